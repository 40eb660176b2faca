"""Small models over bare arrays: products, embeddings, convolutions, weights used in many ways."""

import jax
import jax.numpy as jnp
from jax import lax
from lazy_reference import Draw, Model, model, weighted

from dpjax.types import PyTree

T = 3  # positions of an example


def rms(x: jax.Array) -> jax.Array:
    """Every row at unit size, without a parameter."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.01)


def nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Summed cross-entropy in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1)) - jnp.sum(chosen)


def leaves_used(params: PyTree, each) -> jax.Array:
    """The sum of ``each(name, leaf)`` over a dict: many independent leaves in one model."""
    parts = [jnp.sum(jnp.sin(each(name, leaf))) for name, leaf in params.items()]
    return sum(parts[1:], parts[0])


# Products.


@model
def mlp(d: Draw) -> Model:
    def inner(p, ex):
        h = jnp.tanh(ex["x"] @ p["w1"] + p["b1"])
        return jnp.sum((h @ p["w2"] + p["b2"]) ** 2)

    return weighted(inner, {"w1": d(6, 8), "b1": d(8), "w2": d(8, 2), "b2": d(2)}, {"x": d.data(6)})


@model
def mlp_over_few_positions(d: Draw) -> Model:
    """Sides larger than the positions: Gram matrices are the cheap way."""

    def inner(p, ex):
        h = jax.nn.silu(ex["x"] @ p["w1"] + p["b1"][None])
        h = jax.nn.gelu(h @ p["w2"] + p["b2"][None])
        return jnp.mean((h @ p["w3"]) ** 2)

    params = {"w1": d(12, 16), "b1": d(16), "w2": d(16, 14), "b2": d(14), "w3": d(14, 5)}
    return weighted(inner, params, {"x": d.data(2, 12)})


@model
def mlp_over_many_positions(d: Draw) -> Model:
    """More positions than the sides are wide: products are the cheap way."""

    def inner(p, ex):
        h = jax.nn.relu(ex["x"] @ p[0] + p[1][None])
        return jnp.mean((h @ p[2]) ** 2)

    return weighted(inner, [d(3, 4), d(4), d(4, 2)], {"x": d.data(20, 3)})


EINSUMS = {
    "td,df->tf": (6, 8),
    "td,fd->tf": (8, 6),
    "td,dhk->thk": (6, 2, 4),
    "td,hdk->htk": (2, 6, 4),
    "td,hkd->kth": (3, 4, 6),
    "ghd,ghdf->ghf": (2, 3, 6, 5),
    "ghd,hdf->ghf": (3, 6, 5),
    "ghd,gdf->hfg": (2, 6, 5),
    "ghd,fgd->hgf": (5, 2, 6),
    "ghd,hdg->gh": (3, 6, 2),
    "ghd,hgd->": (3, 2, 6),
    "ghd,hdf->gf": (3, 6, 5),
    "td,f->tdf": (4,),
    "td,d->t": (6,),
    "td,d->td": (6,),
    "td,t->d": (T,),
    "td,->td": (),
    "td,dd->t": (6, 6),
    "td,->": (),
    "td,td->": (T, 6),
    "td,fe->tdfe": (2, 3),
    "ghd,gf->hdf": (2, 4),
}


@model
def einsums(d: Draw) -> Model:
    def inner(p, ex):
        def each(name, w):
            data = ex["x3"] if name.startswith("ghd") else ex["x2"]
            return jnp.einsum(name, data, w)

        return leaves_used(p, each)

    params = {name: d(*shape) for name, shape in EINSUMS.items()}
    return weighted(inner, params, {"x2": d.data(T, 6), "x3": d.data(2, 3, 6)})


@model
def other_products(d: Draw) -> Model:
    """Products that are no plain matrix product, or hold no data at all."""

    def inner(p, ex):
        x = ex["x"]
        chain = jnp.einsum("td,df,fg->tg", x, p["first"], p["second"])
        merged = x @ (p["left"] @ p["right"])
        outer = jnp.sum(p["vector"][:, None] * p["other"][None] * (x.T @ x))
        constant = jnp.sum(jnp.ones((2, 6), x.dtype) @ p["no data"]) + jnp.mean(p["mean"] ** 2)
        bilinear = jnp.einsum("td,de,te->t", x, p["bilinear"], x)
        square = p["square"] @ p["square"]
        wide = lax.dot_general(
            x, p["wide"], (((1,), (0,)), ((), ())), preferred_element_type=x.dtype
        )
        parts = (chain, merged, bilinear, x @ square, wide)
        return sum((jnp.sum(jnp.cos(part)) for part in parts), outer + constant)

    shapes = {
        "first": (6, 4),
        "second": (4, 5),
        "left": (6, 2),
        "right": (2, 7),
        "vector": (6,),
        "other": (6,),
        "no data": (6, 3),
        "mean": (4, 4),
        "bilinear": (6, 6),
        "square": (6, 6),
        "wide": (6, 3),
    }
    params = {name: d(*shape) for name, shape in shapes.items()}
    return weighted(inner, params, {"x": d.data(T, 6)})


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention; q [t, k, g, w], k and v [t, k, w]."""
    t = q.shape[0]
    scores = jnp.einsum("tkgw,skw->kgts", q, k)
    causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgts,skw->tkgw", weights, v)


