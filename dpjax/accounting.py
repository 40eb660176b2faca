"""From dp_accounting events to epsilon, and from a budget to a noise multiplier.

One convention holds everywhere in dpjax: a ``noise_multiplier`` is the noise's standard deviation
divided by the L2 sensitivity *under the neighbouring relation in force*. (dp_accounting's own PLD
code means stddev / clip norm under replace-one; this file translates.)
"""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from scipy import optimize, special, stats

from dpjax.errors import DpjaxError
from dpjax.types import NeighboringRelation, as_neighboring_relation

Accountant = Literal["rdp", "pld"]


def check_delta(delta: float, population: int | None = None) -> float:
    """Returns ``delta`` if it is a failure probability worth stating.

    Example:
      >>> check_delta(0.01, population=100)
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: delta is 0.01, not below 1/n = 0.01 for n = 100 examples: \
releasing one whole record would satisfy it; use at most 1/n^1.1, e.g. 0.0063
    """
    if not 0 < delta < 1:
        raise DpjaxError(f"delta is {delta}; it must be in (0, 1), well below 1/n, e.g. 1e-6")
    if population is not None and delta >= 1 / population:
        raise DpjaxError(
            f"delta is {delta:g}, not below 1/n = {1 / population:g} for n = {population} examples:"
            " releasing one whole record would satisfy it;"
            f" use at most 1/n^1.1, e.g. {population**-1.1:.2g}"
        )
    return float(delta)


