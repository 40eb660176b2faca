"""Robust aggregators against float64 numpy and scipy, for every number of present clients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from dpjax import DPSGD
from dpjax.errors import DpjaxError
from dpjax.federated import (
    Clients,
    coordinate_median,
    fed_avg,
    init_federated,
    krum,
    norm_bounded,
    private,
    robust,
    run_round,
    trimmed_mean,
)

SLOTS = 9


def plain_krum(rows, num_byzantine, multi):
    """Blanchard et al. (2017), section 4, as a loop."""
    n = len(rows)
    scores = []
    for i in range(n):
        others = sorted(np.sum((rows[i] - rows[j]) ** 2) for j in range(n) if j != i)
        scores.append(sum(others[: n - num_byzantine - 2]))
    chosen = np.argsort(scores, kind="stable")[: min(multi, n - num_byzantine)]
    return rows[chosen].mean(axis=0)


def plain_norm_bounded(rows, weights, bound):
    norms = np.linalg.norm(rows, axis=1)
    cut = rows * np.minimum(1, bound / np.maximum(norms, 1e-300))[:, None]
    return weights @ cut / weights.sum()


# One row each: the combine, and what it must be for n >= 1 present rows of float64.
COMBINES = {
    "median": (coordinate_median(), lambda rows, w: np.median(rows, axis=0)),
    "trimmed 0.2": (
        trimmed_mean(0.2), lambda rows, w: scipy.stats.trim_mean(rows, 0.2, axis=0),
    ),
    "trimmed 0": (trimmed_mean(0), lambda rows, w: np.mean(rows, axis=0)),
    "krum 1": (
        krum(1), lambda rows, w: plain_krum(rows, 1, 1) if len(rows) >= 5 else 0 * rows[0],
    ),
    "krum 2 of 3": (
        krum(2, multi=3), lambda rows, w: plain_krum(rows, 2, 3) if len(rows) >= 7 else 0 * rows[0],
    ),
    "norm 1.5": (norm_bounded(1.5), lambda rows, w: plain_norm_bounded(rows, w, 1.5)),
}  # fmt: skip


COMPILED = {name: jax.jit(combine) for name, (combine, _) in COMBINES.items()}


def as_tree(rows):
    rows = jnp.asarray(rows, jnp.float32)
    return {"a": rows[:, :4].reshape(-1, 2, 2), "b": rows[:, 4]}


def as_row(tree):
    return np.append(np.asarray(tree["a"], np.float64).ravel(), np.asarray(tree["b"], np.float64))


@pytest.fixture(params=COMBINES)
def case(request):
    return COMPILED[request.param], COMBINES[request.param][1]


@pytest.mark.parametrize("absent", [np.nan, np.inf, -1e30, 0.0])
def test_any_number_of_present_rows_and_nothing_of_the_absent(case, absent):
    combine, expected = case
    rng = np.random.default_rng(0)
    for n in range(SLOTS + 1):
        rows = rng.normal(size=(SLOTS, 5))
        weights = np.zeros(SLOTS)
        at = np.sort(rng.permutation(SLOTS)[:n])
        weights[at] = rng.uniform(0.5, 3, n)
        there = rows[at].astype(np.float32).astype(np.float64)
        rows[weights == 0] = absent
        found = as_row(combine(as_tree(rows), jnp.asarray(weights, jnp.float32)))
        right = expected(there, weights[at]) if n else np.zeros(5)
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6, err_msg=f"n = {n}")


def test_values_repeat_and_rows_are_permuted(case):
    """Ties have one answer, in any order of the rows."""
    combine, expected = case
    rows = np.float64([[1, 1, 2, 0, 3]] * 3 + [[2, 1, 0, 0, 3]] * 2 + [[5, 1, 0, 7, -3]] * 2)
    rows = np.concatenate([rows, np.zeros((2, 5))])
    weights = np.array([1.0] * 7 + [0.0] * 2)
    right = expected(rows[:7], weights[:7])
    for order in itertools.islice(itertools.permutations(range(SLOTS)), 0, 300_000, 37_511):
        order = list(order)
        found = combine(as_tree(rows[order]), jnp.asarray(weights[order], jnp.float32))
        np.testing.assert_allclose(as_row(found), right, rtol=2e-5, atol=2e-6)


AGAINST_SIX = [
    (combine, jax.jit(combine))
    for combine in (
        coordinate_median(), trimmed_mean(0.2), krum(6), krum(6, multi=24), norm_bounded(2.5)
    )
]  # fmt: skip


@pytest.mark.parametrize("attack", ["large", "sign flip", "huge", "same"])
def test_a_fifth_of_attackers_break_the_mean_only(attack):
    """30 clients of mean 1; 6 send what they like."""
    rng = np.random.default_rng(1)
    rows = 1 + 0.3 * rng.normal(size=(30, 5))
    honest = rows[6:].mean(axis=0)
    send = {"large": 50.0, "sign flip": -20 * rows[:6], "huge": 3e37, "same": -4.0}
    rows[:6] = send[attack]
    mean = rows.mean(axis=0)
    assert np.abs(mean - honest).min() > 0.7
    for combine, compiled in AGAINST_SIX:
        found = as_row(compiled(as_tree(rows), jnp.ones(30)))
        error = np.abs(found - honest).max()
        # A bound leaves attackers 6 / 30 of 2.5, and takes their share of the honest mean.
        limit = 0.9 if combine.__name__ == "norm_bounded" else 0.75
        assert error < limit, (combine.__name__, error)
        if combine.__name__ in ("coordinate_median", "trimmed_mean"):
            assert error < 0.35


def test_trim_counts_are_exact():
    """floor(0.3 * 10) is 3 although 0.3 * 10 may be less in binary; 0.29 * 100 too."""
    for share, n, cut in ((0.3, 10, 3), (0.1, 30, 3), (0.29, 100, 29), (0.35, 20, 7)):
        x = jnp.square(jnp.arange(n, dtype=jnp.float32))
        expected = np.mean(np.arange(n, dtype=np.float64)[cut : n - cut] ** 2)
        found = jax.jit(trimmed_mean(share))(x[:, None], jnp.ones(n))
        np.testing.assert_allclose(np.asarray(found), [expected], rtol=1e-6)


def test_norm_bound_limits_the_influence_of_one():
    rows = np.random.default_rng(2).normal(size=(SLOTS, 5))
    combine = jax.jit(norm_bounded(1.0))
    before = as_row(combine(as_tree(rows), jnp.ones(SLOTS)))
    for size in (1e3, 1e20, 3e38):
        rows[4] = size
        after = as_row(combine(as_tree(rows), jnp.ones(SLOTS)))
        assert 0 < np.linalg.norm(after - before) <= 2 / SLOTS + 1e-6
        assert np.isfinite(after).all()


def test_rounds_survive_attackers_with_a_robust_aggregator():
    """Ten clients fit a mean of 1; two hold data that pull to -200. Padding clients are absent."""
    rng = np.random.default_rng(3)
    x = (1 + 0.2 * rng.normal(size=(20, 3))).astype(np.float32)
    x[:4] = -200
    people = Clients({"x": x}, tuple(np.arange(20).reshape(10, 2)), tuple("abcdefghij"))
    plain = fed_avg(lambda w, e: jnp.sum((w - e["x"]) ** 2), optax.sgd(0.25))
    cohort = people.cohort(range(10), jax.random.key(0), batch_size=2)
    errors = {}
    for name, algorithm in {
        "mean": plain,
        "median": robust(plain, coordinate_median()),
        "trimmed": robust(plain, trimmed_mean(0.2)),
        "krum": robust(plain, krum(2, multi=6)),
        "norm": robust(plain, norm_bounded(2.0)),
    }.items():
        state = init_federated(algorithm, jnp.zeros(3), 10)
        for _ in range(6):
            state, info = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
        errors[name] = float(jnp.abs(state.params - 1).max())
        assert int(info.sensitive_num_clients) == 10
    assert errors["mean"] > 30
    assert max(errors["median"], errors["trimmed"], errors["krum"]) < 0.25, errors
    assert errors["norm"] < 1.0, errors


def test_refusals():
    plain = fed_avg(lambda w, e: jnp.sum((w - e) ** 2), optax.sgd(0.1))
    mechanism = DPSGD(1.0, 0.5, 10, noise_multiplier=1.0, population=4)
    with pytest.raises(DpjaxError, match="without private"):
        robust(private(plain, mechanism, jax.random.key(0)), coordinate_median())
    with pytest.raises(DpjaxError, match="another combine"):
        robust(robust(plain, krum(1)), coordinate_median())
    with pytest.raises(DpjaxError, match="own combine"):
        private(robust(plain, coordinate_median()), mechanism, jax.random.key(0))
    for wrong in (
        lambda: trimmed_mean(0.5), lambda: trimmed_mean(-0.1), lambda: krum(-1),
        lambda: krum(1, multi=0), lambda: norm_bounded(0.0), lambda: norm_bounded(float("nan")),
    ):  # fmt: skip
        with pytest.raises(DpjaxError):
            wrong()
