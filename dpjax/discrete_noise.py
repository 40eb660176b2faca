"""Integer noise: discrete Gaussian and Skellam, for sums that are taken modulo a power of two.

Two ways of drawing. `exact_discrete_gaussian` takes bits from the operating system and computes in
whole numbers: no rounding at all, for real clients. `NoiseTable` draws inside compiled programs
from a JAX key, for simulations, within a stated total variation distance.
"""

import dataclasses
import decimal
import fractions
import functools
import math
import secrets
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from dpjax.errors import DpjaxError
from dpjax.types import RandomKey

Noise = Literal["discrete_gaussian", "skellam"]

_WORDS = 3  # uint32 words of a draw: its thresholds are multiples of 2^-96
_LARGEST_STDDEV = 2.0**16


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseTable:
    """Thresholds from which a symmetric integer distribution is drawn by inversion.

    Attributes:
      thresholds: uint32[size, 3], most significant word first: P(|X| <= m) in units of 2^-96.
      total_variation: most that the distribution of one draw differs from the right one.
      variance: of the right one.

    Made by `discrete_gaussian_table` or `skellam_table`.
    """

    thresholds: np.ndarray
    total_variation: float
    variance: float

    @property
    def largest(self) -> int:
        """Largest absolute value that is ever drawn."""
        return len(self.thresholds)

    def sample(self, key: RandomKey, shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """Independent draws, int32; may be compiled.

        Example:
          >>> table = discrete_gaussian_table(4.0)
          >>> draws = table.sample(jax.random.key(0), (10_000,))
          >>> draws.dtype, bool(abs(jnp.var(draws.astype(jnp.float32)) - 4) < 0.2)
          (dtype('int32'), True)
        """
        bits = jax.random.bits(key, (_WORDS + 1, *shape), jnp.uint32)
        table = jnp.asarray(self.thresholds)
        low = jnp.zeros(shape, jnp.int32)
        high = jnp.full(shape, len(self.thresholds), jnp.int32)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) // 2
            rows = table[jnp.minimum(middle, len(self.thresholds) - 1)]
            reached = jnp.ones(shape, bool)  # draw >= threshold, word by word from the least
            for word in reversed(range(_WORDS)):
                same = bits[word] == rows[..., word]
                reached = jnp.where(same, reached, bits[word] > rows[..., word])
            reached &= low < high
            return jnp.where(reached, middle + 1, low), jnp.where(reached, high, middle)

        steps = len(self.thresholds).bit_length()
        magnitude, _ = jax.lax.fori_loop(0, steps, halve, (low, high))
        return jnp.where(bits[_WORDS] & jnp.uint32(1), -magnitude, magnitude)


@functools.lru_cache(maxsize=16)
def noise_table(noise: Noise, variance: float) -> NoiseTable:
    """`discrete_gaussian_table` or `skellam_table`, by name.

    Example:
      >>> noise_table("skellam", 2.5).variance
      2.5
    """
    if noise == "skellam":
        return skellam_table(variance)
    if noise == "discrete_gaussian":
        return discrete_gaussian_table(variance)
    raise DpjaxError(f"noise is {noise!r}; use 'discrete_gaussian' or 'skellam'")


def discrete_gaussian_table(scale_squared: float) -> NoiseTable:
    """P(x) proportional to exp(-x^2 / (2 scale_squared)) on the integers.

    Args:
      scale_squared: sigma^2, at least 1e-3 and at most 2^32; the variance is a little below it for
        small values.

    Raises:
      DpjaxError: out of range.

    Source: Canonne, Kamath and Steinke (2020), *The discrete Gaussian for differential privacy*,
      definition 1.

    Example:
      >>> table = discrete_gaussian_table(1.0)
      >>> table.total_variation < 1e-25, round(table.variance, 6)
      (True, 1.0)
    """
    _check_variance(scale_squared)
    with decimal.localcontext(prec=60):
        ratio = (-1 / decimal.Decimal(scale_squared)).exp()  # between successive ratios
        step, weight, weights = (-1 / (2 * decimal.Decimal(scale_squared))).exp(), 1, []
        weight = decimal.Decimal(1)
        while weight > decimal.Decimal(2) ** -120:
            weights.append(weight)
            weight, step = weight * step, step * ratio
        return _table(weights)


def skellam_table(variance: float) -> NoiseTable:
    """Difference of two independent Poisson variables, each of mean variance / 2.

    Args:
      variance: at least 1e-3 and at most 2^32.

    Source: Agarwal, Kairouz and Liu (2021), *The Skellam mechanism for differentially private
      federated learning*, definition 2.1. P(x) = exp(-v) I_x(v), with the Bessel functions by
      downward recurrence (Abramowitz and Stegun, 9.12).

    Example:
      >>> table = skellam_table(10.0)
      >>> table.total_variation < 1e-25, round(table.variance, 6)
      (True, 10.0)
    """
    _check_variance(variance)
    with decimal.localcontext(prec=60):
        mean = decimal.Decimal(variance)
        # Far enough out that the recurrence has forgotten where it started.
        start = 60 + math.ceil(20 * math.sqrt(variance))
        after, weight = decimal.Decimal(0), decimal.Decimal(10) ** -60
        weights = [weight]
        for order in range(start, 0, -1):
            after, weight = weight, after + 2 * order / mean * weight
            weights.append(weight)
        weights.reverse()
        smallest = weights[0] * decimal.Decimal(2) ** -120
        return _table([w for w in weights if w > smallest])


