"""A decoder-only transformer in flax.nnx, used as pure functions over a plain parameter pytree."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dpjax.models.config import DecoderConfig
from dpjax.types import PyTree, RandomKey, require_key


class Cache(NamedTuple):
    """Keys and values of one layer, or of a stack of layers, for the positions seen so far."""

    keys: Array  # [(layers,) length, num_kv_heads, head_width]
    values: Array  # the same


class Places(NamedTuple):
    """What attention must know of positions: one for full layers and one for local ones."""

    cos: Float[Array, "time half"] | None  # None with learned positions
    sin: Float[Array, "time half"] | None
    visible: Bool[Array, "time keys"]


def rotary(
    x: Float[Array, "time heads width"],
    cos: Float[Array, "time half"],
    sin: Float[Array, "time half"],
) -> Float[Array, "time heads width"]:
    """Rotates pairs of features by an angle that grows with position (Su et al., 2021).

    Example:
      >>> x = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])
      >>> angles = jnp.array([[0.0], [1.0]])
      >>> [f"{v:.2f}" for v in rotary(x, jnp.cos(angles), jnp.sin(angles))[1, 0]]
      ['0.54', '0.84']
    """
    cos, sin = (t[:, None, :].astype(x.dtype) for t in (cos, sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary_frequencies(config: DecoderConfig, local: bool = False) -> np.ndarray:
    """Radians per position, float32[head_width / 2]; stretched as ``rope_scaling`` says.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> print(rotary_frequencies(decoder_config("nano", 300))[:2].round(3))
      [1.    0.562]
    """
    theta = config.local_rope_theta if local else config.rope_theta
    exponents = np.arange(0, config.head_width, 2, dtype=np.float64) / config.head_width
    frequencies = theta**-exponents
    scaling = None if local else config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


class Norm(nnx.Module):
    """RMS norm or layer norm over the last axis, in float32 whatever comes in."""

    def __init__(self, kind: str, width: int, config: DecoderConfig):
        dtype = jnp.dtype(config.dtype)
        self.epsilon, self.centred = config.norm_epsilon, kind == "layernorm"
        self.offset = config.norm_offset
        self.scale = nnx.Param(jnp.full(width, 1.0 - self.offset, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if self.centred else None

    def __call__(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)
        if self.offset:
            scale = scale + self.offset
        normed = _times(wide * jax.lax.rsqrt(variance + self.epsilon), scale)
        if self.bias is not None:
            normed = _plus(normed, self.bias[...])
        return normed.astype(x.dtype)


def _times(x: Array, vector: Array) -> Array:
    return x * jnp.broadcast_to(vector.astype(x.dtype), x.shape)


def _plus(x: Array, vector: Array) -> Array:
    return x + jnp.broadcast_to(vector.astype(x.dtype), x.shape)


class Projection(nnx.Module):
    """``x W``, with a bias and a low-rank adapter where the configuration has them."""

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        depth: int = 1,
    ):
        # N(0, 0.02^2 / depth): depth scales down what feeds the residual sum.
        dtype, lora = jnp.dtype(config.dtype), config.lora
        stddev = 0.02 / math.sqrt(depth)
        normal = nnx.initializers.normal(stddev, dtype)
        self.kernel = nnx.Param(normal(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.scaling = None
        if lora is not None and name in lora.targets:
            self.scaling = lora.scaling
            # B = 0, so that training starts at the model itself.
            drawn = jax.random.uniform(rngs.params(), (inputs, lora.rank), jnp.float32, -1.0, 1.0)
            self.lora_a = nnx.Param((drawn / math.sqrt(inputs)).astype(dtype))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs), dtype))

    def __call__(self, x: Float[Array, "time inputs"]) -> Float[Array, "time outputs"]:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = _plus(y, self.bias[...])
        if self.scaling is not None:
            inner = x @ self.lora_a[...].astype(x.dtype)
            y = y + (inner @ self.lora_b[...].astype(x.dtype)) * self.scaling
        return y


class Attention(nnx.Module):
    """Causal self-attention with grouped queries over one sequence."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, width = config, config.head_width
        self.config = config
        across, shared = c.num_heads * width, c.num_kv_heads * width
        self.query = Projection("query", c.d_model, across, c, rngs, bias=c.qkv_bias)
        self.key = Projection("key", c.d_model, shared, c, rngs, bias=c.qkv_bias)
        self.value = Projection("value", c.d_model, shared, c, rngs, bias=c.qkv_bias)
        self.out = Projection(
            "out", across, c.d_model, c, rngs, bias=c.out_bias, depth=2 * c.num_layers
        )
        self.query_norm = Norm("rmsnorm", width, c) if c.qk_norm else None
        self.key_norm = Norm("rmsnorm", width, c) if c.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "time d_model"],
        places: Places,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "time d_model"], Cache | None]:
        c, time = self.config, x.shape[0]
        query = self.query(x).reshape(time, c.num_heads, c.head_width)
        key = self.key(x).reshape(time, c.num_kv_heads, c.head_width)
        value = self.value(x).reshape(time, c.num_kv_heads, c.head_width)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if places.cos is not None and places.sin is not None:
            query = rotary(query, places.cos, places.sin)
            key = rotary(key, places.cos, places.sin)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, start, axis=0)
            value = jax.lax.dynamic_update_slice_in_dim(cache.values, value, start, axis=0)
            cache = Cache(key, value)
        groups = c.num_heads // c.num_kv_heads
        query = query.reshape(time, c.num_kv_heads, groups, c.head_width)
        scores = jnp.einsum("tkgw,skw->kgts", query, key).astype(jnp.float32) * c.score_scale
        scores = jnp.where(places.visible[None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("kgts,skw->tkgw", weights, value)
        return self.out(mixed.reshape(time, c.num_heads * c.head_width)), cache


class FeedForward(nnx.Module):
    """Position-wise block: SwiGLU, GeGLU (Shazeer, 2020) or GELU."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, bias = config, config.ff_bias
        self.config = config
        self.gate = (
            Projection("gate", c.d_model, c.d_ff, c, rngs, bias=bias) if c.is_gated else None
        )
        self.up = Projection("up", c.d_model, c.d_ff, c, rngs, bias=bias)
        self.down = Projection(
            "down", c.d_ff, c.d_model, c, rngs, bias=bias, depth=2 * c.num_layers
        )

    def __call__(self, x: Float[Array, "time d_model"]) -> Float[Array, "time d_model"]:
        hidden = self.up(x)
        if self.gate is None:
            hidden = jax.nn.gelu(hidden, approximate=self.config.activation == "gelu")
        else:
            bend = jax.nn.silu if self.config.activation == "swiglu" else jax.nn.gelu
            hidden = bend(self.gate(x)) * hidden
        return self.down(hidden)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.norm, config.d_model, config)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = Norm(config.norm, config.d_model, config)
        self.feed_forward = FeedForward(config, rngs)
        post = config.post_norms
        self.attention_post_norm = Norm(config.norm, config.d_model, config) if post else None
        self.feed_forward_post_norm = Norm(config.norm, config.d_model, config) if post else None

    def __call__(
        self,
        x: Float[Array, "time d_model"],
        places: Places,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "time d_model"], Cache | None]:
        change, cache = self.attention(self.attention_norm(x), places, cache, start)
        x = x + (change if self.attention_post_norm is None else self.attention_post_norm(change))
        change = self.feed_forward(self.feed_forward_norm(x))
        if self.feed_forward_post_norm is not None:
            change = self.feed_forward_post_norm(change)
        return x + change, cache


class Decoder(nnx.Module):
    """Tokens of ONE sequence in, float32 logits out. Usable as a plain nnx module as well."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _table(config.vocabulary_size, config, rngs)
        learned = config.positions == "learned"
        self.position_embedding = _table(config.max_positions, config, rngs) if learned else None
        if config.segments:
            self.blocks = nnx.List([_stack(config, rngs, n) for n in config.segments])
        else:
            self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = Norm(config.norm, config.d_model, config)
        self.head = (
            None
            if config.tied
            else Projection("head", config.d_model, config.vocabulary_size, config, rngs)
        )

    def hidden(
        self,
        tokens: Int[Array, " time"],
        caches: list[Cache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "time d_model"], list[Cache] | None]:
        """The normed residual stream; with caches, of tokens that follow ``start`` earlier ones."""
        c, dtype = self.config, jnp.dtype(self.config.activation_dtype)
        x = self.embedding.embedding[...][tokens].astype(dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, dtype)
        positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        if self.position_embedding is not None:
            x = x + self.position_embedding.embedding[...][positions].astype(dtype)
        length = tokens.shape[0] if caches is None else caches[0].keys.shape[-3]
        full = _places(c, positions, length, local=False)
        near = _places(c, positions, length, local=True) if any(c.local_layers) else full
        after: list[Cache] = []
        layer = 0
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            if c.segments:
                x, cache = _scan(c, block, layer, x, full, near, cache, start)
                layer += c.segments[index]
            else:
                places = near if c.local_layers and c.local_layers[layer] else full
                x, cache = _run(c, block)(x, places, cache, start)
                layer += 1
            if cache is not None:
                after.append(cache)
        return self.final_norm(x), None if caches is None else after

    def logits(self, x: Float[Array, "time d_model"]) -> Float[Array, "time vocabulary"]:
        """float32 logits of the normed residual stream."""
        if self.head is None:
            return (x @ self.embedding.embedding[...].astype(x.dtype).T).astype(jnp.float32)
        return self.head(x).astype(jnp.float32)

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocabulary"]:
        return self.logits(self.hidden(tokens)[0])


def _table(rows: int, config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Embed:
    dtype = jnp.dtype(config.dtype)
    return nnx.Embed(
        rows,
        config.d_model,
        dtype=dtype,
        param_dtype=dtype,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _stack(config: DecoderConfig, rngs: nnx.Rngs, layers: int) -> Block:
    """Blocks whose parameters have a leading axis of layers."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(keys: nnx.Rngs) -> Block:
        return Block(config, keys)

    return make(rngs)


def _places(config: DecoderConfig, positions: Array, length: int, local: bool) -> Places:
    keys = jnp.arange(length, dtype=jnp.int32)[None, :]
    visible = keys <= positions[:, None]
    if local and config.sliding_window is not None:
        visible = visible & (keys > positions[:, None] - config.sliding_window)
    if config.positions == "learned":
        return Places(None, None, visible)
    frequencies = jnp.asarray(rotary_frequencies(config, local))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return Places(jnp.cos(angles), jnp.sin(angles), visible)


def _run(config: DecoderConfig, block: Block):
    """The block as a function, recomputed in the backward pass if asked for."""
    if not config.remat:
        return block
    graph, state = nnx.split(block)

    def run(x, places, cache, start):
        again = jax.checkpoint(lambda state, *rest: nnx.merge(graph, state)(*rest))
        return again(state, x, places, cache, start)

    return run


def _scan(config, stacked, first, x, full, near, cache, start):
    """Runs stacked blocks one after the other by ``lax.scan``."""
    graph, states = nnx.split(stacked)
    layers = jax.tree.leaves(states)[0].shape[0]
    is_local = config.local_layers[first : first + layers]
    mixed = len(set(is_local)) == 2

    def body(x, layer):
        state, cache, local = layer
        places = near if is_local and is_local[0] else full
        if mixed:
            places = jax.tree.map(lambda a, b: jnp.where(local, a, b), near, full)
        return _run(config, nnx.merge(graph, state))(x, places, cache, start)

    local = jnp.asarray(is_local) if mixed else None
    return jax.lax.scan(body, x, (states, cache, local))


@functools.lru_cache(maxsize=64)
def _graph(config: DecoderConfig):
    """The module's static structure and its state with shapes for leaves."""
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return nnx.split(abstract)


def _merged(config: DecoderConfig, params: PyTree) -> Decoder:
    graph, abstract = _graph(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def init_params(config: DecoderConfig, key: RandomKey) -> PyTree:
    """Fresh parameters as nested plain dicts of arrays.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> params = init_params(decoder_config("nano", 1024), jax.random.key(0))
      >>> count_parameters(params), params["embedding"]["embedding"].shape
      (722048, (1024, 128))
    """
    rngs = nnx.Rngs(require_key(key))
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs), nnx.Param))


def abstract_params(config: DecoderConfig) -> PyTree:
    """The same nested dicts with `jax.ShapeDtypeStruct` leaves."""
    return nnx.to_pure_dict(_graph(config)[1])


def apply(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, " time"]
) -> Float[Array, "time vocabulary"]:
    """Logits (float32, nats up to a constant) for the token after each of ``tokens``.

    A pure function of ONE sequence: use ``jax.vmap`` for a batch.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> apply(config, params, jnp.array([1, 2, 3])).shape
      (3, 300)
    """
    return _merged(config, params)(tokens)


def hidden_states(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, " time"]
) -> Float[Array, "time d_model"]:
    """The last layer's normed output at every position of ONE sequence: features of the text.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> hidden_states(config, params, jnp.array([1, 2, 3])).shape
      (3, 128)
    """
    return _merged(config, params).hidden(tokens)[0]


