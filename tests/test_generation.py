"""Sampling: the distribution that is drawn from, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.generation import choose_token, generate
from dpjax.models import DecoderConfig, apply, init_params

CONFIG = DecoderConfig(
    vocabulary_size=17, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=16
)


@pytest.fixture(scope="module")
def params():
    fresh = init_params(CONFIG, jax.random.key(3))
    return jax.tree.map(lambda x: 8 * x, fresh)  # peaked enough to tell orders apart


def test_greedy_equals_one_forward_pass_after_another(params):
    prompt, expected = [4, 9, 2], []
    for _ in range(6):
        logits = apply(CONFIG, params, jnp.array(prompt + expected))
        expected.append(int(jnp.argmax(logits[-1])))
    found = generate(CONFIG, params, [prompt], None, max_new_tokens=6, temperature=0.0)
    assert found == [expected]


def test_a_batch_gives_each_prompt_what_it_gets_alone(params):
    prompts = [[1], [5, 6, 7, 8, 9], [2, 3]]
    together = generate(CONFIG, params, prompts, None, max_new_tokens=5, temperature=0.0)
    alone = [
        generate(CONFIG, params, [p], None, max_new_tokens=5, temperature=0.0)[0] for p in prompts
    ]
    assert together == alone


def test_first_token_follows_the_models_distribution(params):
    logits = apply(CONFIG, params, jnp.array([4, 9]))[-1]
    expected = np.asarray(jax.nn.softmax(logits / 1.5))
    draws = 4000
    texts = generate(
        CONFIG, params, [[4, 9]] * draws, jax.random.key(0), max_new_tokens=1, temperature=1.5
    )
    found = np.bincount([t[0] for t in texts], minlength=17) / draws
    error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(found - expected) < 5 * error + 1e-3)
    # Power: the distribution at another temperature is far outside the same band.
    other = np.asarray(jax.nn.softmax(logits))
    assert np.any(np.abs(other - expected) > 10 * error)


def test_top_k_and_top_p_cut_where_they_say():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    keys = jax.random.split(jax.random.key(0), 500)

    def drawn(**settings):
        return set(np.asarray(jax.vmap(lambda k: choose_token(logits, k, **settings))(keys)))

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(top_p=0.76) == {0, 1, 2}
    assert drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(top_k=1) == {0}


def test_stop_token_ends_a_text(params):
    free = generate(CONFIG, params, [[4, 9, 2]], None, max_new_tokens=6, temperature=0.0)[0]
    stop = free[3]
    cut = generate(
        CONFIG, params, [[4, 9, 2]], None, max_new_tokens=6, temperature=0.0, stop_token=stop
    )[0]
    assert cut == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[]], {}, "a prompt is empty"),
        ([[99]], {}, "token 99 is outside the vocabulary of 17"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_bad_input_is_one_line(params, prompts, settings, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        generate(CONFIG, params, prompts, jax.random.key(0), **settings)
    assert "\n" not in str(caught.value)


def test_a_key_is_required_to_draw(params):
    with pytest.raises(DpjaxError, match="key is None"):
        generate(CONFIG, params, [[1]], None, temperature=1.0)
