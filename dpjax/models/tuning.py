"""Which parameters training may change: adapters, the last layers, biases, or all."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.errors import DpjaxError
from dpjax.models.config import DecoderConfig, LoRA
from dpjax.models.decoder import abstract_params
from dpjax.models.losses import language_model_loss
from dpjax.types import LossFn, PyTree, RandomKey, require_key

Tuning = Literal["full", "lora", "last_layers", "bias"]


def add_lora(
    config: DecoderConfig, params: PyTree, lora: LoRA, key: RandomKey
) -> tuple[DecoderConfig, PyTree]:
    """The same model with fresh adapters; its outputs do not change until they are trained.

    The first matrix is uniform in plus or minus ``1 / sqrt(inputs)``, the second is zero.

    Args:
      config, params: a model without adapters.
      lora: rank, alpha and targets.
      key: JAX random key for the first matrices.

    Raises:
      DpjaxError: if the model has adapters, or no projection is a target.

    Example:
      >>> from dpjax.models import count_parameters, decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> adapted, with_lora = add_lora(config, params, LoRA(4, targets=("query",)),
      ...                               jax.random.key(1))
      >>> count_parameters(with_lora) - count_parameters(params)  # 4 layers, 4 (128 + 128)
      4096
    """
    if config.lora is not None:
        raise DpjaxError("the model has adapters already; merge them first (merge_lora)")
    changed = dataclasses.replace(config, lora=lora)
    present = dict(_leaves(params))
    key = require_key(key)

    def leaf(path, shape):
        name = _name(path)
        if name in present:
            return present[name]
        if not name.endswith("lora_a"):
            return jnp.zeros(shape.shape, shape.dtype)
        drawn = jax.random.uniform(
            jax.random.fold_in(key, _stable(name)), shape.shape, jnp.float32, -1.0, 1.0
        )
        return (drawn / shape.shape[-2] ** 0.5).astype(shape.dtype)

    with_lora = jax.tree_util.tree_map_with_path(leaf, abstract_params(changed))
    if len(jax.tree.leaves(with_lora)) == len(present):
        raise DpjaxError(f"lora targets are {list(lora.targets)}; this model has none of them")
    return changed, with_lora


def merge_lora(config: DecoderConfig, params: PyTree) -> tuple[DecoderConfig, PyTree]:
    """Folds adapters into the matrices beside them: ``W + (alpha / rank) A B``, in float32.

    Example:
      >>> from dpjax.models import apply, decoder_config, init_params
      >>> config = decoder_config("nano", 300, lora=LoRA(2))
      >>> params = init_params(config, jax.random.key(0))
      >>> plain, merged = merge_lora(config, params)
      >>> print(plain.lora, "lora_a" in merged["blocks"][0]["attention"]["query"])
      None False
    """
    if config.lora is None:
        return config, params
    scaling = config.lora.scaling

    def merge(tree):
        if not isinstance(tree, dict):
            return tree
        if "lora_a" not in tree:
            return {name: merge(part) for name, part in tree.items()}
        kernel = tree["kernel"]
        a, b = (tree[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        # Full precision: on accelerators the default product would round the adapter to bf16.
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scaling
        merged = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
        rest = {n: x for n, x in tree.items() if n not in ("kernel", "lora_a", "lora_b")}
        return {"kernel": merged, **rest}

    return dataclasses.replace(config, lora=None), merge(params)


def with_segments(
    config: DecoderConfig, params: PyTree, segments: tuple[int, ...]
) -> tuple[DecoderConfig, PyTree]:
    """The same model with its layers stacked in other groups; see ``DecoderConfig.segments``.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> stacked, regrouped = with_segments(config, params, (3, 1))
      >>> [block["attention"]["query"]["kernel"].shape for block in regrouped["blocks"].values()]
      [(3, 128, 128), (1, 128, 128)]
    """
    if segments == config.segments:
        return config, params
    changed = dataclasses.replace(config, segments=segments)
    layers: list[PyTree] = []
    for index, block in params["blocks"].items():
        if config.segments:
            count = config.segments[index]
            layers += [jax.tree.map(lambda x, i=i: x[i], block) for i in range(count)]
        else:
            layers.append(block)
    if segments:
        grouped, at = [], 0
        for count in segments:
            grouped.append(jax.tree.map(lambda *x: jnp.stack(x), *layers[at : at + count]))
            at += count
        layers = grouped
    return changed, {**params, "blocks": dict(enumerate(layers))}


def prepare_tuning(
    config: DecoderConfig,
    params: PyTree,
    tuning: Tuning,
    *,
    lora: LoRA | None = None,
    last_layers: int = 2,
    key: RandomKey | None = None,
) -> tuple[DecoderConfig, PyTree, PyTree]:
    """Divides a model into what is trained and what stays.

    Args:
      config, params: the model.
      tuning: "full" trains everything; "lora" adds adapters and trains them; "last_layers" the last
        ``last_layers`` blocks, the final norm and an untied head; "bias" the bias vectors (Zaken et
        al. (2022); under DP: Bu et al. (2022)).
      lora: adapters, for "lora".
      last_layers: number of blocks, for "last_layers".
      key: for the adapters' start.

    Returns:
      ``(config, trainable, frozen)``: two trees of the model's structure, in each of which the
      other's leaves are None. `combine` joins them; `tuned_loss` makes the loss.

    Raises:
      DpjaxError: no biases to train, or more layers than there are.

    Example:
      >>> from dpjax.models import count_parameters, decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> tuned, trainable, frozen = prepare_tuning(config, params, "last_layers", last_layers=1)
      >>> count_parameters(trainable) + count_parameters(frozen) == count_parameters(params)
      True
    """
    if tuning == "full":
        return config, params, jax.tree.map(lambda _: None, params)
    if tuning == "lora":
        if config.lora is None:
            config, params = add_lora(config, params, lora or LoRA(), require_key(key))
        wanted: Callable[[str], bool] = lambda name: name.endswith(("lora_a", "lora_b"))  # noqa: E731
    elif tuning == "bias":
        wanted = lambda name: name.endswith("/bias")  # noqa: E731
    elif tuning == "last_layers":
        if not 1 <= last_layers <= config.num_layers:
            raise DpjaxError(
                f"last_layers is {last_layers}; the model has {config.num_layers} layers"
            )
        kept = config.num_layers - last_layers
        if config.segments:
            # A scan of its own for the trained layers: the backward pass stops in front of it.
            segments = (kept, last_layers) if kept else (last_layers,)
            config, params = with_segments(config, params, segments)
            first = len(segments) - 1
        else:
            first = kept
        trained = {f"blocks/{i}" for i in range(first, len(params["blocks"]))}
        trained |= {"final_norm", "head"}
        wanted = lambda name: any(name.startswith(f"{part}/") for part in trained)  # noqa: E731
    else:
        raise DpjaxError(f"tuning is {tuning!r}; use full, lora, last_layers or bias")
    trainable, frozen = partition(params, wanted)
    if not jax.tree.leaves(trainable):
        raise DpjaxError(
            f"tuning is {tuning!r}, but this model has no such parameters (Llama-like models have "
            "no biases); use lora"
        )
    return config, trainable, frozen


def partition(params: PyTree, wanted: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Two trees of one structure: leaves whose path is wanted, and the others; None elsewhere.

    Example:
      >>> partition({"a": {"w": 1, "b": 2}}, lambda name: name == "a/b")
      ({'a': {'b': 2, 'w': None}}, {'a': {'b': None, 'w': 1}})
    """

    def part(keep: bool) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if wanted(_name(path)) == keep else None, params
        )

    return part(True), part(False)


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Reverses `partition`.

    Example:
      >>> combine({"w": None, "b": 2}, {"w": 1, "b": None})
      {'b': 2, 'w': 1}
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


