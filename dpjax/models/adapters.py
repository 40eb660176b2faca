"""LoRA matrices as a PEFT adapter: a few megabytes beside the model they were trained on."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.models.config import ALL_TARGETS, DecoderConfig
from dpjax.models.families import adapter_module, family_of
from dpjax.models.hub_files import write_json, write_safetensors
from dpjax.models.tuning import with_segments
from dpjax.types import PyTree


def write_adapter(
    path: pathlib.Path, config: DecoderConfig, params: PyTree, base: str | None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a folder.

    Raises:
      DpjaxError: no adapters.
    """
    if config.lora is None:
        raise DpjaxError(
            "the model has no adapter to export; train with --tuning lora, or export it whole"
        )
    lora, family = config.lora, family_of(config)
    config, params = with_segments(config, params, (config.num_layers,))
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    # Module -> the adapters that it holds, with their place among its outputs.
    modules: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    width: dict[str, int] = {}
    projections = {name: x for part in params["blocks"][0].values() for name, x in part.items()}
    for target in ALL_TARGETS:  # in the order in which GPT-2's thirds lie
        if target not in projections:
            continue
        leaves, module = projections[target], adapter_module(family, target)
        start = width.get(module, 0)
        width[module] = start + leaves["kernel"].shape[-1]
        if "lora_a" in leaves:
            a, b = (np.asarray(jax.device_get(leaves[name])) for name in ("lora_a", "lora_b"))
            modules.setdefault(module, []).append((start, a, b))
    named: dict[str, np.ndarray] = {}
    for module, held in modules.items():
        for layer in range(config.num_layers):
            prefix = f"base_model.model.{layers}.{layer}.{module}"
            a, b = _joined([(start, a[layer], b[layer]) for start, a, b in held], width[module])
            # PEFT keeps both matrices transposed, outputs x inputs.
            named[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.T)
            named[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b.T)
    ranks = {module: lora.rank * len(held) for module, held in modules.items()}
    # One rank for all where there is one: not every reader knows ranks by module.
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    write_safetensors(path / "adapter_model.safetensors", named)
    write_json(
        path / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": lora.scaling * rank,
            "rank_pattern": others,
            "alpha_pattern": {module: lora.scaling * r for module, r in others.items()},
            "lora_dropout": 0.0,
            # Whole names: GPT-2 has a c_proj in attention and in the feed-forward block.
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": family == "gpt2",
            "inference_mode": True,
        },
    )


def _joined(
    held: list[tuple[int, np.ndarray, np.ndarray]], outputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """One adapter that does what several do, each at its place among the module's outputs.

    GPT-2 computes query, key and value by one matrix: their ranks add up, with zeros in the second
    matrix where an adapter does not reach.
    """
    a = np.concatenate([a for _, a, _ in held], axis=1)
    b = np.zeros((a.shape[1], outputs), held[0][2].dtype)
    row = 0
    for start, _, part in held:
        b[row : row + len(part), start : start + part.shape[1]] = part
        row += len(part)
    return a, b