@model
def attention(d: Draw) -> Model:
    def inner(p, ex):
        x = ex["x"]
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        y = x + jnp.einsum("thk,hkd->td", attend(q[:, :, None], k, v)[:, :, 0], p["o"])
        return jnp.mean(y**2)

    params = {**{name: d(8, 2, 4) for name in "qkv"}, "o": d(2, 4, 8)}
    return weighted(inner, params, {"x": d.data(T, 8)})


@model
def grouped_query_attention(d: Draw) -> Model:
    def inner(p, ex):
        x = ex["x"]
        q = jnp.einsum("td,dkgw->tkgw", x, p["q"])
        k, v = (x @ p["kv"]).reshape(T, 2, 2, 4).swapaxes(0, 1)
        y = attend(q, k, v).reshape(T, 16) @ p["o"]
        return jnp.sum(jnp.tanh(y))

    params = {"q": d(8, 2, 2, 4), "kv": d(8, 16), "o": d(16, 8)}
    return weighted(inner, params, {"x": d.data(T, 8)})


@model
def fused_projections(d: Draw) -> Model:
    """One weight for several projections: its product is split, or it is itself."""

    def inner(p, ex):
        x = rms(ex["x"])
        q, k, v = jnp.split(x @ p["product is split"], 3, axis=1)
        a, b, c = jnp.split(p["weight is split"], 3, axis=1)
        left, right = p["sliced"][:, :6], p["sliced"][:, 4:]  # they overlap
        rows = p["rows"]
        h = jnp.tanh(attend(q[:, None, None], k[:, None], v[:, None])[:, 0, 0])
        h = jax.nn.softmax(h @ a, axis=1) * (h @ b) + h @ c
        h = jnp.tanh(h @ left) + h @ right
        return jnp.sum((h[:, :3] @ rows[:3] - h[:, 3:] @ rows[3:] + h @ rows[::-1]) ** 2)

    params = {
        "product is split": d(6, 18),
        "weight is split": d(6, 18),
        "sliced": d(6, 10),
        "rows": d(6, 4),
    }
    return weighted(inner, params, {"x": d.data(T, 6)})


# What happens to a weight before it is used.


