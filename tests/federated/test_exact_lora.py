"""Exact aggregation of adapters, against a float64 loop; a decoder's adapters along the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.errors import DpjaxError
from dpjax.federated import Clients, exact_lora, init_federated, run_round, with_kernels
from dpjax.models import (
    DecoderConfig,
    LoRA,
    combine,
    init_params,
    partition,
    prepare_tuning,
    tuned_loss,
)

SCALING, RATE = 2.0, 0.2


def loss_fn(params, example):
    weight = params["kernel"] + SCALING * params["lora_a"] @ params["lora_b"]
    return jnp.sum((example["x"] @ weight - example["y"]) ** 2)


def float64_client(start, x, y, rows):
    """Full-batch steps on A and B alone."""
    a, b = start["lora_a"].copy(), start["lora_b"].copy()
    for _ in range(2):
        slope = np.zeros_like(start["kernel"])
        for row in rows:
            residual = x[row] @ (start["kernel"] + SCALING * a @ b) - y[row]
            slope += 2 * np.outer(x[row], residual) / len(rows)
        a, b = a - RATE * SCALING * slope @ b.T, b - RATE * SCALING * a.T @ slope
    return a, b


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    y = rng.normal(size=(9, 3)).astype(np.float32)
    params = {
        "kernel": rng.normal(size=(4, 3)).astype(np.float32),
        "lora_a": (0.5 * rng.normal(size=(4, 2))).astype(np.float32),
        "lora_b": (0.3 * rng.normal(size=(2, 3))).astype(np.float32),
    }
    rows = (np.array([0, 3, 5, 7]), np.array([1, 2]), np.array([4, 6, 8]))
    return params, x, y, Clients({"x": x, "y": y}, rows, ("a", "b", "c"))


def test_the_model_is_the_mean_of_the_clients_models(problem):
    params, x, y, people = problem
    algorithm = exact_lora(loss_fn, optax.sgd(RATE), SCALING)
    state = init_federated(algorithm, jax.tree.map(jnp.asarray, params), 3)
    cohort = people.cohort([0, 1, 2], jax.random.key(0), batch_size=None, epochs=2)
    state, _ = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
    start = {k: v.astype(np.float64) for k, v in params.items()}
    trained = [float64_client(start, x, y, rows) for rows in people.rows]
    weights = people.sizes / people.sizes.sum()
    mean = sum(
        w * (start["kernel"] + SCALING * a @ b) for w, (a, b) in zip(weights, trained, strict=True)
    )
    found = jax.tree.map(lambda v: np.asarray(v, np.float64), state.params)
    model = found["kernel"] + SCALING * found["lora_a"] @ found["lora_b"]
    np.testing.assert_allclose(model, mean, rtol=1e-5, atol=1e-5)
    # The means of the matrices one by one are another model, and the kernel made up for it.
    a, b = (sum(w * t[n] for w, t in zip(weights, trained, strict=True)) for n in (0, 1))
    naive = start["kernel"] + SCALING * a @ b
    assert np.abs(naive - mean).max() > 1e-2
    np.testing.assert_allclose(found["lora_a"], a, rtol=1e-4, atol=1e-5)


def test_a_decoders_adapters_take_their_kernels_along():
    config = DecoderConfig(
        vocabulary_size=20, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, d_ff=8
    )
    whole = init_params(config, jax.random.key(0))
    config, trainable, frozen = prepare_tuning(
        config, whole, "lora", lora=LoRA(2), key=jax.random.key(1)
    )
    params, rest = with_kernels(trainable, frozen)
    same = jax.tree.map(jnp.array_equal, combine(params, rest), combine(trainable, frozen))
    assert all(jax.tree.leaves(same))
    kernels, _ = partition(params, lambda name: name.endswith("/kernel"))
    assert len(jax.tree.leaves(kernels)) * 2 == len(jax.tree.leaves(trainable))
    algorithm = exact_lora(tuned_loss(config, rest), optax.sgd(1.0), config.lora.scaling)
    tokens = np.random.default_rng(0).integers(0, 20, (6, 5)).astype(np.int32)
    people = Clients(
        {"tokens": tokens, "loss_mask": np.ones_like(tokens, bool)},
        (np.arange(3), np.arange(3, 6)),
        ("a", "b"),
    )
    state = init_federated(algorithm, params, 2)
    for number in range(2):
        cohort = people.cohort([0, 1], jax.random.key(number), batch_size=3)
        state, info = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
    assert int(info.sensitive_num_rejected) == 0
    moved, _ = partition(state.params, lambda name: name.endswith("/kernel"))
    # B starts at zero, so the first round's products of means are exact; the second's are not.
    differs = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), kernels, moved)
    assert any(jax.tree.leaves(differs))


def test_parameters_without_adapters_are_refused():
    with pytest.raises(DpjaxError, match="with_kernels"):
        exact_lora(loss_fn, optax.sgd(RATE), 1.0).init({"kernel": jnp.ones((2, 2))})
