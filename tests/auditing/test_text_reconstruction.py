"""Texts from gradients: exact where nothing hides them, nothing under noise, the union in a sum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing.text_reconstruction import (
    guess_sequences,
    recover_sequences,
    recover_tokens,
    text_recovery,
)
from dpjax.auditing.updates import observe_update
from dpjax.data import byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, LoRA, init_params, language_model_loss

GPT2_LIKE = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "qkv_bias": True}


def config(tied, **changes):
    shape = {"vocabulary_size": 64, "num_layers": 2, "d_model": 32, "num_heads": 4}
    return DecoderConfig(**shape, num_kv_heads=2, d_ff=64, tied=tied, **changes)


UNTIED, TIED = config(False), config(True)
BATCH = ((57, 8, 54, 19, 8, 27), (7, 51, 30, 57, 43, 30))


@pytest.fixture(scope="module")
def params():
    return {c: init_params(c, jax.random.key(0)) for c in (UNTIED, TIED)}


@functools.partial(jax.jit, static_argnums=0)
def differentiate(shape, model, tokens, mask):
    return jax.grad(language_model_loss(shape))(model, {"tokens": tokens, "loss_mask": mask})


def gradient(shape, model, batch, length=6):
    """Of the mean loss over sequences; shorter ones are padded with token 0 and masked."""
    rows = max(2, len(batch))  # one shape for most tests, as each is compiled
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, sequence in enumerate(batch):
        tokens[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return differentiate(shape, model, jnp.asarray(tokens), jnp.asarray(mask))


def read_by_the_model(batch):
    return sorted({t for s in batch for t in s[:-1]})


@pytest.mark.parametrize("view", ["plain", "clipped"])
def test_embedding_rows_are_the_tokens_read(params, view):
    seen = observe_update([gradient(UNTIED, params[UNTIED], BATCH)], view, l2_clip_norm=0.1)
    found = recover_tokens(UNTIED, params[UNTIED], seen)
    assert found.method == "embedding"
    assert found.tokens.tolist() == read_by_the_model(BATCH)  # 27 was only predicted
    assert found.scores.dtype == np.float64 and found.scores.shape == (64,)


def test_embedding_rows_have_no_limit_of_length(params):
    batch = guess_sequences(64, 4, 30, jax.random.key(5))  # 116 positions, 32 features
    seen = gradient(UNTIED, params[UNTIED], batch, 30)
    assert recover_tokens(UNTIED, params[UNTIED], seen).tokens.tolist() == read_by_the_model(batch)
    # The span has one: it is the whole space, so it says nothing, and says so.
    found = recover_tokens(UNTIED, params[UNTIED], seen, method="span")
    assert found.rank is None and len(found.tokens) == 0


@pytest.mark.parametrize("shape", [UNTIED, TIED], ids=["untied", "tied"])
def test_span_finds_the_set_under_both_heads(params, shape):
    seen = gradient(shape, params[shape], BATCH)
    if shape.tied:
        rows = np.asarray(seen["embedding"]["embedding"])
        assert np.all(np.linalg.norm(rows, axis=1) > 0)  # so rows cannot tell
    found = recover_tokens(shape, params[shape], seen, method="span")
    assert found.tokens.tolist() == read_by_the_model(BATCH)
    # Rotary positions come later: a token has one input, wherever it stands.
    assert found.rank == len(read_by_the_model(BATCH)) == 8


@pytest.mark.parametrize("shape", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("view", ["plain", "clipped"])
def test_sequences_exactly_and_in_order(params, shape, view):
    seen = observe_update([gradient(shape, params[shape], BATCH)], view, l2_clip_norm=0.01)
    found = recover_sequences(shape, params[shape], seen, max_length=6)
    assert sorted(found.sequences) == sorted(BATCH)
    assert found.complete and found.match > 0.9999
    assert found.ranks == (8, 10)
    # Each candidate takes the memory of a gradient: where there are too many, the search says so.
    for limit in ({"max_prefixes": 9}, {"max_candidates": 1}):
        cut = recover_sequences(shape, params[shape], seen, max_length=6, **limit)
        assert cut.sequences == () and not cut.complete and cut.match == 0.0


def test_messages_whose_prefixes_are_alike():
    """Untrained attention moves little: wrong prefixes are near the span, so it must be strict."""
    tokenizer = byte_tokenizer()
    shape = dataclasses.replace(
        UNTIED, vocabulary_size=tokenizer.vocabulary_size, d_model=64, num_heads=4, d_ff=128
    )
    params = init_params(shape, jax.random.key(0))
    batch = tuple(tuple(tokenizer.encode(text)) for text in ("hello goood ", "its a lost c"))
    found = recover_sequences(shape, params, gradient(shape, params, batch, 12), max_length=12)
    assert sorted(found.sequences) == sorted(batch) and found.match > 0.9999


def test_the_order_comes_from_the_gradient(params):
    """The same tokens in another order give another answer: no sorting, no language prior."""
    for batch in (((5, 9, 3, 12),), ((12, 3, 9, 5),)):
        seen = gradient(TIED, params[TIED], batch)
        assert recover_sequences(TIED, params[TIED], seen, max_length=6).sequences == batch


@pytest.mark.parametrize("shape", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "batch",
    [
        ((4, 6, 5, 2, 7), (8, 3, 6)),  # padding
        ((1, 6, 5, 9), (1, 6, 8, 3)),  # one beginning
        ((1, 6, 5), (1, 6, 5, 9, 2)),  # one begins the other
        ((11, 30),),  # one token read
    ],
)
def test_awkward_batches(params, shape, batch):
    seen = gradient(shape, params[shape], batch)
    found = recover_sequences(shape, params[shape], seen, max_length=6)
    assert sorted(found.sequences) == sorted(batch)


def test_a_run_at_the_beginning_may_come_in_pieces(params):
    """Attention over equal values gives that value: these two batches have one gradient."""
    run, pieces = ((9, 9, 9, 4), (5, 6, 7, 8)), ((9, 9), (9, 9), (9, 4), (5, 6, 7, 8))
    grads = [gradient(UNTIED, params[UNTIED], batch) for batch in (run, pieces)]
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        # The loss is a mean over sequences, 2 and 4.
        np.testing.assert_allclose(one, 2 * other, atol=1e-7)
    found = recover_sequences(UNTIED, params[UNTIED], grads[0], max_length=6)
    assert found.match > 0.9999 and (5, 6, 7, 8) in found.sequences
    assert {t for s in found.sequences if s != (5, 6, 7, 8) for t in s} == {9, 4}


def test_learned_positions_and_biases():
    shape = config(True, **GPT2_LIKE)
    model = init_params(shape, jax.random.key(3))
    seen = gradient(shape, model, BATCH)
    tokens = recover_tokens(shape, model, seen, positions=5)
    assert tokens.tokens.tolist() == read_by_the_model(BATCH)
    assert tokens.rank == 10  # every place has its own inputs
    found = recover_sequences(shape, model, seen, max_length=6)
    assert sorted(found.sequences) == sorted(BATCH)


def test_noise_hides_the_text(params):
    """At a noise multiplier of 1, against an attacker who knows how many tokens there are."""
    for shape in (UNTIED, TIED):
        seen = gradient(shape, params[shape], BATCH)
        noised = observe_update(
            [seen], "noised", l2_clip_norm=1.0, noise_multiplier=1.0, key=jax.random.key(1)
        )
        found = recover_sequences(shape, params[shape], noised, max_length=6)
        assert found.sequences == () and found.ranks == (None, None) and found.match == 0.0
        best = recover_tokens(shape, params[shape], noised, count=8)
        hits = len(set(best.tokens.tolist()) & set(read_by_the_model(BATCH)))
        assert len(best.tokens) == 8 and hits <= 4  # 8 of 64: a guess hits 1
        plain = recover_tokens(shape, params[shape], seen, count=8)
        assert plain.tokens.tolist() == read_by_the_model(BATCH)


def test_sum_of_clients_gives_the_union_without_names(params):
    others = [guess_sequences(64, 2, 6, jax.random.key(k)) for k in range(7)]
    grads = [gradient(UNTIED, params[UNTIED], b) for b in (BATCH, *others)]
    # All tokens of all clients, whatever their number ...
    seen = observe_update(grads, "aggregated", l2_clip_norm=1.0)
    found = recover_tokens(UNTIED, params[UNTIED], seen)
    union = read_by_the_model(sum(others, BATCH))
    assert found.tokens.tolist() == union and len(union) > 30
    # ... and no sequence, as they read more positions than the model has features.
    lost = recover_sequences(UNTIED, params[UNTIED], seen, max_length=6)
    assert lost.sequences == ()
    # A small sum does not hide them: two clients' sequences come out, in one heap.
    few = jax.tree.map(lambda a, b: a + b, grads[0], grads[1])
    heap = recover_sequences(UNTIED, params[UNTIED], few, max_length=6)
    assert sorted(heap.sequences) == sorted(BATCH + others[0])


def test_zero_gradient_says_nothing(params):
    zeros = jax.tree.map(jnp.zeros_like, params[TIED])
    assert len(recover_tokens(TIED, params[TIED], zeros).tokens) == 0
    found = recover_sequences(TIED, params[TIED], zeros, max_length=6)
    assert found.sequences == () and found.match == 0.0


def test_scores_of_recovered_text():
    perfect = text_recovery(BATCH[::-1], BATCH)
    assert set(perfect.values()) == {1.0}
    part = text_recovery([(1, 2, 3, 9)], [(1, 2, 3, 4), (5, 6)])
    # Longest common subsequence 3 of 4 and 4: F1 3/4; nothing of the other.
    assert part == pytest.approx(
        {
            "exact_sequences": 0.0,
            "rouge_l": 0.375,
            "token_recall": 3 / 6,
            "token_precision": 3 / 4,
        }
    )
    assert set(text_recovery([], BATCH).values()) == {0.0}
    # Against rouge_score's definition on an interleaved pair: LCS of abcbdab and bdcaba is 4.
    assert text_recovery([(1, 2, 3, 2, 4, 1, 2)], [(2, 4, 3, 1, 2, 1)])["rouge_l"] == pytest.approx(
        8 / 13
    )


def test_guess_is_uniform():
    guesses = np.array(guess_sequences(8, 500, 4, jax.random.key(0)))
    counts = np.bincount(guesses.ravel(), minlength=8)
    assert guesses.shape == (500, 4) and counts.min() > 200 and counts.max() < 300


def test_refusals(params):
    model = params[TIED]
    segments = config(True, segments=(2,))
    adapters = config(True, lora=LoRA(rank=2))
    calls = [
        (lambda: recover_tokens(segments, model, model), "segments or lora"),
        (lambda: recover_tokens(adapters, model, model), "segments or lora"),
        (lambda: recover_tokens(TIED, model, {}), "not a pytree like params"),
        (lambda: recover_tokens(TIED, model, model, method="embedding"), "tied head"),
        (lambda: recover_tokens(TIED, model, model, method="rows"), "'rows'"),  # pyright: ignore
        (lambda: recover_tokens(TIED, model, model, count=65), "count is 65"),
        (lambda: recover_sequences(TIED, model, model, max_length=1), "max_length is 1"),
        (lambda: text_recovery([], []), "0 sequences"),
        (lambda: text_recovery([], [()]), "an empty one"),
        (lambda: guess_sequences(0, 1, 1, jax.random.key(0)), "above 0"),
        (lambda: guess_sequences(2, 1, 1, 0), "jax.random.key"),
    ]
    for call, said in calls:
        with pytest.raises(DpjaxError, match=said):
            call()
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    with pytest.raises(DpjaxError, match="not finite"):
        recover_tokens(TIED, model, broken)
