"""What a worker's owner permits: deny, allow, or answers with noise out of a budget.

A noisy answer is a sum over records on an integer grid: each value is clipped to public bounds and
becomes a whole number, the sum of these is exact, and so is the discrete noise on it. No rounding
of floats is left for anybody to read, neither in the noise nor in the sum.
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, NamedTuple

import dp_accounting
import numpy as np
from jaxtyping import Float, Shaped

from dpjax import accounting
from dpjax.discrete_noise import exact_discrete_gaussian, exact_discrete_laplace
from dpjax.errors import DpjaxError

Mechanism = Literal["laplace", "gaussian"]
Bounds = tuple[float, float]

GRID = 2**30  # steps from the lower to the upper bound
MAX_OUTPUTS = 10_000  # numbers in one noisy answer: the draws take 0.2 s
_LARGEST_SCALE = 2**55  # of the noise in steps; beyond 2^63 with probability e^-256


@dataclasses.dataclass(frozen=True)
class Policy:
    """The owner's answer to ``pointer.get()``. It travels with all that is computed from an array.

    Make it with `Policy.deny`, `Policy.allow` or `Policy.dp`.

    Attributes:
      kind: "deny", "allow" or "dp".
      lower, upper: public bounds that values are clipped to ("dp").
      noise_multiplier: least scale (Laplace) or stddev (Gaussian) / sensitivity of an answer.
      mechanism: "laplace" or "gaussian".

    Example:
      >>> Policy.deny()
      Policy.deny()
      >>> Policy.dp(0, 120, noise_multiplier=10.0)
      Policy.dp(0.0, 120.0, noise_multiplier=10.0, mechanism='laplace')
    """

    kind: Literal["deny", "allow", "dp"]
    lower: float = 0.0
    upper: float = 1.0
    noise_multiplier: float = math.inf
    mechanism: Mechanism = "laplace"

    def __post_init__(self) -> None:
        if self.kind not in ("deny", "allow", "dp"):
            raise DpjaxError(f"policy is {self.kind!r}; use 'deny', 'allow' or 'dp'")
        if self.kind != "dp":
            return
        if self.mechanism not in ("laplace", "gaussian"):
            raise DpjaxError(f"mechanism is {self.mechanism!r}; use 'laplace' or 'gaussian'")
        if usable_bounds(self.lower, self.upper) is None:
            raise DpjaxError(
                f"bounds are {self.lower} and {self.upper}; they must be finite, the lower first"
            )
        check_noise_multiplier(self.noise_multiplier)

    def __repr__(self) -> str:
        if self.kind != "dp":
            return f"Policy.{self.kind}()"
        return (
            f"Policy.dp({self.lower}, {self.upper}, noise_multiplier={self.noise_multiplier}, "
            f"mechanism={self.mechanism!r})"
        )

    @staticmethod
    def deny() -> "Policy":
        """Nothing leaves."""
        return Policy("deny")

    @staticmethod
    def allow() -> "Policy":
        """Values leave as they are, to everybody who may connect."""
        return Policy("allow")

    @staticmethod
    def dp(
        lower: float, upper: float, *, noise_multiplier: float, mechanism: Mechanism = "laplace"
    ) -> "Policy":
        """Only sums and means over records leave, with noise, out of the requester's budget.

        Args:
          lower, upper: public bounds of the values, chosen without looking at them.
          noise_multiplier: least noise / sensitivity of one answer. A Laplace answer costs
            epsilon = 1 / noise_multiplier, a Gaussian one 1 / (2 noise_multiplier^2) of zCDP.
          mechanism: "laplace", or "gaussian", which needs a budget with a delta.
        """
        return Policy("dp", float(lower), float(upper), float(noise_multiplier), mechanism)


def usable_bounds(lower: float, upper: float) -> Bounds | None:
    """The bounds as a pair, or None where no grid lies between them.

    Example:
      >>> usable_bounds(0, 5), usable_bounds(5, 5), usable_bounds(0, math.inf)
      ((0.0, 5.0), None, None)
    """
    low, high = float(lower), float(upper)
    step = (high - low) / GRID
    is_usable = math.isfinite(low) and math.isfinite(high) and 1e-300 < step < math.inf
    return (low, high) if is_usable else None


def check_noise_multiplier(value: float) -> float:
    """Returns it if a mechanism can be made of it."""
    if not 1e-3 <= value <= 1e6:
        raise DpjaxError(f"noise_multiplier is {value}; it must be between 0.001 and 1e6, e.g. 10")
    return float(value)


class Total(NamedTuple):
    """A sum or mean over records, before the noise."""

    rows: Shaped[np.ndarray, "records *shape"]  # private
    axes: tuple[int, ...]  # summed; 0 is among them
    bounds: Bounds | None
    is_mean: bool
    shape: tuple[int, ...]  # of the answer

    @property
    def outputs(self) -> int:
        """Numbers in the answer."""
        return math.prod(self.shape)

    @property
    def summed(self) -> int:
        """Values that are added for each number of the answer; public, as shapes are."""
        return math.prod(self.rows.shape[axis] for axis in self.axes)

    @property
    def values_per_record(self) -> int:
        """How many of them are one record's."""
        return math.prod(self.rows.shape[axis] for axis in self.axes if axis != 0)


class Release(NamedTuple):
    """The noise of one answer and what it costs."""

    mechanism: Mechanism
    noise_multiplier: float
    scale: int  # Laplace: in steps of the grid
    variance: Fraction  # Gaussian: in squared steps
    epsilon: float | None  # Laplace: pure DP
    rho: float  # zCDP


