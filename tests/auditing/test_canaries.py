"""Canaries: their distribution, where they are put, and gradients that are exactly as chosen."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax import DPSGD, clipped_grad, fit, init_state
from dpjax.auditing.canaries import (
    canary_losses,
    extend_vocabulary,
    natural_canaries,
    new_token_canaries,
    random_token_canaries,
    unused_token_ids,
)
from dpjax.auditing.gradient_canaries import (
    CanaryRows,
    canary_scores,
    dirac_directions,
    random_directions,
    with_gradient_canaries,
)
from dpjax.auditing.insertion import fair_coins, insert
from dpjax.data import (
    ArrayDataset,
    Dataset,
    Record,
    by_user,
    byte_tokenizer,
    dataset_from_records,
    stable_id,
)
from dpjax.errors import DpjaxError
from dpjax.models import (
    DecoderConfig,
    abstract_params,
    apply,
    init_params,
    language_model_loss,
)

TOKENIZER = byte_tokenizer()
forward = jax.jit(apply, static_argnums=0)


@functools.lru_cache
def initial(config):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(0))


def rows(num=5, length=8, users=None):
    tokens = np.arange(num * length).reshape(num, length) % 200
    mask = np.ones((num, length), bool)
    mask[:, -2:] = False
    tokens[:, -2:] = 256
    return Dataset(tokens, mask, np.full(num, -1) if users is None else np.array(users))


class TestRandomTokens:
    def test_uniform_and_alike(self):
        """Every id equally often at every place, in canaries and in twins; power for 3/2."""
        canaries = random_token_canaries(
            2000, 40, 3, [39], seed=0, alphabet=range(20), num_held_out=2000
        )
        for part in (canaries.in_, canaries.held_out):
            for place in (1, 2, 3):
                counts = np.bincount(part[:, place], minlength=20)
                assert counts.size == 20 and stats.chisquare(counts).pvalue > 1e-3
                assert counts.min() / 100 > 2 / 3 and counts.max() / 100 < 3 / 2
        assert np.all(canaries.in_[:, 0] == 39) and canaries.secret_start == 1
        together = np.concatenate([canaries.in_, canaries.held_out])
        assert len(np.unique(together, axis=0)) == 4000  # distinct, twins included

    def test_never_special(self):
        canaries = random_token_canaries(500, TOKENIZER, 8, TOKENIZER.encode("id "), seed=1)
        assert canaries.in_[0, :4].tolist() == [TOKENIZER.bos_id, *b"id "]
        secrets = np.concatenate([canaries.in_, canaries.held_out])[:, 4:]
        assert not set(np.unique(secrets)) & TOKENIZER.special_ids
        assert np.unique(secrets).size == 256
        assert canaries.space_bits[0] == pytest.approx(8 * 8)

    def test_seeds_and_counts(self):
        first, again, other = (
            random_token_canaries(3, 50, 4, [1], seed=s, repetitions=[1, 4, 16]) for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(first.in_, again.in_)
        assert not np.array_equal(first.in_, other.in_)
        assert first.repetitions.tolist() == [1, 4, 16]
        assert not set(first.users) & set(other.users)
        assert "50" not in repr(first) and str(first.in_[0, 1]) not in repr(first)[:20]

    def test_a_whole_space(self):
        canaries = random_token_canaries(
            50, 11, 2, [10], seed=0, alphabet=range(10), num_held_out=50
        )
        both = np.concatenate([canaries.in_, canaries.held_out])[:, 1:]
        assert sorted(map(tuple, both.tolist())) == [(a, b) for a in range(10) for b in range(10)]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num": 0}, "at least 1"),
            ({"length": 0}, "secret token"),
            ({"prefix_tokens": []}, "predicted by nothing"),
            ({"prefix_tokens": [10]}, "outside the vocabulary"),
            ({"vocabulary": TOKENIZER, "prefix_tokens": [256]}, "special"),
            ({"vocabulary": TOKENIZER, "alphabet": [257]}, "special"),
            ({"alphabet": []}, "list of ids"),
            ({"alphabet": [3, 3]}, "twice"),
            ({"num": 60, "length": 2}, "distinct"),
            ({"repetitions": 0}, "at least 1"),
            ({"repetitions": [1]}, "one integer, or 2"),
            ({"repetitions": 1.5}, "one integer"),
        ],
    )
    def test_bad_input(self, arguments, message):
        plain = {"num": 2, "vocabulary": 10, "length": 3, "prefix_tokens": [1], "seed": 0}
        with pytest.raises(DpjaxError, match=message):
            random_token_canaries(**(plain | arguments))


class TestNaturalAndNewTokens:
    def test_natural(self):
        canaries = natural_canaries({1: 4, 3: 2}, seed=0, num_held_out=10)
        assert len(canaries) == 6 and len(canaries.held_out) == 10
        assert canaries.users == tuple(record.user for record in canaries.in_)
        assert canaries.planted is not None and np.all(canaries.space_bits > 10)
        texts = {record.text for record in canaries.in_ + canaries.held_out}
        assert len(texts) == 16

    def test_new_tokens_are_each_ones_own(self):
        prefixes = np.arange(40).reshape(10, 4)
        canaries = new_token_canaries(prefixes, range(100, 120), 6, seed=0, repetitions=2)
        both = np.concatenate([canaries.in_, canaries.held_out])
        assert canaries.in_.shape == (6, 5) and canaries.held_out.shape == (4, 5)
        assert np.unique(both[:, -1]).size == 10 and both[:, -1].min() >= 100
        assert sorted(both[:, 0].tolist()) == prefixes[:, 0].tolist()
        assert both[:, 0].tolist() != prefixes[:, 0].tolist()  # shuffled
        assert canaries.space_bits[0] == math.log2(20) and canaries.secret_start == 4

    @pytest.mark.parametrize(
        "prefixes, ids, num",
        [
            (np.zeros((2, 3), int), [5], 1),
            (np.zeros((2, 3), int), [5, 5], 1),
            (np.zeros((2, 3), int), [0, 5], 1),
            (np.zeros((2, 3), int), [5, 6], 3),
            (np.zeros((2, 0), int), [5, 6], 1),
        ],
    )
    def test_bad_input(self, prefixes, ids, num):
        with pytest.raises(DpjaxError):
            new_token_canaries(prefixes, ids, num, seed=0)

    def test_unused_ids_ignore_padding(self):
        found = unused_token_ids(rows(num=2), 20, [19])
        # Rows hold 0-5 and 8-13; 256 is padding, masked.
        assert found.tolist() == [6, 7, 14, 15, 16, 17, 18]
        assert TOKENIZER.special_ids.isdisjoint(
            unused_token_ids(rows(), 259, TOKENIZER.special_ids)
        )

    @pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
    def test_extended_vocabulary(self, tied, dtype):
        config = DecoderConfig(10, 1, 8, 2, 1, 8, tied=tied, dtype=dtype)
        params = initial(config)
        wide, extended = extend_vocabulary(config, params, 300, jax.random.key(1))
        tokens = jnp.array([1, 2, 3])
        before, after = forward(config, params, tokens), forward(wide, extended, tokens)
        assert after.shape == (3, 310) and wide.vocabulary_size == 310
        np.testing.assert_allclose(after[:, :10], before, atol=1e-6)
        table = extended["embedding"]["embedding"]
        assert table.dtype == jnp.dtype(dtype)
        old, new = (np.asarray(part, np.float64) for part in (table[:10], table[10:]))
        np.testing.assert_allclose(new.std(axis=0), old.std(axis=0), rtol=0.2)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(wide))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), extended) == shapes
        with pytest.raises(DpjaxError, match="at least 1"):
            extend_vocabulary(config, params, 0, jax.random.key(1))


class TestInsertion:
    def test_rows(self):
        data = rows(50, users=range(50))
        canaries = random_token_canaries(3, 256, 3, [250], seed=0, repetitions=[1, 4, 2])
        mixed = insert(data, canaries, np.array([True, True, False]), seed=0)
        assert len(mixed) == 55
        is_canary = mixed.tokens[:, 0] == 250
        np.testing.assert_array_equal(mixed.tokens[~is_canary], data.tokens)  # order kept
        found = [np.sum(np.all(mixed.tokens[:, :4] == row, axis=1)) for row in canaries.in_]
        assert found == [1, 4, 0]
        assert mixed.loss_mask[is_canary].tolist() == [[True] * 4 + [False] * 4] * 5
        assert np.all(mixed.tokens[is_canary, 4:] == 256)
        users = mixed.user_ids[is_canary]
        assert sorted(np.unique(users, return_counts=True)[1].tolist()) == [1, 4]
        assert stable_id("user", canaries.users[1]) in users
        assert mixed.preprocessing[-1]["step"] == "2 canaries inserted"
        # A row is one example, and no two canaries are one person.
        assert np.unique(mixed.people()).size == 52

    def test_places_are_uniform(self):
        data = rows(9)
        canaries = random_token_canaries(1, 256, 3, [250], seed=0)
        mixed = (insert(data, canaries, seed=seed).tokens[:, 0] for seed in range(1000))
        places = [int(np.flatnonzero(tokens == 250)[0]) for tokens in mixed]
        assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 1e-3

    def test_nothing_included(self):
        canaries = random_token_canaries(2, 256, 3, [250], seed=0)
        data = rows()
        mixed = insert(data, canaries, np.zeros(2, bool), seed=0)
        assert mixed.fingerprint() == data.fingerprint()
        people = by_user(data, 2)
        assert insert(people, canaries, np.zeros(2, bool), seed=0).fingerprint() == (
            people.fingerprint()
        )

    def test_records(self):
        canaries = natural_canaries({1: 2, 5: 1}, seed=0)
        records = [Record(f"message {i}", f"user {i}") for i in range(20)]
        mixed = insert(records, canaries, seed=3)
        assert [record for record in mixed if record in records] == records
        assert [mixed.count(canary) for canary in canaries.in_] == [1, 1, 5]
        assert mixed[-7:] != [*canaries.in_[:2], *[canaries.in_[2]] * 5]  # not put at the end
        with pytest.raises(DpjaxError, match="there already"):
            insert(mixed, canaries, seed=3)

    def test_users(self):
        """A person's whole contribution is the canary: other people's rows do not change."""
        people = by_user(rows(6, users=[1, 1, 2, 3, 3, 3]), 3)
        canaries = random_token_canaries(2, 256, 3, [250], seed=0, repetitions=[1, 3])
        mixed = insert(people, canaries, seed=0)
        assert len(mixed) == 5
        is_canary = mixed.tokens[:, 0, 0] == 250
        np.testing.assert_array_equal(mixed.tokens[~is_canary], people.tokens)
        np.testing.assert_array_equal(mixed.loss_mask[~is_canary], people.loss_mask)
        per_row = mixed.loss_mask[is_canary].sum(axis=2)
        assert sorted(per_row.tolist()) == [[4, 0, 0], [4, 4, 4]]
        # The same as rows of one person, grouped.
        grouped = by_user(insert(rows(6, users=[1, 1, 2, 3, 3, 3]), canaries, seed=0), 3)
        assert {x.tobytes() for x in grouped.tokens} == {x.tobytes() for x in mixed.tokens}
        with pytest.raises(DpjaxError, match="rows_per_user"):
            insert(by_user(rows(), 2), canaries, seed=0)

    def test_bad_input(self):
        canaries = random_token_canaries(2, 256, 3, [250], seed=0, repetitions=3)
        mixed = insert(rows(), canaries, seed=0)
        with pytest.raises(DpjaxError, match="there already"):
            insert(mixed, canaries, seed=0)
        with pytest.raises(DpjaxError, match="would be cut"):
            insert(rows(length=3), canaries, seed=0)
        with pytest.raises(DpjaxError, match="raise the bound"):
            insert(rows().bound_contributions(2, seed=0), canaries, seed=0)
        with pytest.raises(DpjaxError, match="one bool for each"):
            insert(rows(), canaries, np.array([1, 0]), seed=0)
        with pytest.raises(DpjaxError, match="wrong target"):
            insert([Record("hi")], canaries, seed=0)
        with pytest.raises(DpjaxError, match="wrong target"):
            insert(rows(), natural_canaries({1: 1}, seed=0), seed=0)

    def test_fair_coins(self):
        coins = fair_coins(10_000, jax.random.key(0))
        assert coins.dtype == np.bool_ and abs(coins.mean() - 0.5) < 0.02
        with pytest.raises(DpjaxError, match="key is 0"):
            fair_coins(3, 0)
        with pytest.raises(DpjaxError, match="at least 1"):
            fair_coins(0, jax.random.key(0))


class TestLosses:
    CONFIG = DecoderConfig(259, 1, 8, 2, 1, 8)

    def test_token_canaries_count_the_secret_only(self):
        params = initial(self.CONFIG)
        canaries = random_token_canaries(4, TOKENIZER, 5, TOKENIZER.encode("ab"), seed=0)
        found = canary_losses(self.CONFIG, params, canaries, "in")
        for loss, row in zip(found, canaries.in_, strict=True):
            logits = np.asarray(forward(self.CONFIG, params, jnp.asarray(row[:-1])), np.float64)
            each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), row[1:]]
            assert loss == pytest.approx(each[2:].sum(), abs=1e-4)
        with pytest.raises(DpjaxError, match="'in' or 'held_out'"):
            canary_losses(self.CONFIG, params, canaries, "out")  # pyright: ignore

    def test_natural_canaries_count_the_secret_only(self):
        params = initial(self.CONFIG)
        canaries = natural_canaries({1: 3}, seed=0, locales=["zh_CN"])
        found = canary_losses(self.CONFIG, params, canaries, "held_out", TOKENIZER)
        sizes = [len(s.secret.encode()) for s in canaries.planted.held_out]
        np.testing.assert_allclose(found, np.array(sizes) * math.log(259), rtol=0.02)
        with pytest.raises(DpjaxError, match="tokenizer is None"):
            canary_losses(self.CONFIG, params, canaries, "in")

    def test_a_planted_canary_is_exposed_and_its_twins_are_not(self):
        config = DecoderConfig(40, 1, 16, 2, 1, 16)
        canaries = random_token_canaries(
            2, 40, 4, [39], seed=0, num_held_out=200, alphabet=range(30)
        )
        data = insert(
            Dataset(np.full((2, 5), 38), np.ones((2, 5), bool), [-1, -1]), canaries, seed=0
        )
        params = initial(config)
        loss_fn, batch = language_model_loss(config), data.take(np.arange(len(data)))

        @jax.jit
        def step(params, _):
            gradient = jax.grad(lambda p: jnp.mean(jax.vmap(lambda e: loss_fn(p, e))(batch)))(
                params
            )
            return jax.tree.map(lambda p, g: p - jnp.float32(1.0) * g, params, gradient), None

        params, _ = jax.lax.scan(step, params, length=300)
        inside = canary_losses(config, params, canaries, "in")
        outside = canary_losses(config, params, canaries, "held_out")
        assert inside.max() < outside.min()


def real_loss(params, example):
    return jnp.sum(jnp.tanh(example["x"] @ params["w"]) * params["b"])


PARAMS = {"b": jnp.array([0.3, -0.2]), "w": jnp.arange(6.0).reshape(3, 2) / 7}
KINDS = (dirac_directions, random_directions)


@jax.jit
def dense_directions(directions, params):
    """All directions themselves: gradients of their inner products."""
    numbers = jnp.arange(len(directions), dtype=jnp.int32)
    return jax.vmap(lambda n: jax.grad(lambda p: directions.dot(n, p))(params))(numbers)


class TestGradientCanaries:
    def dense(self, directions, number):
        return jax.tree.map(lambda x: x[number], dense_directions(directions, PARAMS))

    def test_dirac_directions_are_distinct_coordinates(self):
        directions = dirac_directions(PARAMS, 8, jax.random.key(0))
        flat = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(self.dense(directions, n))])
            for n in range(8)
        ]
        assert sorted(map(tuple, flat)) == sorted(map(tuple, np.eye(8, dtype=np.float32)))
        # Uniform over coordinates, not over leaves.
        first = [dirac_directions(PARAMS, 1, jax.random.key(s)).leaf[0].item() for s in range(400)]
        assert abs(np.mean(first) - 6 / 8) < 0.1
        for num in (0, 9):
            with pytest.raises(DpjaxError, match="1 to 8"):
                dirac_directions(PARAMS, num, jax.random.key(0))

    def test_random_directions_are_unit_and_independent(self):
        params = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(2000)}
        directions = random_directions(params, 20, jax.random.key(0))
        found = dense_directions(directions, params)
        flat = np.concatenate([np.reshape(leaf, (20, -1)) for leaf in jax.tree.leaves(found)], 1)
        products = flat @ flat.T
        np.testing.assert_allclose(np.diag(products), 1.0, atol=1e-5)
        # Off the diagonal: N(0, 1 / 4000).
        spread = products[np.triu_indices(20, 1)].std() * math.sqrt(4000)
        assert 2 / 3 < spread < 3 / 2
        # Both leaves have their share; one key for both would make them equal.
        halves = flat[0].reshape(2, 2000)
        assert abs(halves[0] @ halves[1]) < 0.1 and abs(np.sum(halves[0] ** 2) - 0.5) < 0.1

    @pytest.mark.parametrize("method", ["vmap", "lazy"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_clipped_gradients(self, kind, method):
        """A canary is its direction at the clip norm, exactly; a real example is what it was."""
        directions = kind(PARAMS, 3, jax.random.key(1))
        loss_fn = with_gradient_canaries(real_loss, directions, 100.0)
        grad_fn = clipped_grad(loss_fn, l2_clip_norm=0.5, method=method)
        plain = clipped_grad(real_loss, l2_clip_norm=0.5, method=method)
        x = jnp.array([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
        for number in range(3):
            batch = {"x": x[:1], "canary": jnp.array([number], jnp.int32)}
            total, info = grad_fn(PARAMS, batch)
            expected = jax.tree.map(lambda d: 0.5 * np.asarray(d), self.dense(directions, number))
            for leaf, wanted in zip(*map(jax.tree.leaves, (total, expected)), strict=True):
                np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-7)
            assert info.sensitive_norms[0] == pytest.approx(100.0, rel=1e-5)
        mixed = {"x": x, "canary": jnp.array([-1, 2], jnp.int32)}
        total, _ = grad_fn(PARAMS, mixed)
        real, _ = plain(PARAMS, {"x": x[:1]})
        wanted = jax.tree.map(
            lambda r, d: np.asarray(r) + 0.5 * np.asarray(d), real, self.dense(directions, 2)
        )
        for leaf, value in zip(*map(jax.tree.leaves, (total, wanted)), strict=True):
            np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_decoder(self, kind):
        """Embedding rows, norms and products, through the clipping that training uses."""
        config = DecoderConfig(20, 1, 8, 2, 1, 8)
        params = initial(config)
        directions = kind(params, 4, jax.random.key(1))
        loss_fn = with_gradient_canaries(language_model_loss(config), directions, 50.0)
        rows_ = CanaryRows(rows(3, 6), np.array([False, True, False, True]))
        batch = jax.tree.map(jnp.asarray, rows_.take(np.array([0, 3, 4])))
        batch = {**batch, "tokens": batch["tokens"] % 20}
        assert batch["canary"].tolist() == [-1, 1, 3]
        total, info = clipped_grad(loss_fn, 1e-3)(params, batch)
        np.testing.assert_allclose(info.sensitive_norms[1:], 50.0, rtol=1e-4)
        scores = canary_scores(total, directions)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, [0, 1e-3, 0, 1e-3], atol=4e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_are_inner_products(self, kind):
        directions = kind(PARAMS, 3, jax.random.key(1))
        tree = {"b": jnp.array([1.0, 2.0]), "w": jnp.arange(6.0).reshape(3, 2)}
        found = canary_scores(tree, directions)
        for number in range(3):
            dense = self.dense(directions, number)
            parts = [np.vdot(dense[name], tree[name]) for name in tree]
            assert found[number] == pytest.approx(sum(parts), rel=1e-5)

    def test_bad_input(self):
        directions = dirac_directions(PARAMS, 1, jax.random.key(0))
        for scale in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(DpjaxError, match="scale"):
                with_gradient_canaries(real_loss, directions, scale)
        loss_fn = with_gradient_canaries(real_loss, directions, 1.0)
        with pytest.raises(DpjaxError, match="no field 'canary'"):
            loss_fn(PARAMS, {"x": jnp.ones(3)})
        with pytest.raises(DpjaxError, match="at least 1"):
            random_directions(PARAMS, 0, jax.random.key(0))


def test_scores_through_the_training_loop():
    """Included canaries score clip norm + noise, the others noise alone; 2/3 and 3/2 would fail."""
    num, noise = 800, 0.4
    params = {"b": jnp.zeros(100), "w": jnp.zeros((30, 30))}
    directions = dirac_directions(params, num, jax.random.key(0))
    loss_fn = with_gradient_canaries(
        lambda p, e: jnp.sum(p["w"][0]) * e["x"], directions, scale=20.0
    )
    included = fair_coins(num, jax.random.key(1))
    data = CanaryRows(ArrayDataset({"x": np.zeros(5, np.float32)}), included)
    # Everything is drawn in every iteration, so that a score depends on the coin and noise alone.
    mechanism = DPSGD(0.5, 1.0, 1, noise_multiplier=noise, population=len(data))
    optimizer = optax.sgd(1.0)
    state = init_state(mechanism, params, optimizer, jax.random.key(2))
    (after, _), *_ = fit(state, mechanism, loss_fn, optimizer, data)
    scores = canary_scores(jax.tree.map(jnp.subtract, params, after.params), directions)
    assert scores[included].mean() == pytest.approx(0.5, rel=0.1)
    assert scores[~included].mean() == pytest.approx(0.0, abs=0.05)
    for part in (scores[included], scores[~included]):
        assert part.std() == pytest.approx(noise * 0.5, rel=0.15)


class TestCanaryRows:
    def test_rows(self):
        data = ArrayDataset({"x": np.arange(3.0)})
        mixed = CanaryRows(data, np.array([True, False, True, True, True]))
        assert len(mixed) == 7
        batch = mixed.take(np.array([2, 3, 4, 5, 6]))
        assert batch["canary"].tolist() == [-1, 0, 2, 3, 4]
        assert batch["x"].tolist() == [2.0, 0.0, 1.0, 2.0, 0.0]
        other = CanaryRows(data, np.array([True, True, True, True, False]))
        assert mixed.fingerprint() != other.fingerprint()
        with pytest.raises(DpjaxError, match="outside"):
            mixed.take(np.array([7]))
        with pytest.raises(DpjaxError, match="bools"):
            CanaryRows(data, np.array([1, 0]))

    def test_nothing_included(self):
        mixed = CanaryRows(ArrayDataset({"x": np.arange(3.0)}), np.zeros(2, bool))
        assert len(mixed) == 3 and mixed.take(np.arange(3))["canary"].tolist() == [-1] * 3


def test_canaries_reach_the_model_through_records():
    canaries = natural_canaries({2: 1}, seed=0)
    mixed = insert([Record("hello")], canaries, seed=0)
    data = dataset_from_records(mixed, TOKENIZER, 96)
    assert len(data) == 3 and np.unique(data.people()).size == 2
