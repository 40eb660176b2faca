"""The loop: one compilation, bitwise resume, the ledger first, and the right distribution."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import training
from dpjax.checkpoint import Checkpointer, digest
from dpjax.data import ArrayDataset
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.sampling import ShuffledSampler
from dpjax.training import fit, init_state


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """optax.adam raises a float to an integer count."""


def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"])
    return (hidden @ params["v"] - example["y"]) ** 2


def data_of(size=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return ArrayDataset({"x": x, "y": np.sin(x[:, 0])})


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
    }


MECHANISM = DPSGD(
    0.5, 0.1, 30, noise_multiplier=1.0, normalize_by=20.0, microbatch_size=4, population=200
)
OPTIMIZER = optax.adam(0.01)


def final(state, mechanism=MECHANISM, **settings):
    for state, _ in fit(state, mechanism, loss_fn, OPTIMIZER, data_of(), **settings):
        pass
    return state


def test_one_compilation_for_batches_of_every_size(caplog):
    mechanism = dataclasses.replace(MECHANISM, l2_clip_norm=0.51)  # compiled by no other test
    sizes = set()
    state = init_state(mechanism, start(), OPTIMIZER, jax.random.key(1))
    with jax.log_compiles():
        for state, info in fit(state, mechanism, loss_fn, OPTIMIZER, data_of()):
            sizes.add(int(info.sensitive_num_examples))
    assert len(sizes) > 5
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert sum("_train_step" in message for message in compiled) == 1


@pytest.mark.parametrize("stop", [0, 1, 13, 30])
def test_resume_from_any_checkpoint_is_bitwise(tmp_path, stop):
    state = init_state(MECHANISM, start(), OPTIMIZER, jax.random.key(1))
    expected = digest(final(state))
    with Checkpointer(tmp_path) as checkpointer:
        for state, _ in fit(state, MECHANISM, loss_fn, OPTIMIZER, data_of(), max_iterations=stop):
            pass
        checkpointer.save(stop, state, {})
        like = init_state(MECHANISM, start(5), OPTIMIZER, jax.random.key(9))
        restored, _ = checkpointer.restore(like)
    assert int(restored.iteration) == stop
    assert digest(final(restored)) == expected


def test_keys_matter_and_noise_and_sampling_keys_differ():
    one, two = (init_state(MECHANISM, start(), OPTIMIZER, jax.random.key(k)) for k in (1, 2))
    assert digest(final(one)) != digest(final(two))
    noise, sampling = one.opt_state[0].key, one.sampling_key
    assert not np.array_equal(jax.random.key_data(noise), jax.random.key_data(sampling))


def test_the_release_is_on_disk_before_the_step_is_computed(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    seen = []

    def crash(*args, **kwargs):
        seen.append(path.read_bytes().count(b'"kind":"release"'))
        raise RuntimeError("power cut")

    monkeypatch.setattr(training, "train_step", crash)
    with Ledger.open(path) as ledger:
        run = ledger.start_run(MECHANISM, 200, {})
        state = init_state(MECHANISM, start(), OPTIMIZER, jax.random.key(1))
        with pytest.raises(RuntimeError, match="power cut"):
            next(fit(state, MECHANISM, loss_fn, OPTIMIZER, data_of(), ledger=ledger, run=run))
    assert seen == [1]


def test_without_noise_it_is_plain_training():
    mechanism = DPSGD(float("inf"), 1.0, 12, noise_multiplier=0.0, normalize_by=200.0)
    found = final(init_state(mechanism, start(), OPTIMIZER, jax.random.key(0)), mechanism)
    params, data = start(), data_of().arrays
    opt_state = OPTIMIZER.init(params)
    for _ in range(12):
        grads = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, data)))(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_one_step_has_the_mean_and_spread_of_the_theory():
    """A linear loss has the constant gradient x: the released sum is then known exactly."""
    size, dimension, steps = 400, 30, 150
    x = np.random.default_rng(0).normal(size=(size, dimension)).astype(np.float32)
    data = ArrayDataset({"x": x})
    mechanism = DPSGD(1.0, 0.2, steps, noise_multiplier=2.0, normalize_by=80.0, microbatch_size=32)
    optimizer = optax.sgd(1.0)

    def linear(params, example):
        return jnp.vdot(params, example["x"])

    clipped = x / np.maximum(1, np.linalg.norm(x, axis=1, keepdims=True))
    state = init_state(mechanism, jnp.zeros(dimension), optimizer, jax.random.key(0))
    moves, previous = [], np.zeros(dimension)
    for state, _ in fit(state, mechanism, linear, optimizer, data):
        moves.append(previous - np.asarray(state.params, np.float64))
        previous = np.asarray(state.params, np.float64)
    moves = np.array(moves)
    variance = (0.2 * 0.8 * (clipped**2).sum(0) + 2.0**2) / 80.0**2
    ratio = (moves - 0.2 * clipped.sum(0) / 80.0) / np.sqrt(variance)
    assert abs(ratio.mean()) < 5 / np.sqrt(ratio.size)
    assert 0.93 < ratio.std() < 1.07  # 2/3 or 3/2 of the noise would give 0.70 or 1.47


def test_an_empty_batch_is_a_step_with_noise():
    mechanism = DPSGD(1.0, 1e-9, 3, noise_multiplier=1.0)
    state = init_state(mechanism, start(), optax.sgd(0.1), jax.random.key(0))
    for after, info in fit(state, mechanism, loss_fn, optax.sgd(0.1), data_of()):
        assert int(info.sensitive_num_examples) == 0
        assert float(info.noisy_grad_norm) > 1
    assert int(after.iteration) == 3
    assert mechanism.dp_event.count == 3


def test_a_nan_record_trains_as_if_absent():
    clean, broken = data_of(), data_of()
    x = clean.arrays["x"].copy()
    x[17] = np.nan
    broken = ArrayDataset({"x": x, "y": clean.arrays["y"]})
    state = init_state(MECHANISM, start(), OPTIMIZER, jax.random.key(1))
    for state, info in fit(state, MECHANISM, loss_fn, OPTIMIZER, broken):
        assert np.isfinite(info.sensitive_loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        (
            {"sampler": ShuffledSampler(200, jax.random.key(0), fixed_batch_size=20)},
            200,
            "shuffled",
        ),
        ({"run": 0}, 200, "pass ledger and run together"),
        ({}, 150, "has 150 examples"),
    ],
)
def test_mismatches_are_refused(settings, data, words):
    state = init_state(MECHANISM, start(), OPTIMIZER, jax.random.key(1))
    with pytest.raises(DpjaxError, match=words):
        next(fit(state, MECHANISM, loss_fn, OPTIMIZER, data_of(data), **settings))


def test_eight_devices_give_the_numbers_of_one(tmp_path):
    """In a process of its own, because the number of simulated devices is fixed at start."""
    script = pathlib.Path(__file__).parent / "eight_devices.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")
