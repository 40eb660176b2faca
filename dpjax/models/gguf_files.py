"""GGUF files (llama.cpp's format): shape, dequantised tensors and tokenizer out of one file."""

from __future__ import annotations

import importlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

from dpjax.data import Tokenizer, pretrained_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models.config import DecoderConfig, RopeScaling
from dpjax.models.families import Family, tensors

_FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# How text is cut before the merges of a byte-level BPE; names are llama.cpp's, patterns those that
# the models' own tokenizer.json files hold.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "qwen2": _CONTRACTIONS + r"\p{N}" + _REST,
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
}
# Values of token_type; no text spells a control token.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"


def read_gguf(
    path: pathlib.Path,
) -> tuple[Family, DecoderConfig, list[str], Callable[[str], np.ndarray], Tokenizer]:
    """Family, shape, tensor names and reader (in Hugging Face's names and layout), tokenizer.

    Undoes llama.cpp's reordering of query and key rows (pairs of rotary features lie side by side
    there, half a head apart here), and the one that it adds to Gemma's norm weights.

    Raises:
      DpjaxError: the package ``gguf`` is missing; a broken file; an architecture, quantisation or
        tokenizer that is not supported.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise DpjaxError(
            "gguf is missing and reads such files; run: pip install 'dpjax[pretrained]'"
        ) from None
    try:
        reader = gguf.GGUFReader(os.fspath(path))
    except FileNotFoundError:
        raise DpjaxError(f"{path} does not exist; give the path of a GGUF file") from None
    except Exception as error:
        first = " ".join(str(error).split())[:120]
        raise DpjaxError(f"{path} is not a readable GGUF file ({first}); fetch it again") from error
    facts = _Facts(reader, path)
    architecture = str(facts.get("general.architecture"))
    if architecture not in _FAMILIES:
        raise DpjaxError(
            f"{path} is of architecture {architecture!r}; supported in GGUF: "
            f"{', '.join(_FAMILIES)} (others as a Hugging Face folder)"
        )
    family = _FAMILIES[architecture]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _shape(facts, family, architecture, stored)
    names = _names(family, config)
    present = {theirs: ours for theirs, ours in names.items() if ours in stored}
    unknown = sorted(set(stored) - set(names.values()) - {"output.weight"})
    if unknown:
        raise DpjaxError(
            f"{path} has a tensor {unknown[0]!r} that is not supported here; use the model's "
            "Hugging Face folder instead"
        )
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(name: str) -> np.ndarray:
        tensor = stored[names[name]]
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:
            raise DpjaxError(
                f"tensor {tensor.name!r} of {path} is stored as {tensor.tensor_type.name}, which "
                f"cannot be read ({' '.join(str(error).split())[:80]}); use another quantisation"
            ) from error
        module = tensor.name.split(".")[-2]
        if family == "llama" and module in heads:
            value = _halves(value, heads[module])
        if family == "gemma3" and "norm" in module:
            value = value.astype(np.float32) - 1.0
        return value

    return family, config, list(present), read, _tokenizer(facts)


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from pairs side by side to pairs half a head apart."""
    shape = value.shape
    return value.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _names(family: Family, config: DecoderConfig) -> dict[str, str]:
    """Hugging Face's name of every tensor -> GGUF's."""
    layer, outside = tensors(family, config)
    # One name means the norm in front of the feed-forward block in one family, and the one behind
    # attention in the other.
    after = "post_attention_norm" if config.post_norms else "ffn_norm"
    modules = {**_MODULES, "post_attention_layernorm": after}
    names: dict[str, str] = {}
    for tensor in layer:
        module, _, kind = tensor.name.removeprefix("model.layers.{layer}.").rpartition(".")
        for number in range(config.num_layers):
            names[tensor.name.format(layer=number)] = f"blk.{number}.{modules[module]}.{kind}"
    for tensor in outside:
        module, _, kind = tensor.name.rpartition(".")
        names[tensor.name] = f"{_OUTSIDE[module]}.{kind}"
    return names


class _Facts:
    """The metadata of a file, by name."""

    def __init__(self, reader: Any, path: pathlib.Path):
        self.path, self._fields = path, reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise DpjaxError(f"{self.path} has no {name!r}; the file is incomplete: fetch it again")
        return value


