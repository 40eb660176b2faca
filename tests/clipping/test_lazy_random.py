"""Random networks of the primitives that the lazy path knows, against `vmap(grad)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from lazy_models import rms
from lazy_reference import assert_close, quick_jit

from dpjax.clipping import clipped_grad

BATCH, TIME = 4, 3
WIDTH = 4  # of every activation [time, width], so that any operation can follow any other
HEADS = 2

# Ways to reach a [width, width] matrix from a stored weight, with that weight's shape.
PREPARATIONS = {
    "as it is": ((WIDTH, WIDTH), lambda w: w),
    "transposed": ((WIDTH, WIDTH), lambda w: w.T),
    "reshaped": ((2 * WIDTH, WIDTH // 2), lambda w: w.reshape(WIDTH, WIDTH)),
    "reshaped and transposed": ((WIDTH // 2, 2 * WIDTH), lambda w: w.reshape(WIDTH, WIDTH).T),
    "sliced": ((WIDTH, WIDTH + 3), lambda w: w[:, 2 : 2 + WIDTH]),
    "padded": ((WIDTH, WIDTH - 1), lambda w: jnp.pad(w, ((0, 0), (0, 1)))),
    "joined": ((WIDTH // 2, WIDTH), lambda w: jnp.concatenate([w, -w])),
    "scaled": ((WIDTH, WIDTH), lambda w: 0.5 * w),
    "cast": ((WIDTH, WIDTH), lambda w: lax.reduce_precision(w, 8, 20)),
    "layer": ((3, WIDTH, WIDTH), lambda w: w[1]),
    "squared": ((WIDTH, WIDTH), lambda w: w * jnp.abs(w)),
}
# Einsums from [time, width] to [time, width] over a [heads, width, width / heads] split.
EINSUMS = ("td,dhk->thk", "td,hdk->thk", "td,hkd->thk", "td,khd->thk", "td,dkh->thk")
OPERATIONS = ("dense", "heads", "lookup", "norm", "conv", "add", "mix", "tied")
WRAPPERS = ("none", "checkpoint", "jit", "scan", "scan of checkpoints", "shared scan", "cond")


@st.composite
def networks(draw):
    """A list of layers (wrapper, operations); operations name their weights and may share them."""
    number = st.integers(0, 2)
    operation = st.tuples(
        st.sampled_from(OPERATIONS),
        st.sampled_from(sorted(PREPARATIONS)),
        st.sampled_from(EINSUMS),
        number,
    )
    layer = st.tuples(
        st.sampled_from(WRAPPERS), st.lists(operation, min_size=1, max_size=3).map(tuple)
    )
    return tuple(draw(st.lists(layer, min_size=1, max_size=3)))


def weight_of(operation):
    """Key and shape of the weight that an operation uses."""
    kind, preparation, einsum, number = operation
    if kind == "dense":
        return f"dense {preparation} {number}", PREPARATIONS[preparation][0]
    if kind == "heads":
        sizes = {"d": WIDTH, "h": HEADS, "k": WIDTH // HEADS}
        return f"{einsum} {number}", tuple(sizes[i] for i in einsum[3:6])
    if kind in ("lookup", "tied"):
        return "embedding", (7, WIDTH)
    if kind in ("norm", "add"):
        return f"{kind} {number}", (WIDTH,)
    if kind == "conv":
        return f"conv {number}", (2, WIDTH, WIDTH)
    return f"mix {number}", (TIME, TIME)


def apply(operation, w, h, tokens):
    """One operation with its weight."""
    kind, preparation, einsum, _ = operation
    if kind == "dense":
        return h + jnp.tanh(h @ PREPARATIONS[preparation][1](w))
    if kind == "heads":
        return h + jnp.sin(jnp.einsum(einsum, h, w).reshape(TIME, WIDTH))
    if kind == "lookup":
        return h + w[tokens]
    if kind == "tied":
        return h + jax.nn.softmax(h @ w.T, axis=1) @ w
    if kind == "norm":
        return rms(h) * w[None]
    if kind == "add":
        return h + w[None]
    if kind == "conv":
        out = lax.conv_general_dilated(
            h[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return h + jnp.tanh(out[0])
    return h + jnp.tril(w) @ h


def run_layer(wrapper, operations, params, h, tokens):
    """Some operations, plainly or inside a loop, a region or a branch."""
    used = {key: params[key] for key in {weight_of(op)[0] for op in operations}}

    def body(p, h):
        for operation in operations:
            h = apply(operation, p[weight_of(operation)[0]], h, tokens)
        return rms(h)

    if wrapper == "checkpoint":
        return jax.checkpoint(body)(used, h)
    if wrapper == "jit":
        return jax.jit(body)(used, h)
    if wrapper in ("scan", "scan of checkpoints"):
        inner = jax.checkpoint(body) if wrapper != "scan" else body
        stacked = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), used)
        return lax.scan(lambda h, p: (inner(p, h), None), h, stacked)[0]
    if wrapper == "shared scan":
        return lax.scan(lambda h, _: (body(used, h), None), h, length=2)[0]
    if wrapper == "cond":
        return lax.cond(jnp.sum(h) > 0, body, lambda p, h: 0.5 * body(p, h), used, h)
    return body(used, h)


@settings(
    max_examples=14,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(network=networks(), seed=st.integers(0, 99))
def test_a_random_network(network, seed):
    rng = np.random.default_rng(seed)
    shapes = dict(weight_of(op) for _, operations in network for op in operations)
    params = {
        key: jnp.asarray(rng.normal(size=shape) * 0.6, jnp.float32)
        for key, shape in sorted(shapes.items())
    }
    batch = {
        "x": jnp.asarray(rng.normal(size=(BATCH, TIME, WIDTH)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(0, 7, (BATCH, TIME)), jnp.int32),
        "weight": jnp.asarray([0.1, 3.0, 30.0, 0.5], jnp.float32),
    }

    def loss_fn(p, ex):
        h = ex["x"]
        for wrapper, operations in network:
            h = run_layer(wrapper, operations, p, h, ex["tokens"])
        return ex["weight"] * jnp.sum(h[:, 0] + jnp.sin(h[:, 1]))

    @functools.cache
    def of(method):
        grad_fn = clipped_grad(loss_fn, 2.0, method=method)
        return quick_jit(lambda *args: grad_fn(*args))(params, batch)

    expected, wanted = of("vmap")
    found, info = of("lazy")
    assert_close(found, expected, 2.0, 1e-5)
    np.testing.assert_allclose(info.sensitive_norms, wanted.sensitive_norms, rtol=1e-5)
    np.testing.assert_allclose(info.sensitive_losses, wanted.sensitive_losses, rtol=1e-4, atol=1e-5)
