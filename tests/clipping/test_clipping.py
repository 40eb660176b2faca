"""Clipped sums against a slow float64 loop, and what must not move them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import clip_and_sum, clipped_grad, microbatch_order, per_example_l2_norms
from dpjax.errors import DpjaxError


def net(params, example):
    """Tied embedding used twice, a convolution, a dense layer: all kinds of gradient leaves."""
    x = params["embedding"][example["tokens"]]
    kernel = params["kernel"]
    mixed = sum(kernel[i] * jnp.roll(x, i, axis=0) for i in range(3))
    hidden = jnp.tanh(mixed @ params["dense"])
    logits = hidden @ params["embedding"].T
    return jnp.sum(jax.nn.log_softmax(logits)[:, 0] * example["weight"])


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "embedding": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(3,)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
    }


def batch_of(size, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, 7, (size, 5)), jnp.int32),
        "weight": jnp.asarray(10.0 ** rng.uniform(-3, 1, (size, 5)), jnp.float32),
    }


def oracle(loss_fn, params, batch, clip, keep=None):
    """One example at a time, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        size = len(jax.tree.leaves(batch)[0])
        total = jax.tree.map(lambda x: np.zeros(x.shape), params)
        norms, losses = [], []
        for i in range(size):
            example = jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), batch)
            example["weight"] = example["weight"].astype(jnp.float64)
            loss, grad = jax.value_and_grad(loss_fn)(wide, example)
            grad = jax.tree.map(np.asarray, grad)
            norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
            norms.append(norm)
            losses.append(float(loss))
            if keep is None or keep[i]:
                total = jax.tree.map(lambda t, g, n=norm: t + g * min(1, clip / n), total, grad)
    return total, np.array(norms), np.array(losses)


def close(found, expected, rtol=1e-5):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=rtol, atol=rtol * (1 + np.abs(e).max()))


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 4, 12, 100])
def test_sum_matches_a_float64_loop(params, microbatch_size):
    batch = batch_of(12)
    expected, norms, losses = oracle(net, params, batch, 6.0)
    assert norms.min() < 6.0 < norms.max()  # some are clipped, some are not
    grad_fn = clipped_grad(net, 6.0, microbatch_size=microbatch_size)
    total, info = grad_fn(params, batch)
    close(total, expected)
    np.testing.assert_allclose(info.sensitive_norms, norms, rtol=1e-5)
    np.testing.assert_allclose(info.sensitive_losses, losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 2, 5])
