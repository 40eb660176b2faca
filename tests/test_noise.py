"""Noise: the right scale with power, never the same draw twice, resumable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax.clipping import clipped_grad
from dpjax.errors import DpjaxError
from dpjax.noise import gaussian_privatizer
from dpjax.optimizers import dp_adam, dp_aggregate, dp_sgd

SHAPES = {"a": (60, 50), "b": (1000,), "c": ()}


def zeros(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def draws(privatizer, tree, count):
    state, found = privatizer.init(tree), []
    for _ in range(count):
        noisy, state = privatizer.update(tree, state)
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(noisy)]))
    return np.stack(found), state


def plausible(sample, stddev):
    """Two-sided chi-square test of the scale at the 1e-6 level."""
    statistic = (sample.astype(np.float64) ** 2).sum() / stddev**2
    tail = min(stats.chi2.cdf(statistic, sample.size), stats.chi2.sf(statistic, sample.size))
    return tail > 5e-7


def test_scale_is_accepted_and_two_thirds_and_three_halves_are_not():
    sample, _ = draws(gaussian_privatizer(2.5, jax.random.key(0)), zeros(), 3)
    assert plausible(sample, 2.5)
    assert not plausible(sample, 2.5 * 2 / 3) and not plausible(sample, 2.5 * 3 / 2)
    assert stats.kstest(sample.ravel() / 2.5, "norm").pvalue > 1e-4
    assert abs(sample.mean()) < 5 * 2.5 / np.sqrt(sample.size)


def test_no_two_draws_are_equal_over_steps_leaves_and_keys():
    one, _ = draws(gaussian_privatizer(1.0, jax.random.key(0)), zeros(), 4)
    two, _ = draws(gaussian_privatizer(1.0, jax.random.key(1)), zeros(), 4)
    both = np.concatenate([one, two])
    correlation = np.corrcoef(both)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(both.shape[1])
    same = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    state = gaussian_privatizer(1.0, jax.random.key(0)).init(same)
    noisy, _ = gaussian_privatizer(1.0, jax.random.key(0)).update(same, state)
    assert not np.any(np.asarray(noisy["a"]) == np.asarray(noisy["b"]))


def test_bfloat16_sums_get_float32_noise():
    privatizer = gaussian_privatizer(1.0, jax.random.key(0))
    noisy, _ = privatizer.update(zeros(jnp.bfloat16), privatizer.init(zeros()))
    assert {leaf.dtype for leaf in jax.tree.leaves(noisy)} == {jnp.dtype("float32")}
    values = np.asarray(noisy["b"])
    assert np.mean(values == values.astype(jnp.bfloat16).astype(np.float32)) < 0.05


def test_resumed_state_draws_what_an_uninterrupted_one_would():
    privatizer = gaussian_privatizer(1.0, jax.random.key(5))
    whole, _ = draws(privatizer, zeros(), 5)
    _, state = draws(privatizer, zeros(), 3)
    # Another privatizer object with another key: all that counts is in the state.
    elsewhere = gaussian_privatizer(1.0, jax.random.key(99))
    for step in (3, 4):
        noisy, state = elsewhere.update(zeros(), state)
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noisy)])
        np.testing.assert_array_equal(found, whole[step])


@pytest.mark.parametrize("key", [0, None, "secret", np.zeros(3)])
def test_a_key_is_required(key):
    with pytest.raises(DpjaxError, match=r"key is .*jax\.random\.key"):
        gaussian_privatizer(1.0, key)


@pytest.mark.parametrize("stddev", [-1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(stddev):
    with pytest.raises(DpjaxError, match="stddev is"):
        gaussian_privatizer(stddev, jax.random.key(0))


def linear(params, example):
    return jnp.vdot(params["w"], example["x"]) + params["b"] * example["y"]


@pytest.mark.parametrize("normalize_by", [1.0, 16.0])
@pytest.mark.parametrize("padded", [False, True])
@jax.numpy_dtype_promotion("standard")  # optax.adam raises a float to an integer count
def test_both_routes_give_the_same_numbers_for_the_same_key(normalize_by, padded):
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=16), jnp.float32),
    }
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    padding = jnp.arange(16) % 3 == 0 if padded else None
    key, clip, noise_multiplier = jax.random.key(3), 0.8, 1.3

    grad_fn = clipped_grad(linear, clip, normalize_by=normalize_by)
    privatizer = gaussian_privatizer(noise_multiplier * grad_fn.sensitivity(), key)
    first = optax.chain(privatizer, optax.adam(0.1))
    second = dp_adam(0.1, clip, noise_multiplier, key, normalize_by=normalize_by)
    one, two = first.init(params), second.init(params)
    for _ in range(3):
        total, _ = grad_fn(params, batch, padding)
        a, one = first.update(total, one, params)
        grads = jax.vmap(jax.grad(linear), (None, 0))(params, batch)
        b, two = second.update(grads, two, params, is_padding_example=padding)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_dp_sgd_is_clip_sum_noise_and_step_by_hand():
    grads = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])}
    tx = dp_sgd(0.5, 1.0, 0.0, jax.random.key(0), normalize_by=3.0)
    updates, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    by_hand = -0.5 * (np.array([0.6, 0.8]) + np.array([0.3, 0.4]) + np.array([-0.6, 0.8])) / 3
    np.testing.assert_allclose(updates["w"], by_hand, rtol=1e-6)


def test_aggregate_noise_follows_clip_norm_and_normaliser():
    tx = dp_aggregate(2.0, 1.5, jax.random.key(0), normalize_by=10.0)
    grads = {name: jnp.zeros((4, *shape)) for name, shape in SHAPES.items()}
    noisy, _ = tx.update(grads, tx.init(zeros()))
    sample = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noisy)])
    assert plausible(sample, 1.5 * 2.0 / 10)
    assert not plausible(sample, 1.5 * 2.0 / 10 * 2 / 3)
    assert not plausible(sample, 1.5 * 2.0 / 10 * 3 / 2)
