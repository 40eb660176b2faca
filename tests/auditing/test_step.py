"""The audit of a step: classic bugs are found, the sound step is not accused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing.step import SCENARIOS, audit_step, own_step
from dpjax.clipping import clipped_grad
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.sampling import PoissonSampler
from dpjax.types import Batch

CLIP, NORMALIZER, NOISE = 2.0, 4.0, 1.0
MECHANISM = DPSGD(CLIP, 0.25, 4, noise_multiplier=NOISE, normalize_by=NORMALIZER)
RUNS = 4000
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def scale(x, factor):
    return x * factor.astype(x.dtype)


def norm(grads):
    return jnp.sqrt(sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(grads)))


def bf16_norm(grads):
    """Squares are summed in bfloat16, entry by entry, array by array."""

    def narrow(x):
        return jax.lax.reduce_precision(x, 8, 7)

    def add(total, x):
        return narrow(total + narrow(x)), None

    total = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(grads):
        within, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), x.reshape(-1) ** 2)
        total = narrow(total + within)
    return jnp.sqrt(total)


def step(bug):
    """A DP step of its own, with one bug or none."""

    def per_example(loss_fn, params, batch):
        return jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)

    def clipped_sum(loss_fn, params, batch, mask):
        grads = per_example(loss_fn, params, batch)
        if bug == "per-token clipping":
            tokens = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), batch)
            count = jax.tree.leaves(batch)[0].shape[1]
            grads = per_example(loss_fn, params, tokens)
            mask = jnp.repeat(mask, count)
        if bug == "mean before noise":
            grads = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), grads)
            mask = mask[:1] & False
        norms = jax.vmap(bf16_norm if bug == "norm in bf16" else norm)(grads)
        factors = jnp.minimum(1.0, CLIP / jnp.maximum(norms, 1e-12))
        if bug == "no clip":
            factors = jnp.ones_like(factors)
        if bug != "missing padding mask":
            factors = jnp.where(mask, 0.0, factors)
        return jax.tree.map(lambda x: jnp.tensordot(factors, x, 1), grads)

    def iteration(loss_fn, params, batch, mask, key):
        total = clipped_sum(loss_fn, params, batch, mask)
        stddev = NOISE * CLIP / NORMALIZER
        if bug == "noise / 10":
            stddev /= 10
        divisor = jnp.float32(NORMALIZER)
        if bug == "realised batch as normaliser":
            divisor = jnp.maximum(jnp.sum(~mask), 1).astype(jnp.float32)
        if bug == "mean before noise":
            divisor = jnp.float32(1.0)
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        if bug == "one key for all arrays":
            keys = jnp.broadcast_to(keys[:1], keys.shape)
        shapes = [() if bug == "one draw for an array" else x.shape for x in leaves]
        noisy = [
            x / divisor + stddev * jax.random.normal(k, shape)
            for x, k, shape in zip(leaves, keys, shapes, strict=True)
        ]
        if bug == "noise on one shard only":
            noisy = [noisy[0], *(x / divisor for x in leaves[1:])]
        return jax.tree.unflatten(structure, noisy)

    def run(loss_fn, params, batches, masks, key):
        count = masks.shape[0]
        keys = jax.random.split(key, count)
        if bug == "key reused":
            keys = jnp.broadcast_to(keys[:1], keys.shape)
        released = [
            iteration(
                loss_fn, params, jax.tree.map(lambda x, i=i: x[i], batches), masks[i], keys[i]
            )
            for i in range(count)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *released)

    return run


BUGS = {
    "noise / 10": "alone",
    "no clip": "alone",
    "mean before noise": "alone",
    "noise on one shard only": "last coordinate",
    "norm in bf16": "many entries",
    "key reused": "alternating",
    "one key for all arrays": "noise in common",
    "one draw for an array": "noise in common",
    "missing padding mask": "copies in the padding",
    "per-token clipping": "many tokens",
    "realised batch as normaliser": "against the crowd",
}


@pytest.mark.parametrize(("bug", "scenario"), BUGS.items(), ids=BUGS)
def test_bug_is_found_where_it_shows(bug, scenario):
    audit = audit_step(
        step(bug), MECHANISM, jax.random.key(1), num_runs=RUNS, scenarios=[BY_NAME[scenario]]
    )
    assert audit.verdict == "FALSIFIED"


@pytest.mark.slow
def test_bf16_norm_over_many_arrays():
    scenario = [BY_NAME["many arrays"]]
    settings = {"num_runs": 16000, "scenarios": scenario}
    audit = audit_step(step("norm in bf16"), MECHANISM, jax.random.key(1), **settings)
    assert audit.verdict == "FALSIFIED"
    assert audit_step(own_step(MECHANISM), MECHANISM, jax.random.key(1), **settings).verdict != (
        audit.verdict
    )


@dataclasses.dataclass(frozen=True)
class InOrder(PoissonSampler):
    """Batches in the order of the data set, each example once in an epoch."""

    def batch(self, iteration):
        indices = np.arange(4, dtype=np.int32) + 4 * iteration
        inside = indices < self.population
        return Batch(np.where(inside, indices, 0).astype(np.int32), ~inside)


def test_another_sampler_than_the_accountants_is_found():
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=0.7)

    def make_sampler(population, key):
        return InOrder(population, key, sampling_probability=0.25)

    def found(**settings):
        return audit_step(
            own_step(mechanism),
            mechanism,
            jax.random.key(2),
            num_runs=16000,
            scenarios=[BY_NAME["sampled"]],
            **settings,
        ).results[0]

    assert found(make_sampler=make_sampler).refuted
    sound = found()
    assert not sound.refuted and sound.statistic
    assert sound.bound.epsilon_lower <= sound.claimed_epsilon


@pytest.mark.parametrize("which", ["ours", "written here"])
def test_sound_step_is_not_accused(which):
    """All scenarios but the one over many arrays, which takes long to compile."""
    run = own_step(MECHANISM) if which == "ours" else step(None)
    scenarios = [s for s in SCENARIOS if s.name != "many arrays"]
    audit = audit_step(run, MECHANISM, jax.random.key(3), num_runs=RUNS, scenarios=scenarios)
    assert audit.verdict == "not falsified", [r for r in audit.results if r.refuted]
    for result in audit.results:
        assert result.bound.epsilon_lower <= result.claimed_epsilon
        assert result.bound.ceiling > result.bound.epsilon_lower
    by_name = {r.scenario.name: r for r in audit.results}
    # It sees something: without noise's protection these would be zero.
    assert by_name["alone"].bound.epsilon_lower > 0.8
    assert 1.1 < by_name["alone"].detectable < 1.5


def test_power_is_as_stated():
    """A step with the noise that `detectable` names is found in about nine of ten audits."""
    scenario = [BY_NAME["alone"]]
    result = audit_step(
        step(None), MECHANISM, jax.random.key(0), num_runs=400, scenarios=scenario
    ).results[0]
    claim = dataclasses.replace(MECHANISM, noise_multiplier=NOISE * result.detectable)
    found = sum(
        audit_step(step(None), claim, jax.random.key(seed), num_runs=400, scenarios=scenario)
        .results[0]
        .refuted
        for seed in range(20)
    )
    assert found >= 12


@pytest.mark.slow
def test_a_sound_step_is_accused_no_more_often_than_stated():
    """200 audits at 80% confidence, with the same claims as the noise: at most 20% and chance."""
    accused = sum(
        audit_step(
            step(None),
            MECHANISM,
            jax.random.key(seed),
            num_runs=100,
            confidence=0.8,
            scenarios=SCENARIOS[:3],
        ).verdict
        == "FALSIFIED"
        for seed in range(200)
    )
    assert accused <= 40 + 3 * 32**0.5


def test_steps_that_vmap_does_not_go_through():
    run = step("noise / 10")

    def eager(loss_fn, params, batches, mask, key):
        assert isinstance(float(jax.random.uniform(key)), float)  # fails under a tracer
        return run(loss_fn, params, batches, mask, key)

    settings = {"num_runs": 40, "scenarios": SCENARIOS[:1]}
    audit = audit_step(eager, MECHANISM, jax.random.key(0), vectorise=False, **settings)
    assert audit.verdict == "FALSIFIED"


def test_replace_one_moves_twice_as_far():
    """The canary is replaced by its opposite: the whole sensitivity of that relation is used."""
    mechanism = DPSGD(
        CLIP,
        0.25,
        4,
        noise_multiplier=NOISE,
        normalize_by=4.0,
        sampling="fixed_size",
        population=16,
    )
    settings = {"num_runs": 2000, "scenarios": SCENARIOS[:1]}
    sound = audit_step(own_step(mechanism), mechanism, jax.random.key(0), **settings)
    assert sound.verdict == "not falsified" and sound.results[0].bound.epsilon_lower > 0.5
    # `step` has noise for add-or-remove: half of what replace-one needs.
    wrong = audit_step(step(None), mechanism, jax.random.key(0), **settings)
    assert wrong.verdict == "FALSIFIED"


def test_nan_releases_are_an_outcome():
    """A step that returns NaN when the canary is there gives it away."""

    def run(loss_fn, params, batches, mask, key):
        grad_fn = clipped_grad(loss_fn, CLIP, normalize_by=NORMALIZER)
        total, info = grad_fn(params, jax.tree.map(lambda x: x[0], batches), mask[0])
        nan = jnp.where(jnp.max(info.sensitive_norms) > 10, jnp.nan, 0.0)
        noise = jax.random.normal(key, total[0].shape)
        return [(x + noise[: x.shape[0]] + nan)[None] for x in total]

    audit = audit_step(run, MECHANISM, jax.random.key(0), num_runs=400, scenarios=SCENARIOS[:1])
    assert audit.verdict == "FALSIFIED"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_runs": 3}, "num_runs is 3"),
        ({"scenarios": ()}, "scenarios is empty"),
        ({"confidence": 95}, "confidence is 95"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(DpjaxError, match=words):
        audit_step(own_step(MECHANISM), MECHANISM, jax.random.key(0), **settings)


def test_no_noise_has_no_claim():
    mechanism = DPSGD(1.0, 0.5, 1, noise_multiplier=0.0)
    with pytest.raises(DpjaxError, match="no claim"):
        audit_step(own_step(mechanism), mechanism, jax.random.key(0))
