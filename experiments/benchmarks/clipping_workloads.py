"""What clipping.py times: networks as pure functions, with random parameters and data.

Parameters and data come from numpy, so that nothing is compiled before the steps themselves.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models import (
    ALL_TARGETS,
    DecoderConfig,
    LoRA,
    abstract_params,
    decoder_config,
    language_model_loss,
    prepare_tuning,
    tuned_loss,
)
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
_SMOL = {
    "vocabulary_size": 49152,
    "num_layers": 30,
    "d_model": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "d_ff": 1536,
    "rope_theta": 1e5,
}

# For each preset: the decoders of W1 to W4, then shapes of the rest.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "W1": _decoder(4, 256, 1024, 8192, 128, 32),
        "W1t": _decoder(4, 256, 1024, 8192, 128, 32, tied=True),
        "W2": _decoder(2, 128, 512, 1024, 64, 64),
        "W3": {"batch": 256},
        "W4": _decoder(4, 256, 1024, 8192, 128, 32) | {"rank": _LORA_RANK},
        "W5": {"config": _SMOL, "sequence": 128, "batch": 16},
        "GPT2": {"sequence": 512, "batch": 4},
    },
    "gpu": {
        "W1": _decoder(4, 256, 1024, 8192, 128, 256),
        "W1t": _decoder(4, 256, 1024, 8192, 128, 256, tied=True),
        "W2": _decoder(2, 128, 512, 1024, 64, 512),
        "W3": {"batch": 2048},
        "W4": _decoder(4, 256, 1024, 8192, 128, 256) | {"rank": _LORA_RANK},
        "W5": {"config": _SMOL, "sequence": 128, "batch": 16},
        "GPT2": {"sequence": 512, "batch": 16},
    },
    "smoke": {
        "W1": _TINY,
        "W1t": _decoder(1, 16, 32, 64, 8, 4, tied=True),
        "W2": _decoder(1, 16, 32, 32, 4, 8),
        "W3": {"batch": 4},
        "W4": _TINY | {"rank": 2},
        "W5": {
            "config": _SMOL
            | {"vocabulary_size": 64, "num_layers": 2, "d_model": 24, "num_heads": 3}
            | {"num_kv_heads": 1, "d_ff": 32},
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
    """Adapters on every matrix of the blocks of a frozen W1 decoder."""
    adapters = LoRA(size["rank"], targets=ALL_TARGETS)
    config = dataclasses.replace(_config(size, dtype), lora=adapters)
    config, trainable, frozen = prepare_tuning(config, _filled(abstract_params(config)), "lora")
    return Workload(
        name,
        f"rank {size['rank']} LoRA on the projections of the frozen W1",
        lambda frozen: tuned_loss(config, frozen),
        trainable,
        frozen,
        _text(config.vocabulary_size, size["sequence"], examples),
        None,
    )


def _scanned(name: str, size: dict[str, Any], dtype: str, examples: int, remat: bool) -> Workload:
    """SmolLM2-135M's architecture, its layers stacked and scanned."""
    config = DecoderConfig(**size["config"], segments=(size["config"]["num_layers"],), dtype=dtype)
    loss_fn = language_model_loss(dataclasses.replace(config, remat=remat))
    return Workload(
        name,
        f"SmolLM2 shape, {config.num_layers} scanned layers, d {config.d_model}, vocabulary "
        f"{config.vocabulary_size}, tied, sequence {size['sequence']}"
        f"{', checkpointed' if remat else ''}",
        lambda frozen: loss_fn,
        _filled(abstract_params(config)),
        (),
        _text(config.vocabulary_size, size["sequence"], examples),
        None,
    )