def check_epsilon(epsilon: float) -> float:
    """Returns ``epsilon`` if it is positive and finite."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise DpjaxError(f"target_epsilon is {epsilon}; it must be positive, e.g. 8.0")
    return float(epsilon)


class Truncation(NamedTuple):
    """Outcome of replacing truncated by plain Poisson sampling in an event."""

    dp_event: dp_accounting.DpEvent
    probability: float  # that any batch of the whole event was cut, at most


def untruncate(dp_event: dp_accounting.DpEvent) -> Truncation:
    """Bounds a truncated-Poisson event by Poisson sampling and a failure probability.

    A batch that is not cut is a Poisson batch. So the two mechanisms' outputs are within total
    variation tau = the probability that any batch is cut (union bound), on either neighbour, and a
    Poisson guarantee (epsilon, d) gives (epsilon, d + (1 + e^epsilon) tau) for the truncated one.

    Example:
      >>> event = dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 200, 1.0)
      >>> poisson, probability = untruncate(dp_accounting.SelfComposedDpEvent(event, 10))
      >>> type(poisson.event).__name__, probability < 1e-18
      ('PoissonSampledDpEvent', True)
    """
    match dp_event:
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            # n + 1: the larger of two neighbouring data sets, whichever of them was counted.
            probability = float(
                stats.binom.sf(
                    dp_event.truncated_batch_size,
                    dp_event.dataset_size + 1,
                    dp_event.sampling_probability,
                )
            )
            plain = dp_accounting.PoissonSampledDpEvent(
                dp_event.sampling_probability,
                dp_accounting.GaussianDpEvent(dp_event.noise_multiplier),
            )
            return Truncation(plain, probability)
        case dp_accounting.SelfComposedDpEvent():
            inner = untruncate(dp_event.event)
            return Truncation(
                dp_accounting.SelfComposedDpEvent(inner.dp_event, dp_event.count),
                min(1.0, dp_event.count * inner.probability),
            )
        case dp_accounting.ComposedDpEvent():
            parts = [untruncate(event) for event in dp_event.events]
            return Truncation(
                dp_accounting.ComposedDpEvent([part.dp_event for part in parts]),
                min(1.0, sum(part.probability for part in parts)),
            )
        case _:
            return Truncation(dp_event, 0.0)


def _make_accountant(
    accountant: Accountant, neighboring_relation: NeighboringRelation
) -> dp_accounting.PrivacyAccountant:
    if accountant == "rdp":
        return rdp.RdpAccountant(neighboring_relation=neighboring_relation)
    if accountant == "pld":
        # A Gaussian's privacy loss depends on stddev / sensitivity alone, so with multipliers
        # relative to the relation's own sensitivity every relation has the add-or-remove curve.
        # Only events without replace-one sampling get here (see `_compose`).
        return pld.PLDAccountant()
    raise DpjaxError(f"accountant is {accountant!r}; use 'rdp' or 'pld'")


def _events(dp_event: dp_accounting.DpEvent) -> list[dp_accounting.DpEvent]:
    match dp_event:
        case dp_accounting.SelfComposedDpEvent():
            return _events(dp_event.event)
        case dp_accounting.ComposedDpEvent():
            return [leaf for event in dp_event.events for leaf in _events(event)]
        case _:
            return [dp_event]


_SAMPLED = (
    dp_accounting.PoissonSampledDpEvent,
    dp_accounting.TruncatedSubsampledGaussianDpEvent,
)


def _compose(
    dp_event: dp_accounting.DpEvent,
    accountant: Accountant,
    neighboring_relation: NeighboringRelation,
) -> dp_accounting.PrivacyAccountant:
    """An accountant with ``dp_event`` composed, or a line saying why it cannot be. Read only."""
    # A report asks for many numbers of few events, and PLD takes seconds for each event. Events
    # are frozen, and their repr is complete, but those with lists have no hash.
    key = (repr(dp_event), accountant, neighboring_relation)
    if key not in _COMPOSED:
        if len(_COMPOSED) >= 32:
            _COMPOSED.pop(next(iter(_COMPOSED)))
        _COMPOSED[key] = _compose_afresh(dp_event, accountant, neighboring_relation)
    return _COMPOSED[key]


_COMPOSED: dict[Any, dp_accounting.PrivacyAccountant] = {}


def _compose_afresh(
    dp_event: dp_accounting.DpEvent,
    accountant: Accountant,
    neighboring_relation: NeighboringRelation,
) -> dp_accounting.PrivacyAccountant:
    made = _make_accountant(accountant, neighboring_relation)
    leaves = _events(dp_event)
    if neighboring_relation is NeighboringRelation.REPLACE_ONE and any(
        isinstance(leaf, _SAMPLED) for leaf in leaves
    ):
        raise DpjaxError(
            "neighboring_relation is replace_one, but the event samples by Poisson, whose "
            "amplification is proven for add_or_remove_one; pass that relation"
        )
    if neighboring_relation is not NeighboringRelation.REPLACE_ONE and any(
        isinstance(leaf, dp_accounting.SampledWithoutReplacementDpEvent) for leaf in leaves
    ):
        raise DpjaxError(
            f"neighboring_relation is {neighboring_relation.name.lower()}, but fixed-size sampling "
            "is proven for replace_one only; pass that relation"
        )
    if not made.supports(dp_event):
        kind = next(
            (type(leaf).__name__ for leaf in leaves if not made.supports(leaf)),
            type(dp_event).__name__,
        )
        raise DpjaxError(
            f"the {accountant} accountant has no proven bound for {kind}; "
            "use the other accountant or another sampler"
        )
    if accountant == "pld" and _is_hopeless(dp_event, neighboring_relation):
        raise DpjaxError(
            f"epsilon is above {_LARGEST_PLD:g} by RDP, where PLD takes minutes to say as much; "
            "use more noise, or the rdp accountant"
        )
    return made.compose(dp_event)


_LARGEST_PLD = 100.0


def _is_hopeless(dp_event: dp_accounting.DpEvent, relation: NeighboringRelation) -> bool:
    """Whether the privacy loss is so large that its distribution has no sensible grid."""
    plain = untruncate(dp_event)[0]
    if not rdp.RdpAccountant(neighboring_relation=relation).supports(plain):
        return False
    return _LARGEST_PLD < epsilon(plain, 1e-5, "rdp", relation) < math.inf


def _quiet(function: Callable[[], Any]) -> Any:
    """dp_accounting warns of Renyi orders that did not converge; it drops them, which is safe."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    finally:
        logger.setLevel(level)


