"""Membership inference with reference models: LiRA and RMIA. Scores: higher = member.

All take log-likelihoods, or logits of a confidence (`logit_confidence`), of N examples under a
target and under K shadow models whose training halves the attacker knows.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from dpjax.errors import DpjaxError

_FEW = 32  # models on a side, below which a variance of its own per example is worse than none


def logit_confidence(log_probs: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of confidences given as log p: near Gaussian over models, for classifiers.

    Source: Carlini et al. (2022), section IV-C.

    Example:
      >>> logit_confidence(np.log([0.5, 0.9])).round(3).tolist()
      [0.0, 2.197]
    """
    log_probs = np.minimum(np.asarray(log_probs, np.float64), -1e-300)
    return log_probs - np.log(-np.expm1(log_probs))


def lira_online(
    target_scores: np.ndarray,
    shadow_scores: np.ndarray,
    included: np.ndarray,
    *,
    variance: Literal["auto", "per_example", "global"] = "auto",
) -> np.ndarray:
    """Log-likelihood ratio of the target's score under models with and without the example.

    Args:
      target_scores: float[N].
      shadow_scores: float[K, N].
      included: bool[K, N], of the shadow models.
      variance: of the two Gaussians fitted to an example: its own, or one of all examples for each
        side. "auto" takes its own from 32 models on each side.

    Returns:
      float64[N].

    Raises:
      DpjaxError: shapes that do not fit, NaN, or an example that is in all or no shadow models.

    Source: Carlini et al. (2022), Algorithm 1.

    Example:
      >>> shadow = np.array([[1.0], [1.2], [0.0], [0.2]])
      >>> inside = np.array([[True], [True], [False], [False]])
      >>> lira_online(np.array([1.1]), shadow, inside).round(6).tolist()
      [25.0]
    """
    target, shadow, included = _checked(target_scores, shadow_scores, included)
    (mean_in, std_in), (mean_out, std_out) = (
        _fit(shadow, side, variance, name) for side, name in ((included, "no"), (~included, "all"))
    )
    return stats.norm.logpdf(target, mean_in, std_in) - stats.norm.logpdf(target, mean_out, std_out)


def lira_offline(
    target_scores: np.ndarray,
    shadow_scores: np.ndarray,
    included: np.ndarray,
    *,
    variance: Literal["auto", "per_example", "global"] = "auto",
) -> np.ndarray:
    """How far above the models without the example the target scores it, in their deviations.

    Needs no shadow model that was trained on the example; those that were are left out. The
    probability that Carlini et al. state is the normal distribution function of this number.

    Args, raises: as `lira_online`.

    Source: Carlini et al. (2022), section IV-D.

    Example:
      >>> shadow = np.array([[-1.0], [1.0]])
      >>> lira_offline(np.array([2.0]), shadow, np.zeros((2, 1), bool)).round(3).tolist()
      [1.414]
    """
    target, shadow, included = _checked(target_scores, shadow_scores, included)
    mean, std = _fit(shadow, ~included, variance, "all")
    return (target - mean) / std


def rmia(
    target_scores: np.ndarray,
    shadow_scores: np.ndarray,
    included: np.ndarray,
    population_scores: np.ndarray,
    population_shadow_scores: np.ndarray,
    *,
    gamma: float = 1.0,
    offline_a: float | None = None,
) -> np.ndarray:
    """Share of population examples that the target raises less than this one.

    Scores are log-probabilities (at most 0): minus the mean loss of a text.

    Args:
      target_scores: float[N].
      shadow_scores: float[K, N].
      included: bool[K, N].
      population_scores: float[Z], of examples that nobody was trained on, under the target.
      population_shadow_scores: float[K, Z].
      gamma: how much more the example must be raised; at least 1.
      offline_a: None uses shadow models with and without the example. A number in [0, 1] uses
        those without it alone, and corrects for that: p(x) = ((1 + a) p_out(x) + 1 - a) / 2.

    Returns:
      float64[N] in [0, 1].

    Source: Zarifzadeh et al. (2024), Algorithm 1 and appendix B.2.

    Example:
      >>> rmia(np.log([0.9]), np.log([[0.8], [0.4]]), np.array([[True], [False]]),
      ...      np.log([0.5, 0.5]), np.log([[0.5, 0.2], [0.5, 0.2]])).tolist()
      [0.5]
    """
    target, shadow, included = _checked(target_scores, shadow_scores, included)
    others, other_shadow, _ = _checked(
        population_scores, population_shadow_scores, np.zeros_like(population_shadow_scores, bool)
    )
    if len(other_shadow) != len(shadow):
        raise DpjaxError(
            f"population_shadow_scores are of {len(other_shadow)} models, shadow_scores of "
            f"{len(shadow)}; score both under the same models"
        )
    if gamma < 1:
        raise DpjaxError(f"gamma is {gamma}; it must be at least 1")
    if max(x.max() for x in (target, shadow, others, other_shadow)) > 1e-9:
        raise DpjaxError("a score is above 0; RMIA takes log-probabilities, e.g. minus mean losses")
    outside = _mean_probability(shadow, ~included, "all")
    if offline_a is None:
        p_x = (outside + _mean_probability(shadow, included, "no")) / 2
        p_z = np.mean(np.exp(other_shadow), axis=0)
    elif 0 <= offline_a <= 1:
        p_x = ((1 + offline_a) * outside + 1 - offline_a) / 2
        p_z = ((1 + offline_a) * np.mean(np.exp(other_shadow), axis=0) + 1 - offline_a) / 2
    else:
        raise DpjaxError(f"offline_a is {offline_a}; it must be in [0, 1], e.g. 0.3")
    raised = np.exp(target) / p_x
    population = np.sort(np.exp(others) / p_z)
    # Equal ratios count: "at least gamma times".
    return np.searchsorted(population, raised / gamma, side="right") / len(population)