def plan_release(total: Total, mechanism: Mechanism, noise_multiplier: float) -> Release:
    """Noise for this sum, from public facts only.

    Guarantee:
      - Replacing one record by any other changes, in each of m numbers of the answer, at most k
        values by at most GRID steps: L1 sensitivity m k GRID, L2 sensitivity sqrt(m) k GRID.
      - Laplace: scale >= noise_multiplier * L1 and integer, so epsilon <= 1 / noise_multiplier and
        zCDP epsilon^2 / 2. Gaussian: variance = noise_multiplier^2 L2^2 exactly, so zCDP
        1 / (2 noise_multiplier^2).

    Source: Canonne, Kamath and Steinke (2020), theorem 4 and lemma 24; Bun and Steinke (2016),
      proposition 1.4; Casacuberta et al. (2022) for why the sum is over integers.

    Raises:
      DpjaxError: unbounded, empty or too large.

    Example:
      >>> total = Total(np.zeros((5, 3), np.float32), (0,), (0.0, 1.0), False, (3,))
      >>> release = plan_release(total, "laplace", 10.0)
      >>> release.scale == 30 * GRID, release.epsilon
      (True, 0.1)
    """
    if total.bounds is None:
        raise DpjaxError(
            "the values have no public bounds, so one record could change their sum by any amount; "
            "clip them first: pointer.clip(lower, upper).sum(axis=0)"
        )
    if total.rows.size == 0 or total.outputs > MAX_OUTPUTS:
        raise DpjaxError(
            f"the answer has {total.outputs} numbers from {total.rows.size} values; it may have 1 "
            f"to {MAX_OUTPUTS}: ask for fewer columns at once"
        )
    l1 = total.outputs * total.values_per_record * GRID
    scale = math.ceil(Fraction(noise_multiplier) * l1)
    if scale > _LARGEST_SCALE or total.summed * GRID > 2**61:
        raise DpjaxError(
            f"the answer sums {total.summed} values in {total.outputs} numbers with noise "
            f"{noise_multiplier:g}; that is beyond exact 64-bit arithmetic: ask for fewer at once"
        )
    if mechanism == "laplace":
        epsilon = float(Fraction(l1, scale))
        return Release(mechanism, noise_multiplier, scale, Fraction(0), epsilon, epsilon**2 / 2)
    square = total.outputs * (total.values_per_record * GRID) ** 2
    variance = Fraction(noise_multiplier) ** 2 * square
    return Release(mechanism, noise_multiplier, 0, variance, None, 0.5 / noise_multiplier**2)


def noisy_answer(total: Total, release: Release) -> Float[np.ndarray, "*shape"]:
    """The answer, float64. Each call draws new noise from the operating system's entropy.

    Guarantee:
      - Sensitivity and noise are as in `plan_release`, in integers throughout; what follows the
        noise is public arithmetic.
      - NaN counts as the lower bound and infinity as the nearer one. A refusal would depend on the
        records, and would tell.
      - Not covered: the time it takes, which depends a little on the noise drawn.

    Example:
      >>> total = Total(np.array([1.0, 0.0, np.nan, 9.0]), (0,), (0.0, 1.0), True, ())
      >>> release = plan_release(total, "gaussian", 0.001)  # hardly any noise
      >>> round(float(noisy_answer(total, release)), 1)
      0.5
    """
    assert total.bounds is not None
    lower, upper = total.bounds
    step = (upper - lower) / GRID
    values = np.asarray(total.rows, np.float64)
    values = np.where(np.isnan(values), lower, values)
    units = np.rint((np.clip(values, lower, upper) - lower) / step)
    whole = np.clip(units, 0, GRID).astype(np.int64)
    sums = np.sum(whole, axis=total.axes, dtype=np.int64).reshape(total.shape)
    if release.mechanism == "laplace":
        noise = exact_discrete_laplace(release.scale, total.outputs)
    else:
        noise = exact_discrete_gaussian(release.variance, total.outputs)
    noisy = (sums + noise.reshape(total.shape)).astype(np.float64)
    if total.is_mean:
        return lower + noisy * (step / total.summed)
    return lower * total.summed + noisy * step


class Spent(NamedTuple):
    """What a requester, or all together, know so far."""

    epsilon: float
    delta: float
    answers: int


class Cost(NamedTuple):
    """Of one answer, as in the ledger."""

    epsilon: float | None
    rho: float


def spent_epsilon(costs: Iterable[Cost], delta: float) -> float:
    """Epsilon of all these answers together at ``delta``.

    The smaller of two bounds: the sum of epsilons, if all answers are pure; and the sum of zCDP.

    Guarantee: as a filter ("answer while this is at most the target") it holds although requesters
      choose each query and its noise after seeing the answers before. Both sums are fully adaptive:
      on paths that end within the first bound the loss never passes the target, and paths within
      the second are those of one mechanism of bounded zCDP; delta is paid once.

    Source: Whitehouse et al. (2023) and Feldman and Zrnic (2021) for adaptive zCDP filters; the
      conversion is dp_accounting's.

    Example:
      >>> laplace = Cost(0.1, 0.005)
      >>> round(spent_epsilon([laplace] * 10, 0.0), 6), spent_epsilon([Cost(None, 0.1)], 0.0)
      (1.0, inf)
      >>> f"{spent_epsilon([laplace] * 2000, 1e-6):.1f}"  # 200 by adding
      '32.2'
    """
    costs = list(costs)
    pure = math.fsum(math.inf if cost.epsilon is None else cost.epsilon for cost in costs)
    if delta == 0 or not costs:
        return pure
    event = dp_accounting.ZCDpEvent(math.fsum(cost.rho for cost in costs))
    return min(pure, accounting.epsilon(event, delta, "rdp", "replace_one"))
