"""A clip norm that follows a quantile of the gradient norms, released with noise of its own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpjax.errors import DpjaxError
from dpjax.types import NeighboringRelation, RandomKey

# Public range of the clip norm, as a multiple of the first one.
SMALLEST, LARGEST = 2.0**-20, 2.0**20

# Sets the count's key stream apart from the gradient's, which folds in the number of the release.
_COUNT_STREAM = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class AdaptiveClipping:
    """Moves the clip norm towards a quantile of the gradient norms, iteration by iteration.

    Beside the sum of clipped gradients, each iteration releases how many of them were not cut, as
    the sum of (1 if norm <= clip norm else 0) - 1/2 over its examples, with Gaussian noise. Then
    the clip norm is multiplied by exp(-learning_rate * (released share - target_quantile)).

    Attributes:
      target_quantile: share of examples that are to remain uncut, in (0, 1).
      learning_rate: of the logarithm of the clip norm.
      budget_share: of what one iteration reveals (in units of 1 / noise_multiplier^2), in (0, 1).
        The count is released with noise multiplier ``z / sqrt(budget_share)``, the gradient with
        ``z / sqrt(1 - budget_share)``: together one Gaussian mechanism of noise multiplier z.

    Raises:
      DpjaxError: a value out of range.

    Guarantee:
      The pair (gradient, count), each divided by its own noise stddev, changes by at most 1 / z in
      L2 between neighbouring batches, so the accountant's event for z covers both releases. One
      example moves the count by 1/2 when it is added or removed, by 1 when it is replaced. An
      example whose gradient is not finite counts nothing, as if removed; so does padding. The
      next clip norm is post-processing; the released share is divided by the public expected
      batch size, never the realised one.

    Source: Andrew et al. (2021), Algorithm 1 and Theorem 1.

    Example:
      >>> AdaptiveClipping(target_quantile=0.5).budget_share
      0.01
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    budget_share: float = 0.01

    def __post_init__(self):
        for name in ("target_quantile", "budget_share"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise DpjaxError(f"{name} is {value}; it must lie between 0 and 1, e.g. 0.5")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise DpjaxError(f"learning_rate is {self.learning_rate}; use e.g. 0.2")

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Of the gradient alone, when both releases together have ``noise_multiplier``.

        Example:
          >>> print(f"{AdaptiveClipping(budget_share=0.19).gradient_noise_multiplier(0.9):.3f}")
          1.000
        """
        return noise_multiplier / math.sqrt(1 - self.budget_share)

    def count_stddev(self, noise_multiplier: float, relation: NeighboringRelation) -> float:
        """Absolute noise on the count, when both releases together have ``noise_multiplier``.

        Example:
          >>> AdaptiveClipping().count_stddev(1.0, NeighboringRelation.ADD_OR_REMOVE_ONE)
          5.0
        """
        sensitivity = 1.0 if relation is NeighboringRelation.REPLACE_ONE else 0.5
        return sensitivity * noise_multiplier / math.sqrt(self.budget_share)


def next_relative_clip_norm(
    adaptive: AdaptiveClipping,
    relative_clip_norm: Float[Array, ""],
    clip_norm: float,
    norms: Float[Array, " batch"],
    is_padding_example: Bool[Array, " batch"],
    *,
    expected_batch_size: float,
    stddev: float,
    key: RandomKey,
    release: Int[Array, ""],
) -> Float[Array, ""]:
    """Releases the noisy count of one iteration and moves the clip norm.

    Args:
      adaptive: the configuration.
      relative_clip_norm: now, as a multiple of ``clip_norm``.
      clip_norm: the first clip norm.
      norms: of the whole gradients before clipping.
      is_padding_example: which rows are no examples.
      expected_batch_size: public.
      stddev: `AdaptiveClipping.count_stddev`.
      key: the noise key; the count has a stream of its own in it.
      release: number of this release, never used twice.

    Example:
      >>> moved = next_relative_clip_norm(
      ...     AdaptiveClipping(), jnp.float32(1), 1.0, jnp.array([5.0, 9.0]), jnp.zeros(2, bool),
      ...     expected_batch_size=2.0, stddev=0.0, key=jax.random.key(0), release=jnp.int32(0))
      >>> print(f"{moved:.4f}")  # all were cut, so it grows by exp(0.2 * 0.5)
      1.1052
    """
    counts = jnp.isfinite(norms) & ~is_padding_example
    uncut = counts & (norms <= relative_clip_norm * clip_norm)
    # Half units as integers: exact however large the batch.
    halves = 2 * jnp.sum(uncut.astype(jnp.int32)) - jnp.sum(counts.astype(jnp.int32))
    return moved_by_count(
        adaptive,
        relative_clip_norm,
        0.5 * halves.astype(jnp.float32),
        expected_batch_size=expected_batch_size,
        stddev=stddev,
        key=key,
        release=release,
    )


def moved_by_count(
    adaptive: AdaptiveClipping,
    relative_clip_norm: Float[Array, ""],
    sensitive_count: Float[Array, ""],
    *,
    expected_batch_size: float,
    stddev: float,
    key: RandomKey,
    release: Int[Array, ""],
) -> Float[Array, ""]:
    """`next_relative_clip_norm` from a count that was summed elsewhere, without noise so far.

    Args:
      sensitive_count: sum over examples of 1/2 if uncut, else -1/2.

    Example:
      >>> moved = moved_by_count(
      ...     AdaptiveClipping(), jnp.float32(1), jnp.float32(-1), expected_batch_size=2.0,
      ...     stddev=0.0, key=jax.random.key(0), release=jnp.int32(0))
      >>> print(f"{moved:.4f}")
      1.1052
    """
    stream = jax.random.fold_in(jax.random.fold_in(key, _COUNT_STREAM), release)
    noisy = sensitive_count + stddev * jax.random.normal(stream, (), jnp.float32)
    share = jnp.clip(noisy / expected_batch_size + 0.5, 0.0, 1.0)
    step = -adaptive.learning_rate * (share - adaptive.target_quantile)
    return jnp.clip(relative_clip_norm * jnp.exp(step), SMALLEST, LARGEST)
