"""Extraction from a model that knows some texts by heart, and never saw their twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing import rate_result
from dpjax.auditing.discoverable import (
    discoverable,
    extraction_attacks,
    extraction_probability,
    queries_needed,
    suffix_log_probabilities,
)
from dpjax.auditing.extraction import completes_secrets
from dpjax.data import Record, byte_tokenizer, dataset_from_records, plant_pii
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig, apply, init_params

TOKENIZER = byte_tokenizer()
CONFIG = DecoderConfig(
    vocabulary_size=TOKENIZER.vocabulary_size,
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64,
)  # fmt: skip
SMALL = DecoderConfig(
    vocabulary_size=7, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=16
)
FORWARD = jax.jit(functools.partial(apply, SMALL))
PLANTED = plant_pii(
    [], repetitions={1: 6}, seed=3, kinds=["phone"], locales=["en_US"], num_held_out_twins=6
)[1]


@pytest.fixture(scope="module")
def memorised(overfit):
    texts = [s.text for s in PLANTED.inserted]
    return overfit(CONFIG, texts, max(map(len, texts)) + 2, 300)


@pytest.fixture(scope="module")
def small():
    return jax.tree.map(lambda x: 3 * x, init_params(SMALL, jax.random.key(1)))


def pairs(secrets):
    prefixes = [[TOKENIZER.bos_id, *TOKENIZER.encode(s.prefix)] for s in secrets]
    return prefixes, [TOKENIZER.encode(s.secret) for s in secrets]


def test_greedy_extraction_finds_the_planted_and_not_their_twins(memorised):
    inside, outside = (
        discoverable(CONFIG, memorised, *pairs(secrets))
        for secrets in (PLANTED.inserted, PLANTED.held_out)
    )
    assert inside.is_exact.all() and (inside.share_equal == 1).all()
    assert not outside.is_exact.any() and (outside.share_equal < 1).all()
    assert completes_secrets(CONFIG, memorised, TOKENIZER, PLANTED.inserted) == [True] * 6
    assert completes_secrets(CONFIG, memorised, TOKENIZER, PLANTED.held_out) == [False] * 6
    extra = rate_result("greedy", inside.is_exact, outside.is_exact).metrics["extra_rate"]
    assert extra.value == 1 and extra.low > 0.4


def test_share_equal_counts_places_not_tokens(memorised):
    prefixes, suffixes = pairs(PLANTED.inserted[:1])
    wrong = [[*suffixes[0][:-2], suffixes[0][-1] ^ 1, suffixes[0][-2]]]
    found = discoverable(CONFIG, memorised, prefixes, wrong)
    right = np.mean([a == b for a, b in zip(wrong[0], suffixes[0], strict=True)])
    assert not found.is_exact[0] and found.share_equal[0] == pytest.approx(right)


def test_probability_separates_planted_from_twins_without_sampling(memorised):
    inside, outside = (
        suffix_log_probabilities(CONFIG, memorised, *pairs(secrets), batch_size=4)
        for secrets in (PLANTED.inserted, PLANTED.held_out)
    )
    assert np.all(queries_needed(inside, 0.5) <= 10)
    assert np.all(queries_needed(outside, 0.5) > 1e4)


SCHEMES = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_probability_is_the_share_of_samples_of_the_same_scheme(small, scheme):
    prefix, draws = [1, 4], 4000
    drawn = generate(SMALL, small, [prefix] * draws, jax.random.key(5), max_new_tokens=2,
                     batch_size=draws, **scheme)  # fmt: skip
    every = [[a, b] for a in range(7) for b in range(7)]
    expected = np.exp(suffix_log_probabilities(SMALL, small, [prefix] * 49, every, **scheme))
    assert np.sum(expected) == pytest.approx(1, abs=1e-4)
    counts = np.bincount([7 * a + b for a, b in drawn], minlength=49)
    assert np.all(counts[expected == 0] == 0)
    # Pearson's statistic over the cells that can be judged; 5 standard deviations.
    cells = expected * draws >= 5
    assert cells.sum() >= 6
    statistic = np.sum((counts - draws * expected)[cells] ** 2 / (draws * expected)[cells])
    freedom = cells.sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    # Power: another temperature is far out.
    other = np.exp(
        suffix_log_probabilities(
            SMALL, small, [prefix] * 49, every, temperature=1.5 * scheme["temperature"]
        )
    )
    wrong = np.sum((counts - draws * other)[cells] ** 2 / np.maximum(draws * other, 1)[cells])
    assert wrong > freedom + 20 * np.sqrt(2 * freedom)


def test_log_probabilities_against_a_slow_loop(small):
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(0, 7, n).tolist() for n in (1, 5, 17)]
    suffixes = [rng.integers(0, 7, n).tolist() for n in (4, 1, 3)]
    found = suffix_log_probabilities(SMALL, small, prefixes, suffixes, temperature=2.0)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        # Zeros stand behind: a causal model does not see them, and one compilation serves all.
        tokens = jnp.asarray([*prefix, *suffix, *[0] * 30][:24])
        logits = np.asarray(FORWARD(small, tokens), np.float64) / 2
        total = 0.0
        for n, token in enumerate(suffix):
            here = logits[len(prefix) + n - 1]
            total += here[token] - np.log(np.sum(np.exp(here)))
        assert found[row] == pytest.approx(total, abs=1e-3)


def test_greedy_scheme_is_certain_or_impossible(small):
    said = generate(SMALL, small, [[3, 3]], None, max_new_tokens=5, temperature=0.0)[0]
    other = [*said[:-1], (said[-1] + 1) % 7]
    found = suffix_log_probabilities(SMALL, small, [[3, 3]] * 2, [said, other], temperature=0.0)
    assert found.tolist() == [0.0, -np.inf]
    assert extraction_probability(found, 1e9).tolist() == [1.0, 0.0]
    assert queries_needed(found, 0.99).tolist() == [1.0, np.inf]


def test_sampling_hits_as_often_as_the_probability_says(small):
    said = generate(SMALL, small, [[2]], None, max_new_tokens=2, temperature=0.0)
    scheme = {"temperature": 1.2, "top_k": 5}
    p = float(np.exp(suffix_log_probabilities(SMALL, small, [[2]], said, **scheme)[0]))
    found = discoverable(
        SMALL, small, [[2]], said, jax.random.key(0), num_samples=2000, batch_size=2000, **scheme
    )
    assert 0.02 < p < 0.9
    error = (p * (1 - p) / 2000) ** 0.5
    assert abs(found.exact_samples[0] / 2000 - p) < 5 * error < p / 3  # rejects 2/3 p and 4/3 p


def test_queries_needed_is_the_least_number():
    for p in (0.9, 0.3, 1e-3, 1e-9):
        for wanted in (0.1, 0.5, 0.9, 0.999):
            n = float(queries_needed(np.log(p), wanted))
            assert extraction_probability(np.log(p), n) >= wanted * (1 - 1e-9)
            if n > 1:
                assert extraction_probability(np.log(p), n - 1) < wanted
    # Closed form where 1 - p cannot be told from 1: n p = ln 2.
    assert float(queries_needed(-100.0, 0.5)) == pytest.approx(np.log(2) * np.exp(100.0), rel=1e-9)
    assert np.isfinite(queries_needed(-700.0, 0.5)) and queries_needed(-800.0, 0.5) == np.inf


def test_whole_attack_on_records(memorised):
    sides = [
        dataset_from_records([Record(s.text) for s in secrets], TOKENIZER, 64)
        for secrets in (PLANTED.inserted, PLANTED.held_out)
    ]
    found = extraction_attacks(CONFIG, memorised, *sides, suffix_length=8, num_queries=(1, 1000))
    assert [r.attack for r in found] == ["extraction in 1 query", "extraction in 1,000 queries"]
    assert found[1].metrics["rate"].value == 1 and found[1].metrics["rate_on_twins"].value == 0
    assert found[0].metrics["rate"].value >= 0.5 and found[0].num_non_members == 6
    # To be surer takes more queries.
    surer = extraction_attacks(
        CONFIG, memorised, *sides, suffix_length=8, num_queries=(1,), success_probability=0.9999
    )[0]
    assert surer.metrics["rate"].value <= found[0].metrics["rate"].value
    assert "extracted: with probability 0.9999 or more" in surer.assumptions
    # A record as short as the suffix has no prefix to prompt with.
    short = dataset_from_records([Record("ab"), Record("a much longer text")], TOKENIZER, 64)
    some = extraction_attacks(CONFIG, memorised, short, sides[1], suffix_length=8)
    assert some[0].num_members == 1 and "1 shorter records were left out" in some[0].assumptions
    with pytest.raises(DpjaxError, match="none of the 1 members"):
        extraction_attacks(CONFIG, memorised, short.select(np.array([0])), sides[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: discoverable(SMALL, p, [], []), "0 prefixes"),
        (lambda p: discoverable(SMALL, p, [[1]], [[]]), "suffix 0 is empty"),
        (lambda p: discoverable(SMALL, p, [[1]], [[1]], num_samples=3), "num_samples is 3"),
        (lambda p: suffix_log_probabilities(SMALL, p, [[1]], [[9]]), "token 9 is outside"),
        (lambda p: suffix_log_probabilities(SMALL, p, [[1]], [[1]], temperature=-1.0), "is -1"),
        (lambda p: queries_needed(np.nan, 0.5), "log-probability is nan"),
        (lambda p: queries_needed(0.5, 0.5), "log-probability is 0.5"),
        (lambda p: queries_needed(-1.0, 1.0), "success_probability is 1"),
        (lambda p: extraction_probability(-1.0, 0), "num_queries is 0"),
    ],
)
def test_refusals(small, call, words):
    with pytest.raises(DpjaxError, match=words):
        call(small)