def _check_variance(variance: float) -> None:
    if not 1e-3 <= variance <= _LARGEST_STDDEV**2:
        raise DpjaxError(
            f"the noise variance on the integer grid is {variance:g}; it must be between 0.001 and "
            f"{_LARGEST_STDDEV**2:g}: change the grid's scale"
        )


def _table(weights: list[decimal.Decimal]) -> NoiseTable:
    """From unnormalised P(|x|), at 0, 1, 2, ...; beyond the last one they fall ever faster."""
    total = weights[0] + 2 * sum(weights[1:])
    unit, sum_so_far, numbers = 2 ** (32 * _WORDS), decimal.Decimal(0), []
    for x, weight in enumerate(weights[:-1]):
        sum_so_far += weight if x == 0 else 2 * weight
        numbers.append(min(unit - 1, int(sum_so_far / total * unit)))
    words = [[n >> 64 & 0xFFFFFFFF, n >> 32 & 0xFFFFFFFF, n & 0xFFFFFFFF] for n in numbers]
    # Every threshold is off by at most one unit, and the tail left out is below 2^-100.
    distance = (len(numbers) + 1) * 2.0**-96 + 2.0**-100
    variance = 2 * sum(w * x * x for x, w in enumerate(weights)) / total
    thresholds = np.array(words, np.uint32).reshape(-1, _WORDS)
    return NoiseTable(thresholds, distance, float(variance))


def exact_discrete_gaussian(scale_squared: fractions.Fraction | float, size: int) -> np.ndarray:
    """Draws from the discrete Gaussian exactly, from the operating system's entropy: int64[size].

    About 50,000 a second. No float is involved, so there is no rounding for an attacker to read
    (Mironov, 2012), and no seed to keep secret. Time depends on the values drawn.

    Args:
      scale_squared: sigma^2, a rational; a float stands for exactly its value.

    Raises:
      DpjaxError: not positive.

    Source: Canonne, Kamath and Steinke (2020), algorithms 1 to 3.

    Example:
      >>> draws = exact_discrete_gaussian(fractions.Fraction(9, 4), 4000)
      >>> bool(abs(draws.mean()) < 0.15), bool(1.9 < draws.var() < 2.6)
      (True, True)
    """
    if not (math.isfinite(scale_squared) and scale_squared > 0):
        raise DpjaxError(f"scale_squared is {scale_squared}; it must be positive and finite")
    variance = fractions.Fraction(scale_squared)
    return np.array([_exact_gaussian(variance) for _ in range(size)], np.int64)


def exact_discrete_laplace(scale: int, size: int) -> np.ndarray:
    """P(x) proportional to exp(-|x| / scale), as exact and as fast as `exact_discrete_gaussian`.

    An integer sum of L1 sensitivity D is (D / scale)-DP under it. int64[size].

    Source: Canonne, Kamath and Steinke (2020), algorithm 2; Ghosh, Roughgarden and Sundararajan
      (2009) for the mechanism.

    Example:
      >>> draws = exact_discrete_laplace(10, 4000)
      >>> bool(abs(draws.mean()) < 1.2), bool(8.9 < np.abs(draws).mean() < 11.1)
      (True, True)
    """
    if scale < 1:
        raise DpjaxError(f"scale is {scale}; it must be an integer of at least 1")
    return np.array([_exact_laplace(scale) for _ in range(size)], np.int64)


def _exact_gaussian(variance: fractions.Fraction) -> int:
    top, bottom = variance.numerator, variance.denominator
    scale = math.isqrt(top // bottom) + 1
    while True:
        x = _exact_laplace(scale)
        # exp(-(|x| - variance / scale)^2 / (2 variance)), over one denominator.
        gap = abs(x) * scale * bottom - top
        if _exact_exponential(gap * gap, 2 * top * bottom * scale * scale):
            return x


def _exact_laplace(scale: int) -> int:
    """P(x) proportional to exp(-|x| / scale)."""
    while True:
        low = secrets.randbelow(scale)
        if not _exact_exponential(low, scale):
            continue
        high = 0
        while _exact_exponential(1, 1):
            high += 1
        magnitude = low + scale * high
        is_negative = secrets.randbelow(2) == 1
        if magnitude or not is_negative:  # zero must not count twice
            return -magnitude if is_negative else magnitude


def _exact_exponential(top: int, bottom: int) -> bool:
    """True with probability exp(-top / bottom)."""
    while top > bottom:
        if not _exact_exponential(bottom, bottom):
            return False
        top -= bottom
    count = 1
    while secrets.randbelow(bottom * count) < top:
        count += 1
    return count % 2 == 1


def centred(total: Int[Array, "..."], bits: int) -> Int32[Array, "..."]:
    """The representative in [-2^(bits-1), 2^(bits-1)) of numbers modulo 2^bits, from uint32.

    Example:
      >>> centred(jnp.array([1, 255, 2**32 - 1], jnp.uint32), 8).tolist()
      [1, -1, -1]
    """
    half = jnp.uint32(2 ** (bits - 1))
    mask = jnp.uint32(2**bits - 1)
    return jax.lax.bitcast_convert_type(((total & mask) ^ half) - half, jnp.int32)