@model
def weights_joined(d: Draw) -> Model:
    def inner(p, ex):
        x = ex["x"]
        joined = jnp.concatenate([p["a"], p["b"], 2 * p["a"]], axis=1)
        stacked = jnp.stack([p["a"], p["c"]])
        h = jnp.tanh(x @ joined)
        h = jnp.einsum("td,ldf->tf", h[:, :6], stacked)
        layers = p["layers"]
        for layer in range(3):
            h = jnp.tanh(h @ layers[layer]) + h
        h = h @ lax.dynamic_index_in_dim(layers, ex["which"], 0, keepdims=False)
        return jnp.sum(h @ layers[ex["which"]] + h @ layers[-1])

    params = {"a": d(6, 6), "b": d(6, 2), "c": d(6, 6), "layers": d(3, 6, 6, scale=0.4)}
    return weighted(inner, params, {"x": d.data(T, 6), "which": d.ints(3)})


PREPARED = {
    "padded": lambda w: jnp.pad(w, ((0, 0), (1, 2))),
    "padded inside": lambda w: lax.pad(w, jnp.zeros((), w.dtype), ((0, 0, 0), (0, 1, 2))),
    "cropped": lambda w: lax.pad(w, jnp.zeros((), w.dtype), ((0, 0, 0), (-1, 2, 0))),
    "scaled": lambda w: 0.5 * w,
    "divided": lambda w: w / 3,
    "negated": lambda w: -w,
    "transposed": lambda w: w.T.reshape(6, 5),
    "reversed": lambda w: w[::-1, ::2],
    "rolled": lambda w: jnp.roll(w, 2, axis=0),
    "half": lambda w: w.astype(jnp.float16).astype(w.dtype),
    "repeated": lambda w: jnp.repeat(w, 2, axis=1),
    "tiled": lambda w: jnp.tile(w, (1, 2)),
    "broadcast": lambda w: jnp.broadcast_to(w[:, None], (6, 3, 5)).reshape(6, 15),
    "masked": lambda w: jnp.where(jnp.arange(30).reshape(6, 5) % 2 == 0, w, 0.0),
    "triangular": lambda w: jnp.tril(w),
    "squared": lambda w: w * w,
    "normalised": lambda w: w / jnp.sqrt(jnp.sum(w * w) + 0.1),
    "rows normalised": lambda w: w / jnp.sqrt(jnp.sum(w * w, axis=1, keepdims=True) + 0.1),
    "centred": lambda w: w - jnp.mean(w),
    "summed": lambda w: jnp.sum(w.reshape(6, 5, 1), axis=2) + jnp.sum(w, axis=1, keepdims=True),
    "selected": lambda w: w[:, jnp.array([0, 3, 3, 1])],
    "set": lambda w: w.at[1].set(0.5).at[:, 2].multiply(2.0),
    "updated": lambda w: lax.dynamic_update_slice(jnp.zeros((6, 9), w.dtype), w, (0, 2)),
    "cast to bfloat16": lambda w: w.astype(jnp.bfloat16).astype(w.dtype),
    "sorted": lambda w: jnp.sort(w, axis=0),
    "cumulated": lambda w: jnp.cumsum(w, axis=1),
    "flipped sign": lambda w: w * jnp.array([1, -1, 1, -1, 1], w.dtype)[None],
}
_ROUNDED = ("half", "cast to bfloat16")


def _prepared(d: Draw, names: list[str], rtol: float) -> Model:
    def inner(p, ex):
        return leaves_used(p, lambda name, w: ex["x"] @ PREPARED[name](w))

    params = {name: d(6, 5) for name in names}
    return weighted(inner, params, {"x": d.data(T, 6)}, rtol=rtol)


@model
def weights_prepared(d: Draw) -> Model:
    return _prepared(d, [name for name in PREPARED if name not in _ROUNDED], 1e-5)


@model
def weights_rounded(d: Draw) -> Model:
    return _prepared(d, list(_ROUNDED), 2.0**-8)


@model
def weights_used_both_ways(d: Draw) -> Model:
    """x W and x W', and one weight four times."""

    def inner(p, ex):
        h = rms(jnp.tanh(ex["x"] @ p["both"]) @ p["both"].T)
        for _ in range(3):
            h = rms(h + jnp.tanh(h @ p["often"]))
        return jnp.sum((h @ p["often"].T) ** 2)

    return weighted(inner, {"both": d(8, 5), "often": d(8, 8)}, {"x": d.data(2, 8)})


