"""User-level privacy: what the server learns of a round is one noisy sum of clipped updates."""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpjax import accounting
from dpjax.adaptive import moved_by_count
from dpjax.clipping.norms import leaf_paths, squared_norms
from dpjax.clipping.rules import ClipRule
from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm, LocalResult
from dpjax.federated.clients import Clients
from dpjax.federated.round import FederatedState
from dpjax.mechanism import DPSGD
from dpjax.noise import NoiseState
from dpjax.types import PyTree, RandomKey, require_key

# Sets the noise apart from every key that a round makes of the same key: it folds in its number.
_NOISE_STREAM = 2**31 - 2


class PrivateServer(NamedTuple):
    """The inner algorithm's server state and the noise. Secret: it holds the noise key."""

    inner: Any  # has ``params``
    noise: NoiseState
    # float32, the clip norm as a multiple of the mechanism's: 1 unless it adapts
    relative_clip_norm: Float[Array, ""]

    @property
    def params(self) -> PyTree:
        """The shared parameters."""
        return self.inner.params


class SentUpdate(NamedTuple):
    """What one client sends in a private round."""

    update: PyTree  # float32, clipped as a whole
    uncut: Any  # float32, 1/2 if it was within the clip norm, else -1/2; () unless that adapts


def private(algorithm: Algorithm, mechanism: DPSGD, key: RandomKey) -> Algorithm:
    """The same algorithm with differential privacy for users: clip, sum, add Gaussian noise once.

    Every client clips all that it sends, as one vector, to ``mechanism.l2_clip_norm``. All clients
    weigh alike, whatever weights the inner algorithm has. The server divides the sum by the public
    ``mechanism.normalize_by``, adds the mechanism's noise, and hands the result to the inner
    ``server_update`` with public constants in place of the realised weight and cohort.

    Args:
      algorithm: e.g. `fed_avg` or `scaffold`.
      mechanism: read "example" as "client": ``population`` is the number of all clients,
        ``sampling_probability`` the expected cohort over it. ``normalize_by`` should be the
        expected cohort: its default of 1 is legal, and makes the server's step that of a sum.
      key: JAX random key of the noise; secret, as for `dpjax.init_state`.

    Returns:
      An `Algorithm` whose server state is `PrivateServer`. Draw cohorts by `sample_cohort` with the
      same mechanism: its epsilon holds for no others.

    Raises:
      DpjaxError: a mechanism without a population; an inner algorithm that is private already, has
        its own ``combine``, or sends integers.

    Guarantee:
      The server states of all rounds together satisfy ``mechanism.epsilon(delta, iterations=
      rounds)`` for users, under ``mechanism.relation``; a user is all examples of one client. One
      client moves the sum by at most l2_clip_norm / normalize_by in L2 (twice that if replaced), up
      to float32 rounding, whatever it sends: norms are float32 also for bfloat16 parameters, and an
      update that is not finite, or whose norm overflows, counts as its absence. An empty cohort is
      a round like any other: it releases noise. Noise is added once to the sum, not once on each
      device. Not covered: what a client itself keeps between rounds (control variates, personal
      parameters) is made of its own data and never released here; and the ``sensitive_`` fields of
      `RoundInfo`. Somebody who sees single updates learns them: the server is trusted here.

    Source: McMahan et al. (2018), *Learning differentially private recurrent language models*,
      algorithm 1 (flat clipping, fixed denominator); Andrew et al. (2021) for adaptive clipping.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg, init_federated, run_round
      >>> people = Clients({"x": np.float32([5, 7, 9])}, ([0], [1], [2]), ("a", "b", "c"))
      >>> mechanism = DPSGD(1.0, 1.0, 10, noise_multiplier=0.1, population=3, normalize_by=3.0)
      >>> inner = fed_avg(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5))
      >>> algorithm = private(inner, mechanism, jax.random.key(0))
      >>> state = init_federated(algorithm, jnp.zeros(()), len(people))
      >>> for number in range(3):
      ...     chosen = sample_cohort(mechanism, people, number, jax.random.key(1))
      ...     cohort = people.cohort(chosen, jax.random.key(2), batch_size=None)
      ...     state, info = run_round(algorithm, state, cohort, jax.random.key(3), engine="jit")
      >>> bool(abs(state.params - 3.0) < 0.3), int(state.server.noise.count)
      (True, 3)
    """
    key = jax.random.fold_in(require_key(key), _NOISE_STREAM)
    if mechanism.population is None:
        raise DpjaxError(
            "population is None; a private round needs the expected cohort: build the mechanism "
            "with population=len(clients)"
        )
    if algorithm.normalize_by is not None or algorithm.combine is not None:
        has = "combine" if algorithm.normalize_by is None else "normalize_by"
        raise DpjaxError(
            f"{algorithm.name} has its own {has}; make the plain algorithm private, once: the "
            "sensitivity of anything but the plain sum is another one"
        )
    rule = mechanism.clipped_grad(lambda params, example: params).rule
    adaptive = mechanism.adaptive_clipping
    # One client at the least: algorithms divide by it.
    expected_cohort = max(1, round(mechanism.expected_batch_size))

    def init(params):
        server, client = algorithm.init(params)
        noise: Any = mechanism.privatizer(key).init(params)
        return PrivateServer(server, noise, jnp.ones((), jnp.float32)), client

    def local_update(server, client, data, key):
        result = algorithm.local_update(server.inner, client, data, key)
        relative = None if adaptive is None else server.relative_clip_norm
        clipped, norm = clip_update(result.update, rule, relative)
        uncut = ()
        if relative is not None:
            uncut = jnp.where(norm <= relative * mechanism.l2_clip_norm, 0.5, -0.5)
        one = jnp.ones((), jnp.float32)
        return LocalResult(SentUpdate(clipped, uncut), one, result.client, result.metrics)

    def server_update(server, aggregate):
        mean, uncut = aggregate.update
        like, found = jax.tree.structure(server.params), jax.tree.structure(mean)
        if like != found and not isinstance(server.noise, NoiseState):
            raise DpjaxError(
                f"correlated_noise keeps its past in the parameters' structure, {like}, but the "
                f"update has {found}; use independent noise, or an algorithm that sends changes of "
                "the parameters only"
            )
        privatizer = mechanism.privatizer(server.noise.key)
        noisy, noise = cast(Any, privatizer.update(mean, server.noise))
        relative = server.relative_clip_norm
        if adaptive is not None:
            noisy = jax.tree.map(lambda x: x * relative, noisy)
            relative = moved_by_count(
                adaptive,
                relative,
                uncut * mechanism.normalize_by,
                expected_batch_size=mechanism.expected_batch_size,
                stddev=mechanism.count_stddev,
                key=server.noise.key,
                release=server.noise.count,
            )
        weight = jnp.asarray(mechanism.normalize_by, jnp.float32)
        public = Aggregate(noisy, weight, jnp.asarray(expected_cohort, jnp.int32))
        return PrivateServer(algorithm.server_update(server.inner, public), noise, relative)

    name = f"private {algorithm.name}"
    return Algorithm(name, init, local_update, server_update, normalize_by=mechanism.normalize_by)


