"""Models written in flax.nnx, flax.linen and equinox; the same code that a user would write."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from lazy_models import T, next_tokens, nll
from lazy_reference import Draw, Model, model, weighted

from dpjax.models import DecoderConfig, abstract_params, language_model_loss

NANO = DecoderConfig(
    vocabulary_size=11, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, d_ff=12
)


def _decoder(d: Draw, **changes) -> Model:
    config = dataclasses.replace(NANO, **changes)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda s: (d(*s.shape, scale=0.3) + 0.1).astype(s.dtype), shapes)
    batch = next_tokens(d, time=4)
    mask = d.ints(4, 5) > 0
    exact = dataclasses.replace(config, dtype="float64")  # pyright: ignore[reportArgumentType]
    narrow = config.dtype == "bfloat16"
    return weighted(
        language_model_loss(config),
        params,
        {**batch, "loss_mask": mask.at[:, 1].set(True)},
        rtol=0.05 if narrow else 1e-5,
        strict=not narrow,  # flax's norms promote bfloat16 statistics themselves
        reference_loss=language_model_loss(exact),
    )


@model
def nnx_decoder_tied(d: Draw) -> Model:
    return _decoder(d)


@model
def nnx_decoder_untied(d: Draw) -> Model:
    return _decoder(d, tied=False, norm="layernorm", activation="gelu")


@model
def nnx_decoder_bfloat16(d: Draw) -> Model:
    return _decoder(d, dtype="bfloat16")


class NnxNet(nnx.Module):
    """Embedding, convolution, attention, a recurrent cell, norms and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, kernel_size=(3,), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.cell = nnx.GRUCell(8, 6, rngs=rngs)
        self.head = nnx.LinearGeneral(6, (11,), rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        h = h + self.norm(nnx.relu(self.conv(h)))
        h = h + self.attention(h)
        state = jnp.zeros(6, h.dtype)
        out = []
        for row in h:
            state, y = self.cell(state, row)
            out.append(y)
        return self.head(jnp.stack(out))


@model
def nnx_network(d: Draw) -> Model:
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)))

    def inner(p, ex):
        return nll(nnx.merge(graph, p)(ex["tokens"][:-1]), ex["tokens"][1:])

    return weighted(inner, params, next_tokens(d, time=T), strict=False)


class LinenBlock(nn.Module):
    """Attention and a feed-forward layer, as the body of a scan."""

    @nn.compact
    def __call__(self, h, _):
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        return h + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(h)))), None


class LinenNet(nn.Module):
    """A tied embedding around a stack of blocks, scanned and rematerialised or not."""

    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        h = embed(tokens) + self.param("positions", nn.initializers.normal(0.5), (9, 8))[:T]
        if self.scanned:
            stack = nn.scan(
                nn.remat(LinenBlock),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            h, _ = stack()(h, None)
        else:
            h = nn.Conv(8, (2,), strides=1, padding="SAME")(h)
            h, _ = LinenBlock()(h, None)
            zeros = jnp.zeros(8, h.dtype)
            h = nn.RNN(nn.OptimizedLSTMCell(8))(h, initial_carry=(zeros, zeros))
            h = nn.Dropout(0.5, deterministic=True)(nn.GroupNorm(2)(h))
        return embed.attend(h)


def _linen(d: Draw, scanned: bool) -> Model:
    net = LinenNet(scanned)
    batch = next_tokens(d, time=T)
    params = net.init(jax.random.key(0), batch["tokens"][0, :-1])

    def inner(p, ex):
        logits = jnp.asarray(net.apply(p, ex["tokens"][:-1]))
        return nll(logits, ex["tokens"][1:])

    return weighted(inner, params, batch, strict=False)


@model
def linen_network(d: Draw) -> Model:
    return _linen(d, scanned=False)


@model
def linen_scan_of_checkpoints(d: Draw) -> Model:
    return _linen(d, scanned=True)


class EqxNet(eqx.Module):
    """Convolution, recurrent cells, attention and linear layers of equinox."""

    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    lstm: eqx.nn.LSTMCell
    gru: eqx.nn.GRUCell
    head: eqx.nn.Linear
    slope: jax.Array
    name: str = eqx.field(static=True)

    def __init__(self, key):
        keys = iter(jax.random.split(key, 6))
        self.embed = eqx.nn.Embedding(11, 8, key=next(keys))
        self.conv = eqx.nn.Conv1d(8, 8, 3, padding=1, key=next(keys))
        self.norm = eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_key_bias=True, key=next(keys))
        self.lstm = eqx.nn.LSTMCell(8, 6, key=next(keys))
        self.gru = eqx.nn.GRUCell(6, 6, key=next(keys))
        self.head = eqx.nn.Linear(6, 11, key=next(keys))
        self.slope = jnp.array(0.25)
        self.name = "net"

    def __call__(self, tokens):
        h = jax.vmap(self.embed)(tokens)
        h = h + jax.vmap(self.norm)(self.conv(h.T).T)
        h = h + self.attention(h, h, h, mask=jnp.tril(jnp.ones((T, T), bool)))

        def step(state, x):
            lstm, gru = state
            lstm = self.lstm(x, lstm)
            gru = self.gru(lstm[0], gru)
            return (lstm, gru), gru

        zeros = jnp.zeros(6, h.dtype)
        _, h = jax.lax.scan(step, ((zeros, zeros), zeros), h)
        h = jnp.where(h > 0, h, self.slope * h)
        return jax.vmap(self.head)(h)


@model
def equinox_network(d: Draw) -> Model:
    params, static = eqx.partition(EqxNet(jax.random.key(0)), eqx.is_inexact_array)

    def inner(p, ex):
        return nll(eqx.combine(p, static)(ex["tokens"][:-1]), ex["tokens"][1:])

    return weighted(inner, params, next_tokens(d, time=T), strict=False)


@model
def equinox_layers_scanned(d: Draw) -> Model:
    """Stacked equinox layers, checkpointed and scanned over."""
    keys = jax.random.split(jax.random.key(1), 3)
    stack = eqx.filter_vmap(lambda key: eqx.nn.MLP(6, 6, 9, 1, jnp.tanh, key=key))(keys)
    params, static = eqx.partition(stack, eqx.is_inexact_array)

    def inner(p, ex):
        @jax.checkpoint
        def body(h, layer):
            return h + jax.vmap(eqx.combine(layer, static))(h), None

        return jnp.sum(jax.lax.scan(body, ex["x"], p)[0] ** 2)

    return weighted(inner, params, {"x": d.data(T, 6)}, strict=False)
