"""Distributed privacy: grid, rotation, modular sums, noise of the survivors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import linalg

import dpjax
from dpjax import DpjaxError
from dpjax.federated import (
    Aggregate,
    Clients,
    DistributedPrivacy,
    distributed,
    fed_avg,
    init_federated,
    local_dp_event,
    run_round,
    scaffold,
)
from dpjax.federated.distributed_privacy import hadamard, on_grid

SIZE = 50
START = {"w": jnp.zeros((7, 7)), "b": jnp.zeros(())}


def mechanism_of(**changes):
    settings = {
        "l2_clip_norm": 1.0,
        "noise_multiplier": 0.5,
        "num_clients": 4,
        "dimension": SIZE,
        "min_survivors": 2,
        "scale": 500.0,
        "bits": 18,
    }
    return DistributedPrivacy(**{**settings, **changes})


def loss_fn(params, example):
    """One step of SGD with rate 1 moves the parameters by the example's numbers."""
    return -jnp.sum(params["w"] * example["x"]) - params["b"] * example["y"]


INNER = fed_avg(loss_fn, optax.sgd(1.0))
ALGORITHM = distributed(INNER, mechanism_of(), jax.random.key(1))  # compiled once for most tests


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7, 7)).astype(np.float32) * 0.1
    x[2] *= 50  # far beyond the clip norm
    y = rng.normal(size=5).astype(np.float32) * 0.1
    return Clients({"x": x, "y": y}, tuple(np.arange(5)[:, None]), tuple("abcde"))


def vectors(people):
    """float64[5, 50]: what each client sends, clipped; leaves in the order of their names."""
    x = np.asarray(people.examples["x"], np.float64).reshape(5, -1)
    rows = np.concatenate([np.asarray(people.examples["y"], np.float64)[:, None], x], 1)
    return rows * np.minimum(1, 1 / np.linalg.norm(rows, axis=1))[:, None]


def flat(params):
    return np.concatenate([np.ravel(np.asarray(params[k], np.float64)) for k in ("b", "w")])


def round_of(algorithm, people, chosen, key=5, state=None, **options):
    state = init_federated(algorithm, START, len(people)) if state is None else state
    cohort = people.cohort(chosen, jax.random.key(0), batch_size=1)
    return run_round(algorithm, state, cohort, jax.random.key(key), engine="jit", **options)


