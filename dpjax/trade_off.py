"""Trade-off functions of f-DP: the least false-negative rate at each false-positive rate.

Someone who must tell from a release whether one unit was in the data chooses a false-positive rate
x, and then misses a member with probability at least f(x), whatever the test.

Source: Dong et al. (2022), "Gaussian differential privacy".
"""

import dataclasses
from collections.abc import Callable, Sequence

import dp_accounting
import numpy as np
from scipy import special

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.types import NeighboringRelation

TradeOff = Callable[[np.ndarray], np.ndarray]
"""False-positive rates in [0, 1] -> least false-negative rates; convex, falling, symmetric."""

# Where an accountant's curve is read off. Its true trade-off function lies above what these points
# give, so that nothing is lost but sharpness.
_DELTAS = np.concatenate([np.geomspace(1e-12, 1e-2, 16), np.linspace(0.03, 0.97, 24)])


@dataclasses.dataclass(frozen=True)
class GaussianTradeOff:
    """Of telling N(0, 1) from N(mu, 1): ``Phi(Phi^-1(1 - x) - mu)``.

    Example:
      >>> print(f"{GaussianTradeOff(0.0)(0.3):.4f}")  # a blind guess
      0.7000
      >>> print(f"{GaussianTradeOff(1.0)(0.05):.4f}")
      0.7405
    """

    mu: float

    def __call__(self, false_positive_rate: np.ndarray) -> np.ndarray:
        rate = np.asarray(false_positive_rate, np.float64)
        return special.ndtr(-special.ndtri(rate) - self.mu)


@dataclasses.dataclass(frozen=True)
class ProfileTradeOff:
    """The best that (epsilon, delta) pairs prove together.

    Attributes:
      points: pairs that all hold for the mechanism, under a symmetric neighbouring relation.

    Example:
      >>> pure = ProfileTradeOff(((1.0, 0.0),))
      >>> print(f"{pure(0.1):.4f}")
      0.7282
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, false_positive_rate: np.ndarray) -> np.ndarray:
        rate = np.asarray(false_positive_rate, np.float64)[..., None]
        epsilons, deltas = np.array(self.points, np.float64).reshape(-1, 2).T
        with np.errstate(over="ignore", invalid="ignore"):
            steep = 1 - deltas - np.where(rate > 0, np.exp(epsilons) * rate, 0.0)
            flat = np.exp(-epsilons) * (1 - deltas - rate)
        bounds = np.maximum(np.maximum(steep, flat), 0.0)
        # NaN arises only where exp overflows to inf times a rate that rounds to nothing.
        return np.max(np.nan_to_num(bounds, nan=0.0), axis=-1, initial=0.0)


def event_trade_off(
    dp_event: dp_accounting.DpEvent,
    neighboring_relation: NeighboringRelation | str = "add_or_remove_one",
    deltas: Sequence[float] | None = None,
) -> ProfileTradeOff:
    """The trade-off function that the PLD accountant proves for an event, from below.

    Args:
      dp_event: of the whole run.
      neighboring_relation: what the event's noise multipliers are relative to.
      deltas: where the accountant's epsilon is read off.

    Raises:
      DpjaxError: an event for which PLD has no bound.

    Example:
      >>> event = dp_accounting.GaussianDpEvent(1.0)
      >>> rates = np.array([0.01, 0.1, 0.5])
      >>> exact, proven = GaussianTradeOff(1.0)(rates), event_trade_off(event)(rates)
      >>> bool(np.all(proven <= exact + 1e-9)), bool(np.all(proven > exact - 0.01))
      (True, True)
    """
    wanted = _DELTAS if deltas is None else np.asarray(deltas, np.float64)
    points = []
    for delta in wanted:
        epsilon = accounting.epsilon(dp_event, float(delta), "pld", neighboring_relation)
        if np.isfinite(epsilon):
            points.append((epsilon, float(delta)))
    if not points:
        raise DpjaxError("the event has no finite privacy profile; its noise must be above 0")
    return ProfileTradeOff(tuple(points))