def test_padding_contributes_exactly_nothing_whatever_it_holds(params, microbatch_size):
    batch, padding = batch_of(8), jnp.array([0, 1, 0, 0, 1, 1, 0, 0], bool)
    grad_fn = clipped_grad(net, 0.5, microbatch_size=microbatch_size)
    results = []
    for junk in (0.0, 1e30, jnp.nan, jnp.inf):
        weight = jnp.where(padding[:, None], junk, batch["weight"])
        total, info = grad_fn(params, {**batch, "weight": weight}, padding)
        results.append(total)
        assert np.all(np.asarray(info.sensitive_norms)[np.asarray(padding)] == 0)
        assert np.all(np.asarray(info.sensitive_losses)[np.asarray(padding)] == 0)
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    expected, _, _ = oracle(net, params, batch, 0.5, keep=~np.asarray(padding))
    close(results[0], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_non_finite_example_equals_its_removal(params, bad, microbatch_size):
    batch = batch_of(6)
    broken = {**batch, "weight": batch["weight"].at[3, 2].set(bad)}
    removed = jnp.arange(6) == 3
    grad_fn = clipped_grad(net, 0.5, microbatch_size=microbatch_size)
    found, info = grad_fn(params, broken)
    expected, _ = grad_fn(params, batch, removed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.isfinite(info.sensitive_norms[3])
    assert np.all(np.isfinite(np.delete(np.asarray(info.sensitive_norms), 3)))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_an_empty_batch_gives_zeros(params, microbatch_size):
    grad_fn = clipped_grad(net, 0.5, microbatch_size=microbatch_size)
    for batch, padding in ((batch_of(0), None), (batch_of(4), jnp.ones(4, bool))):
        total, info = grad_fn(params, batch, padding)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(total))
        assert info.sensitive_norms.shape == (len(batch["tokens"]),)


def test_norm_over_hundreds_of_bfloat16_leaves():
    """A bfloat16 accumulator stops growing at 256 terms of 1; the oracle sums 11,100 in float64."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(2, 37)), jnp.bfloat16) for _ in range(300)]
    wide = np.concatenate([np.asarray(g, np.float64) for g in grads], axis=1)
    expected = np.sqrt((wide**2).sum(axis=1))
    np.testing.assert_allclose(per_example_l2_norms(grads), expected, rtol=1e-6)
    total, _ = clip_and_sum(grads, 1.0)
    assert {leaf.dtype for leaf in total} == {jnp.dtype("float32")}
    summed = np.concatenate([np.asarray(leaf, np.float64) for leaf in total])
    np.testing.assert_allclose(summed, (wide / expected[:, None]).sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1_000_003, 5_000_000])
def test_norm_of_a_large_leaf(size):
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(2, size)) ** 3, jnp.float32)
    expected = np.sqrt((np.asarray(grads, np.float64) ** 2).sum(axis=1))
    np.testing.assert_allclose(jax.jit(per_example_l2_norms)(grads), expected, rtol=1e-6)


def test_bfloat16_parameters_sum_in_float32(params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss_fn(p, example):
        weight = example["weight"].astype(jnp.bfloat16)
        return net(p, {**example, "weight": weight}).astype(jnp.float32)

    batch = batch_of(64)
    total, _ = clipped_grad(loss_fn, 0.1, microbatch_size=16)(narrow, batch)
    per_example = jax.vmap(jax.grad(loss_fn), (None, 0))(narrow, batch)
    wide = jax.tree.map(lambda g: np.asarray(g.astype(jnp.float32), np.float64), per_example)
    norms = np.sqrt(sum((g**2).reshape(64, -1).sum(1) for g in jax.tree.leaves(wide)))
    factor = np.minimum(1, 0.1 / norms)
    expected = jax.tree.map(lambda g: np.tensordot(factor, g, 1), wide)
    close(total, expected, rtol=1e-3)  # bfloat16 sums would be off by 1e-2


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e15])
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(size):
    def loss_fn(p, x):
        return jnp.vdot(p, x)

    grad_fn = clipped_grad(loss_fn, 0.7, normalize_by=4.0)
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(9, 50)), jnp.float32)
    extra = jnp.asarray(size * rng.normal(size=(1, 50)), jnp.float32)
    without, _ = grad_fn(jnp.zeros(50), batch)
    with_it, _ = grad_fn(jnp.zeros(50), jnp.concatenate([batch, extra]))
    moved = np.linalg.norm(np.asarray(with_it, np.float64) - np.asarray(without, np.float64))
    assert moved <= grad_fn.sensitivity("add_or_remove_one") * (1 + 1e-5)
    if size > 1:
        assert moved >= 0.999 * grad_fn.sensitivity("add_or_remove_one")
    replaced, _ = grad_fn(jnp.zeros(50), batch.at[0].set(-1e6 * batch[0]))
    moved = np.linalg.norm(np.asarray(replaced, np.float64) - np.asarray(without, np.float64))
    assert 0.999 * 2 * 0.7 / 4 <= moved <= grad_fn.sensitivity("replace_one") * (1 + 1e-5)


def test_the_normaliser_is_a_constant_not_a_count(params):
    half = jnp.arange(8) < 4
    constant = clipped_grad(net, 0.5, normalize_by=8.0)
    plain = clipped_grad(net, 0.5)
    for padding in (None, half, jnp.arange(8) < 7):
        a, _ = constant(params, batch_of(8), padding)
        b, _ = plain(params, batch_of(8), padding)
        close(a, jax.tree.map(lambda x: np.asarray(x) / 8, b), rtol=1e-6)


def test_aux_comes_back_in_the_batchs_order(params):
    def with_aux(p, example):
        return net(p, example), {"first": example["tokens"][0]}

    batch = batch_of(10)
    for microbatch_size in (None, 3):
        _, info = clipped_grad(with_aux, 0.5, has_aux=True, microbatch_size=microbatch_size)(
            params, batch
        )
        np.testing.assert_array_equal(info.sensitive_aux["first"], batch["tokens"][:, 0])


def test_infinite_clip_norm_gives_the_plain_sum(params):
    batch = batch_of(6)
    total, _ = clipped_grad(net, float("inf"))(params, batch)
    summed = jax.grad(lambda p: jax.vmap(net, (None, 0))(p, batch).sum())(params)
    close(total, summed)
    assert clipped_grad(net, float("inf")).sensitivity() == float("inf")


def test_memory_of_a_step_does_not_grow_with_the_batch(params):
    wide = {**params, "dense": jnp.zeros((4, 4)), "embedding": jnp.ones((7, 4))}

    def temporary(size):
        grad_fn = clipped_grad(net, 0.5, microbatch_size=8)
        padding = jnp.zeros(size, bool)
        compiled = jax.jit(lambda p, b, m: grad_fn(p, b, m)[0]).lower(wide, batch_of(size), padding)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    # Without microbatches it grows by the batch; with them only the tokens' own copy may.
    growth = temporary(1024) - temporary(64)
    assert growth <= 2 * (1024 - 64) * (5 * 4 + 5 * 4 + 16)
    whole = clipped_grad(net, 0.5)
    big = jax.jit(lambda p, b: whole(p, b)[0]).lower(wide, batch_of(1024)).compile()
    assert big.memory_analysis().temp_size_in_bytes > 5 * temporary(1024)


def test_microbatch_order_gathers_padding(params):
    padding = np.arange(12) >= 5
    order = microbatch_order(12, 4)
    assert sorted(order) == list(range(12))
    microbatches = padding[order].reshape(4, 3).T
    assert [bool(m.all()) for m in microbatches] == [False, False, True]
    with pytest.raises(DpjaxError, match="multiple"):
        microbatch_order(10, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: clipped_grad(net, 0.0), "l2_clip_norm is 0.0"),
        (lambda: clipped_grad(net, float("nan")), "l2_clip_norm is nan"),
        (lambda: clipped_grad(net, 1.0, method="magic"), "method is 'magic'"),
        (lambda: clipped_grad(net, 1.0, microbatch_size=0), "microbatch_size is 0"),
        (lambda: clipped_grad(net, 1.0, normalize_by=0.0), "normalize_by is 0.0"),
        (lambda: clipped_grad(net, 1.0).sensitivity("swap"), "neighboring_relation is 'swap'"),
        (lambda: clipped_grad(net, 1.0)({}, {"a": np.ones(2), "b": np.ones(3)}), "same leading"),
        (
            lambda: clipped_grad(net, 1.0)({}, {"a": np.ones(2)}, np.ones(3, bool)),
            r"must be \(2,\)",
        ),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