@functools.lru_cache(maxsize=32)
def _combined_loss(config: DecoderConfig, normalize_by: float | None) -> LossFn:
    whole = language_model_loss(config, normalize_by)

    def loss_fn(frozen: PyTree, trainable: PyTree, example: dict[str, Any]) -> Float[Array, ""]:
        return whole(combine(trainable, frozen), example)

    return loss_fn


def tuned_loss(config: DecoderConfig, frozen: PyTree, normalize_by: float | None = None) -> LossFn:
    """`language_model_loss` of the trainable part; the frozen arrays travel with the function.

    Returns:
      A ``jax.tree_util.Partial``: a pytree, whose arrays `dpjax.fit` passes to the compiled step as
      arguments. A plain closure would copy them into the program as constants.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> config, trainable, frozen = prepare_tuning(config, params, "lora", lora=LoRA(2),
      ...                                            key=jax.random.key(1))
      >>> example = {"tokens": jnp.array([5, 6, 7]), "loss_mask": jnp.ones(3, bool)}
      >>> tuned_loss(config, frozen)(trainable, example).shape
      ()
    """
    if not jax.tree.leaves(frozen):
        return language_model_loss(config, normalize_by)
    return jax.tree_util.Partial(_combined_loss(config, normalize_by), frozen)


def _leaves(params: PyTree) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _stable(name: str) -> int:
    """A 31-bit number of a name, the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