@model
def weights_in_several_shapes(d: Draw) -> Model:
    def inner(p, ex):
        w = p["w"]
        h = jnp.tanh(ex["x"] @ w)  # [t, 8]
        h = jnp.tanh(h[:, :4] @ w.reshape(4, 12))  # [t, 12]
        h = jnp.einsum("tab,bca->tc", h.reshape(T, 6, 2), w.reshape(2, 4, 6))
        return jnp.sum(jnp.sin(h @ w.T.reshape(12, 4)[:4])) + jnp.sum(jnp.cos(w[0]))

    return weighted(inner, {"w": d(6, 8)}, {"x": d.data(T, 6)})


@model
def mixture_of_experts(d: Draw) -> Model:
    """Routed densely; and by the top two experts of each position."""

    def inner(p, ex):
        x = ex["x"]
        gates = jax.nn.softmax(x @ p["router"], axis=1)
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
        x = x + jnp.einsum("tef,efd,te->td", hidden, p["down"], gates)
        best, index = lax.top_k(x @ p["router"], 2)
        each = jnp.einsum("td,tjdf->tjf", x, p["up"][index])
        y = jnp.einsum("tjf,tj->tf", each, jax.nn.softmax(best, axis=1))
        return jnp.mean(y**2)

    params = {"router": d(6, 3), "up": d(3, 6, 5, scale=0.4), "down": d(3, 5, 6, scale=0.4)}
    return weighted(inner, params, {"x": d.data(T, 6)})


@model
def normalisations(d: Draw) -> Model:
    def inner(p, ex):
        x = rms(ex["x"]) * p["rms"][None]
        x = jnp.tanh(x @ p["w"])
        centred = x - jnp.mean(x, axis=1, keepdims=True)
        x = rms(centred) * p["scale"][None] + p["bias"][None]
        groups = rms(x.reshape(T, 2, 3)) * p["groups"][None, :, None]
        return jnp.sum(jax.nn.softmax(groups.reshape(T, 6), axis=1)[:, 0]) * p["scalar"] ** 2

    params = {
        "rms": d(6),
        "w": d(6, 6),
        "scale": d(6),
        "bias": d(6),
        "groups": d(2),
        "scalar": d(),
    }
    return weighted(inner, params, {"x": d.data(T, 6)})


# Embeddings.

LOOKUPS = {
    "default": ((7, 4), lambda w, i: w[i]),
    "take": ((7, 4), lambda w, i: jnp.take(w, i % 7, axis=0)),
    "clip": ((7, 4), lambda w, i: jnp.take(w, i, axis=0, mode="clip")),
    "wrap": ((7, 4), lambda w, i: jnp.take(w, i, axis=0, mode="wrap")),
    "fill": ((7, 4), lambda w, i: w.at[i].get(mode="fill", fill_value=0.0)),
    "fill without wrapping": (
        (7, 4),
        lambda w, i: w.at[i].get(mode="fill", fill_value=0.0, wrap_negative_indices=False),
    ),
    "in bounds": ((7, 4), lambda w, i: w.at[i % 7].get(mode="promise_in_bounds")),
    "one token": ((7, 4), lambda w, i: w[i[0]]),
    "two axes of tokens": ((7, 4), lambda w, i: w[jnp.stack([i, i[::-1]])]),
    "columns": ((4, 7), lambda w, i: w[:, i]),
    "columns by take": ((4, 7), lambda w, i: jnp.take(w, i, axis=1, mode="clip")),
    "middle axis": ((2, 7, 3), lambda w, i: w[:, i]),
    "three axes": ((7, 2, 3), lambda w, i: w[i]),
    "vector": ((7,), lambda w, i: w[i]),
    "pairs": ((7, 5), lambda w, i: w[i, i % 5]),
    "one-hot": ((7, 4), lambda w, i: jax.nn.one_hot(i, 7, dtype=w.dtype) @ w),
    "along axis": ((T + 2, 7), lambda w, i: jnp.take_along_axis(w, i[:, None] % 7, axis=1)),
    "scaled": ((7, 4), lambda w, i: 2.0 * w[i]),
    "transposed": ((4, 7), lambda w, i: w.T[i]),
    "twice": ((7, 4), lambda w, i: w[i] * w[i[::-1]]),
    "part of it": ((9, 4), lambda w, i: w[1:8][i]),
}


