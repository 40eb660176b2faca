"""Strategies with the least error of running sums, found in milliseconds by exact gradients."""

import functools
import math

import numpy as np
from scipy import optimize, signal, special

from dpjax.strategies.matrices import (
    BandedToeplitz,
    BufferedToeplitz,
    Strategy,
    overlaid,
    participations,
)


def prefix_error(strategy: Strategy) -> float:
    """Mean over the iterations of the variance of the running sum's noise, for unit draws.

    Times the squared sensitivity and noise multiplier: what to compare strategies by.

    Example:
      >>> prefix_error(BandedToeplitz((1.0,), 4))  # independent noise: 1, 2, 3, 4
      2.5
    """
    if isinstance(strategy, BandedToeplitz):
        return _toeplitz_error([1.0], np.array(strategy.coefficients), strategy.iterations)[0]
    if isinstance(strategy, BufferedToeplitz):
        decay, scale = np.array(strategy.buffer_decay), np.array(strategy.output_scale)
        return _toeplitz_error(*_inverse_filter(decay, scale), strategy.iterations)[0]
    running = np.cumsum(strategy.noising_matrix(), axis=0)
    return float(np.mean(np.sum(running**2, axis=1)))


def _toeplitz_error(
    numerator: np.ndarray | list[float], denominator: np.ndarray, size: int
) -> tuple[float, np.ndarray]:
    """`prefix_error` of a Toeplitz matrix, and its gradient with respect to the first column.

    Args:
      numerator, denominator: of the inverse matrix as a recursive filter.
    """
    running = np.asarray(signal.lfilter(numerator, denominator, np.ones(size)))
    weights = np.arange(size, 0, -1) / size
    # d running = -C^-1 (d C) running.
    again = signal.lfilter(numerator, denominator, running)
    gradient = -2 * signal.correlate(weights * running, again, "full", "fft")[size - 1 :]
    return float(np.sum(weights * running**2)), gradient


def _inverse_filter(decay: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C = 1 + x sum_j scale_j / (1 - decay_j x), turned upside down."""
    numerator, denominator = np.ones(1), np.zeros(len(decay) + 1)
    for d in decay:
        numerator = np.convolve(numerator, [1.0, -d])
    for j, s in enumerate(scale):
        others = np.ones(1)
        for d in np.delete(decay, j):
            others = np.convolve(others, [1.0, -d])
        denominator[1:] += s * others
    return numerator, numerator + denominator


@functools.lru_cache(maxsize=64)
def optimal_banded(iterations: int, num_bands: int) -> BandedToeplitz:
    """Coefficients with the least mean error of running sums per squared sensitivity.

    For examples that take part at least ``num_bands`` iterations apart. The first coefficient is 1.

    Source: Choquette-Choo et al. (2023); McKenna (2024), "Scaling up the banded matrix
    factorization mechanism". jax_privacy has the same optimum; this takes milliseconds.

    Example:
      >>> print([round(c, 3) for c in optimal_banded(64, 4).coefficients])
      [1.0, 0.67, 0.562, 0.479]
    """

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        column = np.zeros(iterations)
        column[0], column[1:num_bands] = 1.0, free
        square = column @ column
        with np.errstate(all="ignore"):  # a bad step overflows, and is taken back
            error, gradient = _toeplitz_error([1.0], column[:num_bands], iterations)
        if not np.isfinite(error):
            return 1e6, np.zeros(num_bands - 1)
        slope = gradient[1:num_bands] / error + 2 * free / square
        return math.log(error) + math.log(square), slope

    if num_bands == 1:
        return BandedToeplitz((1.0,), iterations)
    found = optimize.minimize(
        loss, _root_coefficients(num_bands)[1:], jac=True, method="L-BFGS-B",
        bounds=[(0.0, 1.0)] * (num_bands - 1),
        options={"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 30},
    )  # fmt: skip
    return BandedToeplitz((1.0, *(float(x) for x in found.x)), iterations)


def _root_coefficients(count: int) -> np.ndarray:
    """Of 1 / sqrt(1 - x): the best square root of running sums (Fichtenberger et al., 2023)."""
    k = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


@functools.lru_cache(maxsize=64)
def optimal_buffered(
    iterations: int, min_sep: int, max_participations: int, num_buffers: int
) -> BufferedToeplitz:
    """Decays and scales with the least mean error of running sums per squared sensitivity.

    Source: McMahan et al. (2024); the objective is jax_privacy's, with exact gradients.

    Example:
      >>> found = optimal_buffered(64, 8, 8, 1)
      >>> print(round(found.buffer_decay[0], 3), round(found.output_scale[0], 3))
      0.785 0.628
    """
    count = participations(iterations, min_sep, max_participations)
    powers = np.arange(iterations - 1)[:, None]

    def parts(free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        decay = special.expit(free[:num_buffers])
        share = special.softmax(free[num_buffers:-1])
        return decay, share, share * special.expit(free[-1]), float(special.expit(free[-1]))

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        decay, share, scale, total = parts(free)
        terms = decay[None] ** powers
        column = np.concatenate([[1.0], terms @ scale])
        error, slope = _toeplitz_error(*_inverse_filter(decay, scale), iterations)
        joint = overlaid(column, min_sep, count)
        square = float(joint @ joint)
        slope_of_square = joint.copy()
        for a in range(1, count):
            slope_of_square[: -a * min_sep] += joint[a * min_sep :]
        slope = (slope / error + 2 * slope_of_square / square)[1:]
        by_scale = slope @ terms
        by_decay = (slope @ (powers * terms)) * scale / decay
        by_share = by_scale * total
        gradient = np.concatenate(
            [
                by_decay * decay * (1 - decay),
                share * (by_share - share @ by_share),
                [(by_scale @ share) * total * (1 - total)],
            ]
        )
        return math.log(error) + math.log(square), gradient

    # Memories spread from a few iterations to all of them.
    spread = np.geomspace(2.0, max(3.0, iterations), num_buffers + 2)[1:-1]
    start = np.concatenate([np.log(spread - 1), np.zeros(num_buffers + 1)])
    found = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 30},
    )  # fmt: skip
    decay, _, scale, _ = parts(found.x)
    below_one = np.float32(1) - np.float32(2**-24)
    return BufferedToeplitz(
        tuple(float(min(np.float32(d), below_one)) for d in decay),
        tuple(float(s) for s in scale),
        iterations,
    )
