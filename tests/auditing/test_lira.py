"""LiRA and RMIA against closed forms and slow loops."""

import math

import jax
import numpy as np
import pytest
from scipy import stats

from dpjax.auditing.curves import auc
from dpjax.auditing.lira import (
    leave_one_out_targets,
    lira_offline,
    lira_online,
    logit_confidence,
    rmia,
)
from dpjax.auditing.shadow import balanced_inclusion
from dpjax.errors import DpjaxError

N, K, GAP, STDDEV = 4000, 64, 1.0, 0.8


@pytest.fixture(scope="module")
def gaussian():
    """Examples of very different difficulty, all raised by the same gap when included."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 5, N)
    included = np.zeros((K + 1, N), bool)
    for k in range(0, K, 2):
        included[k] = rng.random(N) < 0.5
        included[k + 1] = ~included[k]
    included[K] = rng.random(N) < 0.5
    scores = difficulty + GAP * included + STDDEV * rng.normal(size=(K + 1, N))
    return scores, included, difficulty


def test_online_is_the_likelihood_ratio(gaussian):
    scores, included, difficulty = gaussian
    target, inside = scores[K], included[K]
    found = lira_online(target, scores[:K], included[:K], variance="global")
    exact = stats.norm.logpdf(target, difficulty + GAP, STDDEV) - stats.norm.logpdf(
        target, difficulty, STDDEV
    )
    assert np.corrcoef(found, exact)[0, 1] > 0.95
    # The best that any attack can do on two Gaussians a gap apart.
    best = stats.norm.cdf(GAP / STDDEV / math.sqrt(2))
    attained = auc(found[inside], found[~inside]).value
    assert best - 0.025 < attained < best + 0.015
    # The loss alone sees difficulty.
    assert auc(target[inside], target[~inside]).value < 0.6
    offline = lira_offline(target, scores[:K], included[:K], variance="global")
    assert best - 0.03 < auc(offline[inside], offline[~inside]).value < best + 0.015


@pytest.mark.parametrize("variance", ["per_example", "global"])
def test_against_a_slow_loop(gaussian, variance):
    scores, included, _ = (x[:, :7] if x.ndim == 2 else x for x in gaussian)
    target, shadow, inside = scores[K], scores[:K], included[:K]

    def side(i, used):
        values = shadow[used[:, i], i]
        if variance == "per_example":
            return np.mean(values), np.std(values, ddof=1)
        squares = [((shadow[used[:, j], j] - shadow[used[:, j], j].mean()) ** 2).sum()
                   for j in range(7)]  # fmt: skip
        return np.mean(values), math.sqrt(sum(squares) / (used.sum() - 7))

    online = lira_online(target, shadow, inside, variance=variance)
    offline = lira_offline(target, shadow, inside, variance=variance)
    for i in range(7):
        (m1, s1), (m0, s0) = side(i, inside), side(i, ~inside)
        wanted = stats.norm.logpdf(target[i], m1, s1) - stats.norm.logpdf(target[i], m0, s0)
        assert online[i] == pytest.approx(wanted, rel=1e-9)
        assert offline[i] == pytest.approx((target[i] - m0) / s0, rel=1e-9)


def test_auto_takes_own_variances_only_from_many_models(gaussian):
    scores, included, _ = gaussian
    arguments = scores[K], scores[:K], included[:K]
    np.testing.assert_array_equal(
        lira_online(*arguments), lira_online(*arguments, variance="per_example")
    )
    few = scores[K], scores[:16], included[:16]
    np.testing.assert_array_equal(lira_online(*few), lira_online(*few, variance="global"))


@pytest.mark.parametrize("offline_a", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_rmia_against_a_double_loop(offline_a, gamma):
    rng = np.random.default_rng(1)
    k, n, z = 6, 15, 40
    shadow, target = np.log(rng.random((k, n))), np.log(rng.random(n))
    other_shadow, others = np.log(rng.random((k, z))), np.log(rng.random(z))
    included = np.array([[(i + j) % 2 == 0 for j in range(n)] for i in range(k)])
    found = rmia(target, shadow, included, others, other_shadow, gamma=gamma, offline_a=offline_a)

    def marginal(values, inside):
        if offline_a is None:
            p_in = [v for v, i in zip(values, inside, strict=True) if i]
            p_out = [v for v, i in zip(values, inside, strict=True) if not i]
            return (np.mean(p_in) + np.mean(p_out)) / 2 if p_in else np.mean(p_out)
        p_out = np.mean([v for v, i in zip(values, inside, strict=True) if not i])
        return 0.5 * ((1 + offline_a) * p_out + (1 - offline_a))

    for i in range(n):
        ratio = math.exp(target[i]) / marginal(np.exp(shadow[:, i]), included[:, i])
        wins = 0
        for j in range(z):
            other = math.exp(others[j]) / marginal(np.exp(other_shadow[:, j]), [False] * k)
            wins += ratio / other >= gamma
        assert found[i] == pytest.approx(wins / z, abs=1e-12)


def test_rmia_sees_members(gaussian):
    scores, included, _ = gaussian
    logs = -np.exp(-0.3 * scores)  # negative, monotone: fit for log-probabilities
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 5, 500)
    others = -np.exp(-0.3 * (difficulty + STDDEV * rng.normal(size=(K + 1, 500))))
    found = rmia(logs[K], logs[:K], included[:K], others[K], others[:K])
    inside = included[K]
    loss_alone = auc(logs[K][inside], logs[K][~inside]).value
    assert auc(found[inside], found[~inside]).value > loss_alone + 0.05


def test_every_model_is_a_target_once():
    rng = np.random.default_rng(3)
    scores, included = rng.normal(size=(4, 9)), rng.random((4, 9)) < 0.5
    for k, target in enumerate(leave_one_out_targets(scores, included)):
        np.testing.assert_array_equal(target.scores, scores[k])
        np.testing.assert_array_equal(target.is_member, included[k])
        assert target.shadow.tolist() == [i for i in range(4) if i != k]
        np.testing.assert_array_equal(target.shadow_scores, scores[target.shadow])


@pytest.mark.parametrize("num_models", [6, 8, 16])
def test_models_that_learned_nothing_show_nothing(num_models):
    """Each model has a level of its own, as real ones do; with the partner left in, that shows."""
    rng, values, naive = np.random.default_rng(4), [], []
    included = balanced_inclusion(num_models, 2000, jax.random.key(0))
    for _ in range(24):
        levels = rng.normal(size=(num_models, 1))
        scores = rng.normal(0, 3, 2000) + levels + 0.1 * rng.normal(size=(num_models, 2000))
        for k, target in enumerate(leave_one_out_targets(scores, included)):
            assert len(target.shadow) == num_models - 2
            found = lira_online(target.scores, target.shadow_scores, target.included)
            values.append(auc(found[target.is_member], found[~target.is_member]).value)
            rest = np.delete(np.arange(num_models), k)
            found = lira_online(scores[k], scores[rest], included[rest])
            naive.append(auc(found[included[k]], found[~included[k]]).value)
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 4 * error < 0.03
    if num_models == 6:
        assert np.mean(naive) < 0.45


def test_coins_that_give_the_target_away_are_refused():
    included = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)  # each in exactly two
    with pytest.raises(DpjaxError, match="every example is in 2 models"):
        next(leave_one_out_targets(np.zeros((3, 3)), included))


def test_logits():
    assert logit_confidence(np.array([0.0]))[0] > 600  # certain, and finite
    assert np.isfinite(logit_confidence(np.array([-1e-12, -50.0]))).all()


@pytest.mark.parametrize(
    ("target", "shadow", "included", "message"),
    [
        ([1.0], [[1.0], [2.0]], [[True], [True]], "example 0 is in all shadow models"),
        ([1.0], [[1.0], [2.0]], [[False], [False]], "example 0 is in no shadow models"),
        ([1.0], [[1.0], [math.nan]], [[True], [False]], "NaN"),
        ([1.0, 2.0], [[1.0], [2.0]], [[True], [False]], "shapes are"),
        ([], np.zeros((2, 0)), np.zeros((2, 0), bool), "no scores"),
        ([1.0], [[1.0], [2.0]], [[True], [False]], "one model on a side"),
    ],
)
def test_bad_input(target, shadow, included, message):
    with pytest.raises(DpjaxError, match=message):
        lira_online(np.array(target), np.array(shadow), np.array(included))


def test_rmia_refuses_what_is_no_probability():
    ok = np.log([0.5]), np.log([[0.5], [0.5]]), np.array([[True], [False]])
    with pytest.raises(DpjaxError, match="above 0"):
        rmia(np.array([1.0]), *ok[1:], ok[0], ok[1])
    with pytest.raises(DpjaxError, match="gamma is 0.5"):
        rmia(*ok, ok[0], ok[1], gamma=0.5)
    with pytest.raises(DpjaxError, match="offline_a is 2"):
        rmia(*ok, ok[0], ok[1], offline_a=2.0)