def clip_update(
    update: PyTree, rule: ClipRule, relative_clip_norm: Float[Array, ""] | None = None
) -> tuple[PyTree, Float[Array, ""]]:
    """One client's whole update within a clip norm, in float32, and its norm before.

    Args:
      update: pytree of float arrays, of any width.
      rule: from `dpjax.clipping.rules.clip_rule`.
      relative_clip_norm: r clips to r times the norm and divides by r: the bound stays.

    Guarantee:
      The result's L2 norm is at most ``rule.bound`` up to float32 rounding. Where the norm is not
      finite, every number of the result is NaN, so that a round leaves the client out.

    Example:
      >>> clipped, norm = clip_update({"w": jnp.array([30.0, 40.0])}, ClipRule(5.0))
      >>> clipped["w"].tolist(), float(norm)
      ([3.0, 4.0], 50.0)
    """
    leaves, structure = jax.tree.flatten(update)
    for path, leaf in zip(leaf_paths(update), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise DpjaxError(
                f"the update's leaf {path!r} is {leaf.dtype}; only floats can be clipped: encode "
                "after clipping, not before"
            )
    rows = [jnp.asarray(x, jnp.float32)[None] for x in leaves]
    factors, norms, is_unclean = rule.factors(
        [squared_norms(x) for x in rows], leaf_paths(update), None, relative_clip_norm
    )
    nan = jnp.asarray(jnp.nan, jnp.float32)
    clipped = [
        jnp.where(is_unclean[0], nan, x[0] * f[0]) for x, f in zip(rows, factors, strict=True)
    ]
    return jax.tree.unflatten(structure, clipped), norms[0]


def sample_cohort(
    mechanism: DPSGD, clients: Clients, round_number: int, key: RandomKey
) -> np.ndarray:
    """The clients of one round, drawn as the mechanism's accountant assumes: int32[cohort].

    Args:
      mechanism: as given to `private`.
      clients: all clients; the mechanism's population.
      round_number: from 0; the same number gives the same clients, so a resume needs nothing more.
      key: JAX random key of the sampling; secret, since amplification assumes that nobody knows
        who took part. Another one than the noise has.

    Raises:
      DpjaxError: another population than accounted for, or a round beyond the planned ones.

    Example:
      >>> people = Clients({"x": np.arange(9)}, tuple(np.arange(9)[:, None]), tuple("abcdefghi"))
      >>> mechanism = DPSGD(1.0, 0.5, 10, noise_multiplier=1.0, population=9)
      >>> 1 < len(sample_cohort(mechanism, people, 0, jax.random.key(0))) < 9
      True
    """
    if not 0 <= round_number < mechanism.iterations:
        raise DpjaxError(
            f"round_number is {round_number}, but the mechanism accounts for rounds 0 to "
            f"{mechanism.iterations - 1}; build it with more iterations"
        )
    batch = mechanism.sampler(len(clients), key).batch(int(round_number))
    return batch.indices[~batch.is_padding_example]


def check_private_state(mechanism: DPSGD, state: FederatedState, clients: Clients) -> None:
    """Refuses to go on with a state that this mechanism's epsilon does not describe.

    Raises:
      DpjaxError: a state that is not private, other clients, rounds without noise, rounds beyond
        the planned ones, or a clip norm that moved though it is fixed.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg, init_federated
      >>> people = Clients({"x": np.arange(2)}, ([0], [1]), ("ann", "bob"))
      >>> mechanism = DPSGD(1.0, 0.5, 10, noise_multiplier=1.0, population=2)
      >>> state = init_federated(fed_avg(lambda w, e: w, optax.sgd(1.0)), jnp.zeros(()), 2)
      >>> check_private_state(mechanism, state, people)
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: the state's server is a ServerState, not a PrivateServer; make it \
with init_federated(private(...))
    """
    server = state.server
    if not isinstance(server, PrivateServer):
        raise DpjaxError(
            f"the state's server is a {type(server).__name__}, not a PrivateServer; make it with "
            "init_federated(private(...))"
        )
    kept = {len(x) for x in jax.tree.leaves(state.clients)} or {len(clients)}
    if kept != {len(clients)} or mechanism.population != len(clients):
        raise DpjaxError(
            f"there are {len(clients)} clients, the state has {sorted(kept)[0]} and the mechanism "
            f"accounts for {mechanism.population}; they must agree"
        )
    rounds, draws = int(state.round), int(server.noise.count)
    if rounds != draws or rounds > mechanism.iterations:
        raise DpjaxError(
            f"the state has run {rounds} rounds with {draws} draws of noise, of "
            f"{mechanism.iterations} rounds planned; it belongs to another run"
        )
    relative = float(server.relative_clip_norm)
    if mechanism.adaptive_clipping is None and relative != 1.0:
        raise DpjaxError(
            f"relative_clip_norm is {relative:g}, but the mechanism's clip norm is fixed; build it "
            "with the adaptive_clipping of the run"
        )


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A run whose noise stands for a larger cohort's, and what it really guarantees.

    Attributes:
      actual: the mechanism to run: the small cohort, with less noise.
      imagined: the mechanism whose noise per client it imitates.
      delta: at which both are stated, in (0, 1).

    The only public number is `line`, which never shows the one epsilon without the other.
    """

    actual: DPSGD
    imagined: DPSGD
    delta: float

    def line(self, rounds: int | None = None, accountant: accounting.Accountant = "rdp") -> str:
        """Both epsilons after ``rounds`` rounds (default: all planned), in nats."""
        imagined = self.imagined.epsilon(self.delta, accountant, rounds)
        actual = self.actual.epsilon(self.delta, accountant, rounds)
        return (
            f"SIMULATED epsilon {imagined:.4g} "
            f"(cohort {self.imagined.expected_batch_size:,.0f} imagined) | "
            f"actual epsilon {actual:.4g} (cohort {self.actual.expected_batch_size:,.0f}), "
            f"delta {self.delta:g}"
        )


def scaled_to_cohort(
    mechanism: DPSGD, imagined_cohort: int, imagined_population: int, delta: float | None = None
) -> Simulated:
    """Noise of a large cohort, tried out on a small one: the utility is right, the privacy is not.

    The mean of m updates with noise multiplier z has noise z * clip / m. A cohort of c has the same
    noise in its mean with multiplier z * c / m, and much less privacy.

    Args:
      mechanism: the small cohort's, with the noise multiplier (or targets) of the imagined one.
      imagined_cohort: m, larger than the actual one.
      imagined_population: all clients of the imagined run.
      delta: default: the mechanism's target_delta.

    Raises:
      DpjaxError: no delta, or an imagined cohort that is no larger, or exceeds its population.

    Source: McMahan et al. (2018), section 4, which estimates utility so.

    Example:
      >>> mechanism = DPSGD(1.0, 0.1, 100, noise_multiplier=5.0, population=1000)
      >>> print(scaled_to_cohort(mechanism, 1_000, 100_000, delta=1e-6).line())
      SIMULATED epsilon 0.0903 (cohort 1,000 imagined) | actual epsilon 40.26 (cohort 100), \
delta 1e-06
    """
    delta = mechanism.target_delta if delta is None else delta
    if delta is None:
        raise DpjaxError("delta is None, and the mechanism has no target_delta; give it, e.g. 1e-7")
    if mechanism.population is None:
        raise DpjaxError("population is None; build the mechanism with population=len(clients)")
    cohort = mechanism.expected_batch_size
    if not cohort <= imagined_cohort <= imagined_population:
        raise DpjaxError(
            f"imagined_cohort is {imagined_cohort}; it must be between the actual {cohort:g} and "
            f"the imagined population of {imagined_population}"
        )
    by_target = mechanism.target_epsilon is not None
    truncated = mechanism.truncated_batch_size
    if truncated is not None:
        truncated = math.ceil(truncated * imagined_cohort / cohort)
    imagined = dataclasses.replace(
        mechanism,
        population=imagined_population,
        sampling_probability=imagined_cohort / imagined_population,
        truncated_batch_size=truncated,
        noise_multiplier=None if by_target else mechanism.noise_multiplier,
    )
    assert imagined.noise_multiplier is not None
    actual = dataclasses.replace(
        mechanism,
        noise_multiplier=imagined.noise_multiplier * cohort / imagined_cohort,
        target_epsilon=None,
        target_delta=None,
    )
    return Simulated(actual, imagined, delta)
