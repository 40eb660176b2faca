"""Shamir's secret sharing of 256-bit secrets: any t shares give the secret, t - 1 say nothing."""

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

from dpjax.errors import DpjaxError

PRIME = 2**256 + 297  # the least prime above 2^256: every 32-byte secret is a field element
SHARE_BYTES = 33


def split_secret(
    secret: int,
    points: Sequence[int],
    threshold: int,
    *,
    prime: int = PRIME,
    randbelow: Callable[[int], int] = secrets.randbelow,
) -> dict[int, int]:
    """One share for each point, of which any ``threshold`` give the secret back.

    Args:
      secret: in [0, prime).
      points: distinct, in [1, prime): who gets a share. 0 is where the secret lies.
      threshold: t, 1 to the number of points.
      prime: of the field.
      randbelow: uniform below its argument; the default draws from the operating system. Anything
        else is for tests.

    Guarantee: shares of fewer than ``threshold`` points are uniform and independent of the secret.

    Raises:
      DpjaxError: points, threshold or secret out of range.

    Source: Shamir (1979), *How to share a secret*.

    Example:
      >>> shares = split_secret(1234, [1, 2, 3, 4, 5], threshold=3)
      >>> join_shares({k: shares[k] for k in (5, 1, 3)}, threshold=3)
      1234
    """
    if len(set(points)) != len(points) or any(not 0 < x < prime for x in points):
        raise DpjaxError("points must be distinct numbers above 0 and below the prime")
    if not 1 <= threshold <= len(points) or not 0 <= secret < prime:
        raise DpjaxError(
            f"threshold is {threshold} of {len(points)} shares; it must be at least 1 and at most "
            "their number, and the secret a number below the prime"
        )
    coefficients = [secret, *(randbelow(prime) for _ in range(threshold - 1))]
    shares = {}
    for x in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % prime
        shares[x] = value
    return shares


def join_shares(shares: Mapping[int, int], threshold: int, *, prime: int = PRIME) -> int:
    """The secret from at least ``threshold`` shares, by point; the first ones are used.

    Wrong shares give a wrong secret: nothing here can tell.

    Raises:
      DpjaxError: too few shares.
    """
    if len(shares) < threshold:
        raise DpjaxError(f"{len(shares)} shares of a secret, and {threshold} are needed")
    points = list(shares)[:threshold]
    weights = weights_at_zero(points, prime=prime)
    return sum(weights[x] * shares[x] for x in points) % prime


def weights_at_zero(points: Collection[int], *, prime: int = PRIME) -> dict[int, int]:
    """Lagrange's weights: the secret is the sum of weight times share, modulo the prime.

    Example:
      >>> weights_at_zero([1, 2], prime=7)  # a line at 0 is twice its value at 1 less that at 2
      {1: 2, 2: 6}
    """
    weights = {}
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        weights[x] = above * pow(below, -1, prime) % prime
    return weights
