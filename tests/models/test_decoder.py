"""The decoder against a slow float64 numpy implementation of the same equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.models import (
    DecoderConfig,
    abstract_params,
    apply,
    count_parameters,
    decoder_config,
    init_params,
    language_model_loss,
    next_token_losses,
)

TINY = DecoderConfig(
    vocabulary_size=23, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24
)
VARIANTS = {
    "rmsnorm tied grouped": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "layernorm gelu": dataclasses.replace(TINY, norm="layernorm", activation="gelu"),
    "one key head": dataclasses.replace(TINY, num_kv_heads=1),
    "all key heads": dataclasses.replace(TINY, num_kv_heads=4),
}


def random_params(config, seed=0):
    """Larger than the initialisation, so that every term matters; norms are not all ones."""
    shapes = abstract_params(config)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.3 * rng.normal(size=s.shape) + 0.1, s.dtype) for s in leaves]
    return jax.tree.unflatten(treedef, drawn)


def oracle(config, params, tokens):
    """Loops over heads and positions in float64, straight from the papers."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    width, group = config.head_width, config.num_heads // config.num_kv_heads

    def norm(w, x):
        if config.norm == "rmsnorm":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale"]
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w["scale"] + w["bias"]

    def rotate(vector, position):
        half = width // 2
        out = np.empty(width)
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / width)
            a, b = vector[i], vector[i + half]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = p["embedding"]["embedding"][np.asarray(tokens)]
    for layer in range(config.num_layers):
        block = p["blocks"][layer]
        h = norm(block["attention_norm"], x)
        q, k, v = (h @ block["attention"][n]["kernel"] for n in ("query", "key", "value"))
        mixed = np.zeros((len(tokens), config.num_heads * width))
        for head in range(config.num_heads):
            shared = head // group
            for t in range(len(tokens)):
                query = rotate(q[t, head * width : (head + 1) * width], t)
                keys = [
                    rotate(k[s, shared * width : (shared + 1) * width], s) for s in range(t + 1)
                ]
                scores = np.array([query @ key for key in keys]) / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                values = v[: t + 1, shared * width : (shared + 1) * width]
                mixed[t, head * width : (head + 1) * width] = weights @ values
        x = x + mixed @ block["attention"]["out"]["kernel"]
        h = norm(block["feed_forward_norm"], x)
        ff = block["feed_forward"]
        up = h @ ff["up"]["kernel"]
        if config.activation == "swiglu":
            gate = h @ ff["gate"]["kernel"]
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + hidden @ ff["down"]["kernel"]
    x = norm(p["final_norm"], x)
    head = p["embedding"]["embedding"].T if config.tied else p["head"]["kernel"]
    return x @ head


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_match_a_float64_loop(config):
    params = random_params(config)
    tokens = np.array([3, 1, 22, 3, 0, 7, 7])
    expected = oracle(config, params, tokens)
    found = apply(config, params, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_later_tokens_do_not_reach_earlier_logits():
    params = random_params(TINY)
    tokens = jnp.array([3, 1, 22, 3, 0])
    changed = tokens.at[3].set(9)
    before, after = apply(TINY, params, tokens), apply(TINY, params, changed)
    np.testing.assert_array_equal(before[:3], after[:3])
    assert not np.allclose(before[3], after[3])


@pytest.mark.parametrize(
    ("preset", "vocabulary", "low", "high"),
    [
        ("nano", 1024, 0.65e6, 0.8e6),
        ("mini", 4096, 4.5e6, 5.5e6),
        ("small", 16384, 27e6, 33e6),
        ("gpt2", 50257, 122e6, 126e6),
    ],
)
def test_presets_have_their_stated_size(preset, vocabulary, low, high):
    count = count_parameters(abstract_params(decoder_config(preset, vocabulary)))
    assert low <= count <= high


def test_parameters_are_a_plain_pytree_of_dicts():
    params = init_params(TINY, jax.random.key(0))

    def check(node):
        if isinstance(node, dict):
            for child in node.values():
                check(child)
        else:
            assert type(node).__module__.startswith("jax"), type(node)

    check(params)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(TINY))


def test_initialisation_depends_on_the_key_and_predicts_uniformly():
    config = decoder_config("nano", 1024)
    one, two = (init_params(config, jax.random.key(k)) for k in (0, 1))
    assert not np.allclose(one["embedding"]["embedding"], two["embedding"]["embedding"])
    tokens = jnp.arange(40) * 7
    example = {"tokens": tokens, "loss_mask": jnp.ones(40, bool)}
    losses, _ = next_token_losses(config, one, example)
    assert abs(float(losses.mean()) - np.log(1024)) < 0.15


def test_loss_sums_unmasked_tokens_over_a_public_constant():
    params = random_params(TINY)
    tokens = np.array([3, 1, 22, 3, 0, 0, 0])
    mask = np.array([True, True, True, False, True, False, False])
    logits = oracle(TINY, params, tokens[:-1])
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -sum(
        log_probabilities[t, tokens[t + 1]] for t in range(len(tokens) - 1) if mask[t + 1]
    )
    example = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}
    by_shape = language_model_loss(TINY)(params, example)
    by_ten = language_model_loss(TINY, normalize_by=10.0)(params, example)
    np.testing.assert_allclose(by_shape, expected / 6, rtol=1e-4)
    np.testing.assert_allclose(by_ten, expected / 10, rtol=1e-4)


def test_padding_has_no_gradient():
    params = random_params(TINY)
    loss_fn = language_model_loss(TINY, normalize_by=4.0)
    short = {"tokens": jnp.array([1, 2, 3]), "loss_mask": jnp.ones(3, bool)}
    padded = {
        "tokens": jnp.array([1, 2, 3, 9, 9]),
        "loss_mask": jnp.array([True, True, True, False, False]),
    }
    for a, b in zip(
        jax.tree.leaves(jax.grad(loss_fn)(params, short)),
        jax.tree.leaves(jax.grad(loss_fn)(params, padded)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@jax.numpy_dtype_promotion("standard")  # flax's norms promote bfloat16 statistics themselves
def test_bfloat16_model_has_bfloat16_parameters_and_float32_logits():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert apply(config, params, jnp.array([1, 2])).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 18}, "d_model is 18"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(DpjaxError, match=words):
        dataclasses.replace(TINY, **changes)
    with pytest.raises(DpjaxError, match="model is 'giant'"):
        decoder_config("giant", 10)
