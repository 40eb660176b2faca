"""Membership scores against slow references, and on a model that has memorised its members."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.auditing import scoring
from dpjax.auditing.membership import (
    distribution_check,
    loss_attacks,
    loss_score,
    membership_attacks,
    min_k_plus_plus_score,
    min_k_score,
    neighbourhood_score,
    reference_score,
    zlib_score,
)
from dpjax.auditing.scoring import TokenStatistics, score_examples, token_statistics
from dpjax.data import ArrayDataset, Record, byte_tokenizer, dataset_from_records
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply, init_params, language_model_loss

CONFIG = DecoderConfig(
    vocabulary_size=259, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=32
)


def texts(seed, count=24):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh"), rng.integers(5, 11))) for _ in range(count)]


def dataset(seed, count=24):
    records = [Record(text) for text in texts(seed, count)]
    return dataset_from_records(records, byte_tokenizer(), 12)


@pytest.fixture(scope="module")
def start():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def memorised(start):
    """Trained on dataset(1) until it knows it."""
    loss, optimizer = language_model_loss(CONFIG), optax.adam(1e-2)
    batch = jax.tree.map(jnp.asarray, dataset(1).take(np.arange(24)))

    def step(carry, _):
        params, state = carry
        grad = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, batch)))(params)
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 400)[0][0])
        return run(start)


def slow(params, data):
    """Per sequence: (log p, mean, standard deviation) of each counted token, in float64."""
    found = []
    for tokens, mask in zip(data.tokens, data.loss_mask, strict=True):
        logits = np.asarray(apply(CONFIG, params, jnp.asarray(tokens[:-1])), np.float64)
        rows = []
        for t in range(1, len(tokens)):
            if mask[t]:
                p = np.exp(logits[t - 1] - logits[t - 1].max())
                p /= p.sum()
                mean = sum(p * np.log(p))
                deviation = np.sqrt(sum(p * (np.log(p) - mean) ** 2))
                rows.append((np.log(p[tokens[t]]), mean, deviation))
        found.append(np.array(rows))
    return found


def test_scores_against_slow_references(memorised, start):
    data = dataset(2, 7)
    stats = token_statistics(CONFIG, memorised, data, batch_size=4)
    expected = slow(memorised, data)
    lengths = [len(rows) for rows in expected]
    assert stats.mask.sum(axis=1).tolist() == lengths and len(set(lengths)) > 1
    loss = [rows[:, 0].mean() for rows in expected]
    np.testing.assert_allclose(loss_score(stats), loss, rtol=1e-4)
    for k in (0.2, 0.5, 1.0):
        lowest = [np.sort(rows[:, 0])[: max(1, int(k * len(rows)))].mean() for rows in expected]
        np.testing.assert_allclose(min_k_score(stats, k), lowest, rtol=1e-4)
        z = [(rows[:, 0] - rows[:, 1]) / rows[:, 2] for rows in expected]
        lowest = [np.sort(row)[: max(1, int(k * len(row)))].mean() for row in z]
        np.testing.assert_allclose(min_k_plus_plus_score(stats, k), lowest, rtol=1e-3)
    sizes = [len(zlib.compress(text.encode())) for text in texts(2, 7)]
    compressed = [rows[:, 0].sum() / size for rows, size in zip(expected, sizes, strict=True)]
    np.testing.assert_allclose(zlib_score(stats, texts(2, 7)), compressed, rtol=1e-4)
    base = token_statistics(CONFIG, start, data)
    difference = [a[:, 0].mean() - b[:, 0].mean()
                  for a, b in zip(expected, slow(start, data), strict=True)]  # fmt: skip
    np.testing.assert_allclose(reference_score(stats, base), difference, rtol=1e-3, atol=1e-4)


def test_every_attack_sees_what_was_memorised_and_nothing_in_a_fresh_model(memorised, start):
    settings = {
        "tokenizer": byte_tokenizer(),
        "reference": (CONFIG, start),
        "neighbour_key": jax.random.key(1),
        "batch_size": 24,
    }
    found = membership_attacks(CONFIG, memorised, dataset(1), dataset(3), **settings)
    assert [r.attack for r in found] == [
        "loss",
        "min_k",
        "min_k_plus_plus",
        "zlib",
        "reference",
        "neighbourhood",
    ]
    for result in found:
        assert result.metrics["auc"].low > 0.8, result
    for result in membership_attacks(CONFIG, start, dataset(1), dataset(3), **settings):
        assert 0.2 < result.metrics["auc"].value < 0.8, result
        assert result.metrics["auc"].low < 0.5 < result.metrics["auc"].high


def test_neighbours_are_near_and_their_number_steadies_the_score(memorised, start):
    data = dataset(1, 8)
    key = jax.random.key(0)
    several = neighbourhood_score(CONFIG, memorised, data, key=key, num_neighbours=6)
    assert np.all(several > 0)  # memorised text is likelier than anything near it
    again = neighbourhood_score(CONFIG, memorised, data, key=key, num_neighbours=6)
    np.testing.assert_array_equal(several, again)
    from dpjax.auditing.membership import _neighbours

    near = _neighbours(CONFIG, start, data, key, 3, 20, 8)
    changed = near.tokens != data.tokens
    assert np.all(changed.sum(axis=1) <= 3) and changed.sum() >= 12
    assert not np.any(changed & ~data.loss_mask) and not np.any(changed[:, 0])


def test_padding_and_the_last_batch_do_not_matter(memorised):
    data = dataset(1, 7)
    whole = token_statistics(CONFIG, memorised, data, batch_size=7)
    parts = token_statistics(CONFIG, memorised, data, batch_size=3)
    np.testing.assert_allclose(whole.log_probs[whole.mask], parts.log_probs[parts.mask], rtol=1e-5)
    tokens = np.where(data.loss_mask, data.tokens, 5)
    other = type(data)(tokens, data.loss_mask, data.user_ids)
    found = token_statistics(CONFIG, memorised, other, batch_size=7)
    np.testing.assert_array_equal(loss_score(whole), loss_score(found))


def test_any_loss_is_attacked_in_one_call(tmp_path):
    """Examples of very different difficulty; the model fits its members a little better."""
    rng = np.random.default_rng(0)
    difficulty = rng.exponential(1.0, 400).astype(np.float32)
    noise = (0.02 * rng.normal(size=400)).astype(np.float32)
    is_member = np.arange(400) < 200
    fields = {"d": difficulty, "e": noise, "m": is_member.astype(np.float32)}
    sides = [ArrayDataset({k: v[which] for k, v in fields.items()})
             for which in (is_member, ~is_member)]  # fmt: skip

    def loss_fn(params, example):
        return example["d"] + example["e"] - params * example["m"]

    settings = {"batch_size": 64, "cache": tmp_path, "cache_name": "invented"}
    # Another loss of the same parameters: not to be taken from the cache of the first.
    reference = (lambda params, example: example["d"], jnp.float32(0.1))
    loss, told = loss_attacks(loss_fn, jnp.float32(0.1), *sides, reference=reference, **settings)
    assert (loss.attack, told.attack) == ("loss", "reference")
    assert loss.metrics["auc"].value < 0.65 and told.metrics["auc"].low > 0.95
    assert told.num_members == 200 and "one distribution" in told.assumptions[0]
    (alone,) = loss_attacks(loss_fn, jnp.float32(0.1), *sides, progress=True)
    assert alone.metrics == loss.metrics and list(tmp_path.rglob("*.npz"))
    # Without members' advantage the reference finds nothing.
    nothing = loss_attacks(loss_fn, jnp.float32(0.0), *sides, reference=reference)[1]
    assert nothing.metrics["auc"].low < 0.5 < nothing.metrics["auc"].high


def test_one_compilation_for_any_number(caplog):
    data = ArrayDataset({"x": np.arange(103, dtype=np.float32)})

    def loss_fn(w, example):
        return (w - example["x"]) ** 2

    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = score_examples(loss_fn, jnp.float32(1.0), data, batch_size=10)
    np.testing.assert_array_equal(found, (1 - np.arange(103.0)) ** 2)
    compiled = [
        r for r in caplog.records if "Finished XLA compilation of jit(_losses)" in r.message
    ]
    assert len(compiled) == 1


def test_cache_hits_resumes_and_misses(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", 2)
    data = ArrayDataset({"x": np.arange(10, dtype=np.float32)})
    calls = []

    def taken(indices, take=data.take):
        calls.append(len(indices))
        return take(indices)

    class Watched:
        take = staticmethod(taken)
        fingerprint = data.fingerprint

        def __len__(self):
            return len(data)

    def loss_fn(w, example):
        return w * example["x"]

    def score(w=2.0, name="a", rows=None):
        return score_examples(
            loss_fn,
            jnp.float32(w),
            rows or Watched(),
            batch_size=2,
            cache=tmp_path,
            cache_name=name,
        )

    first = score()
    assert len(calls) == 5
    np.testing.assert_array_equal(score(), first)
    assert len(calls) == 5  # all from the cache
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 3
    files[1].unlink()
    files[2].write_bytes(b"broken")
    np.testing.assert_array_equal(score(), first)
    assert len(calls) == 8  # one chunk of two batches and one of one
    assert score(3.0)[1] == 3.0 and len(calls) == 13
    score(name="b")
    assert len(calls) == 18
    other = ArrayDataset({"x": np.arange(10, 20, dtype=np.float32)})
    assert score(rows=other)[0] == 20.0
    with pytest.raises(DpjaxError, match="cache_name"):
        score(name=None)


def test_distribution_check_sees_different_words():
    rng = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
    draw = lambda n: [" ".join(rng.choice(words, 6)) for _ in range(n)]  # noqa: E731
    same = distribution_check(draw(80), draw(80), seed=0)
    assert same.details["passed"] and same.metrics["auc"].low < 0.5 < same.metrics["auc"].high
    dated = [f"{text} 2025" if i % 2 else text for i, text in enumerate(draw(80))]
    told = distribution_check(draw(80), dated, seed=0)
    assert not told.details["passed"] and told.metrics["auc"].value > 0.65
    with pytest.raises(DpjaxError, match="at least 10"):
        distribution_check(["a"], draw(20), seed=0)


def test_bad_input(memorised):
    data = dataset(1, 4)
    stats = token_statistics(CONFIG, memorised, data)
    for call, words in [
        (lambda: min_k_score(stats, 0.0), "k is 0.0"),
        (lambda: zlib_score(stats, ["a"]), "1 texts for 4"),
        (lambda: loss_score(stats._replace(mask=np.zeros_like(stats.mask))), "4 sequences"),
        (lambda: token_statistics(CONFIG, memorised, data, batch_size=0), "batch_size is 0"),
        (lambda: reference_score(stats, TokenStatistics(*(x[:2] for x in stats))), "other"),
        (lambda: neighbourhood_score(CONFIG, memorised, data, key=jax.random.key(0), top=1), "top"),
    ]:
        with pytest.raises(DpjaxError, match=words):
            call()