def _shape(
    facts: _Facts, family: Family, architecture: str, stored: dict[str, Any]
) -> DecoderConfig:
    def get(name: str, default: Any = None) -> Any:
        return facts.get(f"{architecture}.{name}", default)

    def need(name: str) -> Any:
        return facts.need(f"{architecture}.{name}")

    layers, d_model = int(need("block_count")), int(need("embedding_length"))
    heads, gemma = int(need("attention.head_count")), family == "gemma3"
    width = int(get("attention.key_length") or d_model // heads)
    rotated = int(get("rope.dimension_count") or width)
    stretch, kind = None, get("rope.scaling.type", "none")
    if kind == "linear":
        stretch = RopeScaling("linear", float(get("rope.scaling.factor", 1.0)))
    if kind not in ("none", "linear") or rotated != width or "rope_freqs.weight" in stored:
        raise DpjaxError(
            f"{facts.path}: its rotary positions are stretched in a way that is not read from GGUF "
            "files; use the model's Hugging Face folder instead"
        )
    local = tuple((layer + 1) % 6 != 0 for layer in range(layers)) if gemma else ()
    epsilon = float(np.float32(need("attention.layer_norm_rms_epsilon")))
    return DecoderConfig(
        vocabulary_size=int(stored["token_embd.weight"].shape[1])
        if "token_embd.weight" in stored
        else int(need("vocab_size")),
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv") or heads),
        d_ff=int(need("feed_forward_length")),
        activation="geglu" if gemma else "swiglu",
        tied="output.weight" not in stored,
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        head_size=width,
        max_positions=int(get("context_length", 2048)),
        # Written as a float32 of a short decimal: 9.999999747378752e-06 was 1e-05.
        norm_epsilon=float(f"{epsilon:.6g}"),
        qkv_bias="blk.0.attn_q.bias" in stored,
        out_bias="blk.0.attn_output.bias" in stored,
        ff_bias="blk.0.ffn_up.bias" in stored,
        qk_norm=family in ("qwen3", "gemma3"),
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=math.sqrt(d_model) if gemma else 1.0,
        query_scale=float(get("attention.scale") or width**-0.5) if gemma else None,
        rope_scaling=stretch,
        sliding_window=int(need("attention.sliding_window")) if any(local) else None,
        local_layers=local if any(local) else (),
        segments=(layers,),
    )


def _tokenizer(facts: _Facts) -> Tokenizer:
    """Rebuilds a BPE, byte-level or SentencePiece's, from its vocabulary."""
    kind, cut = facts.need("tokenizer.ggml.model"), str(facts.get("tokenizer.ggml.pre", "gpt-2"))
    known = ("smollm", "gpt-2", "default", *_PATTERNS)
    if kind != "llama" and (kind != "gpt2" or cut not in known):
        raise DpjaxError(
            f"{facts.path}: its tokenizer ({kind}, {cut}) is not rebuilt from GGUF files; "
            f"supported: llama, and gpt2 with {', '.join(known)}; use the model's Hugging Face "
            "folder instead"
        )
    words = facts.need("tokenizer.ggml.tokens")
    types = facts.get("tokenizer.ggml.token_type") or [_NORMAL] * len(words)
    try:
        if kind == "llama":
            scores = facts.need("tokenizer.ggml.scores")
            prefix = bool(facts.get("tokenizer.ggml.add_space_prefix", True))
            backend = _sentence_pieces(words, scores, types, prefix)
        else:
            merges = [tuple(merge.split(" ")) for merge in facts.need("tokenizer.ggml.merges")]
            backend = _byte_level(words, merges, cut)
        control = [word for word, of in zip(words, types, strict=True) if of == _CONTROL]
    except DpjaxError:
        raise
    # The backend reports a bad vocabulary as a bare Exception, so nothing narrower catches it.
    except Exception as error:
        raise DpjaxError(
            f"{facts.path}: its tokenizer is broken ({error}); fetch it again"
        ) from None
    backend.add_special_tokens([tokenizers.AddedToken(w, normalized=False) for w in control])
    return pretrained_tokenizer(
        backend,
        bos_id=facts.get("tokenizer.ggml.bos_token_id"),
        eos_id=facts.need("tokenizer.ggml.eos_token_id"),
        pad_id=facts.get("tokenizer.ggml.padding_token_id"),
        chat_template=facts.get("tokenizer.chat_template"),
        where=str(facts.path),
    )


def _byte_level(words: list[str], merges: list[tuple[str, ...]], cut: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            ignore_merges=cut == "llama-bpe",
        )
    )
    bytes_ = tokenizers.pre_tokenizers.ByteLevel
    if cut in _PATTERNS:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[cut]), "isolated")
        parts = [split, bytes_(add_prefix_space=False, use_regex=False)]
    elif cut == "smollm":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        parts = [digits, bytes_(add_prefix_space=False)]
    else:
        parts = [bytes_(add_prefix_space=False)]
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    if cut == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentence_pieces(
    words: list[str], scores: list[float], types: list[int], prefix: bool
) -> tokenizers.Tokenizer:
    """The BPE of Llama 2 and Gemma: the pair whose piece has the best score is joined first.

    There is no list of merges: every way to cut a piece in two is one. Spaces are "\u2581", and
    what no piece spells is spelled in bytes.
    """
    kinds = list(zip(words, scores, types, strict=True))
    normal = {word: score for word, score, of in kinds if of == _NORMAL}
    merges = [
        (word[:at], word[at:])
        for word in sorted(normal, key=lambda word: -normal[word])
        for at in range(1, len(word))
        if word[:at] in normal and word[at:] in normal
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            unk_token=next((word for word, _, of in kinds if of == _UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = [tokenizers.normalizers.Replace(" ", _SPACE)]
    first = [tokenizers.normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = tokenizers.normalizers.Sequence([*first, *space])
    parts = [
        tokenizers.decoders.Replace(_SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        *([tokenizers.decoders.Strip(" ", 1, 0)] if prefix else []),
    ]
    backend.decoder = tokenizers.decoders.Sequence(parts)
    # Pieces of their own (Gemma: runs of line breaks) are found before anything is joined.
    own = [word for word, _, of in kinds if of == _USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(w, normalized=not prefix) for w in own])
    return backend