def epsilon(
    dp_event: dp_accounting.DpEvent,
    delta: float,
    accountant: Accountant = "rdp",
    neighboring_relation: NeighboringRelation | str = "add_or_remove_one",
) -> float:
    """Smallest epsilon that this accountant proves for ``dp_event`` at ``delta``.

    Args:
      dp_event: what ran, from a mechanism, a sampler or a ledger.
      delta: failure probability in (0, 1).
      accountant: "rdp" (Renyi, composes by adding) or "pld" (numerical, usually 5 to 70% lower).
      neighboring_relation: what the event's noise multipliers are relative to.

    Returns:
      epsilon in nats; ``inf`` where there is no guarantee, 0 for no event.

    Raises:
      DpjaxError: the accountant has no proven bound for this event under this relation.

    Source: Mironov (2017), Mironov et al. (2019) for RDP; Koskela et al. (2020), Doroshenko et al.
    (2022) for PLD; both as implemented by dp_accounting. RDP of truncated Poisson sampling pays for
    the truncation in delta (`untruncate`).

    Example:
      >>> event = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(
      ...     0.04, dp_accounting.GaussianDpEvent(1.5)), 2250)
      >>> print(f"{epsilon(event, 1e-5):.3f} by RDP, {epsilon(event, 1e-5, 'pld'):.3f} by PLD")
      7.329 by RDP, 6.769 by PLD
    """
    check_delta(delta)
    relation = as_neighboring_relation(neighboring_relation)
    if accountant == "rdp":
        plain, truncated = untruncate(dp_event)
        orders, divergences = _renyi_divergences(plain, relation)
        return _epsilon_from_renyi(orders, divergences, delta, truncated)
    made = _compose(dp_event, accountant, relation)
    return float(_quiet(lambda: made.get_epsilon(delta)))


def _renyi_divergences(
    dp_event: dp_accounting.DpEvent, neighboring_relation: NeighboringRelation
) -> tuple[np.ndarray, np.ndarray]:
    """Orders and the event's divergence at each. They add up under composition."""
    made = _quiet(lambda: _compose(dp_event, "rdp", neighboring_relation))
    # dp_accounting has no public reader for these; re-deriving them would be a second accountant.
    return made._orders, np.asarray(made._rdp)  # type: ignore[attr-defined]


