"""Where norms from factors could go wrong: cancellation, extreme scales, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazy_reference import global_norm, quick_jit

from dpjax.clipping import clipped_grad

METHODS = ["vmap", "lazy", "auto"]


# Losses that are linear in the weight: left and right factors are the example's own arrays, and
# the gradient is their product, known to float64.


def dense(p, ex):
    return jnp.sum(ex["left"] @ p * ex["right"])


def scanned(p, ex):
    def body(total, wlr):
        w, left, right = wlr
        return total + jnp.sum(left @ w * right), None

    pieces = (p, ex["left"][None], ex["right"][None])
    return jax.lax.scan(jax.checkpoint(body), jnp.zeros(()), pieces)[0]


def shared(p, ex):
    """The two halves of the positions use the weight in two places: cross terms cancel."""
    half = ex["left"].shape[0] // 2
    there = jnp.sum(ex["left"][:half] @ p * ex["right"][:half])
    return there + jnp.sum((p.T @ ex["left"][half:].T) * ex["right"][half:].T)


def lookup(p, ex):
    return jnp.sum(p[ex["tokens"]] * ex["right"])


def tied(p, ex):
    return lookup(p, ex) + jnp.sum(ex["left"] @ p * ex["more"])


def exact(kind, ex):
    """Per-example gradients of the matrix in float64."""
    ex = {k: np.asarray(v, np.float64 if v.dtype.kind == "f" else None) for k, v in ex.items()}
    looked_up = np.zeros((len(ex["left"]), ex["left"].shape[2], ex["right"].shape[2]))
    if kind in ("lookup", "tied"):
        for b, tokens in enumerate(ex["tokens"]):
            np.add.at(looked_up[b], tokens, ex["right"][b])
    dense = np.einsum("btm,btn->bmn", ex["left"], ex["right"])
    head = np.einsum("btm,btn->bmn", ex["left"], ex["more"])
    return {"lookup": looked_up, "tied": looked_up + head}.get(kind, dense)


KINDS = {"dense": dense, "scanned": scanned, "shared": shared, "lookup": lookup, "tied": tied}
SIZE, TIME, ROWS, COLUMNS = 24, 4, 16, 12


def example_batch(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(SIZE, *shape)).astype(np.float32)

    return {
        "left": normal(TIME, ROWS),
        "right": normal(TIME, COLUMNS),
        "more": normal(TIME, COLUMNS),
        "tokens": rng.integers(0, ROWS, (SIZE, TIME)).astype(np.int32),
    }


def cancelling(kind):
    """One activation at every position, and cotangents that sum to almost or exactly nothing.

    Example i is left with about 10^(-i/3) of the sum of its terms.
    """
    ex = example_batch()
    ex["left"][:] = ex["left"][:, :1]
    ex["tokens"][:] = ex["tokens"][:, :1]
    rest = 10.0 ** (-np.arange(SIZE) / 3)
    rest[-3:] = 0
    rest = rest[:, None] * ex["right"][:, -1]
    ex["right"][:, -1] = rest - ex["right"][:, :-1].astype(np.float64).sum(1)
    if kind == "tied":  # the head takes back what the embedding gives
        ex["left"] = np.eye(ROWS, dtype=np.float32)[ex["tokens"]]
        ex["more"] = -ex["right"][:, ::-1]
        ex["more"][:, 0] += rest.astype(np.float32)
    return ex


def check_each_alone(kind, method, batch, clip, slack=0.0):
    """Norms are not too small, and no contribution is larger than the clip norm.

    ``slack[i]`` is what float32 rounding of the terms of example i may amount to. An example may
    also be left out, with a norm that is not finite.
    """
    grads = exact(kind, batch)
    norms = np.sqrt((grads**2).sum((1, 2)))
    grad_fn = clipped_grad(KINDS[kind], clip, method=method)
    params = jnp.zeros((1, ROWS, COLUMNS) if kind == "scanned" else (ROWS, COLUMNS))
    run = quick_jit(lambda *args: grad_fn(*args))
    _, info = run(params, batch, np.zeros(SIZE, bool))
    found = np.asarray(info.sensitive_norms, np.float64)
    # Below 1e-15 squares leave float32, and so does the norm; no clip norm is that small.
    right = (found >= norms * (1 - 1e-4) - slack) | ~np.isfinite(found) | (norms < 1e-15)
    np.testing.assert_array_equal(right, True)
    alone = [global_norm(run(params, batch, np.arange(SIZE) != i)[0]) for i in range(SIZE)]
    np.testing.assert_array_less(alone, clip * (1 + 1e-4))
    return norms, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_that_cancel(kind, method):
    batch = cancelling(kind)
    sizes = np.einsum("btm->b", batch["left"] ** 2) * np.einsum("btn->b", batch["right"] ** 2)
    # Far below every example's norm, so that all are clipped, also those that are rounding only.
    slack = 4 * np.finfo(np.float32).eps * np.sqrt(sizes)
    norms, found = check_each_alone(kind, method, batch, 1e-12, slack)
    np.testing.assert_array_less(np.abs(found - norms), 1e-5 * norms + slack)
    assert norms.max() / norms[norms > 0].min() > 1e5


SCALES = [(1e-20, 1e15), (1e15, 1e-20), (1e-25, 1e25), (1e-30, 1e32), (1e-35, 1e35), (1e-20, 1e-2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "scanned", "shared", "tied"])
def test_factors_of_extreme_scales(kind, method):
    """Squares that underflow or overflow must not let an example through unclipped."""
    batch = example_batch()
    for i, (left, right) in enumerate(SCALES):
        batch["left"][i] *= left
        batch["right"][i] *= right
        batch["more"][i] *= right
    norms, found = check_each_alone(kind, method, batch, 1e-6)
    others = np.arange(len(SCALES), SIZE)
    np.testing.assert_allclose(found[others], norms[others], rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_unbalanced_factors_keep_their_norm(method):
    """As `vmap(grad)` has it, while all squares are in range."""
    batch = example_batch()
    scale = 10.0 ** np.linspace(-15, 15, SIZE)[:, None, None]
    batch["left"] = (batch["left"] * scale).astype(np.float32)
    batch["right"] = (batch["right"] / scale).astype(np.float32)
    norms, found = check_each_alone("dense", method, batch, 1.0)
    np.testing.assert_allclose(found, norms, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_factors_stay_within_the_clip_norm(method):
    """Norm and sum must see the same rounding of the factors, or the sensitivity is wrong."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": draw(20, 24), "b": draw(24), "v": draw(24, 6)}
    batch = {"x": draw(32, 2, 20), "weight": jnp.full(32, 1e3)}

    def loss_fn(p, ex):
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
        h = jnp.tanh(ex["x"].astype(jnp.bfloat16) @ p["w"] + p["b"][None])
        return jnp.sum((h @ p["v"]).astype(jnp.float32) ** 2) * ex["weight"]

    grad_fn = jax.jit(clipped_grad(loss_fn, 1.0, method=method).__call__)
    for i in range(8):
        total, info = grad_fn(params, batch, np.arange(32) != i)
        assert info.sensitive_norms[i] > 10
        assert abs(global_norm(total) - 1) <= 1e-4


