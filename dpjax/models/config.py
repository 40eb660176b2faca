"""What a decoder looks like: one frozen description for GPT-2, Llama, Qwen and Gemma families."""

import dataclasses
from typing import Any, Literal

from dpjax.errors import DpjaxError

Target = Literal["query", "key", "value", "out", "gate", "up", "down"]
ALL_TARGETS: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen matrices: ``x W + (alpha / rank) (x A) B``.

    Source: Hu et al. (2022), section 4.1; under DP: Yu et al. (2022).

    Example:
      >>> LoRA(rank=8).scaling
      2.0
    """

    rank: int = 16
    """Inner width of every adapter."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank (default: twice the rank)."""
    targets: tuple[Target, ...] = ("query", "value")
    """Which projections get one: query, key, value, out, gate, up, down. Under noise fewer
    parameters are better: every one of them gets its share."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise DpjaxError(f"lora rank is {self.rank}; it must be at least 1, e.g. 16")
        if self.alpha is not None and not self.alpha > 0:
            raise DpjaxError(f"lora alpha is {self.alpha}; it must be positive, e.g. 32")
        unknown = [t for t in self.targets if t not in ALL_TARGETS]
        if unknown or not self.targets:
            raise DpjaxError(
                f"lora targets are {list(self.targets)}; use some of: {', '.join(ALL_TARGETS)}"
            )

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched for longer texts.

    Attributes:
      kind: "linear" divides all by ``factor``; "llama3" divides low ones, keeps high ones and
        interpolates between (Llama team, 2024; constants as in the checkpoints' config.json).
      factor, low, high, original_positions: its constants.

    Example:
      >>> RopeScaling("linear", 8.0).factor
      8.0
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a pre-norm decoder, and how it is computed.

    Attributes:
      vocabulary_size: rows of the embedding.
      num_layers, d_model: depth and width.
      num_heads: query heads.
      num_kv_heads: key and value heads shared by groups of query heads; divides ``num_heads``.
      d_ff: hidden width of the feed-forward block.
      norm: "rmsnorm" or "layernorm".
      activation: "swiglu", "geglu" (gated, three matrices), "gelu" or "gelu_exact" (two matrices);
        all but "gelu_exact" use the tanh approximation of GELU.
      tied: whether the embedding is also the output head.
      rope_theta: base of the rotary position frequencies.
      dtype: of parameters; logits and loss are float32 in any case.
      head_size: width of each head; default ``d_model / num_heads``.
      positions: "rope", or "learned" (a table added to the embedding).
      max_positions: longest sequence in tokens, the rows of a learned table.
      norm_epsilon: added to the variance.
      qkv_bias, out_bias, ff_bias: which projections have a bias.
      qk_norm: RMS norm of every query and key head (Qwen 3, Gemma 3).
      norm_offset: added to every norm's stored scale (Gemma 3: 1).
      post_norms: a second norm behind attention and feed-forward (Gemma 3).
      embedding_scale: multiplies the embedding (Gemma: the root of ``d_model``).
      query_scale: multiplies the attention scores; default ``head_size ** -0.5``.
      rope_scaling: stretched rotary frequencies.
      sliding_window: tokens that a local layer sees, itself included.
      local_layers: for each layer, whether it is local; empty where none is.
      local_rope_theta: rotary base of local layers.
      lora: adapters; their matrices are then part of the parameters.
      segments: numbers of consecutive layers whose parameters are stacked and run by one
        ``lax.scan`` each; () keeps every layer apart. They sum to ``num_layers``.
      remat: recompute each layer in the backward pass (memory of one layer, a third more time).
      compute_dtype: of activations and matrix products; default ``dtype``. "bfloat16" over float32
        parameters is mixed precision with master weights.

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
    activation: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    tied: bool = True
    rope_theta: float = 10_000.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    head_size: int | None = None
    positions: Literal["rope", "learned"] = "rope"
    max_positions: int = 2048
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    ff_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_theta: float = 10_000.0
    lora: LoRA | None = None
    segments: tuple[int, ...] = ()
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self):
        sizes = ("vocabulary_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise DpjaxError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise DpjaxError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads {self.num_heads}"
            )
        if self.head_size is None and self.d_model % self.num_heads:
            raise DpjaxError(
                f"d_model is {self.d_model} with {self.num_heads} heads; it must be a multiple, or "
                "head_size be given"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise DpjaxError(
                f"d_model is {self.d_model} with {self.num_heads} heads of {self.head_width}; "
                "rotary positions need an even width"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        object.__setattr__(self, "local_layers", tuple(self.local_layers))
        if self.segments and (sum(self.segments) != self.num_layers or min(self.segments) < 1):
            raise DpjaxError(
                f"segments are {list(self.segments)}; they must be positive and sum to num_layers "
                f"{self.num_layers}"
            )
        if self.local_layers and len(self.local_layers) != self.num_layers:
            raise DpjaxError(
                f"local_layers has {len(self.local_layers)} entries for {self.num_layers} layers"
            )
        if any(self.local_layers) and not self.sliding_window:
            raise DpjaxError("local_layers names local layers, but sliding_window is None; give it")

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.d_model // self.num_heads if self.head_size is None else self.head_size

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_width**-0.5 if self.query_scale is None else self.query_scale

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block has a third matrix."""
        return self.activation in ("swiglu", "geglu")

    @property
    def activation_dtype(self) -> str:
        """dtype of activations and matrix products."""
        return self.compute_dtype or self.dtype


def config_from_dict(described: dict[str, Any]) -> DecoderConfig:
    """Reverses ``dataclasses.asdict``, also after JSON.

    Raises:
      TypeError: unknown or missing fields.

    Example:
      >>> config = decoder_config("nano", 300, lora=LoRA(4))
      >>> config_from_dict(dataclasses.asdict(config)) == config
      True
    """
    fields = dict(described)
    if fields.get("lora") is not None:
        fields["lora"] = LoRA(**fields["lora"])
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return DecoderConfig(**fields)


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
