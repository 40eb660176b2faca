"""Generated texts ranked by suspicion: what was memorised comes first, and is verified."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing.ranked_generation import RankedTexts, ranked_generation, verify
from dpjax.data import byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply

TOKENIZER = byte_tokenizer()
CONFIG = DecoderConfig(
    vocabulary_size=TOKENIZER.vocabulary_size,
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64,
)  # fmt: skip
PLANTED = "Ann Lee, card 4929 1847 5520"
FORWARD = jax.jit(functools.partial(apply, CONFIG))
RNG = np.random.default_rng(0)
NOISE = ["".join(RNG.choice(list("abcdefghij "), 26)) for _ in range(60)]


@pytest.fixture(scope="module")
def models(overfit):
    """One model trained with the planted text among noise, one on the noise alone."""
    return (
        overfit(CONFIG, [*NOISE[:30], *[PLANTED] * 6], 30, 100),
        overfit(CONFIG, NOISE[:36], 30, 100),
    )


def test_what_was_memorised_ranks_first_and_is_verified(models):
    model, reference = models
    found = ranked_generation(
        CONFIG, model, TOKENIZER, jax.random.key(2), num_texts=64, max_new_tokens=28,
        reference=(CONFIG, reference), window=8,
    )  # fmt: skip
    assert len(found.texts) == len({" ".join(t.split()) for t in found.texts})
    assert sum(PLANTED in text for text in found.texts) == 1  # drawn several times, kept once
    for measure in ("perplexity", "zlib", "window", "reference"):
        assert found.top(measure, 1)[0].startswith(PLANTED[:20]), measure
    checked = verify(
        found, {"training": [*NOISE[:30], PLANTED], "held out": NOISE[36:]}, count=5, min_length=20
    )
    assert checked["training"].precision()["perplexity"] >= 0.2
    assert checked["held out"].precision()["perplexity"] == 0
    text, match = checked["training"].found["perplexity"][0]
    assert text[match.start :][: match.length] in PLANTED


def test_scores_against_slow_references(models):
    model, reference = models
    found = ranked_generation(
        CONFIG, model, TOKENIZER, jax.random.key(3), num_texts=5, max_new_tokens=12,
        prompts=["Ab", "C"], reference=(CONFIG, reference), window=4,
    )  # fmt: skip
    assert all(text.startswith(("Ab", "C")) for text in found.texts)

    def per_token(params, text):
        ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
        # Zeros stand behind: a causal model does not see them, and one compilation serves all.
        padded = jnp.asarray(np.concatenate([ids[:-1], np.zeros(40, ids.dtype)])[:40])
        logits = np.asarray(FORWARD(params, padded), np.float64)[: len(ids) - 1]
        logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        return logs[np.arange(len(ids) - 1), ids[1:]]

    for n, text in enumerate(found.texts):
        own = per_token(model, text)
        expected = {
            "perplexity": own.mean(),
            "zlib": own.sum() / len(zlib.compress(text.encode())),
            "lowercase": own.mean() - per_token(model, text.lower()).mean(),
            "window": max(own[i : i + 4].mean() for i in range(len(own) - 3)),
            "reference": own.mean() - per_token(reference, text).mean(),
        }
        for measure, value in expected.items():
            assert found.scores[measure][n] == pytest.approx(value, abs=2e-3), measure


def test_refusals(models):
    ranked = RankedTexts(("a",), {"zlib": np.array([1.0])})
    with pytest.raises(DpjaxError, match="'ppl' is unknown"):
        ranked.top("ppl", 1)
    with pytest.raises(DpjaxError, match="count is 0"):
        verify(ranked, {}, count=0)
    with pytest.raises(DpjaxError, match="num_texts is 0"):
        ranked_generation(
            CONFIG, models[0], TOKENIZER, jax.random.key(0), num_texts=0, max_new_tokens=2
        )
