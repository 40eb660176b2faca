"""A decoder-only transformer in flax.nnx, used as pure functions over a plain parameter pytree."""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpjax.errors import DpjaxError
from dpjax.types import PyTree, RandomKey, require_key


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a pre-norm decoder.

    Attributes:
      vocabulary_size: rows of the embedding.
      num_layers, d_model: depth and width.
      num_heads: query heads; ``d_model`` must be a multiple, with an even quotient for RoPE.
      num_kv_heads: key and value heads shared by groups of query heads; divides ``num_heads``.
      d_ff: hidden width of the feed-forward block.
      norm: "rmsnorm" or "layernorm".
      activation: "swiglu" (gated, three matrices) or "gelu" (two matrices).
      tied: whether the embedding is also the output head.
      rope_theta: base of the rotary position frequencies.
      dtype: of parameters and activations; logits and loss are float32 in any case.

    Example:
      >>> decoder_config("nano", vocabulary_size=1024).num_layers
      4
    """

    vocabulary_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    tied: bool = True
    rope_theta: float = 10_000.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in (
            "vocabulary_size",
            "num_layers",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "d_ff",
        ):
            if getattr(self, name) < 1:
                raise DpjaxError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % (2 * self.num_heads):
            raise DpjaxError(
                f"d_model is {self.d_model} with {self.num_heads} heads; it must be a multiple of "
                f"{2 * self.num_heads}, so that every head has an even width for RoPE"
            )
        if self.num_heads % self.num_kv_heads:
            raise DpjaxError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads {self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads


_PRESETS: dict[str, dict] = {
    "nano": {"num_layers": 4, "d_model": 128, "num_heads": 4, "num_kv_heads": 2, "d_ff": 256},
    "mini": {"num_layers": 6, "d_model": 256, "num_heads": 8, "num_kv_heads": 4, "d_ff": 640},
    "small": {"num_layers": 8, "d_model": 512, "num_heads": 8, "num_kv_heads": 4, "d_ff": 1408},
    "gpt2": {
        "num_layers": 12,
        "d_model": 768,
        "num_heads": 12,
        "num_kv_heads": 12,
        "d_ff": 3072,
        "norm": "layernorm",
        "activation": "gelu",
    },
}

Preset = Literal["nano", "mini", "small", "gpt2"]


def decoder_config(preset: Preset, vocabulary_size: int, **changes) -> DecoderConfig:
    """A named shape: "nano" about 0.7M parameters, "mini" 5M, "small" 30M, "gpt2" 124M.

    Args:
      preset: the name; "gpt2" is GPT-2's smallest shape with rotary instead of learned positions.
      vocabulary_size: 1-2k goes with "nano"; 50,257 gives "gpt2" its 124M.
      changes: fields of `DecoderConfig` to override.

    Example:
      >>> decoder_config("nano", 1024, tied=False).tied
      False
    """
    if preset not in _PRESETS:
        raise DpjaxError(f"model is {preset!r}; use one of: {', '.join(_PRESETS)}")
    return DecoderConfig(**{"vocabulary_size": vocabulary_size, **_PRESETS[preset], **changes})


def rotary(x: Float[Array, "time heads width"], theta: float) -> Float[Array, "time heads width"]:
    """Rotates pairs of features by an angle that grows with position (Su et al., 2021).

    Example:
      >>> x = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])
      >>> [f"{v:.2f}" for v in rotary(x, 10_000.0)[1, 0]]  # position 1: by one radian
      ['0.54', '0.84']
    """
    time, _, width = x.shape
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(time, dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(inputs: int, outputs: int, config: DecoderConfig, rngs: nnx.Rngs, depth: int = 1):
    """A bias-free matrix, N(0, 0.02^2 / depth); depth scales down what feeds the residual sum."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(0.02 / math.sqrt(depth)),
        rngs=rngs,
    )


def _norm(config: DecoderConfig, rngs: nnx.Rngs):
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    dtype = jnp.dtype(config.dtype)
    return kind(config.d_model, epsilon=1e-5, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries over one sequence."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, width = config, config.head_width
        self.config = config
        self.query = _linear(c.d_model, c.num_heads * width, c, rngs)
        self.key = _linear(c.d_model, c.num_kv_heads * width, c, rngs)
        self.value = _linear(c.d_model, c.num_kv_heads * width, c, rngs)
        self.out = _linear(c.num_heads * width, c.d_model, c, rngs, depth=2 * c.num_layers)

    def __call__(self, x: Float[Array, "time d_model"]) -> Float[Array, "time d_model"]:
        c, time = self.config, x.shape[0]
        groups = c.num_heads // c.num_kv_heads
        query = rotary(self.query(x).reshape(time, c.num_heads, c.head_width), c.rope_theta)
        key = rotary(self.key(x).reshape(time, c.num_kv_heads, c.head_width), c.rope_theta)
        value = self.value(x).reshape(time, c.num_kv_heads, c.head_width)
        query = query.reshape(time, c.num_kv_heads, groups, c.head_width)
        scores = jnp.einsum("tkgw,skw->kgts", query, key) / math.sqrt(c.head_width)
        causal = jnp.tril(jnp.ones((time, time), bool))[None, None]
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("kgts,skw->tkgw", weights, value)
        return self.out(mixed.reshape(time, c.num_heads * c.head_width))


class FeedForward(nnx.Module):
    """Position-wise block: SwiGLU (Shazeer, 2020) or GELU."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        self.gate = _linear(c.d_model, c.d_ff, c, rngs) if c.activation == "swiglu" else None
        self.up = _linear(c.d_model, c.d_ff, c, rngs)
        self.down = _linear(c.d_ff, c.d_model, c, rngs, depth=2 * c.num_layers)

    def __call__(self, x: Float[Array, "time d_model"]) -> Float[Array, "time d_model"]:
        hidden = self.up(x)
        hidden = jax.nn.gelu(hidden) if self.gate is None else jax.nn.silu(self.gate(x)) * hidden
        return self.down(hidden)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x: Float[Array, "time d_model"]) -> Float[Array, "time d_model"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """Tokens of ONE sequence in, float32 logits out. Usable as a plain nnx module as well."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embedding = nnx.Embed(
            config.vocabulary_size,
            config.d_model,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = _norm(config, rngs)
        self.head = (
            None if config.tied else _linear(config.d_model, config.vocabulary_size, config, rngs)
        )

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocabulary"]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        return logits.astype(jnp.float32)


@functools.lru_cache(maxsize=32)
def _graph(config: DecoderConfig):
    """The module's static structure and its state with shapes for leaves."""
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return nnx.split(abstract)


def init_params(config: DecoderConfig, key: RandomKey) -> PyTree:
    """Fresh parameters as nested plain dicts of arrays.

    Example:
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
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> apply(config, params, jnp.array([1, 2, 3])).shape
      (3, 300)
    """
    graph, abstract = _graph(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(tokens)


def count_parameters(params: PyTree) -> int:
    """Number of scalars in a pytree of arrays.

    Example:
      >>> count_parameters({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
      9
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
