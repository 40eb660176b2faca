"""Every method against a float64 loop, on every model."""

import jax
import jax.numpy as jnp
import lazy_models
import lazy_models_control
import lazy_models_frameworks
import lazy_models_other
import numpy as np
import pytest
from lazy_reference import (
    BATCH,
    MODELS,
    assert_close,
    compiled,
    global_norm,
    on_host,
    quick_jit,
    reference,
)

from dpjax.clipping import clipped_grad

# The reference is a loop; "vmap" must pass too, but other files test it in every run.
METHODS = ["lazy", "auto", pytest.param("vmap", marks=pytest.mark.slow)]
SOURCES = (lazy_models, lazy_models_other, lazy_models_control, lazy_models_frameworks)
NONE = np.zeros(BATCH, bool)


def only(*rows):
    """A mask with these rows set."""
    return np.isin(np.arange(BATCH), rows)


def with_row(x, row, value):
    """A copy with this row set. In numpy: for JAX each such operation is a compilation."""
    if not isinstance(x, np.ndarray):  # keys
        return x.at[row].set(value)
    out = np.array(x)
    out[row] = value
    return out


def difference(a, b):
    """a - b, in float64."""
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y), a, b)


def with_rows(batch, rows, value):
    """The batch with every float of these rows set to ``value``."""

    def put(x):
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return with_row(x, np.array(rows), value) if floats else x

    return jax.tree.map(put, batch)


# One of each kind; "auto" chooses among what "lazy" does for all of them.
AUTO = (
    "mlp",
    "attention",
    "weights_joined",
    "mixture_of_experts",
    "tied_embedding",
    "tied_embedding_over_many_positions",
    "convolutions_2d",
    "lora",
    "aux",
    "bfloat16_compute",
    "unknown_primitive",
    "scan_of_layers",
    "scan_of_checkpoints",
    "checkpoints_unscanned",
    "conditionals",
    "nnx_decoder_tied",
)
CASES = [
    pytest.param(name, method, id=f"{name}-{method}", marks=() if quick else pytest.mark.slow)
    for name in MODELS
    for method, quick in (("lazy", True), ("auto", name in AUTO), ("vmap", False))
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_model(name, method):
    """In one test, because all of it uses one compiled function."""
    model, expected, run = MODELS[name](), reference(name), compiled(name, method)
    clip, batch = expected.clip_norm(), on_host(model.batch)
    total, info = run(model.params, batch, NONE)

    # The sum, norms, losses and aux are those of a loop.
    assert_close(total, expected.clipped_sum(clip), clip, model.rtol)
    np.testing.assert_allclose(info.sensitive_norms, expected.norms, rtol=model.rtol)
    loss_atol = model.rtol * np.abs(expected.losses).max()
    np.testing.assert_allclose(
        info.sensitive_losses, expected.losses, rtol=10 * model.rtol, atol=loss_atol
    )
    for leaf in jax.tree.leaves(total):
        assert leaf.dtype == jnp.float32
    if model.has_aux:
        for found, wanted in zip(
            jax.tree.leaves(info.sensitive_aux), jax.tree.leaves(expected.aux), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=10 * model.rtol, atol=loss_atol)

    # Padding adds nothing, whatever it holds.
    padding = only(1, 4)
    for junk in (0.0, jnp.nan):
        padded, info = run(model.params, with_rows(batch, [1, 4], junk), padding)
        assert_close(padded, expected.clipped_sum(clip, ~padding), clip, model.rtol)
        assert not np.asarray(info.sensitive_norms)[padding].any()
        assert not np.asarray(info.sensitive_losses)[padding].any()
    nothing, info = run(model.params, with_rows(batch, range(BATCH), jnp.nan), ~NONE)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))
    assert not info.sensitive_norms.any()

    # One example more or less moves the sum by at most the clip norm, and by as much if clipped.
    for i in range(BATCH):
        fewer, _ = run(model.params, batch, only(i))
        moved = global_norm(difference(total, fewer))
        assert moved <= clip * (1 + 1e-4)
        np.testing.assert_allclose(
            moved, min(expected.norms[i], clip), rtol=model.rtol, atol=10 * model.rtol * clip
        )

    # An example that is not finite equals its removal.
    removed, _ = run(model.params, batch, only(3))
    for bad in (jnp.nan, jnp.inf, 1e38) if model.has_gradient else ():
        weight = with_row(batch["weight"], 3, bad)
        found, info = run(model.params, {**batch, "weight": weight}, NONE)
        assert np.isfinite(np.delete(np.asarray(info.sensitive_norms), 3)).all()
        if np.isfinite(info.sensitive_norms[3]):  # 1e38 need not overflow
            assert bad == 1e38
            added = global_norm(difference(found, removed))
            assert added <= clip * (1 + 1e-4)
        else:
            assert_close(found, removed, clip, 1e-6)

    # Examples do not mix: another example in row 2 leaves the other rows as they were, to the bit.
    _, before = run(model.params, batch, NONE)
    other = jax.tree.map(lambda x: with_row(x, 2, x[0]), batch)
    other["weight"] = with_row(batch["weight"], 2, 1e4)
    for changed in (other, with_rows(batch, [2], jnp.nan)):
        _, after = run(model.params, changed, NONE)
        for kind in ("sensitive_norms", "sensitive_losses"):
            a, b = (np.delete(np.asarray(getattr(x, kind)), 2) for x in (before, after))
            np.testing.assert_array_equal(a, b)


