"""Renyi divergences of integer noise, from the bounds proven for them."""

import math
import warnings

import numpy as np
from dp_accounting import rdp

from dpjax.accounting import check_delta
from dpjax.errors import DpjaxError


def skellam_renyi(
    orders: np.ndarray, variance: float, l1_sensitivity: float, l2_sensitivity: float
) -> np.ndarray:
    """Renyi divergence bounds of Skellam noise on integers: float64[orders], orders integers > 1.

    Source: Agarwal, Kairouz and Liu (2021), corollary 3.6.

    Example:
      >>> print(skellam_renyi(np.array([2]), 100.0, 1.0, 1.0).round(6))
      [0.010225]
    """
    square = l2_sensitivity**2
    extra = ((2 * orders - 1) * square + 6 * l1_sensitivity) / (4 * variance**2)
    return orders * square / (2 * variance) + np.minimum(extra, 1.5 * l1_sensitivity / variance)


def summed_discrete_gaussian_renyi(
    orders: np.ndarray,
    scale_squared: float,
    num_summands: int,
    l1_sensitivity: float,
    l2_sensitivity: float,
    dimension: int,
) -> np.ndarray:
    """Renyi divergence bounds of the sum of ``num_summands`` discrete Gaussians: float64[orders].

    The sum is not a discrete Gaussian, but close to one; ``tau`` measures how close.

    Args:
      scale_squared: of each summand, at least 1/4 (below, the bound is not proven).
      dimension: coordinates, each with its own noise.

    Source: Kairouz, Liu and Steinke (2021), *The distributed discrete Gaussian mechanism for
      federated learning with secure aggregation*, theorem 1.

    Example:
      >>> print(summed_discrete_gaussian_renyi(np.array([2]), 4.0, 25, 1.0, 1.0, 10).round(6))
      [0.01]
    """
    if scale_squared < 0.25:
        raise DpjaxError(
            f"scale_squared is {scale_squared:g}; sums of discrete Gaussians are bounded from 0.25 "
            "on: use a finer grid, or Skellam noise"
        )
    k = np.arange(1, num_summands)
    tau = 10 * float(np.sum(np.exp(-2 * math.pi**2 * scale_squared * k / (k + 1))))
    ratio = 1 / math.sqrt(num_summands * scale_squared)
    one, two, spread = l1_sensitivity * ratio, l2_sensitivity * ratio, math.sqrt(dimension) * tau
    return np.minimum(
        np.minimum(orders / 2 * two**2 + tau * dimension, orders / 2 * (two + spread) ** 2),
        orders / 2 * (two**2 + 2 * one * tau + spread**2),
    )


def renyi_epsilon(orders: np.ndarray, divergences: np.ndarray, delta: float) -> float:
    """Smallest epsilon that Renyi divergences prove at ``delta``; those of releases add up.

    Source: Canonne, Kamath and Steinke (2020), proposition 12, as implemented by dp_accounting.

    Example:
      >>> orders = np.arange(2.0, 100.0)
      >>> print(f"{renyi_epsilon(orders, orders / 2, 1e-5):.2f}")  # a Gaussian, multiplier 1
      4.75
    """
    check_delta(delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(rdp.compute_epsilon(list(orders), list(divergences), delta)[0])
