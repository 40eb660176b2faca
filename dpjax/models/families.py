"""Hugging Face's names for what `DecoderConfig` describes, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from dpjax.errors import DpjaxError
from dpjax.models.config import DecoderConfig, RopeScaling

Family = Literal["llama", "qwen2", "qwen3", "gemma3", "gpt2"]
_ARCHITECTURES: dict[Family, tuple[str, str]] = {  # model_type, architecture class
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
_MODEL_TYPES: dict[str, Family] = {kind: f for f, (kind, _) in _ARCHITECTURES.items()}


_GEMMA_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}


class Tensor(NamedTuple):
    """One tensor of a checkpoint and the leaf that it is.

    Attributes:
      path: keys into one layer's parameters, or into the whole tree where ``name`` has no layer.
      name: of the tensor; ``{layer}`` stands for the layer's number.
      layout: "as is"; "transposed" (outputs x inputs); "part 0 of 3" and so on (query, key and
        value side by side).
    """

    path: tuple[str, ...]
    name: str
    layout: str = "as is"


def read_hf_config(described: Mapping[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """A ``config.json`` as a family and a shape, layers in one stack.

    Raises:
      DpjaxError: another architecture, or a setting that changes the computation and is not known
        here: the first such, its value and what can be used.

    Example:
      >>> family, config = read_hf_config({
      ...     "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2,
      ...     "num_attention_heads": 4, "intermediate_size": 96, "rms_norm_eps": 1e-6}, "example")
      >>> family, config.num_kv_heads, config.segments
      ('llama', 4, (2,))
    """
    quantised = described.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise DpjaxError(
            f"{where}: the weights are quantised ({method}), which is not read from safetensors; "
            "use the model's unquantised folder or a GGUF file"
        )
    kind = described.get("model_type")
    if kind == "gemma3" and isinstance(described.get("text_config"), Mapping):
        # The multimodal checkpoint: its language model alone.
        # Published files leave out of it what equals the class's defaults.
        described = {**_GEMMA_DEFAULTS, **described["text_config"], "tie_word_embeddings": True}
        kind = "gemma3_text"
    family = _MODEL_TYPES.get(str(kind))
    if family is None:
        raise DpjaxError(
            f"{where} is of type {kind!r}; supported are {', '.join(sorted(_MODEL_TYPES))}"
        )
    try:
        return family, (_gpt2 if family == "gpt2" else _rotary)(family, described, where)
    except KeyError as missing:
        raise DpjaxError(f"{where} has no {missing.args[0]!r}; restore the file") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DpjaxError(f"{where} is corrupt ({error}); restore the file") from None


def _refuse(where: str, described: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    for name, values in allowed.items():
        if name in described and described[name] not in values:
            raise DpjaxError(
                f"{where}: {name} is {described[name]!r}, which is not supported; "
                f"supported: {', '.join(map(repr, values))}"
            )


def _gpt2(family: Family, c: Mapping[str, Any], where: str) -> DecoderConfig:
    activations = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
    _refuse(
        where,
        c,
        {
            "activation_function": tuple(activations),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False, None),
        },
    )
    return DecoderConfig(
        vocabulary_size=int(c["vocab_size"]),
        num_layers=int(c["n_layer"]),
        d_model=int(c["n_embd"]),
        num_heads=int(c["n_head"]),
        num_kv_heads=int(c["n_head"]),
        d_ff=int(c.get("n_inner") or 4 * int(c["n_embd"])),
        norm="layernorm",
        activation=activations[c.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
        tied=bool(c.get("tie_word_embeddings", True)),
        positions="learned",
        max_positions=int(c.get("n_positions", 1024)),
        norm_epsilon=float(c.get("layer_norm_epsilon", 1e-5)),
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        segments=(int(c["n_layer"]),),
    )


def _rotary(family: Family, c: Mapping[str, Any], where: str) -> DecoderConfig:
    gemma = family == "gemma3"
    activation = "hidden_activation" if gemma else "hidden_act"
    bends = ("gelu_pytorch_tanh",) if gemma else ("silu", "swish")
    _refuse(
        where,
        c,
        {
            activation: bends,
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (None, False),
        },
    )
    layers, d_model = int(c["num_hidden_layers"]), int(c["hidden_size"])
    heads = int(c["num_attention_heads"])
    theta, local_theta, scaling = _rope(c, where, 1_000_000.0 if gemma else 10_000.0)
    local = _local_layers(c, where, layers, gemma)
    bias = bool(c.get("attention_bias", False))
    return DecoderConfig(
        vocabulary_size=int(c["vocab_size"]),
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=int(c.get("num_key_value_heads") or heads),
        d_ff=int(c["intermediate_size"]),
        activation="geglu" if gemma else "swiglu",
        tied=bool(c.get("tie_word_embeddings", gemma)),
        rope_theta=theta,
        head_size=int(c["head_dim"]) if c.get("head_dim") else (256 if gemma else None),
        max_positions=int(c.get("max_position_embeddings", 2048)),
        norm_epsilon=float(c.get("rms_norm_eps", 1e-6)),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        ff_bias=bool(c.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3"),
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=math.sqrt(d_model) if gemma else 1.0,
        query_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5 if gemma else None,
        rope_scaling=scaling,
        sliding_window=int(c["sliding_window"]) if any(local) else None,
        local_layers=local if any(local) else (),
        local_rope_theta=local_theta,
        segments=(layers,),
    )


def _local_layers(c: Mapping[str, Any], where: str, layers: int, gemma: bool) -> tuple[bool, ...]:
    if not gemma and not c.get("use_sliding_window", False):
        return ()
    if c.get("layer_types"):
        for kind in c["layer_types"]:
            if kind not in ("sliding_attention", "full_attention"):
                raise DpjaxError(
                    f"{where}: layer_types holds {kind!r}, which is not supported; supported: "
                    "full_attention, sliding_attention"
                )
        return tuple(kind == "sliding_attention" for kind in c["layer_types"])
    if gemma:
        every = int(c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6)
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    return tuple(layer >= int(c.get("max_window_layers", layers)) for layer in range(layers))


def _rope(
    c: Mapping[str, Any], where: str, default: float
) -> tuple[float, float, RopeScaling | None]:
    """Base for full and local layers, and the stretch; in the older and the newer spelling."""
    newer = c.get("rope_parameters") or {}
    full = newer.get("full_attention", newer) or {}
    near = newer.get("sliding_attention") or {}
    theta = float(full.get("rope_theta") or c.get("rope_theta") or default)
    local = float(near.get("rope_theta") or c.get("rope_local_base_freq") or 0.0)
    if not local:
        local = 10_000.0 if str(c.get("model_type", "")).startswith("gemma") else theta
    scaling = c.get("rope_scaling") or full
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = full.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    near_kind = near.get("rope_type", "default")
    if near_kind not in ("default", None):
        raise DpjaxError(
            f"{where}: rotary positions of sliding_attention are of type {near_kind!r}, which is "
            "not supported; supported: default"
        )
    whole = partial in (1, 1.0, None)
    if kind in ("default", None) and whole:
        return theta, local, None
    if kind == "linear" and whole:
        return theta, local, RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3" and whole:
        stretched = RopeScaling(
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
        return theta, local, stretched
    raise DpjaxError(
        f"{where}: rotary positions are of type {kind!r} (partial factor {partial}), which is not "
        "supported; supported: default, linear, llama3 over the whole head"
    )


def family_of(config: DecoderConfig) -> Family:
    """Which Hugging Face architecture computes what this configuration says.

    Raises:
      DpjaxError: none does.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> family_of(decoder_config("nano", 300))
      'llama'
    """
    c = config
    biases = (c.qkv_bias, c.out_bias, c.ff_bias)
    gpt2 = (c.norm, c.positions, biases) == ("layernorm", "learned", (True, True, True))
    if gpt2 and not c.is_gated and c.num_kv_heads == c.num_heads:
        return "gpt2"
    if c.norm == "rmsnorm" and c.positions == "rope":
        plain = (
            not c.post_norms
            and not c.norm_offset
            and c.embedding_scale == 1.0
            and c.query_scale is None
        )
        if c.activation == "swiglu" and plain and not (c.ff_bias and c.qk_norm):
            if not c.qk_norm and not c.local_layers and c.qkv_bias == c.out_bias:
                return "llama"
            if not c.qk_norm and c.qkv_bias and not c.out_bias and not c.ff_bias:
                return "qwen2"
            if c.qk_norm and c.qkv_bias == c.out_bias:
                return "qwen3"
        gemma = (c.activation, c.qk_norm, c.post_norms, c.norm_offset) == ("geglu", True, True, 1)
        if gemma and c.qkv_bias == c.out_bias and not c.ff_bias:
            return "gemma3"
    raise DpjaxError(
        f"no Hugging Face architecture has {c.norm}, {c.activation}, {c.positions} positions and "
        "this set of biases and norms; keep the model folder, or train nano, mini, small or a "
        "pretrained model"
    )


def write_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` for this shape, in the spelling that old and new readers understand.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> described = write_hf_config(decoder_config("nano", 300))
      >>> described["architectures"], read_hf_config(described, "example")[1].d_ff
      (['LlamaForCausalLM'], 256)
    """
    family, c = family_of(config), config
    kind, architecture = _ARCHITECTURES[family]
    common = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": c.vocabulary_size,
        "tie_word_embeddings": c.tied,
        "dtype": c.dtype,
        "torch_dtype": c.dtype,
    }
    if family == "gpt2":
        return {
            **common,
            "n_layer": c.num_layers,
            "n_embd": c.d_model,
            "n_head": c.num_heads,
            "n_inner": c.d_ff,
            "n_positions": c.max_positions,
            "n_ctx": c.max_positions,
            "activation_function": "gelu_new" if c.activation == "gelu" else "gelu",
            "layer_norm_epsilon": c.norm_epsilon,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    stretch: dict[str, Any] | None = None
    if c.rope_scaling is not None:
        s = c.rope_scaling
        stretch = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            stretch |= {
                "low_freq_factor": s.low,
                "high_freq_factor": s.high,
                "original_max_position_embeddings": s.original_positions,
            }
    described = {
        **common,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.d_model,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "attention_bias": c.out_bias,
        "attention_dropout": 0.0,
    }
    full = {"rope_theta": c.rope_theta, "rope_type": "default", **(stretch or {})}
    if family == "gemma3":
        near = {"rope_theta": c.local_rope_theta, "rope_type": "default"}
        return {
            **described,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _whole(c.score_scale**-2),
            "rope_local_base_freq": c.local_rope_theta,
            "rope_scaling": stretch,
            "rope_parameters": {"full_attention": full, "sliding_attention": near},
            "sliding_window": c.sliding_window or 4096,
            "layer_types": _layer_types(c),
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        }
    described |= {"hidden_act": "silu", "rope_scaling": stretch, "rope_parameters": full}
    if family == "llama":
        return {**described, "mlp_bias": c.ff_bias}
    return {
        **described,
        "use_sliding_window": bool(c.local_layers),
        "sliding_window": c.sliding_window,
        "layer_types": _layer_types(c),
    }


def _whole(value: float) -> int | float:
    """An integer where it is one but for rounding: newer readers insist on the type."""
    near = round(value)
    return near if abs(value - near) < 1e-6 * max(1.0, abs(value)) else value


def _layer_types(config: DecoderConfig) -> list[str]:
    local = config.local_layers or (False,) * config.num_layers
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


_PROJECTIONS = {
    "query": ("attention", "self_attn.q_proj"),
    "key": ("attention", "self_attn.k_proj"),
    "value": ("attention", "self_attn.v_proj"),
    "out": ("attention", "self_attn.o_proj"),
    "gate": ("feed_forward", "mlp.gate_proj"),
    "up": ("feed_forward", "mlp.up_proj"),
    "down": ("feed_forward", "mlp.down_proj"),
}


def tensors(family: Family, config: DecoderConfig) -> tuple[list[Tensor], list[Tensor]]:
    """The checkpoint's tensors for one layer, and those outside the layers.

    Example:
      >>> from dpjax.models.config import decoder_config
      >>> layer, outside = tensors("llama", decoder_config("nano", 300))
      >>> outside[0].name, len(layer)
      ('model.embed_tokens.weight', 9)
    """
    if family == "gpt2":
        return _gpt2_tensors(config)
    layer = []
    for name, (part, module) in _PROJECTIONS.items():
        if name == "gate" and not config.is_gated:
            continue
        prefix = f"model.layers.{{layer}}.{module}"
        layer.append(Tensor((part, name, "kernel"), f"{prefix}.weight", "transposed"))
        biases = {"out": config.out_bias, "gate": config.ff_bias}
        biases |= {"up": config.ff_bias, "down": config.ff_bias}
        if biases.get(name, config.qkv_bias):
            layer.append(Tensor((part, name, "bias"), f"{prefix}.bias"))
    norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "feed_forward_post_norm": "post_feedforward_layernorm",
        }
    for ours, theirs in norms.items():
        layer.append(Tensor((ours, "scale"), f"model.layers.{{layer}}.{theirs}.weight"))
    if config.qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            name = f"model.layers.{{layer}}.self_attn.{theirs}.weight"
            layer.append(Tensor(("attention", ours, "scale"), name))
    outside = [
        Tensor(("embedding", "embedding"), "model.embed_tokens.weight"),
        Tensor(("final_norm", "scale"), "model.norm.weight"),
    ]
    if not config.tied:
        outside.append(Tensor(("head", "kernel"), "lm_head.weight", "transposed"))
    return layer, outside


