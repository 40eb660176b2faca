"""ROC curves and rates: against sklearn and jax_privacy, with ties, and coverage of intervals."""

import numpy as np
import pytest
from jax_privacy import auditing as statistics
from scipy import stats
from sklearn import metrics

from dpjax.auditing.curves import attack_result, auc, roc_curve, tpr_at_fpr
from dpjax.errors import DpjaxError


@pytest.mark.parametrize("digits", [8, 1, 0])  # none, some and many ties
def test_roc_and_auc_are_those_of_sklearn(digits):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0.7, 1, 60).round(digits), rng.normal(0, 1, 90).round(digits)
    labels = np.arange(150) < 60
    scores = np.concatenate([inside, outside])
    found = roc_curve(inside, outside)
    fpr, tpr, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.false_positive_rates, fpr)
    np.testing.assert_allclose(found.true_positive_rates, tpr)
    np.testing.assert_allclose(found.thresholds, thresholds)
    area = auc(inside, outside)
    assert area.value == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert area.low < area.value < area.high


def test_auc_interval_covers():
    """1000 repeats: the true AUC of two normals, sqrt(2) sigma apart, is outside in 10%."""
    rng = np.random.default_rng(1)
    truth, missed = 0.8413447, 0
    for _ in range(1000):
        found = auc(rng.normal(2**0.5, 1, 40), rng.normal(0, 1, 60), 0.9)
        missed += not found.low <= truth <= found.high
    assert 67 < missed < 150  # 2/3 and 3/2 of the right number are refused


def test_auc_at_its_ends_has_an_interval():
    found = auc(np.ones(20), np.zeros(50))
    assert found.value == 1.0 and found.high == 1.0
    # All of 20 right: the lower end of Clopper-Pearson's interval.
    assert found.low == pytest.approx(0.025 ** (1 / 20))
    assert auc(np.zeros(20), np.ones(50)).high == pytest.approx(1 - 0.025 ** (1 / 20))
    blind = auc(np.zeros(3), np.zeros(3))
    assert blind.low < blind.value == 0.5


def test_rate_at_few_false_positives():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(2, 1, 500), rng.normal(0, 1, 1000)
    found = tpr_at_fpr(inside, outside, 0.01)
    best = max(
        np.mean(inside >= t) for t in np.concatenate([inside, outside])
        if np.mean(outside >= t) <= 0.01
    )  # fmt: skip
    assert found.rate.value == best and found.false_positives == 10 and found.is_resolved
    theirs = statistics.CanaryScoreAuditor(inside, outside).tpr_at_given_fpr(0.01)
    assert found.rate.value == pytest.approx(float(theirs), abs=0.01)
    assert found.rate.low < found.rate.value < found.rate.high


@pytest.mark.parametrize(("count", "rate"), [(2000, 0.01), (300, 0.05)])
def test_rate_interval_covers_though_its_threshold_is_estimated(count, rate):
    """True rates of two normals 2 apart; an interval for the threshold found misses far more."""
    rng = np.random.default_rng(4)
    truth, missed, conditional, width = stats.norm.cdf(2 + stats.norm.ppf(rate)), 0, 0, []
    for _ in range(1000):
        found = tpr_at_fpr(rng.normal(2, 1, count), rng.normal(0, 1, count), rate, 0.9).rate
        missed += not found.low <= truth <= found.high
        half = 1.645 * (found.value * (1 - found.value) / count) ** 0.5
        conditional += abs(found.value - truth) > half
        width.append(found.high - found.low)
    assert missed <= 100 + 3 * 90**0.5 < 300 < conditional
    # Not empty talk: less than three times as wide as one for a known threshold.
    assert np.mean(width) < 0.4


def test_too_few_non_members_are_no_rate():
    found = tpr_at_fpr(np.array([5.0, 1.0]), np.arange(4.0), 0.001)
    assert not found.is_resolved and found.false_positives == 0 and found.rate.value == 0.5
    result = attack_result("x", np.arange(9.0), np.arange(500.0), threat_view="B")
    assert set(result.metrics) == {"auc", "tpr_at_1_percent_fpr"}
    assert any("500 non-members do not resolve 0.1%" in note for note in result.assumptions)
    # Ties at the threshold accuse nobody too many.
    tied = tpr_at_fpr(np.ones(10), np.ones(200), 0.01)
    assert tied.rate.value == 0.0 and tied.false_positives == 0


@pytest.mark.parametrize("scores", [np.array([]), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_bad_scores(scores):
    for call in (roc_curve, auc, lambda a, b: tpr_at_fpr(a, b, 0.01)):
        with pytest.raises(DpjaxError, match="scores"):
            call(scores, np.zeros(3))
        with pytest.raises(DpjaxError, match="scores"):
            call(np.zeros(3), scores)
