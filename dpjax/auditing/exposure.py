"""Exposure: by how many bits a model prefers a secret over the others that it might have been.

An unseen secret has a uniform rank among its twins, so that its exposure is at least x bits with
probability 2^-x and 1 / ln 2 = 1.4427 bits on average. Losses are in nats, lower = better known.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply, next_token_losses
from dpjax.types import PyTree

_LARGEST_SPACE = 10_000_000
_TAIL = 1e-4  # below it the distribution function of scipy loses digits


class Exposure(NamedTuple):
    """Exposure of each canary, with the most that the method could have shown."""

    bits: np.ndarray  # float64[canaries]
    maximum: float  # bits; inf where a fit was not told the size of the space
    is_censored: np.ndarray  # bool[canaries], at the maximum: the true value may be higher
    method: str
    # of a Kolmogorov-Smirnov test of the fit on the very losses it was fitted to, and so too high:
    # a low one refutes the fit, a high one does not prove it
    ks_p_value: float | None = None


def exposure_by_rank(canary_losses: Any, all_losses_of_the_space: Any) -> Exposure:
    """Exact exposure: log2 of the space's size minus log2 of the canary's rank in it.

    Args:
      canary_losses: float[canaries], nats, taken from the losses of the space.
      all_losses_of_the_space: float array of any shape, the losses of all values that the secret
        could have had, the canaries' among them; see `rank_space`.

    Returns:
      An `Exposure`. Ties are to the canary's disadvantage: it stands behind every other value of
      the same loss, so that a model that tells nothing apart exposes nothing.

    Raises:
      DpjaxError: for NaN or no losses.

    Source: Carlini et al. (2019), section 4.2.

    Example:
      >>> exposure_by_rank([1.0, 4.0], [1.0, 2.0, 3.0, 4.0]).bits
      array([2., 0.])
    """
    losses, space = (
        _checked(canary_losses, "canary_losses"),
        _checked(all_losses_of_the_space, "all_losses_of_the_space"),
    )
    # Found by itself, so at least 1; a recomputed loss may miss itself by a rounding.
    ranks = np.maximum(1, np.searchsorted(np.sort(space), losses, side="right"))
    bits = math.log2(space.size) - np.log2(ranks)
    return Exposure(bits, math.log2(space.size), ranks == 1, "rank")


def exposure_by_sampling(
    canary_losses: Any, reference_losses: Any, space_bits: float | None = None
) -> Exposure:
    """Exposure from the rank among held-out twins, themselves a sample of the space.

    Args:
      canary_losses: float[canaries], nats.
      reference_losses: float[references], nats, of twins that the model never saw.
      space_bits: log2 of the space's size, if known; no exposure can be above it.

    Returns:
      An `Exposure` of log2((references + 1) / (1 + references at or below the canary's loss)). Its
      maximum, and resolution, is log2(references + 1); a canary below all twins is censored there.

    Raises:
      DpjaxError: for NaN or no losses.

    Source: Carlini et al. (2019), section 4.3, approximation by sampling.

    Example:
      >>> exposure_by_sampling([0.5, 2.5], [1.0, 2.0, 3.0]).bits.round(3)
      array([2.   , 0.415])
    """
    losses = _checked(canary_losses, "canary_losses")
    references = np.sort(_checked(reference_losses, "reference_losses"))
    below = np.searchsorted(references, losses, side="right")
    maximum = math.log2(references.size + 1)
    bits = maximum - np.log2(below + 1)
    return _capped(bits, maximum if space_bits is None else min(maximum, space_bits), "sampling")


def exposure_by_skew_normal(
    canary_losses: Any, reference_losses: Any, space_bits: float | None = None
) -> Exposure:
    """Exposure from a skew-normal fit to the twins' losses: looks beyond the best of the twins.

    Args:
      canary_losses: float[canaries], nats.
      reference_losses: float[references], nats, at least 8 of twins that the model never saw.
      space_bits: log2 of the space's size; without it the maximum is infinite.

    Returns:
      An `Exposure` of -log2 P(loss of a twin <= canary's loss) under the fit, with the p-value of a
      Kolmogorov-Smirnov test. Beyond log2(references) bits it rests on the fit alone.

    Raises:
      DpjaxError: for losses that are not finite, fewer than 8, or all the same.

    Source: Carlini et al. (2019), section 4.3, approximation by distribution modelling.

    Example:
      >>> references = np.random.default_rng(0).normal(50.0, 2.0, 1000)
      >>> found = exposure_by_skew_normal([50.0, 42.0], references)
      >>> found.bits.round().tolist(), found.ks_p_value > 0.05
      ([1.0, 14.0], True)
    """
    losses = _checked(canary_losses, "canary_losses")
    references = _checked(reference_losses, "reference_losses")
    if references.size < 8 or not np.all(np.isfinite(references)) or np.ptp(references) == 0:
        raise DpjaxError(
            f"{references.size} reference losses cannot be fitted; give at least 8 finite ones "
            "that differ, or use exposure_by_sampling"
        )
    centre, spread = references.mean(), references.std()
    standard = (references - centre) / spread
    parameters: Any = stats.skewnorm.fit(standard)
    shape, location, scale = map(float, parameters)
    fitted = stats.skewnorm(shape, location, scale)
    tested: Any = stats.kstest(standard, fitted.cdf)
    points = ((losses - centre) / spread - location) / scale
    bits = np.maximum(0.0, -skew_normal_log_cdf(points, shape) / math.log(2.0))
    found = _capped(bits, math.inf if space_bits is None else space_bits, "skew-normal")
    return found._replace(ks_p_value=float(tested.pvalue))


def skew_normal_log_cdf(points: Any, shape: float) -> np.ndarray:
    """log P(X <= x) of a standard skew-normal, nats, far into the lower tail.

    In the tail the density's logarithm is concave, so that the integral over what lies below x is
    an exponential times a factor between 0 and 1, found by Gauss-Laguerre quadrature.

    Args:
      points: float array.
      shape: Azzalini's alpha; 0 is the normal distribution.

    Returns:
      float64, the same shape as ``points``.

    Example:
      >>> skew_normal_log_cdf([-40.0], 0.0).round(3), stats.norm.logcdf(-40.0).round(3)
      (array([-804.608]), np.float64(-804.608))
    """
    shaped = np.asarray(points, np.float64)
    points = shaped.reshape(-1)
    with np.errstate(divide="ignore"):
        log_cdf = np.log(np.clip(stats.skewnorm.cdf(points, shape), 0.0, 1.0))

    def log_density(x):
        return math.log(2.0) + stats.norm.logpdf(x) + special.log_ndtr(shape * x)

    nodes, weights = _laguerre()
    # A density that rises at x and a small probability below: the tail.
    log_ratio = stats.norm.logpdf(shape * points) - special.log_ndtr(shape * points)
    slopes = -points + shape * np.exp(log_ratio)
    tail = np.isfinite(points) & (log_cdf < math.log(_TAIL)) & (slopes > 0)
    x, slope = points[tail][:, None], slopes[tail][:, None]
    factors = np.exp(log_density(x - nodes / slope) - log_density(x) + nodes)
    log_cdf[tail] = log_density(x[:, 0]) - np.log(slope[:, 0]) + np.log(factors @ weights)
    return log_cdf.reshape(shaped.shape)


def unseen_exposure(num_references: int) -> tuple[float, float]:
    """Mean and standard deviation, in bits, of an unseen canary's `exposure_by_sampling`.

    Its rank is uniform on 1, ..., references + 1. Both tend to 1 / ln 2 = 1.4427.

    Example:
      >>> mean, deviation = unseen_exposure(2000)
      >>> print(f"{mean:.3f} {deviation:.3f}")
      1.439 1.430
    """
    if num_references < 1:
        raise DpjaxError(f"num_references is {num_references}; it must be at least 1, e.g. 1000")
    bits = math.log2(num_references + 1) - np.log2(np.arange(1, num_references + 2))
    return float(bits.mean()), float(bits.std())


@functools.partial(jax.jit, static_argnames=("config", "batch_size"))
def _alphabet_losses(config, params, contexts, read, alphabet, batch_size):
    def one(context, place):
        logits = apply(config, params, context)[place]
        return jax.nn.logsumexp(logits) - logits[alphabet]

    return jax.lax.map(lambda pair: one(*pair), (contexts, read), batch_size=batch_size)


def rank_space(
    config: DecoderConfig,
    params: PyTree,
    prefix_tokens: Sequence[int],
    alphabet: Sequence[int],
    length: int,
    batch_size: int = 128,
) -> np.ndarray:
    """Losses of every sequence of ``length`` tokens of an alphabet behind a prefix.

    Sequences with a common beginning share its evaluation: 10^4 codes of 4 digits take 1,111.

    Args:
      prefix_tokens: at least one token, e.g. begin.
      alphabet: A different ids, e.g. those of the ten digits.
      length: L; A^L may be at most 10^7.

    Returns:
      float64[A, ..., A] with L axes, nats: ``losses[3, 1]`` is the summed loss of ``alphabet[3]``
      and then ``alphabet[1]``, over the model's whole vocabulary.

    Raises:
      DpjaxError: for an empty prefix or alphabet, ids outside the vocabulary, a space too large.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> losses = rank_space(config, init_params(config, jax.random.key(0)), [1], [5, 6, 7], 2)
      >>> losses.shape, bool(abs(losses.mean() - 2 * np.log(300)) < 1)
      ((3, 3), True)
    """
    ids, prefix = np.asarray(alphabet), np.asarray(prefix_tokens)
    for name, values in (("alphabet", ids), ("prefix_tokens", prefix)):
        if values.ndim != 1 or not values.size or not np.issubdtype(values.dtype, np.integer):
            raise DpjaxError(f"{name} is {values.tolist()}; give a list of at least one token id")
        if values.min() < 0 or values.max() >= config.vocabulary_size:
            raise DpjaxError(
                f"{name} has an id outside the vocabulary of {config.vocabulary_size}; use the "
                "model's own tokenizer"
            )
    if np.unique(ids).size != ids.size:
        raise DpjaxError("alphabet names an id twice; name each once")
    if length < 1 or ids.size**length > _LARGEST_SPACE:
        raise DpjaxError(
            f"length is {length} over {ids.size} ids; the space must have 1 to {_LARGEST_SPACE} "
            "sequences of at least one token"
        )
    contexts, read = [], []
    for level in range(length):
        grid = np.indices((ids.size,) * level).reshape(level, ids.size**level).T
        rows = np.full((ids.size**level, prefix.size + length - 1), ids[0], np.int32)
        rows[:, : prefix.size] = prefix
        rows[:, prefix.size : prefix.size + level] = ids[grid]
        contexts.append(rows)
        # What lies behind the place that is read is not seen: attention is causal.
        read.append(np.full(len(rows), prefix.size + level - 1, np.int32))
    tokens, places = jnp.asarray(np.concatenate(contexts)), jnp.asarray(np.concatenate(read))
    size = min(batch_size, len(places))
    found = _alphabet_losses(config, params, tokens, places, jnp.asarray(ids, jnp.int32), size)
    found = np.asarray(found, np.float64)
    total = np.zeros((1,))
    start = 0
    for level in range(length):
        total = (total[:, None] + found[start : start + ids.size**level]).reshape(-1)
        start += ids.size**level
    return total.reshape((ids.size,) * length)


@functools.partial(jax.jit, static_argnames="config")
def _sums(config, params, batch):
    losses, counts = jax.vmap(lambda example: next_token_losses(config, params, example))(batch)
    return jnp.sum(jnp.where(counts > 0, losses, 0.0), axis=1)


def secret_losses(
    config: DecoderConfig, params: PyTree, tokens: Any, counted: Any, batch_size: int = 256
) -> np.ndarray:
    """Summed loss of the counted tokens of each row: float64[rows], nats.

    Args:
      tokens: int[rows, time].
      counted: bool[rows, time], e.g. True on the secret's tokens; the first column never counts.
      batch_size: rows at once; one compilation.

    Raises:
      DpjaxError: for shapes that differ, or tokens outside the vocabulary.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> rows, counted = np.array([[1, 2, 3]]), np.array([[False, False, True]])
      >>> bool(abs(secret_losses(config, params, rows, counted)[0] - np.log(300)) < 1)
      True
    """
    rows, mask = np.asarray(tokens), np.asarray(counted)
    if rows.ndim != 2 or rows.shape != mask.shape or rows.shape[1] < 2:
        raise DpjaxError(
            f"tokens have shape {rows.shape} and counted {mask.shape}; both must be [rows, time] "
            "with at least 2 tokens"
        )
    if rows.size and (rows.min() < 0 or rows.max() >= config.vocabulary_size):
        raise DpjaxError(
            f"a token is outside the vocabulary of {config.vocabulary_size}; extend the model's "
            "vocabulary, or use its tokenizer"
        )
    found = [np.zeros(0)]
    size = min(batch_size, max(len(rows), 1))
    for start in range(0, len(rows), size):
        places = np.arange(start, start + size)
        inside = places < len(rows)
        places = np.where(inside, places, start)  # the last batch keeps the shape
        batch = {"tokens": rows[places].astype(np.int32), "loss_mask": mask[places]}
        found.append(np.asarray(_sums(config, params, batch), np.float64)[inside])
    return np.concatenate(found)


@functools.lru_cache(maxsize=1)
def _laguerre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.laguerre.laggauss(64)


def _checked(losses: Any, name: str) -> np.ndarray:
    values = np.asarray(losses, np.float64).reshape(-1)
    if not values.size:
        raise DpjaxError(f"{name} is empty; give at least one loss")
    if np.isnan(values).any():
        raise DpjaxError(
            f"{name} has {np.isnan(values).sum()} NaN; a model that diverged exposes nothing that "
            "can be measured: look at its training first"
        )
    return values


def _capped(bits: np.ndarray, maximum: float, method: str) -> Exposure:
    return Exposure(np.minimum(bits, maximum), maximum, bits >= maximum, method)