def test_the_transform_is_scipys():
    x = np.random.default_rng(0).normal(size=16)
    expected = linalg.hadamard(16) @ x / 4
    np.testing.assert_allclose(
        hadamard(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
def test_the_mean_of_clipped_updates_and_its_noise(people, noise):
    """Over rounds: unbiased, with the noise of those who came. Rejects 2/3 and 3/2 of it."""
    mechanism = mechanism_of(noise=noise)
    algorithm = ALGORITHM
    if noise != mechanism_of().noise:
        algorithm = distributed(INNER, mechanism, jax.random.key(1))
    for chosen in ([0, 1, 2, 3], [2, 4, 1]):
        found = []
        state = init_federated(algorithm, START, 5)
        for number in range(24):
            after, info = round_of(algorithm, people, chosen, number, state)
            found.append(flat(after.params) - flat(state.params))
            state = after
        errors = np.array(found) - vectors(people)[chosen].mean(0)
        n = len(chosen)
        # Rounding adds at most 1/4 on the grid; noise is spread by the rotation, not changed.
        stddev = math.sqrt(n * mechanism.local_variance) / mechanism.scale / n
        assert abs(errors.std() / stddev - 1) < 0.1
        assert abs(errors.mean(0)).max() < 5 * stddev / math.sqrt(24)
        assert info.sensitive_metrics == {} and int(state.server.round) == 24


def test_the_modular_sum_equals_integers(people):
    """What run_round hands to the server, with and without chunks, is numpy's sum modulo 2^32."""
    algorithm = ALGORITHM
    sent, totals = [], []

    def local_update(server, client, data, key):
        result = algorithm.local_update(server, client, data, key)
        jax.debug.callback(lambda x: sent.append(np.asarray(x, np.int64)), result.update)
        return result

    def server_update(server, aggregate):
        jax.debug.callback(lambda x: totals.append(np.asarray(x, np.int64)), aggregate.update)
        return algorithm.server_update(server, aggregate)

    spied = algorithm._replace(local_update=local_update, server_update=server_update)
    round_of(spied, people, [0, 1, 2, 3])
    jax.effects_barrier()
    assert len(sent) == 4 and len(totals) == 1
    assert all(x.min() >= 0 and x.max() < 2**18 and x.shape == (64,) for x in sent)
    np.testing.assert_array_equal(totals[0], np.sum(sent, 0) % 2**32)
    # Noise of several clients on integers: no two of them sent the same.
    assert len({x.tobytes() for x in sent}) == 4


@pytest.mark.parametrize("beta, rotate", [(math.exp(-0.5), True), (0.0, True), (0.8, False)])
def test_rounded_norms_never_exceed_the_bound(beta, rotate):
    """Random and adversarial updates: huge, tiny, on half grid points, on one coordinate."""
    mechanism = mechanism_of(beta=beta, rotate=rotate, scale=6.0, dimension=64, bits=16)
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=64) * s for s in (1e-3, 0.1, 1.0, 1e6, 1e15) for _ in range(40)]
    rows += [np.full(64, v) for v in (1 / 8, 1 / 12, 0.5 / 6.0, 1e20, np.nan, np.inf)]
    rows += [np.eye(64)[k] * 2 for k in range(20)]
    signs = jnp.asarray(rng.choice([-1.0, 1.0], 64), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(rows))
    rows = jnp.asarray(np.array(rows), jnp.float32)
    run = jax.jit(jax.vmap(lambda x, k: on_grid(x, mechanism, signs, k)))
    found = np.asarray(run(rows, keys), np.float64)
    norms = np.linalg.norm(found, axis=1)
    assert norms.max() <= mechanism.rounded_l2_norm
    assert np.abs(found).sum(1).max() <= mechanism.rounded_l1_norm
    # The bound is not idle: a looser rounding than this would break it.
    assert norms.max() > 0.75 * mechanism.rounded_l2_norm or beta == 0
    if beta == 0:
        assert mechanism.rounded_l2_norm == pytest.approx(6.0 + 8.0)
    else:
        extra = math.sqrt(2 * math.log(1 / beta)) * (6 + 4)
        assert mechanism.rounded_l2_norm == pytest.approx(math.sqrt(36 + 16 + extra))


def test_rounding_is_unbiased():
    mechanism = mechanism_of(scale=3.0, dimension=64, bits=16, rotate=False)
    x = np.random.default_rng(1).normal(size=64)
    x *= 0.9 / np.linalg.norm(x)
    run = jax.jit(
        jax.vmap(lambda k: on_grid(jnp.asarray(x, jnp.float32), mechanism, jnp.ones(64), k))
    )
    found = np.asarray(run(jax.random.split(jax.random.key(0), 4000)), np.float64)
    errors = found.mean(0) / 3.0 - x
    # Of each coordinate: stddev at most 1/2 on the grid; the condition hardly ever bites.
    assert np.abs(errors).max() < 4.5 * 0.5 / 3.0 / math.sqrt(4000) + 2e-3
    assert len(np.unique(found[:, 0])) == 2


def test_a_client_that_is_not_finite_sends_noise(people):
    ends = []
    for value in (np.nan, 0.0):
        x = people.examples["x"].copy()
        y = people.examples["y"].copy()
        x[1], y[1] = value, value
        some = dataclasses.replace(people, examples={"x": x, "y": y})
        state, info = round_of(ALGORITHM, some, [0, 1, 3])
        assert int(info.sensitive_num_rejected) == 0
        ends.append(flat(state.params))
    np.testing.assert_array_equal(*ends)


def test_too_few_survivors_release_nothing(people):
    """And accounting takes the noise of the fewest that may be left, not of all."""
    mechanism = mechanism_of()
    server = ALGORITHM.init(START)[0]
    total = jnp.full(64, 2000, jnp.uint32)
    for count in range(1, 6):  # below min_survivors is 1, and 5 are more than fit the bits
        sent = Aggregate(total, jnp.float32(count), jnp.int32(count))
        after = ALGORITHM.server_update(server, sent)
        assert int(after.round) == 1
        moved = np.abs(flat(after.params)).max()
        assert (moved > 0) == (2 <= count <= 4)
    for noise in ("skellam", "discrete_gaussian"):
        all_stay, half, one = (
            mechanism_of(noise=noise, min_survivors=n).epsilon(1e-5, 1) for n in (4, 2, 1)
        )
        assert all_stay < half < one
    # Half the survivors are half the variance: as if everybody had added less.
    less = mechanism_of(min_survivors=4, noise_multiplier=0.5 / math.sqrt(2))
    assert mechanism.epsilon(1e-5, 3) == pytest.approx(less.epsilon(1e-5, 3), rel=1e-6)
    # On a fine grid the cost is that of a Gaussian with the same noise multiplier.
    fine = mechanism_of(scale=5e3, bits=32, noise_multiplier=4.0, min_survivors=4)
    gaussian = dpjax.epsilon(local_dp_event(4.0, 3), 1e-5)
    assert gaussian * (1 - 1e-3) < fine.epsilon(1e-5, 3) < gaussian * 1.02


