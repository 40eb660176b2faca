"""Tensors of a checkpoint into the parameter tree and back; every complaint names the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.models.config import DecoderConfig
from dpjax.models.decoder import abstract_params
from dpjax.models.families import Family, Tensor, tensors
from dpjax.models.tuning import with_segments
from dpjax.types import PyTree

# Tensors that some checkpoints carry and no computation here needs.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|rope_freqs.*)$")


def from_tensors(
    family: Family,
    config: DecoderConfig,
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    where: str,
) -> PyTree:
    """Parameters from named tensors, layers in one stack, as ``config.dtype``.

    Args:
      family, config: from `read_hf_config`; ``config.segments`` is one stack.
      names: every tensor there is.
      read: one of them as an array of any float type, in the checkpoint's own layout.
      where: for messages.

    Raises:
      DpjaxError: a tensor that is missing, has another shape, holds a value that is not finite, or
        is not part of this architecture.
    """
    names = list(names)
    available = {name: name for name in names}
    if family == "gpt2":
        # Some checkpoints were saved from the model without its head.
        available |= {f"transformer.{n}": n for n in names if not n.startswith("transformer.")}
    if any(name.startswith(("language_model.", "model.language_model.")) for name in names):
        available = dict(_text_part(available))
    layer, outside = tensors(family, config)
    shapes = abstract_params(config)
    dtype = np.dtype(jnp.dtype(config.dtype))
    used: set[str] = set()

    def fetch(tensor: Tensor, number: int | None, shape: tuple[int, ...]) -> np.ndarray:
        name = tensor.name if number is None else tensor.name.format(layer=number)
        if name not in available:
            raise DpjaxError(
                f"{where} has no tensor {name!r}; it is incomplete or not a {family} checkpoint: "
                "fetch it again"
            )
        used.add(available[name])
        found = _laid_out(np.asarray(read(available[name])), tensor.layout)
        if found.shape != shape:
            raise DpjaxError(
                f"tensor {name!r} of {where} has shape {list(found.shape)} where its config.json "
                f"says {list(shape)}; the two do not belong together: fetch both again"
            )
        found = found.astype(dtype)
        if not np.isfinite(found.astype(np.float32)).all():
            raise DpjaxError(f"tensor {name!r} of {where} holds NaN or infinity; fetch it again")
        return found

    params: dict = {"blocks": {0: {}}}
    for tensor in layer:
        shape = _get(shapes["blocks"][0], tensor.path).shape
        stacked = np.empty(shape, dtype)
        for number in range(config.num_layers):
            stacked[number] = fetch(tensor, number, shape[1:])
        _set(params["blocks"][0], tensor.path, jnp.asarray(stacked))
    for tensor in outside:
        shape = _get(shapes, tensor.path).shape
        _set(params, tensor.path, jnp.asarray(fetch(tensor, None, shape)))
    spare = {"lm_head.weight", "transformer.lm_head.weight"} if config.tied else set()
    unknown = sorted(
        name
        for name, stored in available.items()
        if stored not in used and stored not in spare and not _IGNORED.match(name)
    )
    if unknown:
        raise DpjaxError(
            f"{where} has a tensor {unknown[0]!r} that a {family} model does not ({len(unknown)} "
            "such); this variant is not supported"
        )
    if jax.tree.structure(params) != jax.tree.structure(shapes):
        raise DpjaxError(f"{where} does not fill a {family} model; this variant is not supported")
    return params


def to_tensors(
    family: Family, config: DecoderConfig, params: PyTree
) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors, one by one; reverses `from_tensors`."""
    config, params = with_segments(config, params, (config.num_layers,))
    layer, outside = tensors(family, config)
    by_name: dict[str, list[Tensor]] = {}
    for tensor in layer:
        by_name.setdefault(tensor.name, []).append(tensor)
    for name, parts in by_name.items():
        stacks = [np.asarray(_get(params["blocks"][0], tensor.path)) for tensor in parts]
        for number in range(config.num_layers):
            values = [_stored(stack[number], parts[0].layout) for stack in stacks]
            value = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
            yield name.format(layer=number), np.ascontiguousarray(value)
    for tensor in outside:
        value = _stored(np.asarray(_get(params, tensor.path)), tensor.layout)
        yield tensor.name, np.ascontiguousarray(value)


def _text_part(available: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A multimodal checkpoint's language model under the names that it has alone."""
    for name, stored in available.items():
        text = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
        if name.endswith("language_model.lm_head.weight"):
            text = "lm_head.weight"
        if text != name:
            yield text, stored


def _laid_out(value: np.ndarray, layout: str) -> np.ndarray:
    if layout == "transposed":
        return value.T
    if layout.startswith("part"):
        number, parts = int(layout.split()[1]), int(layout.split()[3])
        width = value.shape[-1] // parts
        return value[..., number * width : (number + 1) * width]
    return value


def _stored(value: np.ndarray, layout: str) -> np.ndarray:
    if layout == "transposed":
        return value.T
    return value


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