def _epsilon_from_renyi(orders: Any, divergences: Any, delta: float, truncated: float) -> float:
    """Smallest e with a d such that (e, d) holds without truncation and d pays for it as well."""
    low = float(_quiet(lambda: rdp.compute_epsilon(orders, divergences, delta)[0]))
    if truncated == 0.0 or not math.isfinite(low):
        return low

    def excess(e: float) -> float:
        remaining = delta - (1 + math.exp(min(e, 700.0))) * truncated
        if remaining <= 0:
            return math.inf
        return float(_quiet(lambda: rdp.compute_epsilon(orders, divergences, remaining)[0])) - e

    # Just above `low` excess falls with slope -1; far above, the truncation eats all of delta.
    step, high = 1e-9, low
    while excess(high) > 0:
        high, step = low + step, step * 2
        if step > 1e3:
            return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def calibrate_noise_multiplier(
    make_dp_event: Callable[[float], dp_accounting.DpEvent],
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "rdp",
    neighboring_relation: NeighboringRelation | str = "add_or_remove_one",
    tolerance: float = 1e-4,
) -> float:
    """Smallest noise multiplier for which ``make_dp_event`` stays within the budget.

    Args:
      make_dp_event: noise multiplier -> event of the whole run.
      target_epsilon: nats, > 0.
      target_delta: in (0, 1).
      tolerance: absolute, on the noise multiplier; the answer errs on the side of more noise.

    Returns:
      A noise multiplier whose epsilon is at most ``target_epsilon``.

    Example:
      >>> noise = calibrate_noise_multiplier(dp_accounting.GaussianDpEvent, 1.0, 1e-5, "pld")
      >>> print(f"{noise:.2f}")  # Balle and Wang (2018): 3.73
      3.73
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)

    def excess(noise_multiplier: float) -> float:
        event = make_dp_event(noise_multiplier)
        if accountant == "pld" and _is_hopeless(
            event, as_neighboring_relation(neighboring_relation)
        ):
            return math.inf
        return epsilon(event, target_delta, accountant, neighboring_relation) - target_epsilon

    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, high * 2
        if high > 1e6:
            raise DpjaxError(
                f"target_epsilon is {target_epsilon} at delta {target_delta:g}; no noise multiplier"
                " up to 1e6 reaches it; raise epsilon or delta, or the truncated batch size"
            )
    if low == 0.0:
        low = high / 2
        while low > 1e-3 and excess(low) <= 0:
            low, high = low / 2, low
    # Bisection, not a root finder: the returned end is always one that was checked to be private.
    while high - low > tolerance * min(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def calibrate_iterations(
    make_dp_event: Callable[[int], dp_accounting.DpEvent],
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "rdp",
    neighboring_relation: NeighboringRelation | str = "add_or_remove_one",
    maximum: int = 10_000_000,
) -> int:
    """Largest number of iterations whose event stays within the budget (0 if not even one).

    Example:
      >>> event = lambda n: dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(9.0), n)
      >>> calibrate_iterations(event, target_epsilon=1.0, target_delta=1e-5)
      4
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)

    def fits(count: int) -> bool:
        event = make_dp_event(count)
        return epsilon(event, target_delta, accountant, neighboring_relation) <= target_epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= maximum and fits(high):
        low, high = high, high * 2
    high = min(high, maximum + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def epsilon_curve(
    dp_event: dp_accounting.DpEvent,
    counts: np.ndarray,
    delta: float,
    neighboring_relation: NeighboringRelation | str = "add_or_remove_one",
) -> np.ndarray:
    """RDP epsilon after each of ``counts`` repetitions of one event; cheap for long curves.

    Renyi divergences add up, so the event is analysed once for the whole curve.

    Example:
      >>> curve = epsilon_curve(dp_accounting.GaussianDpEvent(2.0), np.array([0, 1, 4]), 1e-5)
      >>> print(curve.round(2))
      [0.   2.17 4.73]
    """
    check_delta(delta)
    relation = as_neighboring_relation(neighboring_relation)
    plain, truncated = untruncate(dp_event)
    orders, divergences = _renyi_divergences(plain, relation)

    def at(count: int) -> float:
        if count == 0:
            return 0.0
        cut = min(1.0, count * truncated)
        return _epsilon_from_renyi(orders, divergences * count, delta, cut)

    return np.array([at(int(count)) for count in counts])


def gaussian_dp_mu(dp_event: dp_accounting.DpEvent, population: int) -> tuple[float, float] | None:
    """Gaussian-DP parameter mu that covers the event, and how far the fit is from the true profile.

    The profile epsilon(delta) by PLD is fitted from above: the smallest mu whose Gaussian
    trade-off curve is weaker than the event's at every delta in [1e-10, 1/n].

    Returns:
      (mu, regret): regret is the largest excess of the Gaussian curve's epsilon over the event's,
      in nats; None where PLD has no bound for the event.

    Source: Dong et al. (2022); Gomez et al. (2025) for reporting mu with its fit error.
    """
    if isinstance(dp_event, dp_accounting.NoOpDpEvent):
        return 0.0, 0.0
    deltas = np.geomspace(1e-10, 1 / max(population, 2), 12)
    try:
        made = _compose(dp_event, "pld", NeighboringRelation.ADD_OR_REMOVE_ONE)
    except DpjaxError:
        return None
    profile = np.array([_quiet(lambda d=d: made.get_epsilon(d)) for d in deltas])
    if not np.all(np.isfinite(profile)):
        return None

    def curve(mu: float) -> np.ndarray:
        return np.array([gaussian_epsilon(mu, d) for d in deltas])

    low, high = 1e-4, 1.0
    while np.any(curve(high) < profile):
        high *= 2
        if high > 1e4:
            return None
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if np.any(curve(middle) < profile) else (low, middle)
    return float(high), float(np.max(curve(high) - profile))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """epsilon of the Gaussian mechanism with sensitivity / stddev = mu (Balle and Wang, 2018)."""

    def excess(e: float) -> float:
        upper = special.ndtr(mu / 2 - e / mu)
        lower = math.exp(e + special.log_ndtr(-mu / 2 - e / mu))
        return float(upper - lower - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.bisect(excess, 0.0, high, xtol=1e-9))  # pyright: ignore[reportArgumentType]