def init_caches(config: DecoderConfig, length: int) -> list[Cache]:
    """Empty keys and values for ``length`` positions of ONE sequence; `apply_cached` fills them.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> caches = init_caches(decoder_config("nano", 300), 16)
      >>> len(caches), caches[0].keys.shape
      (4, (16, 2, 32))
    """
    shape = (length, config.num_kv_heads, config.head_width)
    dtype = jnp.dtype(config.activation_dtype)
    stacks = [(n, *shape) for n in config.segments] or [shape] * config.num_layers
    return [Cache(jnp.zeros(s, dtype), jnp.zeros(s, dtype)) for s in stacks]


def apply_cached(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, " time"],
    caches: list[Cache],
    start: Int[Array, ""] | int,
    read: Int[Array, ""] | int,
) -> tuple[Float[Array, " vocabulary"], list[Cache]]:
    """Logits after one of ``tokens``, which follow ``start`` tokens that the caches hold.

    Args:
      tokens: int32[time]; what lies behind ``read`` is padding, overwritten by later calls.
      caches: from `init_caches` or the call before; ``start + time`` must fit their length.
      start: number of tokens before.
      read: index into ``tokens``: logits are for the token after it.

    Returns:
      ``(logits, caches)``, logits float32[vocabulary].

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> first, caches = apply_cached(
      ...     config, params, jnp.array([1, 2]), init_caches(config, 3), 0, 1)
      >>> then, caches = apply_cached(config, params, jnp.array([3]), caches, 2, 0)
      >>> plain = apply(config, params, jnp.array([1, 2, 3]))
      >>> bool(jnp.allclose(then, plain[2], atol=1e-5))
      True
    """
    decoder = _merged(config, params)
    x, after = decoder.hidden(tokens, caches, start)
    assert after is not None
    return decoder.logits(jax.lax.dynamic_slice_in_dim(x, read, 1))[0], after


def count_parameters(params: PyTree) -> int:
    """Number of scalars in a pytree of arrays.

    Example:
      >>> count_parameters({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
      9
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
