"""What clipping.py times: networks as pure functions, with random parameters and data.

Parameters and data come from numpy, so that nothing is compiled before the steps themselves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models import DecoderConfig, abstract_params, decoder_config, language_model_loss
from dpjax.models.decoder import rotary
from dpjax.types import LossFn, PyTree


class Workload(NamedTuple):
    """A loss of one example with everything it is called on.

    ``make_loss(frozen)`` gives ``loss_fn(params, example)``: arrays that are not trained enter the
    compiled step as an argument, not as constants of the program.
    """

    name: str
    what: str
    make_loss: Callable[[PyTree], LossFn]
    params: PyTree
    frozen: PyTree
    batch: PyTree
    config: DecoderConfig | None  # where Opacus can train the same decoder


def _decoder(layers, d_model, d_ff, vocabulary, sequence, batch, tied=False):
    fields = {"vocabulary_size": vocabulary, "num_layers": layers, "d_model": d_model}
    fields |= {"num_heads": 4, "num_kv_heads": 4, "d_ff": d_ff, "tied": tied}
    return {"config": fields, "sequence": sequence, "batch": batch}


_TINY = _decoder(1, 16, 32, 64, 8, 4)
_LORA_RANK = 8
_SMOL = {"layers": 30, "d": 576, "ff": 1536, "heads": 9, "kv": 3, "vocabulary": 49152}

# For each preset: the decoders of W1 to W4, then shapes of the rest.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "W1": _decoder(4, 256, 1024, 8192, 128, 32),
        "W1t": _decoder(4, 256, 1024, 8192, 128, 32, tied=True),
        "W2": _decoder(2, 128, 512, 1024, 64, 64),
        "W3": {"batch": 256},
        "W4": _decoder(4, 256, 1024, 8192, 128, 32) | {"rank": _LORA_RANK},
        "W5": {"shape": _SMOL, "sequence": 128, "batch": 16},
        "GPT2": {"sequence": 512, "batch": 4},
    },
    "gpu": {
        "W1": _decoder(4, 256, 1024, 8192, 128, 256),
        "W1t": _decoder(4, 256, 1024, 8192, 128, 256, tied=True),
        "W2": _decoder(2, 128, 512, 1024, 64, 512),
        "W3": {"batch": 2048},
        "W4": _decoder(4, 256, 1024, 8192, 128, 256) | {"rank": _LORA_RANK},
        "W5": {"shape": _SMOL, "sequence": 128, "batch": 16},
        "GPT2": {"sequence": 512, "batch": 16},
    },
    "smoke": {
        "W1": _TINY,
        "W1t": _decoder(1, 16, 32, 64, 8, 4, tied=True),
        "W2": _decoder(1, 16, 32, 32, 4, 8),
        "W3": {"batch": 4},
        "W4": _TINY | {"rank": 2},
        "W5": {
            "shape": {"layers": 2, "d": 24, "ff": 32, "heads": 3, "kv": 1, "vocabulary": 64},
            "sequence": 8,
            "batch": 4,
        },
    },
}


def workload(
    name: str, preset: str, dtype: str = "float32", batch: int | None = None, remat: bool = False
) -> Workload:
    """One of `SIZES` at the size that ``preset`` gives it, or with another batch."""
    size = SIZES[preset][name]
    examples = batch or size["batch"]
    if name == "W3":
        return _mnist(name, dtype, examples)
    if name == "W4":
        return _lora(name, size, dtype, examples)
    if name == "W5":
        return _scanned(name, size, dtype, examples, remat)
    config = _config(size, dtype)
    loss_fn = language_model_loss(config)
    return Workload(
        name,
        f"decoder, {config.num_layers} layers, d {config.d_model}, "
        f"vocabulary {config.vocabulary_size}, {'tied' if config.tied else 'untied'}, "
        f"sequence {size['sequence']}",
        lambda frozen: loss_fn,
        _filled(abstract_params(config)),
        (),
        _text(config.vocabulary_size, size["sequence"], examples),
        config,
    )


def _config(size: dict[str, Any], dtype: Any) -> DecoderConfig:
    if "config" not in size:
        return decoder_config("gpt2", 50257, dtype=dtype)
    return DecoderConfig(**size["config"], norm="layernorm", activation="gelu", dtype=dtype)


def _filled(shapes: PyTree) -> PyTree:
    """Ones for scales, zeros for biases, N(0, 0.02^2) for the rest."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _text(vocabulary: int, sequence: int, examples: int) -> dict[str, jax.Array]:
    """One token more than the ``sequence`` positions that predict."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocabulary, (examples, sequence + 1))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "loss_mask": jnp.ones((examples, sequence + 1), bool),
    }


def _next_token_loss(logits, tokens):
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def _attention(query, key, value, theta, heads, kv_heads):
    """Causal attention with rotary positions of [time, heads * width] projections."""
    time, width = query.shape[0], query.shape[1] // heads
    query = rotary(query.reshape(time, heads, width), theta)
    query = query.reshape(time, kv_heads, heads // kv_heads, width)
    key = rotary(key.reshape(time, kv_heads, width), theta)
    value = value.reshape(time, kv_heads, width)
    scores = jnp.einsum("tkgw,skw->kgts", query, key) / math.sqrt(width)
    causal = jnp.tril(jnp.ones((time, time), bool))[None, None]
    scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("kgts,skw->tkgw", weights, value).reshape(time, heads * width)


def _mnist(name: str, dtype: str, examples: int) -> Workload:
    """The network of the first DP-SGD tutorials (Papernot et al., 2021, table 1 with ReLU)."""
    shapes = {
        "conv1": {"kernel": (8, 8, 1, 16), "bias": (16,)},
        "conv2": {"kernel": (4, 4, 16, 32), "bias": (32,)},
        "dense1": {"kernel": (512, 32), "bias": (32,)},
        "dense2": {"kernel": (32, 10), "bias": (10,)},
    }
    rng = np.random.default_rng(0)

    def fill(shape):
        deviation = math.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.0
        return jnp.asarray(rng.standard_normal(shape) * deviation, dtype)

    def conv(x, layer, stride, padding):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), padding, dimension_numbers=dims
        )
        return jax.nn.relu(out + layer["bias"].reshape(1, 1, 1, -1))

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")

    def loss_fn(params, example):
        x = pool(conv(example["image"][None], params["conv1"], 2, "SAME"))
        x = pool(conv(x, params["conv2"], 2, "VALID")).reshape(-1)
        x = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
        logits = x @ params["dense2"]["kernel"] + params["dense2"]["bias"]
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[example["label"]]

    params = jax.tree.map(fill, shapes, is_leaf=lambda x: isinstance(x, tuple))
    batch = {
        "image": jnp.asarray(rng.standard_normal((examples, 28, 28, 1)), dtype),
        "label": jnp.asarray(rng.integers(0, 10, examples), jnp.int32),
    }
    what = "MNIST convolutional network"
    return Workload(name, what, lambda frozen: loss_fn, params, (), batch, None)


def _lora(name: str, size: dict[str, Any], dtype: str, examples: int) -> Workload:
    """Low-rank corrections to every matrix but the embedding of a frozen W1 decoder."""
    config, rank = _config(size, dtype), size["rank"]
    frozen = _filled(abstract_params(config))

    def adapters(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel":
            return None
        shapes = {"a": (leaf.shape[0], rank), "b": (rank, leaf.shape[1])}
        return {k: jax.ShapeDtypeStruct(s, leaf.dtype) for k, s in shapes.items()}

    shapes = jax.tree_util.tree_map_with_path(adapters, abstract_params(config))
    what = f"rank {rank} LoRA on all matrices of the frozen W1"
    batch = _text(config.vocabulary_size, size["sequence"], examples)
    return Workload(
        name,
        what,
        lambda frozen: lambda params, example: lora_loss(config, frozen, params, example),
        _filled(shapes),
        frozen,
        batch,
        None,
    )


def lora_loss(config: DecoderConfig, frozen: PyTree, params: PyTree, example: PyTree) -> jax.Array:
    """`language_model_loss` without a mask, each kernel W acting as W + A B."""

    def linear(x, base, adapter):
        adapter = adapter["kernel"]
        return x @ base["kernel"] + (x @ adapter["a"]) @ adapter["b"]

    def norm(x, base):
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)
        return normal * base["scale"][None] + base["bias"][None]

    tokens = example["tokens"]
    x = frozen["embedding"]["embedding"][tokens[:-1]]
    for i, base in frozen["blocks"].items():
        block = params["blocks"][i]
        base_a, lora_a = base["attention"], block["attention"]
        h = norm(x, base["attention_norm"])
        q, k, v = (linear(h, base_a[n], lora_a[n]) for n in ("query", "key", "value"))
        h = _attention(q, k, v, config.rope_theta, config.num_heads, config.num_kv_heads)
        x = x + linear(h, base_a["out"], lora_a["out"])
        base_f, lora_f = base["feed_forward"], block["feed_forward"]
        h = norm(x, base["feed_forward_norm"])
        h = jax.nn.gelu(linear(h, base_f["up"], lora_f["up"]))
        x = x + linear(h, base_f["down"], lora_f["down"])
    x = norm(x, frozen["final_norm"])
    return _next_token_loss(linear(x, frozen["head"], params["head"]), tokens)


def _scanned(name: str, size: dict[str, Any], dtype: str, examples: int, remat: bool) -> Workload:
    """SmolLM2-135M's architecture, its layers stacked and scanned."""
    s = size["shape"]
    layers, d, ff, width = s["layers"], s["d"], s["ff"], s["d"] // s["heads"]
    shapes = {
        "embedding": (s["vocabulary"], d),
        "final_norm": {"scale": (d,)},
        "layers": {
            "attention_norm": {"scale": (layers, d)},
            "query": (layers, d, d),
            "key": (layers, d, s["kv"] * width),
            "value": (layers, d, s["kv"] * width),
            "out": (layers, d, d),
            "feed_forward_norm": {"scale": (layers, d)},
            "gate": (layers, d, ff),
            "up": (layers, d, ff),
            "down": (layers, ff, d),
        },
    }
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    what = (
        f"SmolLM2 shape, {layers} scanned layers, d {d}, vocabulary {s['vocabulary']}, tied, "
        f"sequence {size['sequence']}{', checkpointed' if remat else ''}"
    )
    return Workload(
        name,
        what,
        lambda frozen: lambda params, example: scanned_loss(s, remat, params, example),
        _filled(abstract),
        (),
        _text(s["vocabulary"], size["sequence"], examples),
        None,
    )


def scanned_loss(shape: dict[str, int], remat: bool, params: PyTree, example: PyTree) -> jax.Array:
    """`language_model_loss` of an RMSNorm, SwiGLU, tied decoder, without a mask, under a scan."""

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
        return normal.astype(x.dtype) * scale[None]

    def layer(x, w):
        h = norm(x, w["attention_norm"]["scale"])
        q, k, v = h @ w["query"], h @ w["key"], h @ w["value"]
        x = x + _attention(q, k, v, 1e5, shape["heads"], shape["kv"]) @ w["out"]
        h = norm(x, w["feed_forward_norm"]["scale"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    tokens = example["tokens"]
    x = params["embedding"][tokens[:-1]]
    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])
    logits = norm(x, params["final_norm"]["scale"]) @ params["embedding"].T
    return _next_token_loss(logits, tokens)
