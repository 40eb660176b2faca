"""Training with correlated noise: bitwise resume, the ledger's epsilon, the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.checkpoint import Checkpointer, digest
from dpjax.correlated_noise import CorrelatedNoise
from dpjax.data import ArrayDataset
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.noise import gaussian_noise_like
from dpjax.training import fit, init_state

SIZE = 40
X = np.random.default_rng(0).normal(size=(SIZE, 5)).astype(np.float32)
DATA = ArrayDataset({"x": X})
OPTIMIZER = optax.sgd(1.0)


def linear(params, example):
    """Its gradient is the example, wherever the parameters are."""
    return jnp.vdot(params, example["x"])


def plan(kind, **settings):
    return DPSGD(
        1.0, 0.25, 6, noise_multiplier=0.8, sampling="cyclic", population=SIZE, normalize_by=10.0,
        correlated_noise=CorrelatedNoise(kind, **settings),
    )  # fmt: skip


PLANS = {
    "banded": plan("banded", num_bands=3),
    "blt": plan("blt", num_buffers=2),
    "tree": plan("tree"),
}


@pytest.fixture(params=PLANS)
def mechanism(request):
    return PLANS[request.param]


def trained(state, mechanism, **settings):
    for state, _ in fit(state, mechanism, linear, OPTIMIZER, DATA, **settings):
        pass
    return state


def test_six_iterations_are_three_a_checkpoint_and_three(mechanism, tmp_path):
    start = init_state(mechanism, jnp.zeros(5), OPTIMIZER, jax.random.key(1))
    whole = trained(start, mechanism)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(3, trained(start, mechanism, max_iterations=3), {})
        like = init_state(mechanism, jnp.ones(5), OPTIMIZER, jax.random.key(9))
        restored, _ = checkpointer.restore(like)
    assert int(restored.iteration) == int(restored.opt_state[0].count) == 3
    assert digest(trained(restored, mechanism)) == digest(whole)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run = ledger.start_run(mechanism, SIZE, {})
        again = trained(start, mechanism, ledger=ledger, run=run)
        assert digest(again) == digest(whole)
        assert ledger.epsilon(1e-4) == pytest.approx(mechanism.epsilon(1e-4))


def test_parameters_move_by_clipped_sums_and_the_matrix_noise():
    """Every move against float64: rows of the sampler, clipping by hand, C^-1 times raw draws."""
    mechanism = PLANS["banded"]
    state = init_state(mechanism, jnp.zeros(5), OPTIMIZER, jax.random.key(1))
    key, sampling_key = state.opt_state[0].key, state.sampling_key
    clipped = X / np.maximum(1, np.linalg.norm(X, axis=1, keepdims=True))
    sampler = mechanism.sampler(SIZE, sampling_key)
    draws = [
        gaussian_noise_like(jnp.zeros(5), mechanism.stddev, jax.random.fold_in(key, t))
        for t in range(6)
    ]
    assert mechanism.strategy is not None
    noise = mechanism.strategy.noising_matrix() @ np.array(draws, np.float64)
    params = np.zeros(5)
    for step, (state, _) in enumerate(fit(state, mechanism, linear, OPTIMIZER, DATA)):
        batch = sampler.batch(step)
        rows = batch.indices[~batch.is_padding_example]
        params = params - clipped[rows].sum(axis=0) / 10.0 - noise[step]
        np.testing.assert_allclose(state.params, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PLANS)
def test_running_sums_have_less_noise_than_independent_draws(kind):
    """At one epsilon, over 200 iterations of which an example sees ten."""
    settings = {"num_bands": 20} if kind == "banded" else {}
    shared = {"sampling": "cyclic", "population": 1000, "target_epsilon": 4.0, "target_delta": 1e-5}
    correlated = DPSGD(1.0, 0.05, 200, **shared, correlated_noise=CorrelatedNoise(kind, **settings))
    independent = DPSGD(1.0, 0.05, 200, **shared)
    assert correlated.strategy is not None
    running = np.cumsum(correlated.strategy.noising_matrix(), axis=0)
    error = correlated.stddev**2 * np.mean(np.sum(running**2, axis=1))
    plain = independent.stddev**2 * np.mean(np.arange(1, 201))
    assert error < 0.5 * plain