SIZES = [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 100))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tied_embedding", "scan_of_checkpoints", "aux"])
@pytest.mark.parametrize("microbatch_size", SIZES)
def test_microbatches_and_the_normaliser(name, method, microbatch_size):
    model, expected = MODELS[name](), reference(name)
    clip = expected.clip_norm()
    grad_fn = clipped_grad(
        model.loss_fn,
        clip,
        method=method,
        microbatch_size=microbatch_size,
        has_aux=model.has_aux,
        normalize_by=8.0,
    )
    assert grad_fn.sensitivity() == clip / 8
    total, info = quick_jit(lambda *args: grad_fn(*args))(model.params, model.batch, only(1))
    wanted = jax.tree.map(lambda x: x / 8, expected.clipped_sum(clip, ~only(1)))
    assert_close(total, wanted, clip / 8, model.rtol)
    kept = np.delete(np.arange(BATCH), 1)
    np.testing.assert_allclose(info.sensitive_norms[kept], expected.norms[kept], rtol=model.rtol)
    for found, aux in zip(
        jax.tree.leaves(info.sensitive_aux), jax.tree.leaves(expected.aux), strict=True
    ):
        np.testing.assert_allclose(found[kept], aux[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_without_jit_and_batches_of_other_sizes(method):
    model, expected = MODELS["mlp"](), reference("mlp")
    clip = expected.clip_norm()
    grad_fn = clipped_grad(model.loss_fn, clip, method=method)
    total, _ = grad_fn(model.params, model.batch)
    assert_close(total, expected.clipped_sum(clip), clip, model.rtol)
    for i in (1, 2):  # one is clipped, one is not
        alone, info = grad_fn(model.params, jax.tree.map(lambda x, i=i: x[i : i + 1], model.batch))
        assert_close(alone, expected.clipped_sum(clip, only(i)), clip, model.rtol)
        np.testing.assert_allclose(info.sensitive_norms, expected.norms[[i]], rtol=model.rtol)
    empty, info = grad_fn(model.params, jax.tree.map(lambda x: x[:0], model.batch))
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, model.params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(empty))
    assert info.sensitive_norms.shape == info.sensitive_losses.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_clip_norm_gives_the_plain_sum(method):
    model, expected = MODELS["tied_embedding"](), reference("tied_embedding")
    grad_fn = clipped_grad(model.loss_fn, float("inf"), method=method)
    total, _ = quick_jit(lambda *args: grad_fn(*args))(model.params, model.batch)
    assert_close(total, expected.clipped_sum(np.inf), 0.0, model.rtol)


@pytest.mark.parametrize("method", METHODS)
def test_other_examples_do_not_recompile(method):
    model, traced = MODELS["tied_embedding"](), []

    def loss_fn(params, example):
        traced.append(1)
        return model.loss_fn(params, example)

    clipped = clipped_grad(loss_fn, 1.0, method=method)
    grad_fn = quick_jit(lambda *args: clipped(*args))
    grad_fn(model.params, model.batch, NONE)
    once = len(traced)
    for i in range(3):
        grad_fn(model.params, jax.tree.map(lambda x, i=i: jnp.roll(x, i, 0), model.batch), only(i))
    assert len(traced) == once
