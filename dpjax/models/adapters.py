"""LoRA matrices as a PEFT adapter: a few megabytes beside the model they were trained on."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.models.config import DecoderConfig
from dpjax.models.families import adapter_module, family_of
from dpjax.models.hub_files import write_json, write_safetensors
from dpjax.models.tuning import with_segments
from dpjax.types import PyTree


def write_adapter(
    path: pathlib.Path, config: DecoderConfig, params: PyTree, base: str | None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a folder.

    Raises:
      DpjaxError: no adapters, or a target that PEFT has no module for.
    """
    if config.lora is None:
        raise DpjaxError(
            "the model has no adapter to export; train with --tuning lora, or export it whole"
        )
    lora, family = config.lora, family_of(config)
    config, params = with_segments(config, params, (config.num_layers,))
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    named: dict[str, np.ndarray] = {}
    modules = set()
    for part in params["blocks"][0].values():
        for target, leaves in part.items():
            if not (isinstance(leaves, dict) and "lora_a" in leaves):
                continue
            module = adapter_module(family, target)
            # The whole name: GPT-2 has a c_proj in attention and in the feed-forward block.
            modules.add(module)
            # PEFT keeps both matrices transposed, outputs x inputs.
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                stacked = np.asarray(jax.device_get(leaves[ours]))
                for layer in range(config.num_layers):
                    name = f"base_model.model.{layers}.{layer}.{module}.{theirs}.weight"
                    named[name] = np.ascontiguousarray(stacked[layer].T)
    write_safetensors(path / "adapter_model.safetensors", named)
    write_json(
        path / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.scaling * lora.rank if lora.alpha is None else lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": family == "gpt2",
            "inference_mode": True,
        },
    )