@model
def lookups(d: Draw) -> Model:
    """Tokens repeat, are negative and out of range."""

    def inner(p, ex):
        return leaves_used(p, lambda name, w: LOOKUPS[name][1](w, ex["tokens"]))

    params = {name: d(*LOOKUPS[name][0], scale=1.0) for name in LOOKUPS}
    tokens = d.ints(7, T + 2).at[:, 0].set(jnp.array([-1, 9, 6, -9, 0]))
    return weighted(inner, params, {"tokens": tokens.at[:, 3].set(tokens[:, 1])})


def next_tokens(d: Draw, vocabulary: int = 11, time: int = 4) -> dict:
    """A batch of tokens, some of them repeated."""
    tokens = d.ints(vocabulary, time + 1)
    return {"tokens": tokens.at[:, 2].set(tokens[:, 0])}


def language_model(p, ex, head):
    """An embedding, positions, one layer and a head."""
    tokens = ex["tokens"]
    h = p["embedding"][tokens[:-1]] + p["positions"][: tokens.shape[0] - 1]
    h = rms(h + jnp.tanh(h @ p["w"]))
    return nll(h @ head(p), tokens[1:])


@model
def untied_embedding(d: Draw) -> Model:
    params = {"embedding": d(11, 6, scale=1.0), "positions": d(9, 6), "w": d(6, 6)}
    return weighted(
        lambda p, ex: language_model(p, ex, lambda p: p["head"]),
        {**params, "head": d(6, 11)},
        next_tokens(d),
    )


@model
def tied_embedding(d: Draw) -> Model:
    return weighted(
        lambda p, ex: language_model(p, ex, lambda p: p["embedding"].T),
        {"embedding": d(11, 6, scale=1.0), "positions": d(9, 6), "w": d(6, 6)},
        next_tokens(d),
    )


@model
def tied_embedding_over_many_positions(d: Draw) -> Model:
    """As `tied_embedding`, where the leaf is smaller than its operands."""
    return weighted(
        lambda p, ex: language_model(p, ex, lambda p: 0.5 * p["embedding"].T),
        {"embedding": d(3, 2, scale=1.0), "positions": d(20, 2), "w": d(2, 2)},
        next_tokens(d, 3, 20),
    )


@model
def tied_embedding_with_casts(d: Draw) -> Model:
    def narrow(p):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)

    def inner(p, ex):
        return language_model(narrow(p), ex, lambda p: p["embedding"].T).astype(jnp.float32)

    params = {"embedding": d(11, 6, scale=1.0), "positions": d(9, 6), "w": d(6, 6)}
    return weighted(inner, params, next_tokens(d), rtol=0.03)


@model
def positions_from_a_start(d: Draw) -> Model:
    def inner(p, ex):
        h = lax.dynamic_slice_in_dim(p["positions"], ex["start"], T, axis=0)
        h = (
            h
            + lax.dynamic_slice(p["wide"], (jnp.zeros_like(ex["start"]), ex["start"]), (T, 4))
            + p["fixed"][2 : 2 + T]
        )
        return jnp.sum(jnp.tanh(ex["x"] + h) @ p["w"])

    params = {"positions": d(8, 4), "wide": d(T, 9), "fixed": d(6, 4), "w": d(4, 3)}
    batch = {"x": d.data(T, 4), "start": jnp.array([0, 3, 7, 2, 5], jnp.int32)}
    return weighted(inner, params, batch)
