"""Attacks that see synthetic text only: signals against slow references, and an echo heard."""

import math

import jax
import numpy as np
import pytest

from dpjax.auditing.insertion import insert
from dpjax.auditing.synthetic_text import (
    echo_canaries,
    ngram_scores,
    similarity_scores,
    synthetic_text_attacks,
)
from dpjax.data import Record, byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig, init_params

TOKENIZER = byte_tokenizer()
CONFIG = DecoderConfig(
    vocabulary_size=TOKENIZER.vocabulary_size,
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64,
)  # fmt: skip
TEXTS = ["a b a c", "b a", "", "c"]


def test_bigram_model_against_counts_by_hand():
    # Words a, b, c and the canary's d: 4 in all. "a b a c" and "b a" begin with a and b.
    found = ngram_scores(TEXTS, ["a b", "d a"], smoothing=0.5)
    first = math.log((1 + 0.5) / (3 + 2)) + math.log((1 + 0.5) / (2 + 2))
    # Begun: a, b, c once each. After a (2 followers counted): b and c. d was never seen.
    second = math.log(0.5 / (3 + 2)) + math.log(0.5 / (0 + 2))
    np.testing.assert_allclose(found, [first / 2, second / 2])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_of_all_words_sum_to_one(order):
    texts = ["x y z", "y z", "z z x"]
    before = ["x", "y"][: order - 1]
    with_context = [" ".join([*before, word]) for word in ("x", "y", "z")]
    without = np.sum(ngram_scores(texts, [" ".join(before)], order=order)) * (order - 1) if before \
        else 0.0  # fmt: skip
    last = order * ngram_scores(texts, with_context, order=order) - without
    assert np.exp(last).sum() == pytest.approx(1)


def test_similarity_against_sets_by_hand():
    rng = np.random.default_rng(0)
    letters = list("abcdefgh")
    texts = [" ".join(rng.choice(letters, rng.integers(0, 9))) for _ in range(30)]
    canaries = [" ".join(rng.choice([*letters, "new"], 5)) for _ in range(6)]
    for order in (1, 2):
        found = similarity_scores(texts, canaries, nearest=4, order=order)
        for score, canary in zip(found, canaries, strict=True):
            runs = [
                {tuple(t.split()[i : i + order]) for i in range(len(t.split()) - order + 1)}
                for t in (canary, *texts)
            ]
            own, others = runs[0], runs[1:]
            every = sorted(len(own & o) / len(own | o) for o in others)
            assert score == pytest.approx(np.mean(every[-4:]))


def canaries(seed, count):
    """An ordinary beginning and six odd words."""
    rng = np.random.default_rng(seed)
    odd = ["".join(rng.choice(list("bdgkmptz"), 3)) for _ in range(60)]
    return ["we saw " + " ".join(rng.choice(odd, 4)) for _ in range(count)]


@pytest.fixture(scope="module")
def corpora(overfit):
    """Texts from a model that was trained with canaries, and from one that was not."""
    rng = np.random.default_rng(0)
    common = [
        "we saw " + " ".join(rng.choice(["the", "old", "dog", "run", "far"], 4)) for _ in range(24)
    ]

    def written(texts, seed):
        params = overfit(CONFIG, texts, 28, 200, seed)
        drawn = generate(
            CONFIG, params, [[TOKENIZER.bos_id]] * 200, jax.random.key(seed), max_new_tokens=26,
            stop_token=TOKENIZER.eos_id, batch_size=200,
        )  # fmt: skip
        return [TOKENIZER.decode(tokens) for tokens in drawn]

    return written(common + canaries(1, 12), 0), written(common + common[:12], 1)


def test_an_echo_is_heard_only_where_there_was_a_voice(corpora):
    leaking, clean = corpora
    inside, outside = canaries(1, 24)[:12], canaries(2, 24)
    found = {r.attack: r for r in synthetic_text_attacks(leaking, inside, outside, nearest=5)}
    assert len(found) == 2 and all(r.threat_view == "Y" for r in found.values())
    for result in found.values():
        assert result.metrics["auc"].value > 0.85 and result.metrics["auc"].low > 0.5
    for result in synthetic_text_attacks(clean, inside, outside, nearest=5):
        assert result.metrics["auc"].low < 0.5 < result.metrics["auc"].high
    # With a clean corpus beside it, what is common anyway no longer counts.
    against = synthetic_text_attacks(leaking, inside, outside, references=[clean], nearest=5)
    assert all(r.metrics["auc"].value > 0.85 for r in against)
    assert "1 corpora" in against[0].assumptions[1]


def test_reference_removes_what_is_likely_anyway():
    # The twins are of the commonest words: without the reference they look like members.
    inside, outside = ["zig zag zog"] * 3, ["the dog ran"] * 3
    common = ["the dog ran"] * 50
    released = [*common, "zig zag zog"]
    plain = synthetic_text_attacks(released, inside, outside)[0]
    against = synthetic_text_attacks(released, inside, outside, references=[common])[0]
    assert plain.metrics["auc"].value == 0 and against.metrics["auc"].value == 1


def test_echo_canaries_begin_alike_and_end_apart():
    params = init_params(CONFIG, jax.random.key(0))
    texts = ["The patient walked in.", "On Monday she called."]

    def made(seed):
        return echo_canaries(
            CONFIG, params, TOKENIZER, texts, jax.random.key(seed), num=6, num_held_out=4,
            prefix_tokens=8, suffix_tokens=12, repetitions=3, labels=["x", "y"],
        )  # fmt: skip

    found = made(1)
    every = [*found.in_, *found.held_out]
    assert len({r.text for r in every}) == 10
    for record in every:
        wanted = texts[0] if record.label == "x" else texts[1]
        assert record.text[:8] == wanted[:8] and record.text[8:] != wanted[8:20]
    assert [r.text for r in made(1).in_] == [r.text for r in found.in_]
    assert not {r.text for r in made(2).in_} & {r.text for r in every}
    # They go in as records: each three times or not at all.
    flags = np.array([True, False, True, False, False, False])
    mixed = insert([Record("one"), Record("two")], found, flags, seed=0)
    assert len(mixed) == 2 + 6
    assert sum(r.text == found.in_[0].text for r in mixed) == 3
    assert sum(r.text == found.in_[1].text for r in mixed) == 0
    assert "in_=6" in repr(found)


def test_refusals():
    with pytest.raises(DpjaxError, match="0 synthetic texts"):
        ngram_scores([], ["a"])
    with pytest.raises(DpjaxError, match="canary 1 has no words"):
        ngram_scores(["a"], ["a", "!!"])
    with pytest.raises(DpjaxError, match="order is 0"):
        ngram_scores(["a"], ["a"], order=0)
    with pytest.raises(DpjaxError, match="nearest is 0"):
        similarity_scores(["a"], ["a"], nearest=0)
    params = init_params(CONFIG, jax.random.key(0))
    with pytest.raises(DpjaxError, match="num is 0"):
        echo_canaries(CONFIG, params, TOKENIZER, ["a"], jax.random.key(0), num=0, num_held_out=1)
    with pytest.raises(DpjaxError, match="2 labels for 1 texts"):
        echo_canaries(
            CONFIG, params, TOKENIZER, ["a"], jax.random.key(0), num=1, num_held_out=1,
            labels=["x", "y"],
        )  # fmt: skip