def _gpt2_tensors(config: DecoderConfig) -> tuple[list[Tensor], list[Tensor]]:
    layer, h = [], "transformer.h.{layer}"
    for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
        layer.append(Tensor((ours, "scale"), f"{h}.{theirs}.weight"))
        layer.append(Tensor((ours, "bias"), f"{h}.{theirs}.bias"))
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for index, name in enumerate(("query", "key", "value")):
            layout = f"part {index} of 3"
            layer.append(Tensor(("attention", name, ours), f"{h}.attn.c_attn.{theirs}", layout))
        layer.append(Tensor(("attention", "out", ours), f"{h}.attn.c_proj.{theirs}"))
        layer.append(Tensor(("feed_forward", "up", ours), f"{h}.mlp.c_fc.{theirs}"))
        layer.append(Tensor(("feed_forward", "down", ours), f"{h}.mlp.c_proj.{theirs}"))
    outside = [
        Tensor(("embedding", "embedding"), "transformer.wte.weight"),
        Tensor(("position_embedding", "embedding"), "transformer.wpe.weight"),
        Tensor(("final_norm", "scale"), "transformer.ln_f.weight"),
        Tensor(("final_norm", "bias"), "transformer.ln_f.bias"),
    ]
    if not config.tied:
        outside.append(Tensor(("head", "kernel"), "lm_head.weight", "transposed"))
    return layer, outside


def adapter_module(family: Family, target: str) -> str:
    """The module that PEFT wraps for a LoRA target, e.g. "self_attn.q_proj".

    GPT-2's query, key and value are thirds of one module.

    Example:
      >>> adapter_module("llama", "query"), adapter_module("gpt2", "key")
      ('self_attn.q_proj', 'attn.c_attn')
    """
    if family != "gpt2":
        return _PROJECTIONS[target][1]
    modules = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    return modules.get(target, "attn.c_attn")