class Target(NamedTuple):
    """One of the shadow models as the target, others as what the attacker has."""

    scores: np.ndarray  # float64[N]
    is_member: np.ndarray  # bool[N]: the truth, for judging only
    shadow_scores: np.ndarray  # float64[models, N]
    included: np.ndarray  # bool[models, N]
    shadow: np.ndarray  # int[models], which of the K these are


def leave_one_out_targets(shadow_scores: np.ndarray, included: np.ndarray) -> Iterator[Target]:
    """Each model in turn is attacked with others: as many attacks as models.

    Where each example is in exactly half of the models, the coins of all others give the target's
    away, if only by their number: one side of an example has a model less exactly where the target
    has it. (With 4 such models that had learned next to nothing the AUC of online LiRA was 0.08.) A
    model that has just what the target has not, its partner in `balanced_inclusion`, is therefore
    left out too, which leaves coins that are independent of the target's.

    The attacks share models, so their spread is that over targets, not over attackers.

    Args:
      shadow_scores: float64[K, N].
      included: bool[K, N].

    Raises:
      DpjaxError: if the others' coins still give the target's away.

    Example:
      >>> included = np.array([[True, False], [False, True], [True, True], [False, False]])
      >>> targets = list(leave_one_out_targets(np.zeros((4, 2)), included))
      >>> len(targets), targets[1].shadow.tolist()
      (4, [2, 3])
    """
    shadow_scores, included = np.asarray(shadow_scores), np.asarray(included, bool)
    if shadow_scores.shape != included.shape or included.ndim != 2:
        raise DpjaxError(
            f"shapes are {shadow_scores.shape} for scores and {included.shape} for included; give "
            "(K, N) for both"
        )
    is_counted = len(np.unique(included.sum(axis=0))) == 1
    for target, own in enumerate(included):
        partner = np.all(included == ~own, axis=1)
        others = np.flatnonzero(~partner & (np.arange(len(included)) != target))
        if is_counted and not partner.any():
            raise DpjaxError(
                f"every example is in {included[:, 0].sum()} models, so the others' coins give "
                "the target's away; use complementary pairs (balanced_inclusion) or fair coins"
            )
        yield Target(shadow_scores[target], own, shadow_scores[others], included[others], others)


def _checked(
    target: np.ndarray, shadow: np.ndarray, included: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target, shadow = np.asarray(target, np.float64), np.asarray(shadow, np.float64)
    included = np.asarray(included, bool)
    if target.ndim != 1 or shadow.shape[1:] != target.shape or included.shape != shadow.shape:
        raise DpjaxError(
            f"shapes are {target.shape} for the target, {shadow.shape} for the shadow models and "
            f"{included.shape} for included; give (N,), (K, N), (K, N)"
        )
    if not target.size or not shadow.size:
        raise DpjaxError("there are no scores; give at least one example and one shadow model")
    if np.isnan(target).any() or np.isnan(shadow).any():
        raise DpjaxError("scores hold NaN; leave out the examples whose loss is not a number")
    return target, shadow, included


def _fit(
    scores: np.ndarray, used: np.ndarray, variance: str, other: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each example over the models ``used``, and the deviation."""
    counts = _counts(used, other)
    mean = np.sum(np.where(used, scores, 0.0), axis=0) / counts
    squares = np.sum(np.where(used, (scores - mean) ** 2, 0.0), axis=0)
    if variance not in ("auto", "per_example", "global"):
        raise DpjaxError(f"variance is {variance!r}; use auto, per_example or global")
    own = variance == "per_example" or (variance == "auto" and counts.min() >= _FEW)
    if own and counts.min() < 2:
        raise DpjaxError("an example has one model on a side; a variance of its own needs two")
    if not own and counts.sum() <= len(counts):
        raise DpjaxError("each example has one model on a side; a variance needs more models")
    # Unbiased: one degree of freedom is lost to each example's mean.
    found = squares / (counts - 1) if own else squares.sum() / (counts.sum() - len(counts))
    return mean, np.sqrt(np.maximum(found, 1e-30))


def _mean_probability(scores: np.ndarray, used: np.ndarray, other: str) -> np.ndarray:
    counts = _counts(used, other)
    return np.sum(np.where(used, np.exp(scores), 0.0), axis=0) / counts


def _counts(used: np.ndarray, other: str) -> np.ndarray:
    counts = used.sum(axis=0)
    if counts.min() == 0:
        raise DpjaxError(
            f"example {int(np.argmin(counts))} is in {other} shadow models; the attack needs "
            "models on both sides: train more, or use balanced_inclusion"
        )
    return counts