# Memory: per-example gradients of a recognised leaf are never all there at once.


def row_numbers(x):
    return (x[:, 0] * 50).astype(jnp.int32)


WIDE = {
    "dense": (lambda p, x: x @ p, (96, 80)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p), (96, 8, 10)),
    "heads first": (lambda p, x: jnp.einsum("td,hkd->htk", x, p), (8, 10, 96)),
    "experts": (lambda p, x: jnp.einsum("td,edf->etf", x, p), (4, 96, 20)),
    "transposed": (lambda p, x: x @ p.T, (80, 96)),
    "twice": (lambda p, x: jnp.tanh(x @ p) @ p.T, (96, 80)),
    "split": (lambda p, x: jnp.tanh(x @ p[:, :40]) * (x @ p[:, 40:]), (96, 80)),
    "reshaped": (lambda p, x: x @ p.reshape(96, 80), (192, 40)),
    "cast": (lambda p, x: x.astype(jnp.bfloat16) @ p.astype(jnp.bfloat16), (96, 80)),
    "scaled": (lambda p, x: x @ (p * 0.1), (96, 80)),
    "padded": (lambda p, x: x @ jnp.pad(p, ((0, 0), (0, 3))), (96, 80)),
    "joined": (lambda p, x: x @ jnp.concatenate([p, p], axis=1), (96, 80)),
    "indexed": (lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1].T), (2, 96, 40)),
    "jit": (lambda p, x: jax.jit(jnp.matmul)(x, p), (96, 80)),
    "silu": (lambda p, x: jax.nn.silu(x @ p), (96, 80)),
    "checkpoint": (lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(x @ p))(p, x), (96, 80)),
    "scan": (
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0],
        (2, 96, 96),
    ),
    "scan of checkpoints": (
        lambda p, x: jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p)[0],
        (2, 96, 96),
    ),
    "embedding": (lambda p, x: p[row_numbers(x)] * x, (200, 96)),
    "tied": (lambda p, x: jnp.tanh(p[row_numbers(x)] * x) @ p.T, (200, 96)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_leaves_are_not_materialised(kind):
    """Temporary memory stays below one gradient for each example, let alone two."""
    fn, shape = WIDE[kind]
    size = 64

    def loss_fn(p, x):
        return jnp.sum(jnp.sin(fn(p, x)).astype(jnp.float32))

    def temporary(method):
        grad_fn = clipped_grad(loss_fn, 1.0, method=method)
        p = jax.ShapeDtypeStruct(shape, jnp.float32)
        x = jax.ShapeDtypeStruct((size, 2, 96), jnp.float32)
        lowered = jax.jit(lambda p, x: grad_fn(p, x)[0]).lower(p, x)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    gradients = 4 * size * np.prod(shape)
    assert temporary("vmap") >= 0.9 * gradients
    assert temporary("lazy") <= 0.5 * gradients
