"""Small models with loops, rematerialisation and branches."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from lazy_models import T, next_tokens, nll, rms
from lazy_reference import Draw, Model, model, weighted

from dpjax.types import PyTree

LAYERS = 3


def block(p: dict, h: jax.Array) -> jax.Array:
    """A residual block with weights, a bias and a scale; used under every kind of loop."""
    inner = jnp.tanh(rms(h) * p["scale"][None] @ p["up"] + p["bias"][None])
    inner = checkpoint_name(inner, "inner")
    return h + 0.5 * inner @ p["down"]


def block_params(d: Draw, *stack: int, width: int = 6) -> dict:
    return {
        "scale": 1 + d(*stack, width, scale=0.2),
        "up": d(*stack, width, 8, scale=0.4),
        "bias": d(*stack, 8, scale=0.4),
        "down": d(*stack, 8, width, scale=0.4),
    }


def classify(p: dict, ex: dict, layers) -> jax.Array:
    """Tied embedding and head around ``layers(h)``."""
    h = layers(p["embedding"][ex["tokens"][:-1]])
    return nll(rms(h) @ p["embedding"].T, ex["tokens"][1:])


def decoder(d: Draw, layers, blocks: PyTree, **options) -> Model:
    """A model whose loss is `classify` around ``layers(blocks, h)``."""
    params = {"embedding": d(11, 6, scale=1.0), "blocks": blocks}
    return weighted(
        lambda p, ex: classify(p, ex, lambda h: layers(p["blocks"], h)),
        params,
        next_tokens(d, time=T),
        **options,
    )


# Loops.


@model
def scan_of_layers(d: Draw) -> Model:
    def layers(blocks, h):
        return lax.scan(lambda h, p: (block(p, h), None), h, blocks)[0]

    return decoder(d, layers, block_params(d, LAYERS))


@model
def scan_backwards_and_unrolled(d: Draw) -> Model:
    def layers(blocks, h):
        def body(h, p):
            h = block(p, h)
            return h, jnp.mean(h, axis=0)

        h, ys = lax.scan(body, h, blocks, reverse=True, unroll=2)
        return h + jnp.cumsum(ys, axis=0)

    return decoder(d, layers, block_params(d, LAYERS))


@model
def scan_over_few_positions(d: Draw) -> Model:
    """Wide stacked weights of every layout, so that Gram matrices pay inside the loop."""

    def inner(p, ex):
        def body(h, p):
            h = rms(h + jnp.tanh(jnp.einsum("td,dhk,hfk->tf", h, p["a"], p["b"])))
            h = h + jnp.tanh(h @ p["c"].T) @ p["d"].reshape(12, 10)
            return h + jnp.concatenate([p["e"], p["e"]])[None] * (h @ p["f"][:, 1:]), None

        return jnp.sum(lax.scan(body, ex["x"], p)[0] ** 2)

    shapes = {
        "a": (10, 2, 6),
        "b": (2, 10, 6),
        "c": (12, 10),
        "d": (4, 3, 10),
        "e": (5,),
        "f": (10, 11),
    }
    params = {name: d(LAYERS, *shape, scale=0.3) for name, shape in shapes.items()}
    return weighted(inner, params, {"x": d.data(1, 10)})


@model
def nested_scans(d: Draw) -> Model:
    def layers(blocks, h):
        def group(h, p):
            return lax.scan(lambda h, q: (block(q, h), None), h, p)

        return lax.scan(group, h, blocks)[0]

    return decoder(d, layers, block_params(d, 2, 2))


@model
def scan_with_shared_weights(d: Draw) -> Model:
    """A recurrent cell over positions, then one block run several times."""

    def inner(p, ex):
        def cell(h, x):
            h = jnp.tanh(p["input"] @ x + p["state"] @ h + p["bias"])
            return h, p["output"] @ h

        _, ys = lax.scan(cell, jnp.zeros(6, ex["x"].dtype), ex["x"])
        ys, _ = lax.scan(lambda h, _: (block(p["block"], h), None), ys, length=2)
        return jnp.sum(ys**2)

    params = {"input": d(6, 5), "state": d(6, 6), "bias": d(6), "output": d(6, 6)}
    return weighted(inner, {**params, "block": block_params(d)}, {"x": d.data(4, 5)})


@model
def scan_with_own_and_shared_weights(d: Draw) -> Model:
    """Stacked weights, a shared one that is also used outside, and one that rides in the carry."""

    def inner(p, ex):
        tokens = ex["tokens"]

        def body(carry, layer):
            h, riding = carry
            looked_up = p["embedding"][tokens[:-1]]
            h = rms(block(layer, h) + jnp.tanh(h @ p["shared"]) + 0.1 * looked_up)
            return (h @ riding, riding), jnp.sum(h)

        h = p["embedding"][tokens[:-1]] @ p["shared"]
        (h, _), sums = lax.scan(body, (h, p["riding"]), p["blocks"])
        return nll(h @ p["shared"] @ p["embedding"].T, tokens[1:]) + jnp.sum(jnp.sin(sums))

    params = {"embedding": d(11, 6), "shared": d(6, 6), "riding": d(6, 6)}
    return weighted(inner, {**params, "blocks": block_params(d, LAYERS)}, next_tokens(d, time=T))


@model
def scan_over_positions_with_lookups(d: Draw) -> Model:
    """One token at a time: the rows of an embedding are read inside the loop."""

    def inner(p, ex):
        def cell(h, tokens):
            token, following = tokens
            h = jnp.tanh(p["embedding"][token] + h @ p["state"])
            return h, jax.nn.log_softmax(p["embedding"] @ h)[following]

        tokens = ex["tokens"]
        _, ys = lax.scan(cell, p["start"], (tokens[:-1], tokens[1:]))
        return jnp.sum(ys)

    params = {"embedding": d(11, 6, scale=1.0), "state": d(6, 6), "start": d(6)}
    return weighted(inner, params, next_tokens(d, time=T))


@model
def scan_over_a_part(d: Draw) -> Model:
    """Stacked weights that are sliced, joined or transposed before the loop."""

    def layers(blocks, h):
        def body(h, p):
            return block(p, h), None

        first = jax.tree.map(lambda x: x[:2], blocks)
        rest = jax.tree.map(lambda x: x[2:], blocks)
        h, _ = lax.scan(body, h, first)
        h, _ = lax.scan(body, h, rest)
        return lax.scan(body, h, jax.tree.map(lambda x: x[::-1], blocks))[0]

    return decoder(d, layers, block_params(d, LAYERS))


@model
def loops_by_index(d: Draw) -> Model:
    """`fori_loop` with a layer number; a `while_loop` that no gradient passes through."""

    def inner(p, ex):
        def body(i, h):
            layer = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), p)
            return block(layer, h)

        h = lax.fori_loop(0, LAYERS, body, ex["x"])
        count = lax.while_loop(lambda c: c[1] < ex["stop"], lambda c: (c[0] + 1, c[1] * 2), (0, 1))
        scale = lax.while_loop(
            lambda s: jnp.sum(lax.stop_gradient(jnp.abs(h))) * s > 1.0,
            lambda s: s * 0.5,
            jnp.ones((), h.dtype),
        )
        return jnp.sum(jnp.sin(block(jax.tree.map(lambda x: x[count[0] % LAYERS], p), h))) * scale

    batch = {"x": d.data(T, 6), "stop": d.ints(40)}
    return weighted(inner, block_params(d, LAYERS), batch)


# Rematerialisation.

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("inner"),
}


@model
def scan_of_checkpoints(d: Draw) -> Model:
    def layers(blocks, h):
        body = jax.checkpoint(lambda h, p: (block(p, h), None))
        return lax.scan(body, h, blocks)[0]

    return decoder(d, layers, block_params(d, LAYERS))


def _under_policy(d: Draw, name: str) -> Model:
    def layers(blocks, h):
        remat = functools.partial(jax.checkpoint, policy=POLICIES[name], prevent_cse=False)
        h, _ = lax.scan(remat(lambda h, p: (block(p, h), None)), h, blocks)
        last = jax.tree.map(lambda x: x[0], blocks)
        return jax.checkpoint(block, policy=POLICIES[name])(last, h)

    return decoder(d, layers, block_params(d, LAYERS))


@model
def checkpoint_nothing(d: Draw) -> Model:
    return _under_policy(d, "nothing")


@model
def checkpoint_everything(d: Draw) -> Model:
    return _under_policy(d, "everything")


@model
def checkpoint_dots(d: Draw) -> Model:
    return _under_policy(d, "dots")


@model
def checkpoint_dots_without_batch(d: Draw) -> Model:
    return _under_policy(d, "dots without batch")


@model
def checkpoint_names(d: Draw) -> Model:
    return _under_policy(d, "names")


@model
def checkpoints_unscanned(d: Draw) -> Model:
    """A region for each block, and one weight in two regions."""

    def layers(blocks, h):
        for p in blocks:
            h = jax.checkpoint(block)(p, h)
        return jax.checkpoint(block)(blocks[0], h)

    return decoder(d, layers, [block_params(d), block_params(d)])


@model
def checkpoint_of_everything_tied(d: Draw) -> Model:
    """Embedding and head inside regions, each its own or both in one."""

    def inner(p, ex):
        tokens = ex["tokens"]
        look_up = jax.checkpoint(lambda p: p["embedding"][tokens[:-1]])
        head = jax.checkpoint(lambda p, h: nll(rms(h) @ p["embedding"].T, tokens[1:]))
        whole = jax.checkpoint(lambda p: classify(p, ex, lambda h: block(p["block"], h)))
        return head(p, block(p["block"], look_up(p))) + whole(p)

    params = {"embedding": d(11, 6, scale=1.0), "block": block_params(d)}
    return weighted(inner, params, next_tokens(d, time=T))


@model
def nested_checkpoints(d: Draw) -> Model:
    """Regions in regions, a scan in a region, a region in a scan in a region."""

    def layers(blocks, h):
        inner = jax.checkpoint(block)

        def outer(h, group):
            h, _ = lax.scan(lambda h, p: (inner(p, h), None), h, group)
            return jax.checkpoint(lambda h: inner(jax.tree.map(lambda x: x[0], group), h))(h), None

        return lax.scan(jax.checkpoint(outer), h, blocks)[0]

    return decoder(d, layers, block_params(d, 2, 2))


@model
def checkpoint_over_few_positions(d: Draw) -> Model:
    def inner(p, ex):
        def body(h, p):
            h = rms(h + jnp.tanh(jnp.einsum("td,hkd->thk", h, p["a"])).reshape(2, 12))
            return h + (h @ p["b"].T) * p["c"][None], None

        h, _ = lax.scan(jax.checkpoint(body), ex["x"], p["stack"])
        return jnp.sum(jax.checkpoint(lambda h, w: jnp.tanh(h @ w) @ w.T)(h, p["last"]))

    shapes = {"a": (3, 4, 12), "b": (12, 12), "c": (12,)}
    stack = {name: d(LAYERS, *shape, scale=0.4) for name, shape in shapes.items()}
    return weighted(inner, {"stack": stack, "last": d(12, 9)}, {"x": d.data(2, 12)})


@model
def checkpoint_in_bfloat16(d: Draw) -> Model:
    def layers(blocks, h):
        def body(h, p):
            p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
            return block(p, h.astype(jnp.bfloat16)).astype(h.dtype), None

        return lax.scan(jax.checkpoint(body), h, blocks)[0]

    return decoder(d, layers, block_params(d, LAYERS), rtol=0.03)


# Branches.


@model
def conditionals(d: Draw) -> Model:
    def inner(p, ex):
        h = lax.cond(
            jnp.sum(ex["x"]) > 0,
            lambda h: jnp.tanh(h @ p["yes"]),
            lambda h: h @ p["no"] @ p["often"],
            ex["x"],
        )
        branches = [lambda h, w=p["experts"][i]: jnp.tanh(h @ w) for i in range(2)]
        h = lax.switch(ex["which"], [*branches, lambda h: h], h)
        h = h + lax.cond(ex["which"] == 2, lambda w: w[0], lambda w: 2 * w[1], p["often"])[None]
        return jnp.sum(jnp.sin(h @ p["often"]))

    shapes = {"yes": (6, 6), "no": (6, 6), "often": (6, 6), "experts": (2, 6, 6)}
    params = {name: d(*shape, scale=0.4) for name, shape in shapes.items()}
    batch = {"x": d.data(T, 6), "which": jnp.array([0, 1, 2, 5, -1], jnp.int32)}
    return weighted(inner, params, batch)


@model
def conditionals_in_loops(d: Draw) -> Model:
    """A branch on data and one on the layer number, in a scan of regions."""

    def layers(blocks, h):
        def body(h, step):
            i, p = step
            h = lax.cond(jnp.mean(h) > 0, block, lambda p, h: h - block(p, h), p, h)
            return lax.cond(i == 1, lambda h: jnp.tanh(h @ p["up"] @ p["down"]), rms, h), None

        return lax.scan(jax.checkpoint(body), h, (jnp.arange(LAYERS), blocks))[0]

    return decoder(d, layers, block_params(d, LAYERS))
