"""What one event promises beyond a single epsilon: to groups, at other deltas, against an attacker.

All of it is read from privacy loss distributions of the executed event. Nothing here draws noise or
touches data.
"""

import math
from typing import NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld
from scipy import stats

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.types import NeighboringRelation

LARGEST_GROUP = 32
"""Beyond it the numerical distributions get slow and every epsilon is void anyway."""

# Privacy losses are rounded up to multiples of this.
_INTERVAL = 1e-4

_MIXTURE = "recomputed: mixture of Gaussians over the number of sampled members"
_GAUSSIAN = "recomputed: Gaussian noise against the joint sensitivity"
_GENERIC = "generic conversion: k epsilon' with delta' (e^(k epsilon') - 1) / (e^epsilon' - 1)"


class GroupGuarantee(NamedTuple):
    """(epsilon, delta) for any ``size`` privacy units together."""

    size: int
    epsilon: float | None  # nats; None where no bound is known
    delta: float
    method: str


class PrivacyCurve(NamedTuple):
    """delta as a function of epsilon: everything an (epsilon, delta) statement can say."""

    accountant: dp_accounting.PrivacyAccountant
    truncated: float  # probability that any truncated batch was cut

    def delta(self, epsilon: float) -> float:
        """Smallest proven delta at ``epsilon`` (nats)."""
        with np.errstate(over="ignore"):
            own = float(self.accountant.get_delta(epsilon))
        return min(1.0, own + (1 + math.exp(min(epsilon, 700.0))) * self.truncated)

    def epsilon(self, delta: float) -> float:
        """Smallest proven epsilon (nats) at ``delta``, within 1e-6; ``inf`` if none."""
        found, remaining = 0.0, delta
        # Truncation is paid from delta, by an amount that grows with the epsilon found.
        for _ in range(100):
            with np.errstate(over="ignore"):  # beyond every float there is no bound: inf
                found = float(self.accountant.get_epsilon(remaining))
            if self.truncated == 0.0 or not math.isfinite(found):
                return found
            found += 1e-6
            paid = (1 + math.exp(min(found, 700.0))) * self.truncated
            if remaining + paid <= delta:
                return found
            remaining = delta - paid
            if remaining <= 0:
                break
        return math.inf


def group_dp_event(
    dp_event: dp_accounting.DpEvent, size: int
) -> tuple[dp_accounting.DpEvent, float, str] | None:
    """The event that ``size`` units together see, or None where none is known.

    Under Poisson sampling a group's joint contribution is a random multiple of one unit's bound:
    binomially many members join a batch, and in the worst case their gradients are aligned.
    Truncation costs what it costs one unit, at a data set larger by the group.

    Returns:
      (event, probability that a truncated batch was cut, the method in words).

    Source: Ganesh (2024), "Tight group-level DP guarantees for DP-SGD with sampling via mixture of
    Gaussians mechanisms".

    Example:
      >>> group_dp_event(dp_accounting.GaussianDpEvent(4.0), 2)[0]
      GaussianDpEvent(noise_multiplier=2.0)
    """
    match dp_event:
        case dp_accounting.NoOpDpEvent():
            return dp_event, 0.0, _GAUSSIAN
        case dp_accounting.GaussianDpEvent():
            multiplier = dp_event.noise_multiplier / size
            return dp_accounting.GaussianDpEvent(multiplier), 0.0, _GAUSSIAN
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent() as inner):
            probability = dp_event.sampling_probability
            return _mixture(inner.noise_multiplier, probability, size), 0.0, _MIXTURE
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            probability = dp_event.sampling_probability
            cut = stats.binom.sf(
                dp_event.truncated_batch_size, dp_event.dataset_size + size, probability
            )
            mixture = _mixture(dp_event.noise_multiplier, probability, size)
            return mixture, float(cut), _MIXTURE
        case dp_accounting.SelfComposedDpEvent():
            inner = group_dp_event(dp_event.event, size)
            if inner is None:
                return None
            repeated = dp_accounting.SelfComposedDpEvent(inner[0], dp_event.count)
            return repeated, min(1.0, dp_event.count * inner[1]), inner[2]
        case dp_accounting.ComposedDpEvent():
            parts = [group_dp_event(event, size) for event in dp_event.events]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts) or not known:
                return None
            composed = dp_accounting.ComposedDpEvent([part[0] for part in known])
            return composed, min(1.0, sum(part[1] for part in known)), known[0][2]
        case _:
            return None


def _mixture(noise_multiplier: float, probability: float, size: int) -> dp_accounting.DpEvent:
    if size == 1:
        return dp_accounting.PoissonSampledDpEvent(
            probability, dp_accounting.GaussianDpEvent(noise_multiplier)
        )
    counts = np.arange(size + 1)
    weights = stats.binom.pmf(counts, size, probability)
    # Far tails underflow to zero weight, which the accountant refuses; their mass is below 1e-300.
    present = weights > 0
    return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        noise_multiplier,
        counts[present].astype(float).tolist(),
        (weights[present] / weights[present].sum()).tolist(),
    )


def privacy_curve(
    dp_event: dp_accounting.DpEvent, size: int = 1, interval: float = _INTERVAL
) -> PrivacyCurve | None:
    """The curve of ``size`` units by privacy loss distributions; None where no such bound is known.

    Args:
      dp_event: its noise multipliers are relative to the sensitivity of one unit.
      interval: losses are rounded up to multiples of it; any is an upper bound.

    Example:
      >>> curve = privacy_curve(dp_accounting.GaussianDpEvent(1.0))
      >>> print(f"{curve.epsilon(1e-5):.2f} {curve.delta(1.0):.4f}")  # Balle and Wang (2018)
      4.38 0.1269
    """
    grouped = group_dp_event(merged(dp_event), size)
    if grouped is None:
        return None
    event, truncated, _ = grouped
    made = pld.PLDAccountant(value_discretization_interval=interval)
    if not made.supports(event):
        return None
    return PrivacyCurve(made.compose(event), truncated)


