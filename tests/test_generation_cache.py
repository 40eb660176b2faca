"""Generation with a cache: the same text as without, in every architecture, batch and stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.generation import generate, stream
from dpjax.models import (
    DecoderConfig,
    LoRA,
    RopeScaling,
    abstract_params,
    apply,
    apply_cached,
    init_caches,
    with_segments,
)

LLAMA = DecoderConfig(
    vocabulary_size=61, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=40
)
CONFIGS = {
    "llama": LLAMA,
    "stacked": dataclasses.replace(LLAMA, segments=(3,)),
    "two stacks": dataclasses.replace(LLAMA, segments=(1, 2)),
    "adapters": dataclasses.replace(LLAMA, lora=LoRA(2)),
    "stretched": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "untied, biases, norms": dataclasses.replace(
        LLAMA, tied=False, qkv_bias=True, qk_norm=True, segments=(3,)
    ),
    "gemma": dataclasses.replace(
        LLAMA,
        activation="geglu",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        sliding_window=4,
        local_layers=(True, False, True),
        local_rope_theta=100.0,
        embedding_scale=5.0,
        segments=(3,),
    ),
    "gemma, layers apart": dataclasses.replace(
        LLAMA, sliding_window=4, local_layers=(True, False, True)
    ),
    "gpt2": dataclasses.replace(
        LLAMA,
        norm="layernorm",
        activation="gelu",
        positions="learned",
        max_positions=48,
        num_kv_heads=4,
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
    ),
}


def random_params(config, seed=0):
    """Weights so large that the likeliest token changes from place to place."""
    leaves, treedef = jax.tree.flatten(abstract_params(config))
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.4 * rng.normal(size=s.shape), s.dtype) for s in leaves]
    return jax.tree.unflatten(treedef, drawn)


def loop(config, params, prompt, count):
    """Greedy decoding, one whole forward pass for each token."""
    tokens = list(prompt)
    whole = jax.jit(apply, static_argnums=0)
    for _ in range(count):
        padded = np.zeros(16, np.int32)
        padded[: len(tokens)] = tokens
        logits = whole(config, params, padded)[len(tokens) - 1]
        tokens.append(int(jnp.argmax(logits)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_logits_are_those_of_the_whole_text(config):
    params = random_params(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, 14))
    whole = apply(config, params, tokens)
    # A prompt with padding behind it, which later tokens overwrite.
    padded = jnp.concatenate([tokens[:5], jnp.full(3, 60)])
    logits, caches = apply_cached(config, params, padded, init_caches(config, 16), 0, 4)
    np.testing.assert_allclose(logits, whole[4], rtol=2e-4, atol=2e-4)
    for at in range(5, 14):
        logits, caches = apply_cached(config, params, tokens[at : at + 1], caches, at, 0)
        np.testing.assert_allclose(logits, whole[at], rtol=2e-4, atol=2e-4)


# Seeds whose texts move about; most random models fall into one token for ever.
@pytest.mark.parametrize(
    ("name", "seed"), [("llama", 9), ("two stacks", 9), ("gemma", 4), ("gpt2", 5)]
)
def test_greedy_text_is_that_of_a_plain_loop(name, seed):
    config = CONFIGS[name]
    params = random_params(config, seed)
    prompts = [[3, 1, 22], [7], [9, 9, 9, 30, 2, 1, 0]]
    expected = [loop(config, params, prompt, 9) for prompt in prompts]
    assert len({token for text in expected for token in text}) > 2
    for use_cache in (True, False):
        found = generate(
            config, params, prompts, None, max_new_tokens=9, temperature=0.0, use_cache=use_cache
        )
        assert found == expected


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}])
def test_drawn_text_is_the_same_without_a_cache(settings):
    config = CONFIGS["gemma"]
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    prompts = [[3, 1, 22], [7]]
    key = jax.random.key(5)
    cached, plain = (
        generate(config, params, prompts, key, max_new_tokens=10, use_cache=use, **settings)
        for use in (True, False)
    )
    assert cached == plain
    other = generate(config, params, prompts, jax.random.key(6), max_new_tokens=10, **settings)
    assert other != cached


def test_a_text_does_not_depend_on_its_batch():
    params = jax.tree.map(lambda x: 0.3 * x, random_params(LLAMA))
    prompts = [[i, i + 1] for i in range(7)]
    key = jax.random.key(0)
    whole = generate(LLAMA, params, prompts, key, max_new_tokens=6)
    assert generate(LLAMA, params, prompts, key, max_new_tokens=6, batch_size=3) == whole
    assert len({tuple(text) for text in whole}) == 7


def test_the_stream_is_the_text_in_pieces():
    params = jax.tree.map(lambda x: 0.3 * x, random_params(LLAMA))
    prompts, key = [[3, 1], [7, 2, 2]], jax.random.key(1)
    whole = generate(LLAMA, params, prompts, key, max_new_tokens=11)
    pieces = list(stream(LLAMA, params, prompts, key, max_new_tokens=11, tokens_per_step=4))
    assert [len(piece[0]) for piece in pieces] == [4, 4, 3]
    assert [[t for piece in pieces for t in piece[row]] for row in (0, 1)] == whole


def test_a_text_ends_before_its_first_stop_token():
    params = random_params(LLAMA, 2)
    prompts = [[3, 1, 22], [7]]
    whole = generate(LLAMA, params, prompts, None, max_new_tokens=12, temperature=0.0)
    stops = (whole[0][4], whole[1][7])
    expected = [text[: min(text.index(s) for s in stops if s in text)] for text in whole]
    settings = {"max_new_tokens": 12, "temperature": 0.0, "stop_token": stops}
    assert generate(LLAMA, params, prompts, None, **settings) == expected
    pieces = list(stream(LLAMA, params, prompts, None, tokens_per_step=3, **settings))
    assert [[t for piece in pieces for t in piece[row]] for row in (0, 1)] == expected
    assert len(pieces) < 4  # it does not go on when every text has ended


def test_learned_positions_are_not_exceeded():
    config = CONFIGS["gpt2"]
    params = random_params(config)
    prompt = list(range(40))
    assert len(generate(config, params, [prompt], None, max_new_tokens=8, temperature=0.0)[0]) == 8
    with pytest.raises(DpjaxError, match="48 positions"):
        generate(config, params, [prompt], None, max_new_tokens=9, temperature=0.0)


def test_stacked_and_unrolled_models_write_the_same():
    params = random_params(LLAMA, 2)
    expected = generate(LLAMA, params, [[3, 1]], None, max_new_tokens=8, temperature=0.0)
    config, stacked = with_segments(LLAMA, params, (2, 1))
    found = generate(config, stacked, [[3, 1]], None, max_new_tokens=8, temperature=0.0)
    assert found == expected