def test_sums_wrap_no_more_often_than_stated(people):
    """The bound holds for all-alike updates, the worst case, under many signs."""
    mechanism = mechanism_of(num_clients=200, min_survivors=200, dimension=64, bits=20)
    assert mechanism.largest_sum < 2**19
    rng = np.random.default_rng(0)
    matrix = linalg.hadamard(64) / 8
    worst = 0.0
    for _ in range(300):
        signs = rng.choice([-1.0, 1.0], 64)
        direction = rng.normal(size=64)
        direction = direction / np.linalg.norm(direction)
        signal = 200 * 500.0 * matrix @ (signs * direction)
        noise = rng.normal(size=64) * math.sqrt(200 * mechanism.local_variance)
        worst = max(worst, np.abs(signal + noise).max() + 200)
    assert 0.3 * mechanism.largest_sum < worst < mechanism.largest_sum
    flat_one = dataclasses.replace(mechanism, rotate=False)
    assert flat_one.largest_sum > 200 * 500.0  # without the rotation nothing spreads a spike
    with pytest.raises(DpjaxError, match="bits is 16, but a sum of 200 clients needs 1[78]"):
        dataclasses.replace(mechanism, bits=16)


def test_hardened_noise_is_drawn_afresh_for_each_client(people):
    """From the system: the same keys twice give other noise, also for clients side by side."""
    mechanism = mechanism_of(noise="discrete_gaussian", noise_multiplier=2.0)
    algorithm = distributed(INNER, mechanism, jax.random.key(1), hardened=True)
    expected = vectors(people)[[0, 1, 2, 3]].mean(0)
    stddev = 2.0 * mechanism.rounded_l2_norm / mechanism.scale / 4
    errors = []
    for at_once in (1, 1, 4):
        state, _ = round_of(algorithm, people, [0, 1, 2, 3], clients_per_step=at_once)
        errors.append(flat(state.params) - expected)
    assert len({e.tobytes() for e in errors}) == 3
    # Four clients that share one draw would have twice this.
    for error in errors:
        assert abs(error.std() / stddev - 1) < 0.35


def test_algorithms_with_other_updates(people):
    inner = scaffold(loss_fn, 1.0, 5)
    like = {"params": START, "control": START}
    mechanism = mechanism_of(dimension=2 * SIZE)
    algorithm = distributed(inner, mechanism, jax.random.key(1), update_like=like)
    state, _ = round_of(algorithm, people, [0, 1, 2])
    assert np.abs(flat(state.server.inner.control)).max() > 0
    with pytest.raises(DpjaxError, match="an update has 100 numbers"):
        round_of(distributed(inner, mechanism_of(), jax.random.key(1)), people, [0])


def test_what_is_refused():
    key = jax.random.key(0)
    with pytest.raises(DpjaxError, match="own normalize_by or combine"):
        distributed(INNER._replace(normalize_by=1.0), mechanism_of(), key)
    with pytest.raises(DpjaxError, match="hardened is True with skellam"):
        distributed(INNER, mechanism_of(), key, hardened=True)
    for words, changes in {
        "min_survivors is 5": {"min_survivors": 5},
        "beta 0.95": {"beta": 0.95},
        "beyond 262144": {"scale": 3e5, "bits": 32},
        "noise_multiplier is 0": {"noise_multiplier": 0.0},
        "variance on the integer grid": {"noise_multiplier": 1e-6},
        "from 0.25 on": {"noise_multiplier": 1e-3, "noise": "discrete_gaussian"},
        "overflow_probability is 2": {"overflow_probability": 2},
    }.items():
        with pytest.raises(DpjaxError, match=words):
            mechanism_of(**changes)
    with pytest.raises(DpjaxError, match="participations is -1"):
        mechanism_of().epsilon(1e-5, -1)
    assert mechanism_of().epsilon(1e-5, 0) == 0.0