def merged(dp_event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """The same composition with equal parts counted together, so that each is analysed once.

    Example:
      >>> once = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 3)
      >>> merged(dp_accounting.ComposedDpEvent([once, once]))
      SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=2.0), count=6)
    """
    if not isinstance(dp_event, dp_accounting.ComposedDpEvent):
        return dp_event
    counted: list[tuple[dp_accounting.DpEvent, int]] = []
    for part in dp_event.events:
        event, count = part, 1
        if isinstance(part, dp_accounting.SelfComposedDpEvent):
            event, count = part.event, part.count
        same = next((i for i, (seen, _) in enumerate(counted) if seen == event), None)
        if same is None:
            counted.append((event, count))
        else:
            counted[same] = (event, counted[same][1] + count)
    parts: list[dp_accounting.DpEvent] = [
        dp_accounting.SelfComposedDpEvent(event, count) for event, count in counted
    ]
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(parts)


def group_guarantee(
    dp_event: dp_accounting.DpEvent,
    size: int,
    delta: float,
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> GroupGuarantee:
    """What ``size`` units together are promised at the same ``delta``.

    Recomputed from the event where the group's joint event is known, else converted from the
    guarantee of one unit, which is much weaker.

    Example:
      >>> event = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(
      ...     0.02, dp_accounting.GaussianDpEvent(1.0)), 100)
      >>> pair = group_guarantee(event, 2, 1e-5)
      >>> print(f"{pair.epsilon:.1f}")
      3.0
    """
    if size < 1:
        raise DpjaxError(f"size is {size}; a group has at least 1 privacy unit")
    if size > LARGEST_GROUP:
        words = f"not computed above {LARGEST_GROUP} units: assume no protection"
        return GroupGuarantee(size, None, delta, words)
    grouped = group_dp_event(merged(dp_event), size)
    if grouped is None:
        found, method = _converted(dp_event, size, delta, neighboring_relation), _GENERIC
    else:
        found, method = _refined(dp_event, size, delta), grouped[2]
    if not math.isfinite(found):
        return GroupGuarantee(size, None, delta, f"no bound: {method} does not reach this delta")
    return GroupGuarantee(size, found, delta, method)


def _refined(dp_event: dp_accounting.DpEvent, size: int, delta: float) -> float:
    """Epsilon at an interval fine enough: the rounding's cost falls with its square.

    Large groups have large losses, for which a coarse interval does, and is much faster.
    """
    found, interval = math.inf, min(0.02 * size, 0.2)
    for attempt in range(8):
        curve = privacy_curve(dp_event, size, interval / 4**attempt)
        assert curve is not None
        before, found = found, min(found, curve.epsilon(delta))
        # A quarter of the interval costs a sixteenth: what is left is below 0.4%.
        if attempt and (math.isinf(found) or found > 0.95 * before):
            break
    return found


def _converted(
    dp_event: dp_accounting.DpEvent,
    size: int,
    delta: float,
    neighboring_relation: NeighboringRelation,
) -> float:
    """Vadhan (2017), Lemma 2.2, at the best inner delta on the Renyi curve."""
    plain, truncated = accounting.untruncate(dp_event)
    # One analysis for all inner deltas; `accounting.epsilon` would repeat it for each.
    orders, divergences = accounting._renyi_divergences(plain, neighboring_relation)

    def own(log_delta: float) -> float:
        inner = math.exp(log_delta)
        return accounting._epsilon_from_renyi(orders, divergences, inner, truncated)

    def fits(log_delta: float) -> bool:
        epsilon = own(log_delta)
        if not math.isfinite(epsilon):
            return False
        grown = size * epsilon + math.log1p(-math.exp(-size * epsilon) + 1e-300)
        once = epsilon + math.log1p(-math.exp(-epsilon) + 1e-300)
        return log_delta + grown - once <= math.log(delta)

    low, high = -680.0, math.log(delta)
    if not fits(low):
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return size * own(low)


def true_positive_rate_bound(curve: PrivacyCurve, false_positive_rate: float) -> float:
    """The most often any test recognises a member, if it accuses a non-member this often.

    Args:
      curve: of the event under attack.
      false_positive_rate: in (0, 1).

    Returns:
      An upper bound in [false_positive_rate, 1].

    Source: Kairouz, Oh and Viswanath (2015), Theorem 2.1, at the best of several epsilons.

    Example:
      >>> curve = privacy_curve(dp_accounting.GaussianDpEvent(1.0))
      >>> print(f"{true_positive_rate_bound(curve, 0.01):.2f}")  # Phi(Phi^-1(0.01) + 1) = 0.09
      0.09
    """
    best = 1.0
    top = curve.epsilon(max(false_positive_rate * 1e-3, 1e-9))
    for epsilon in np.linspace(0.0, min(top, 40.0), 17):
        delta = curve.delta(float(epsilon))
        best = min(
            best,
            math.exp(epsilon) * false_positive_rate + delta,
            1 - math.exp(-epsilon) * max(0.0, 1 - false_positive_rate - delta),
        )
    return max(best, false_positive_rate)
