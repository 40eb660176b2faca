"""PII attacks on a model that knows its planted secrets by heart, and on one that saw none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing.pii_attacks import (
    pii_extraction,
    pii_inference,
    pii_reconstruction,
    rank_candidates,
)
from dpjax.data import PlantedPII, byte_tokenizer, plant_pii
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig, apply, init_params

TOKENIZER = byte_tokenizer()
CONFIG = DecoderConfig(
    vocabulary_size=TOKENIZER.vocabulary_size,
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64,
)  # fmt: skip
FORWARD = jax.jit(functools.partial(apply, CONFIG))
PLANTED = plant_pii(
    [], repetitions={1: 6}, seed=3, kinds=["phone", "account"], locales=["en_US"],
    num_held_out_twins=6,
)[1]  # fmt: skip


@pytest.fixture(scope="module")
def start():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def memorised(overfit):
    return overfit(CONFIG, [s.text for s in PLANTED.inserted], 64, 300)


def test_extraction_from_samples(memorised, start):
    def texts(params):
        drawn = generate(
            CONFIG, params, [[TOKENIZER.bos_id]] * 100, jax.random.key(1), max_new_tokens=50,
            stop_token=TOKENIZER.eos_id, batch_size=100,
        )  # fmt: skip
        return [TOKENIZER.decode(tokens) for tokens in drawn]

    found = pii_extraction(texts(memorised), PLANTED)
    assert found.metrics["rate"].value >= 0.5 and found.metrics["rate_on_twins"].value == 0
    assert found.metrics["extra_rate"].low > 0
    assert found.details["precision"] > 0.5 and found.threat_view == "B"
    nothing = pii_extraction(texts(start), PLANTED)
    assert nothing.metrics["rate"].value == 0 and nothing.details["precision"] is None


def test_extraction_counts_what_stands_there():
    a, b, twin = PLANTED.inserted[0], PLANTED.inserted[1], PLANTED.held_out[0]
    wrong = a.secret[:-1] + str((int(a.secret[-1]) + 1) % 10)
    texts = [f"x {a.secret} y", f"again {a.secret.upper()}", f"z {twin.secret}", f"n {wrong}"]
    found = pii_extraction(texts, PLANTED, known_values=[b.secret])
    assert found.metrics["rate"].value == pytest.approx(1 / 6)
    assert found.metrics["rate_on_twins"].value == pytest.approx(1 / 6)
    assert found.metrics["extra_rate"].value == 0  # a leak and a lucky guess weigh the same
    assert (found.details["recognised"], found.details["recognised_true"]) == (3, 1)


def test_inference_finds_the_planted_value_and_guesses_for_twins(memorised):
    found = pii_inference(CONFIG, memorised, TOKENIZER, PLANTED, num_candidates=20, seed=0)
    assert found.metrics["rate"].value == 1 and found.details["ranks"] == [1] * 6
    assert found.metrics["rate_on_twins"].value <= 1 / 3
    assert found.details["blind_guess"] == 1 / 20


def test_inference_of_a_model_that_knows_nothing_is_a_blind_guess(start):
    # Ranks of the truth among 5 candidates are uniform: mean 3, variance 2 for each of 400.
    many = plant_pii(
        [], repetitions={1: 200}, seed=8, kinds=["phone"], locales=["en_US"], num_held_out_twins=200
    )[1]
    found = pii_inference(CONFIG, start, TOKENIZER, many, num_candidates=5, seed=1, batch_size=256)
    ranks = np.array(found.details["ranks"] + found.details["ranks_of_twins"])
    assert set(ranks) == {1, 2, 3, 4, 5}
    assert abs(ranks.mean() - 3) < 4 * (2 / 400) ** 0.5
    share = np.mean(ranks == 1)
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 400) ** 0.5  # 0.12 to 0.28: rejects a rate of 1/10


def test_ranks_against_a_slow_loop(memorised, start):
    secret = PLANTED.inserted[0]
    ending = secret.text[len(secret.prefix + secret.secret) :]
    candidates = [secret.secret, "555-201-3344", "1", "something much longer than all of them"]

    def slow(params, value):
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(secret.prefix + value + ending)]
        ids.append(TOKENIZER.eos_id)
        # Zeros stand behind: a causal model does not see them, and one compilation serves all.
        padded = jnp.asarray([*ids[:-1], *[0] * 80][:80])
        logits = np.asarray(FORWARD(params, padded), np.float64)[: len(ids) - 1]
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logs[np.arange(len(ids) - 1), ids[1:]].sum()

    found = rank_candidates(CONFIG, memorised, TOKENIZER, [secret], [candidates])
    expected = [slow(memorised, value) for value in candidates]
    np.testing.assert_allclose(found.log_probs[0], expected, rtol=1e-4)
    # Against a reference the difference counts.
    against = rank_candidates(
        CONFIG, memorised, TOKENIZER, [secret], [candidates], reference=(CONFIG, start)
    )
    other = [slow(start, value) for value in candidates]
    np.testing.assert_allclose(against.log_probs[0], np.subtract(expected, other), rtol=1e-3)
    # A tie is not won.
    tie = rank_candidates(CONFIG, memorised, TOKENIZER, [secret], [[secret.secret] * 3])
    assert tie.ranks.tolist() == [3]


def test_reconstruction_without_a_list(memorised, start):
    found = pii_reconstruction(
        CONFIG, memorised, TOKENIZER, PLANTED, jax.random.key(0), num_samples=8
    )
    assert found.metrics["rate"].value == 1 and found.metrics["rate_on_twins"].value == 0
    assert found.details["among_samples"] == 1
    nothing = pii_reconstruction(
        CONFIG, start, TOKENIZER, PLANTED, jax.random.key(0), num_samples=8
    )
    assert nothing.metrics["rate"].value == 0


def test_refusals(start):
    alone = PlantedPII(PLANTED.inserted, (), 0)
    with pytest.raises(DpjaxError, match="6 secrets and 0 twins"):
        pii_extraction(["a"], alone)
    with pytest.raises(DpjaxError, match="no texts"):
        pii_extraction([], PLANTED)
    with pytest.raises(DpjaxError, match="num_candidates is 1"):
        pii_inference(CONFIG, start, TOKENIZER, PLANTED, num_candidates=1, seed=0)
    with pytest.raises(DpjaxError, match="do not begin with the true value"):
        rank_candidates(CONFIG, start, TOKENIZER, PLANTED.inserted[:1], [["x"]])
    with pytest.raises(DpjaxError, match="num_samples is 0"):
        pii_reconstruction(CONFIG, start, TOKENIZER, PLANTED, jax.random.key(0), num_samples=0)
