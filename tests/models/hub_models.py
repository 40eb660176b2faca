"""Tiny random models of every architecture, built by `transformers` itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers as hf

import dpjax.models

# Threads that wait for each other on shared cores take ten times as long as one.
torch.set_num_threads(1)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma(**changes):
    return hf.Gemma3TextConfig(
        **{
            **COMMON,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 4,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
            ],
            **changes,
        }
    )


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama tied with biases": lambda: hf.LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama 3 positions": lambda: hf.LlamaConfig(
        **COMMON, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5
    ),
    "llama linear positions": lambda: hf.LlamaConfig(
        **COMMON,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        head_dim=6,
    ),
    "smollm2": lambda: hf.LlamaConfig(
        **COMMON,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
    "qwen2": lambda: hf.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2 sliding": lambda: hf.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "gemma3": gemma,
    "gemma3 linear positions": lambda: gemma(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    ),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt2 exact gelu": lambda: hf.GPT2Config(**GPT2, activation_function="gelu", n_inner=40),
}


def random_model(name, seed=0, **changes):
    """A model with weights large enough that every term of it matters."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def write_tokenizer(folder, words=97):
    """A vocabulary of whole words; padding, begin and end are its first three."""
    names = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, words - 1)), "<unk>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(names[:3])
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    described = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def save_checkpoint(model, folder, **options):
    """What `transformers` writes, with a tokenizer."""
    model.save_pretrained(folder, **options)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def load_exported(folder, dtype=torch.float32):
    """The model that `transformers` reads there; every tensor must have its place."""
    model, report = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def random_tokens(seed=0, count=40, vocabulary=97):
    return np.random.default_rng(seed).integers(3, vocabulary, count).astype(np.int32)


_apply = jax.jit(dpjax.models.apply, static_argnums=0)


def our_logits(config, params, tokens):
    return np.asarray(_apply(config, params, jnp.asarray(tokens)))
