"""Small models: convolutions, frozen weights, narrow types, custom rules, unusual primitives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from lazy_models import T, leaves_used, next_tokens, nll, rms
from lazy_reference import BATCH, Draw, Model, model, weighted

# Convolutions. Each entry: shape of the input [n, channels, *spatial], of the kernel, settings.

CONVOLUTIONS_1D = {
    "plain": ((1, 3, 7), (4, 3, 3), {}),
    "same": ((1, 3, 7), (4, 3, 3), {"padding": "SAME"}),
    "stride": ((1, 3, 8), (4, 3, 3), {"window_strides": (2,)}),
    "stride with a rest": ((1, 3, 9), (4, 3, 2), {"window_strides": (3,)}),
    "dilated kernel": ((1, 3, 9), (4, 3, 3), {"rhs_dilation": (2,)}),
    "dilated input": ((1, 3, 5), (4, 3, 3), {"lhs_dilation": (2,)}),
    "all of it": (
        (1, 3, 7),
        (4, 3, 3),
        {"window_strides": (2,), "lhs_dilation": (3,), "rhs_dilation": (2,), "padding": [(3, 1)]},
    ),
    "uneven padding": ((1, 3, 6), (4, 3, 3), {"padding": [(0, 4)]}),
    "negative padding": ((1, 3, 9), (4, 3, 3), {"padding": [(-1, -2)]}),
    "several inputs": ((3, 3, 6), (4, 3, 3), {"padding": "SAME"}),
    "one position": ((1, 3, 7), (4, 3, 1), {}),
    "kernel of the input's size": ((1, 3, 4), (4, 3, 4), {}),
    "kernel beyond the input": ((1, 3, 3), (4, 3, 5), {"padding": "SAME"}),
    "no output": ((1, 3, 3), (4, 3, 5), {}),
}

CONVOLUTIONS_2D = {
    "plain": ((1, 2, 5, 6), (3, 2, 3, 2), {}),
    "stride and padding": (
        (1, 2, 5, 6),
        (3, 2, 3, 3),
        {"window_strides": (2, 1), "padding": "SAME"},
    ),
    "dilations": (
        (1, 2, 4, 4),
        (3, 2, 2, 3),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": [(1, 0), (2, 1)]},
    ),
    "channels last": (
        (1, 5, 6, 2),
        (3, 2, 2, 3),
        {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "padding": "SAME"},
    ),
}


CONVOLUTIONS_IN_GROUPS = {
    "groups": ((1, 6, 7), (4, 3, 3), {"feature_group_count": 2}),
    "groups with stride": (
        (1, 6, 8),
        (6, 2, 3),
        {"feature_group_count": 3, "window_strides": (2,), "padding": "SAME"},
    ),
    "depthwise": ((1, 4, 7), (4, 1, 3), {"feature_group_count": 4}),
    "depthwise, more features": ((1, 4, 7), (8, 1, 3), {"feature_group_count": 4}),
    "batch groups": ((4, 3, 7), (6, 3, 3), {"batch_group_count": 2}),
    "groups, 2d": (
        (1, 4, 5, 5),
        (6, 2, 2, 2),
        {"feature_group_count": 2, "window_strides": (1, 2)},
    ),
    "depthwise, 2d": ((1, 3, 5, 5), (3, 1, 3, 3), {"feature_group_count": 3, "padding": "SAME"}),
}


def _convolutions(d: Draw, table: dict) -> Model:
    def inner(p, ex):
        def each(name, kernel):
            spatial = kernel.ndim - 2
            settings = {"window_strides": (1,) * spatial, "padding": ((0, 0),) * spatial}
            settings |= table[name][2]
            return lax.conv_general_dilated(ex[name], kernel, **settings)

        return leaves_used(p, each)

    params = {name: d(*kernel, scale=0.5) for name, (_, kernel, _) in table.items()}
    return weighted(inner, params, {name: d.data(*x) for name, (x, *_) in table.items()})


@model
def convolutions_1d(d: Draw) -> Model:
    return _convolutions(d, CONVOLUTIONS_1D)


@model
def convolutions_2d(d: Draw) -> Model:
    return _convolutions(d, CONVOLUTIONS_2D)


@model
def convolutions_in_groups(d: Draw) -> Model:
    return _convolutions(d, CONVOLUTIONS_IN_GROUPS)


@model
def convolutional_network(d: Draw) -> Model:
    """Biases, pooling, a kernel used twice, one that is a product, a transposed convolution."""

    def inner(p, ex):
        def conv(x, kernel, **settings):
            return lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
            )

        x = ex["x"][None]
        x = jax.nn.relu(conv(x, p["k1"]) + p["b1"][None, None, None])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jnp.tanh(conv(x, p["k2"]))
        x = jnp.tanh(conv(x, p["k2"], rhs_dilation=(2, 2)) + conv(x, jnp.flip(p["k2"], (0, 1))))
        x = lax.conv_transpose(
            x, p["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = conv(x, jnp.einsum("hc,wd->hwcd", p["rows"], p["columns"]))
        return jnp.sum(jnp.mean(x, axis=(0, 1, 2)) ** 2)

    shapes = {"k1": (3, 3, 1, 4), "b1": (4,), "k2": (2, 2, 4, 4), "up": (3, 3, 4, 2)}
    params = {name: d(*shape, scale=0.4) for name, shape in shapes.items()}
    params |= {"rows": d(2, 2), "columns": d(3, 2)}
    return weighted(inner, params, {"x": d.data(6, 6, 1)})


# Weights that do not train.


@model
def lora(d: Draw) -> Model:
    """Low-rank changes of frozen weights, which are closed over."""
    frozen = {"w1": d(8, 9), "w2": d(9, 8)}

    def inner(p, ex):
        h = ex["x"]
        for name, w in frozen.items():
            low = p[name]
            h = rms(jnp.tanh(h @ w.astype(h.dtype) + 0.5 * (h @ low["a"]) @ low["b"]))
        return jnp.sum(h[:, 0])

    params = {name: {"a": d(w.shape[0], 2), "b": d(2, w.shape[1])} for name, w in frozen.items()}
    return weighted(inner, params, {"x": d.data(T, 8)})


@model
def lora_with_stopped_base(d: Draw) -> Model:
    def inner(p, ex):
        w = lax.stop_gradient(p["w"]) + p["a"] @ p["b"]
        return jnp.sum(jnp.tanh(ex["x"] @ w) * p["scale"])

    params = {"w": d(6, 5), "a": d(6, 2), "b": d(2, 5), "scale": d()}
    return weighted(inner, params, {"x": d.data(T, 6)})


@model
def unused_and_empty_leaves(d: Draw) -> Model:
    def inner(p, ex):
        dead = jax.nn.relu(ex["x"] @ p["dead"] - 1e3)
        used = jnp.sum(jnp.tanh(ex["x"] @ p["used"])) + jnp.sum(dead @ p["after dead"])
        return used + jnp.sum(p["empty"]) + 0.0 * jnp.sum(p["times zero"] ** 2)

    params = {
        "used": d(4, 3),
        "dead": d(4, 3),
        "after dead": d(3, 2),
        "unused": (d(5, 2), d(), None),
        "empty": jnp.zeros((0, 3)),
        "times zero": d(3),
    }
    return weighted(inner, params, {"x": d.data(T, 4)})


@model
def no_gradient_at_all(d: Draw) -> Model:
    return weighted(
        lambda p, ex: jnp.sum(lax.stop_gradient(p["a"]) @ ex["x"]),
        {"a": d(2, 3), "b": d(4)},
        {"x": d.data(3)},
        has_gradient=False,
    )


@model
def scalar_parameter(d: Draw) -> Model:
    return weighted(lambda p, ex: jnp.sum(jnp.sin(p * ex["x"])), d(scale=1.0), {"x": d.data(4)})


@model
def regulariser(d: Draw) -> Model:
    """A term that depends on no data joins each gradient."""

    def inner(p, ex):
        penalty = sum(jnp.sum(w * w) for w in p.values())
        h = jnp.tanh(ex["x"] @ p["w1"]) @ p["w2"]
        return jnp.sum(h**2) + 0.1 * penalty + 0.1 * jnp.sum(jnp.abs(p["w1"].T @ p["w1"]))

    return weighted(inner, {"w1": d(6, 8), "w2": d(8, 3)}, {"x": d.data(2, 6)})


@model
def aux(d: Draw) -> Model:
    def inner(p, ex):
        h = jnp.tanh(ex["x"] @ p["w"])
        return jnp.sum(h @ p["v"]), {"h": h, "kind": ex["kind"] + 1, "mean": (jnp.mean(p["w"]),)}

    batch = {"x": d.data(2, 7), "kind": d.ints(9)}
    return weighted(inner, {"w": d(7, 6), "v": d(6, 5)}, batch, has_aux=True)


# Narrow types.


def _small_network(p, ex):
    x = ex["x"].astype(p["w1"].dtype)
    h = jnp.tanh(x @ p["w1"] + p["b1"][None])
    h = h * p["scale"][None] + p["embedding"][ex["tokens"]]
    return jnp.sum((h @ p["w2"]).astype(jnp.float32) ** 2)


def _network_params(d: Draw) -> dict:
    shapes = {"w1": (12, 10), "b1": (10,), "scale": (10,), "embedding": (7, 10), "w2": (10, 8)}
    return {name: d(*shape, scale=0.3) for name, shape in shapes.items()}


@model
def bfloat16_compute(d: Draw) -> Model:
    """float32 parameters, cast inside the loss."""

    def inner(p, ex):
        return _small_network(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), ex)

    batch = {"x": d.data(2, 12), "tokens": d.ints(7, 2)}
    return weighted(inner, _network_params(d), batch, rtol=0.02)


@model
def bfloat16_parameters(d: Draw) -> Model:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _network_params(d))
    return weighted(_small_network, params, {"x": d.data(2, 12), "tokens": d.ints(7, 2)}, rtol=0.02)


@model
def mixed_parameters(d: Draw) -> Model:
    """Leaves of three types in one tree, and products of one type into another."""

    def inner(p, ex):
        x = ex["x"].astype(p["narrow"].dtype)
        wide = p["wide"].dtype
        h = jnp.tanh(lax.dot(x, p["narrow"], preferred_element_type=wide))
        return jnp.sum((h @ p["wide"]).astype(p["half"].dtype) @ p["half"]).astype(wide)

    params = {
        "narrow": d(6, 5).astype(jnp.bfloat16),
        "wide": d(5, 4),
        "half": d(4, 3).astype(jnp.float16),
    }
    return weighted(inner, params, {"x": d.data(T, 6)}, rtol=0.02)


# Calls and rules of one's own.


@jax.custom_jvp
def _softsign(x, w):
    return (x @ w) / (1 + jnp.abs(x @ w))


@_softsign.defjvp
def _softsign_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    slope = 1 / (1 + jnp.abs(x @ w)) ** 2
    return _softsign(x, w), slope * (dx @ w + x @ dw)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, clip):
    return x @ w


_product.defvjp(
    lambda x, w, clip: (x @ w, (x, w)),
    lambda clip, kept, g: (jnp.clip(g, -clip, clip) @ kept[1].T, 2.0 * (kept[0].T @ g)),
)


@model
def custom_rules(d: Draw) -> Model:
    """A custom_jvp over a weight; a custom_vjp whose gradient is not that of its value."""

    def inner(p, ex):
        h = _softsign(ex["x"], p["jvp"])
        h = jnp.add(_product(h, p["vjp"], 0.1), jax.nn.elu(h @ p["vjp"]))
        return jnp.sum(jnp.tanh(h) ** 2)

    return weighted(inner, {"jvp": d(6, 8), "vjp": d(8, 7)}, {"x": d.data(2, 6)})


@model
def nested_jit_and_vmap(d: Draw) -> Model:
    @jax.jit
    def dense(w, x):
        return jnp.tanh(x @ w)

    @functools.partial(jax.jit, static_argnums=2)
    def block(p, x, times):
        for _ in range(times):
            x = dense(p["square"], x)  # the same jaxpr, called several times
        return dense(p["out"], x)

    def inner(p, ex):
        h = block(p, ex["x"], 2)
        rows = jax.vmap(lambda row: p["row"] @ row)(h)
        heads = jax.vmap(lambda w, x: x @ w, in_axes=(0, None), out_axes=1)(p["heads"], rows)
        return jnp.sum(jax.jit(jnp.sin)(heads))

    params = {"square": d(6, 6), "out": d(6, 5), "row": d(4, 5), "heads": d(3, 4, 2, scale=0.5)}
    return weighted(inner, params, {"x": d.data(T, 6)})


@model
def gradient_inside_the_loss(d: Draw) -> Model:
    """A penalty on the gradient with respect to the input, and a directional derivative."""

    def inner(p, ex):
        def energy(x):
            return jnp.sum(jnp.tanh(x @ p["w1"]) @ p["w2"])

        slope = jax.grad(energy)(ex["x"])
        _, tangent = jax.jvp(energy, (ex["x"],), (ex["v"],))
        return energy(ex["x"]) + jnp.sum(slope**2) + tangent**2

    params = {"w1": d(6, 8), "w2": d(8, 3)}
    return weighted(inner, params, {"x": d.data(2, 6), "v": d.data(2, 6)})


@model
def dropout(d: Draw) -> Model:
    def inner(p, ex):
        h = jnp.tanh(ex["x"] @ p["w1"])
        kept = jax.random.bernoulli(ex["key"], jnp.float32(0.6), h.shape)
        return jnp.sum((jnp.where(kept, h / 0.6, 0.0) @ p["w2"]) ** 2)

    keys = jax.random.split(jax.random.key(3), BATCH)
    return weighted(inner, {"w1": d(6, 8), "w2": d(8, 3)}, {"x": d.data(2, 6), "key": keys})


# Primitives that nobody thought of.


@model
def linear_algebra(d: Draw) -> Model:
    def inner(p, ex):
        x, w = ex["x"], p["w"]
        eye = jnp.eye(4, dtype=w.dtype)
        factor = jnp.linalg.cholesky(w @ w.T + x.T @ x + eye)
        solved = jnp.linalg.solve(p["a"] + 3 * eye, x.T)
        triangle = lax.linalg.triangular_solve(
            p["a"] @ p["a"].T + eye, x, left_side=False, lower=True
        )
        waves = jnp.abs(jnp.fft.fft(x @ w)) ** 2 + jnp.real(jnp.fft.ifft(x @ p["a"])) ** 2
        return jnp.sum(jnp.tanh(factor)) + sum(
            jnp.mean(jnp.sin(y)) for y in (solved, triangle, waves)
        )

    return weighted(inner, {"w": d(4, 4), "a": d(4, 4)}, {"x": d.data(T, 4)})


@model
def sorting_and_scans(d: Draw) -> Model:
    def inner(p, ex):
        x = ex["x"] @ p["w"]
        x = jnp.sort(x, axis=0) + jnp.cumsum(x, axis=0) + lax.cummax(x, axis=1)
        decay = jax.nn.sigmoid(x @ p["decay"])

        def step(a, b):
            return a[0] * b[0], a[1] * b[0] + b[1]

        _, states = lax.associative_scan(step, (decay, x))
        order = jnp.argsort(states[:, 0])
        top, _ = lax.top_k(states[order].T, 2)
        return jnp.sum(jnp.max(states, axis=0)) + jnp.sum(jnp.sin(top) @ p["out"])

    params = {"w": d(5, 6), "decay": d(6, 6), "out": d(2, 3)}
    return weighted(inner, params, {"x": d.data(4, 5)})


_mystery = Primitive("mystery_product")
_mystery.def_impl(lambda x, w: x @ w)
_mystery.def_abstract_eval(
    lambda x, w: ShapedArray((x.shape[0], w.shape[1]), jnp.result_type(x, w))
)
mlir.register_lowering(_mystery, mlir.lower_fun(lambda x, w: x @ w, multiple_results=False))
ad.defbilinear(
    _mystery,
    lambda g, x, w: _mystery.bind(g, w.T),
    lambda g, x, w: _mystery.bind(x.T, g),
)


def _mystery_batched(args, axes):
    args = [
        jnp.moveaxis(x, axis, 0) if axis is not None else x
        for x, axis in zip(args, axes, strict=True)
    ]
    letters = ["b" if axis is not None else "" for axis in axes]
    return jnp.einsum(f"{letters[0]}td,{letters[1]}df->btf", *args), 0


batching.primitive_batchers[_mystery] = _mystery_batched


@model
def unknown_primitive(d: Draw) -> Model:
    """Its own derivative is the same primitive: nothing that a matcher could know."""

    def inner(p, ex):
        h = jnp.tanh(_mystery.bind(ex["x"], p["mystery"]))
        h = jnp.tanh(h @ p["known"]) + _mystery.bind(h, p["known"])
        return nll(h @ p["embedding"].T, ex["tokens"]) + jnp.sum(p["embedding"][ex["tokens"]])

    params = {"mystery": d(6, 7), "known": d(7, 5), "embedding": d(11, 5)}
    tokens = next_tokens(d, time=1)["tokens"]
    return weighted(inner, params, {"x": d.data(2, 6), "tokens": tokens})
