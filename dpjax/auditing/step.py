"""Audits a DP step as a black box: worst-case batches with and without a canary, many times over.

The step is run on a loss that is linear in the parameters, so that the gradient of an example is
exactly what the auditor chose. Each scenario is a pair of neighbouring batches at which a class of
bugs shows; half of the runs choose what to look at, the other half are the evidence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special, stats

from dpjax import accounting
from dpjax.auditing.results import VERDICTS, EpsilonBound
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.sampling import Sampler
from dpjax.trade_off import GaussianTradeOff, TradeOff, event_trade_off
from dpjax.training import init_state, train_step
from dpjax.types import Batch, LossFn, NeighboringRelation, PyTree, RandomKey, require_key

BATCH = 8
TOKENS = 4
POPULATION = 16
_LARGE = 100.0  # times the clip norm: far beyond it
_CHUNK = 500

Run = Callable[[LossFn, PyTree, PyTree, jax.Array, RandomKey], PyTree]
"""``run(loss_fn, params, batches, is_padding_example, key)``: what T iterations release.

``batches`` has leading axes [T, B], the mask is bool[T, B]. Returns the noisy gradients, a pytree
like ``params`` with leading axis T: under plain SGD with learning rate 1, parameters before minus
after each iteration.
"""


class Scenario(NamedTuple):
    """A pair of neighbouring inputs, and what is known of the release."""

    name: str
    finds: str
    iterations: int = 1
    leaves: tuple[int, int] = (3, 16)  # number of arrays, entries in each
    sampled: bool = False


SCENARIOS = (
    Scenario("alone", "no clipping, an average that is clipped, too little noise"),
    Scenario("first coordinate", "parameters at the front without noise"),
    Scenario("last coordinate", "parameters at the back without noise"),
    Scenario("noise in common", "noise that arrays or entries share"),
    Scenario("against the crowd", "division by the realised batch"),
    Scenario("copies in the padding", "padding that is not masked"),
    Scenario("many tokens", "clipping of tokens in place of examples"),
    Scenario("many entries", "a norm summed in low precision, within arrays", leaves=(1, 2048)),
    Scenario("many arrays", "a norm summed in low precision, over arrays", leaves=(128, 1)),
    Scenario("alternating", "noise that comes again", iterations=2),
    Scenario("sampled", "a sampler that is not the accountant's", iterations=4, sampled=True),
)


@dataclasses.dataclass(frozen=True)
class ScenarioResult:
    """What one scenario showed.

    Attributes:
      bound: lower bound on epsilon at the audit's delta, with its ceiling.
      claimed_epsilon: of the same releases, at the same delta.
      refuted: whether the observed error rates are impossible under the claimed trade-off curve.
      statistic: what was looked at, chosen on the first half of the runs.
      detectable: the smallest factor on the claimed Gaussian-DP mu (1 / noise multiplier) that
        this many runs would have found with probability 0.9; None where the claim is no Gaussian.
    """

    scenario: Scenario
    bound: EpsilonBound
    claimed_epsilon: float
    refuted: bool
    statistic: str
    detectable: float | None


@dataclasses.dataclass(frozen=True)
class StepAudit:
    """All scenarios of one step."""

    results: tuple[ScenarioResult, ...]
    num_runs: int
    confidence: float

    @property
    def verdict(self) -> str:
        """ "FALSIFIED" if any scenario refutes the claim, at ``confidence`` for all together."""
        return VERDICTS[any(r.refuted for r in self.results)]


def own_step(mechanism: DPSGD) -> Run:
    """`dpjax.training.train_step` as a black box for `audit_step`."""
    optimizer = optax.sgd(1.0)

    def run(loss_fn, params, batches, is_padding_example, key):
        def iteration(state, inputs):
            batch, mask = inputs
            after, _ = train_step(
                state, batch, mask, mechanism=mechanism, loss_fn=loss_fn, optimizer=optimizer
            )
            return after, jax.tree.map(jnp.subtract, state.params, after.params)

        state = init_state(mechanism, params, optimizer, key)
        return jax.lax.scan(iteration, state, (batches, is_padding_example))[1]

    return run


def audit_step(
    run: Run,
    mechanism: DPSGD,
    key: RandomKey,
    *,
    delta: float = 1e-5,
    num_runs: int = 8000,
    confidence: float = 0.95,
    scenarios: Sequence[Scenario] = SCENARIOS,
    make_sampler: Callable[[int, RandomKey], Sampler] | None = None,
    vectorise: bool = True,
) -> StepAudit:
    """Tries to refute that a step is as private as its mechanism says.

    Args:
      run: the black box, e.g. `own_step(mechanism)`; see `Run`. Its examples are
        ``{"directions": f32[T, ...]}`` pytrees and its loss is linear; it must treat them like any.
      mechanism: what is claimed: clip norm, normaliser, noise multiplier and, for the scenario
        "sampled", sampling. Its noise must not be 0.
      key: JAX random key.
      delta: at which bounds are stated. The verdict uses the whole trade-off curve.
      num_runs: with the canary, and as many without; half of each choose the test.
      confidence: of the verdict over all scenarios together.
      make_sampler: ``(population, key)`` to the sampler that training really uses (default: the
        mechanism's own).
      vectorise: all runs in one vmap. False calls ``run`` once for each, for steps that vmap does
        not go through.

    Guarantee:
      A step that keeps its claim is called FALSIFIED with probability at most ``1 - confidence``.
      "not falsified" proves nothing: see ``detectable`` for what would have been found.

    Source: Jagielski et al. (2020); Nasr et al. (2023) for gradient canaries; Dong et al. (2022)
      for testing the trade-off curve.

    Example:
      >>> mechanism = DPSGD(1.0, 0.5, 1, noise_multiplier=1.0, normalize_by=8.0)
      >>> audit = audit_step(own_step(mechanism), mechanism, jax.random.key(0), num_runs=200,
      ...                    scenarios=SCENARIOS[:1])
      >>> print(audit.verdict, audit.results[0].bound.epsilon_lower <= 4.4)
      not falsified True
    """
    if not mechanism.is_private:
        raise DpjaxError("noise_multiplier is 0; there is no claim to audit")
    if num_runs < 20:
        raise DpjaxError(f"num_runs is {num_runs}; it must be at least 20, better 8000")
    if not scenarios:
        raise DpjaxError("scenarios is empty; use e.g. SCENARIOS")
    if not 0.5 < confidence < 1:
        raise DpjaxError(f"confidence is {confidence}; it must be in (0.5, 1), e.g. 0.95")
    key = require_key(key)
    significance = (1 - confidence) / len(scenarios)
    results = []
    for number, scenario in enumerate(scenarios):
        scenario_key = jax.random.fold_in(key, number)
        inside, outside = (
            _scores(
                run,
                mechanism,
                scenario,
                present,
                jax.random.fold_in(scenario_key, int(present)),
                num_runs,
                make_sampler or functools.partial(_own_sampler, mechanism),
                vectorise,
            )
            for present in (True, False)
        )
        results.append(_judge(mechanism, scenario, inside, outside, delta, significance))
    return StepAudit(tuple(results), num_runs, confidence)


def _own_sampler(mechanism: DPSGD, population: int, key: RandomKey) -> Sampler:
    fields = {"target_epsilon": None, "target_delta": None, "population": population}
    return dataclasses.replace(mechanism, **fields).sampler(population, key)


def linear_loss(params: PyTree, example: PyTree) -> jax.Array:
    """The sum over tokens of the inner product of parameters and the token's direction."""
    leaves = zip(jax.tree.leaves(example["directions"]), jax.tree.leaves(params), strict=True)
    return functools.reduce(jnp.add, [jnp.sum(d * p[None]) for d, p in leaves])


def _zero_params(scenario: Scenario) -> list[jax.Array]:
    count, size = scenario.leaves
    return [jnp.zeros(size, jnp.float32) for _ in range(count)]


def _unflatten(params: PyTree, rows: np.ndarray) -> PyTree:
    """float32[..., parameters] as a pytree of the parameters' shapes."""
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(rows, ends[:-1], axis=-1)
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(part.reshape(*rows.shape[:-1], *leaf.shape), jnp.float32)
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )


class _Inputs(NamedTuple):
    """Batches as float32[iterations, B, tokens, parameters], masks, and where to look."""

    rows: np.ndarray
    mask: np.ndarray
    direction: np.ndarray  # unit vector
    signs: np.ndarray  # of the canary in each iteration


def _inputs(mechanism: DPSGD, scenario: Scenario, present: bool, size: int) -> _Inputs:
    """One world's batches: row 0 is the canary's, or what stands in its place."""
    clip = float(mechanism.l2_clip_norm)
    count, replaced = scenario.iterations, mechanism.relation is NeighboringRelation.REPLACE_ONE
    rows = np.zeros((count, BATCH, TOKENS, size), np.float32)
    mask = np.zeros((count, BATCH), bool)
    direction, signs = np.zeros(size), np.ones(count)
    direction[:] = size**-0.5
    canary = np.zeros((TOKENS, size))
    canary[0] = _LARGE * clip * direction
    if scenario.name in ("first coordinate", "last coordinate"):
        at = 0 if scenario.name == "first coordinate" else size - 1
        direction = np.eye(size)[at]
        canary[0] = _LARGE * clip * direction
    elif scenario.name == "noise in common":
        # Opposite in neighbouring entries and in two arrays: noise drawn once for several cancels.
        array, entry = np.divmod(np.arange(size), scenario.leaves[1])
        direction = np.select([array == 0, array == 1], [1.0, -1.0]) * (-1.0) ** entry
        direction /= np.linalg.norm(direction)
        canary[0] = _LARGE * clip * direction
    elif scenario.name == "against the crowd":
        # A small batch: what the canary changes in the divisor then weighs most.
        rows[:, 1, 0] = -2 * clip * direction
        mask[:, 2:] = True
    elif scenario.name == "copies in the padding":
        mask[:, BATCH // 2 :] = True
    elif scenario.name == "many tokens":
        canary[:] = clip * direction
    elif scenario.name in ("many entries", "many arrays"):
        # Squares below 2^-8, each of which is lost when bfloat16 adds it to the first.
        direction = np.full(size, 0.0622)
        direction[0] = 1.0
        direction /= np.linalg.norm(direction)
        canary[0] = 4 * clip * direction
    elif scenario.name == "alternating":
        signs[1::2] = -1.0
    standing = canary if present else -canary if replaced else np.zeros_like(canary)
    rows[:, 0] = signs[:, None, None] * standing
    if scenario.name == "copies in the padding":
        rows[:, BATCH // 2 :] = rows[:, :1]
    if not present and not replaced:
        mask[:, 0] = True
    return _Inputs(rows, mask, direction, signs)


def _scores(
    run: Run,
    mechanism: DPSGD,
    scenario: Scenario,
    present: bool,
    key: RandomKey,
    num_runs: int,
    make_sampler: Callable[[int, RandomKey], Sampler],
    vectorise: bool,
) -> dict[str, np.ndarray]:
    """Statistics of every run: name -> float64[num_runs]."""
    params = _zero_params(scenario)
    size = sum(leaf.size for leaf in params)
    inputs = _inputs(mechanism, scenario, present, size)
    towards = _unflatten(params, inputs.direction.astype(np.float32))

    def project(released: PyTree) -> jax.Array:
        dots = [
            jnp.sum((x * d[None]).reshape(x.shape[0], -1), axis=1)
            for x, d in zip(jax.tree.leaves(released), towards, strict=True)
        ]
        return functools.reduce(jnp.add, dots)

    if scenario.sampled:
        num_runs = max(20, num_runs // 8)  # batches are drawn outside of the compiled runs
        examples, batches = _sampled(make_sampler, mechanism, inputs, present, key, num_runs)
        rows = _unflatten(params, examples)

        def one(inputs) -> jax.Array:
            run_key, batch = inputs
            taken = {"directions": jax.tree.map(lambda x: x[batch.indices], rows)}
            return project(run(linear_loss, params, taken, batch.is_padding_example, run_key))
    else:
        taken = {"directions": _unflatten(params, inputs.rows)}
        batches, mask = None, jnp.asarray(inputs.mask)

        def one(inputs) -> jax.Array:
            return project(run(linear_loss, params, taken, mask, inputs[0]))

    each = (jax.random.split(key, num_runs), batches)
    if vectorise:
        # In chunks: a run holds a gradient for each example.
        seen = jax.jit(lambda each: jax.lax.map(one, each, batch_size=_CHUNK))(each)
    else:
        seen = [one(jax.tree.map(lambda x, i=i: x[i], each)) for i in range(num_runs)]
    seen = np.asarray(seen, np.float64)
    # In units of what the claim lets one example move.
    unit = mechanism.clipped_grad(linear_loss).sensitivity("add_or_remove_one")
    steps = seen * inputs.signs[None] / unit
    found = {"sum over iterations": steps.sum(axis=1)}
    if scenario.iterations > 1:
        found["first iteration"] = steps[:, 0]
        found["last iteration"] = steps[:, -1]
        found["largest"] = steps.max(axis=1)
    if scenario.sampled:
        noise = mechanism.stddev / unit
        share = mechanism.sampling_probability
        ratios = np.logaddexp(np.log1p(-share), np.log(share) + (steps - 0.5) / noise**2)
        found["likelihood ratio"] = ratios.sum(axis=1)
    return found


def _sampled(
    make_sampler: Callable[[int, RandomKey], Sampler],
    mechanism: DPSGD,
    inputs: _Inputs,
    present: bool,
    key: RandomKey,
    num_runs: int,
) -> tuple[np.ndarray, Batch]:
    """A data set whose first row is the canary, and the batches that the sampler draws from it.

    Returns:
      Examples, float32[population, tokens, parameters], and a `Batch` of arrays
      [num_runs, iterations, physical].
    """
    count, _, tokens, size = inputs.rows.shape
    replaced = mechanism.relation is NeighboringRelation.REPLACE_ONE
    population = POPULATION + (present and not replaced)
    examples = np.zeros((population, tokens, size), np.float32)
    if present or replaced:
        examples[0] = inputs.rows[0, 0]
    drawn = []
    for i in range(num_runs):
        sampler = make_sampler(population, jax.random.fold_in(key, num_runs + i))
        drawn.append([sampler.batch(iteration) for iteration in range(count)])
    width = max(len(batch.indices) for batches in drawn for batch in batches)
    indices = np.zeros((num_runs, count, width), np.int32)
    mask = np.ones((num_runs, count, width), bool)
    for i, batches in enumerate(drawn):
        for j, batch in enumerate(batches):
            indices[i, j, : len(batch.indices)] = batch.indices
            mask[i, j, : len(batch.indices)] = batch.is_padding_example
    return examples, Batch(indices, mask)


def _judge(
    mechanism: DPSGD,
    scenario: Scenario,
    inside: dict[str, np.ndarray],
    outside: dict[str, np.ndarray],
    delta: float,
    significance: float,
) -> ScenarioResult:
    """Chooses statistic and threshold on one half of the runs, tests on the other."""
    claim, epsilon, mu = _claim(mechanism, scenario, delta)
    half = len(next(iter(inside.values()))) // 2
    most = {"refutes": (-np.inf, "", 1.0, 0.0), "bounds": (-np.inf, "", 1.0, 0.0)}
    for name in inside:
        for sign in (1.0, -1.0):
            a, b = (sign * _finite(world[name][:half]) for world in (inside, outside))
            thresholds = np.unique(
                np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 400), method="lower")
            )
            hits = np.sum(a[None] > thresholds[:, None], axis=1)
            alarms = np.sum(b[None] > thresholds[:, None], axis=1)
            counts = (hits, len(a), alarms, len(b))
            for aim, gain in (
                ("refutes", _excess(claim, *counts, significance)),
                ("bounds", _log_ratio(*counts, delta, significance)),
            ):
                at = int(np.argmax(gain))
                if gain[at] > most[aim][0]:
                    most[aim] = (float(gain[at]), name, sign, float(thresholds[at]))

    def counted(aim: str) -> tuple[np.ndarray, int, np.ndarray, int]:
        _, name, sign, threshold = most[aim]
        a, b = (sign * _finite(world[name][half:]) for world in (inside, outside))
        return np.array([np.sum(a > threshold)]), len(a), np.array([np.sum(b > threshold)]), len(b)

    refuted = bool(_excess(claim, *counted("refutes"), significance)[0] > 0)
    hits, num_in, alarms, num_out = counted("bounds")
    found = _log_ratio(hits, num_in, alarms, num_out, delta, significance)
    ceiling = _log_ratio(np.array([num_in]), num_in, np.array([0]), num_out, delta, significance)
    return ScenarioResult(
        scenario,
        EpsilonBound(
            "trade_off",
            float(found[0]),
            float(ceiling[0]),
            delta,
            1 - significance,
            "chosen on the other half of the runs",
            num_in + num_out,
            num_in + num_out,
            int(hits[0]) + num_out - int(alarms[0]),
        ),
        epsilon,
        refuted,
        most["refutes" if refuted else "bounds"][1],
        None if mu is None else _detectable(mu, num_in, significance),
    )


def _finite(scores: np.ndarray) -> np.ndarray:
    """A release that is not a number is an outcome like any other; here it ranks highest."""
    return np.where(np.isnan(scores), np.inf, scores)


def _claim(
    mechanism: DPSGD, scenario: Scenario, delta: float
) -> tuple[TradeOff, float, float | None]:
    """Trade-off curve, epsilon and Gaussian-DP mu that the mechanism claims for the scenario."""
    if scenario.sampled:
        event = mechanism.dp_event_after(scenario.iterations)
        relation = mechanism.relation
        return (
            event_trade_off(event, relation),
            accounting.epsilon(event, delta, "pld", relation),
            None,
        )
    mu = scenario.iterations**0.5 / mechanism.gradient_noise_multiplier
    return GaussianTradeOff(mu), accounting.gaussian_epsilon(mu, delta), mu


def _rates(hits, num_in, alarms, num_out, significance):
    """Clopper-Pearson: least true-positive and largest false-positive rates."""
    low = np.where(
        hits > 0, stats.beta.ppf(significance / 2, np.maximum(hits, 1), num_in - hits + 1), 0.0
    )
    high = np.where(
        alarms < num_out,
        stats.beta.ppf(1 - significance / 2, alarms + 1, np.maximum(num_out - alarms, 1)),
        1.0,
    )
    return low, high


def _log_ratio(hits, num_in, alarms, num_out, delta, significance) -> np.ndarray:
    """Lower bounds on epsilon, at least 0."""
    low, high = _rates(hits, num_in, alarms, num_out, significance)
    return np.maximum(np.log(np.maximum(low - delta, 1e-300) / high), 0.0)


def _excess(claim: TradeOff, hits, num_in, alarms, num_out, significance) -> np.ndarray:
    """By how much the least true-positive rate passes what the claim allows; above 0 refutes it."""
    low, high = _rates(hits, num_in, alarms, num_out, significance)
    return low - (1 - np.asarray(claim(high)))


@functools.lru_cache(maxsize=64)
def _detectable(mu: float, count: int, significance: float) -> float:
    """Smallest factor on mu that ``count`` runs of each kind find with probability 0.9."""
    claim = GaussianTradeOff(mu)
    thresholds = np.linspace(-4.0, 8.0, 121)

    def found(factor: float) -> bool:
        # Rates that are missed with probability 0.05 each, at the best threshold.
        hits = stats.binom.ppf(0.05, count, special.ndtr(factor * mu - thresholds))
        alarms = stats.binom.ppf(0.95, count, special.ndtr(-thresholds))
        return bool(np.any(_excess(claim, hits, count, alarms, count, significance) > 0))

    low, high = 1.0, 2.0
    while not found(high):
        low, high = high, 2 * high
        if high > 1e3:
            return float("inf")
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high
