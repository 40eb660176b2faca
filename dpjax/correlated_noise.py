"""Noise that is correlated over iterations: what one draw adds, later draws partly take back."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Int

from dpjax.errors import DpjaxError
from dpjax.noise import gaussian_noise_like
from dpjax.strategies import (
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    Strategy,
    Tree,
    optimal_banded,
    optimal_buffered,
)
from dpjax.types import PyTree, RandomKey, accumulation_dtype, require_key

Kind = Literal["banded", "tree", "blt"]


class CorrelatedNoiseState(NamedTuple):
    """State of a privatizer whose noise depends on what it added before. Secret, as the key is."""

    key: RandomKey  # typed scalar key; never changes
    # int32, calls so far; the name is optax's
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    # like the parameters, float32 or wider, with a leading axis: earlier noise (banded, in a ring),
    # buffers (BLT) or subtrees (tree); of length 0 where nothing is kept
    buffers: PyTree


def matrix_factorization_privatizer(
    strategy: Strategy, stddev: float, key: RandomKey
) -> optax.GradientTransformation:
    """Adds row t of N Z to the t-th clipped sum: N undoes the strategy C, Z is independent noise.

    Args:
      strategy: ``BandedToeplitz``, ``BufferedToeplitz``, ``Tree`` or ``Dense`` of
        `dpjax.strategies`.
      stddev: of every number in Z, in the units of the sum:
        noise_multiplier x ``strategy.sensitivity(...)`` x ``grad_fn.sensitivity(...)``. 0 adds
        nothing.
      key: JAX random key; required, because two runs with one key release the same noise.

    Returns:
      An optax transformation. Its state, ``CorrelatedNoiseState(key, count, buffers)``, is all that
      a resume needs: call ``count`` draws from ``fold_in(key, count)``, so no draw is ever repeated
      or skipped. It keeps bands - 1, buffers, or log2(iterations) + 1 copies of the parameters in
      float32, leaf by leaf, sharded as they are; ``Dense`` keeps none and draws anew.

    Raises:
      DpjaxError: more calls than ``strategy.iterations``, where the count is known.

    Guarantee:
      All calls together are ONE Gaussian mechanism with noise multiplier stddev / (sensitivity of
      the strategy x sensitivity of a sum), for examples that take part as the strategy's
      sensitivity assumes, also if each sum depends on what was released before (Denisov et al.,
      2022). Its first calls alone are no worse. Under jit, where the count is not known, a call
      beyond the planned ones releases NaN and nothing else. Noise is drawn, kept and added in
      float32 whatever the dtype of the input, and products are never rounded to a narrower type.
      Key, count and buffers are secret. float32 sampling is not exact (Mironov 2012).

    Source: Denisov et al. (2022); Choquette-Choo et al. (2023), algorithm 9 (banded); McMahan et
    al. (2024), algorithm 3 (BLT); Kairouz et al. (2021), algorithm 1 (tree).

    Example:
      >>> strategy = BandedToeplitz((1.0, 0.5), iterations=3)
      >>> privatizer = matrix_factorization_privatizer(strategy, 2.0, jax.random.key(0))
      >>> total = jnp.zeros(10_000)
      >>> one, state = privatizer.update(total, privatizer.init(total))
      >>> two, state = privatizer.update(total, state)  # a fresh draw minus half the one before
      >>> print(one.std().round(1), jnp.corrcoef(one, two)[0, 1].round(1))
      2.0 -0.4
    """
    if not (stddev >= 0 and math.isfinite(stddev)):
        raise DpjaxError(
            f"stddev is {stddev}; it must be finite and at least 0: noise_multiplier * "
            "strategy.sensitivity(...) * grad_fn.sensitivity(neighboring_relation)"
        )
    key = require_key(key)
    kept = num_kept(strategy)

    def init(params: PyTree) -> CorrelatedNoiseState:
        def buffers(leaf):
            # From the leaf itself, so that it lies where the leaf does.
            zeros = jnp.zeros_like(leaf, accumulation_dtype(leaf.dtype))
            return jnp.broadcast_to(zeros, (kept, *zeros.shape))

        return CorrelatedNoiseState(
            key, jnp.zeros((), jnp.int32), jax.tree.map(buffers, params) if stddev else ()
        )

    def update(updates, state, params=None):
        del params
        known = not isinstance(state.count, Tracer)
        if known and int(state.count) >= strategy.iterations:
            raise DpjaxError(
                f"the noise is planned for {strategy.iterations} iterations, and this would be one "
                "more; its guarantee ends there: build the strategy for more iterations"
            )
        after = state.count + 1
        if stddev == 0:
            return updates, CorrelatedNoiseState(state.key, after, state.buffers)

        def draw(*places):
            at = jax.random.fold_in(state.key, state.count)
            for place in places:
                at = jax.random.fold_in(at, place)
            return gaussian_noise_like(updates, stddev, at)

        def draw_of(count):
            return gaussian_noise_like(updates, stddev, jax.random.fold_in(state.key, count))

        match strategy:
            case BandedToeplitz():
                noise, buffers = _banded(strategy, draw(), state.buffers, state.count)
            case BufferedToeplitz():
                noise, buffers = _buffered(strategy, draw(), state.buffers)
            case Tree():
                noise, buffers = _tree(strategy, draw, state.buffers, state.count)
            case Dense():
                noise, buffers = _dense(strategy, draw_of, state.count), state.buffers
        planned = state.count < strategy.iterations

        def add(u, z):
            return jnp.where(planned, u.astype(z.dtype) + z, jnp.asarray(jnp.nan, z.dtype))

        noisy = jax.tree.map(add, updates, noise)
        return noisy, CorrelatedNoiseState(state.key, after, buffers)

    return optax.GradientTransformation(init, update)


def num_kept(strategy: Strategy) -> int:
    """Copies of the parameters that the noise's state holds.

    Example:
      >>> num_kept(BandedToeplitz((1.0, 0.5, 0.25), 10)), num_kept(Tree(1000))
      (2, 10)
    """
    match strategy:
        case BandedToeplitz():
            return strategy.num_bands - 1
        case BufferedToeplitz():
            return len(strategy.buffer_decay)
        case Tree():
            return strategy.num_levels
        case Dense():
            return 0


def _weighted(weights: Array, buffers: Array) -> Array:
    """Sum over the leading axis. The default precision of a product may be bfloat16 or TF32."""
    return jnp.tensordot(
        weights.astype(buffers.dtype), buffers, axes=1, precision=jax.lax.Precision.HIGHEST
    )


def _banded(strategy: BandedToeplitz, draws: PyTree, past: PyTree, count: Array) -> Any:
    """x_t = (z_t - sum_j c_j x_{t-j}) / c_0, with x_t in slot t modulo the number kept."""
    first, *others = strategy.coefficients
    kept = len(others)
    if not kept:
        return jax.tree.map(lambda z: z / first, draws), past
    lags = (count - 1 - jnp.arange(kept)) % kept
    weights = jnp.asarray(np.array(others, np.float32))[lags]

    def leaf(z, x):
        return (z - _weighted(weights, x)) / first

    noise = jax.tree.map(leaf, draws, past)
    return noise, jax.tree.map(lambda x, new: x.at[count % kept].set(new), past, noise)


def _buffered(strategy: BufferedToeplitz, draws: PyTree, buffers: PyTree) -> Any:
    """x = z - sum_j s_j b_j; then b_j = d_j b_j + x."""
    scale = jnp.asarray(np.array(strategy.output_scale, np.float32))
    decay = np.array(strategy.buffer_decay, np.float32)
    noise = jax.tree.map(lambda z, b: z - _weighted(scale, b), draws, buffers)

    def decayed(b, x):
        shape = (len(decay), *(1,) * x.ndim)
        return jnp.asarray(decay.reshape(shape), b.dtype) * b + x[None]

    return noise, jax.tree.map(decayed, buffers, noise)


def _tree(strategy: Tree, draw: Any, subtrees: PyTree, count: Array) -> Any:
    """The new leaf's estimate, merged with every subtree of the same size that stands before it.

    The noise of the running sum is that of the subtrees that stand; this step's is the difference.
    """
    weights = jnp.asarray(strategy.weights().astype(np.float32))

    def merge(carry):
        level, estimate, taken = carry
        own = draw(level + 1)
        share = weights[level + 1]

        def leaf(z, e, s):
            return share.astype(z.dtype) * z + (1 - share).astype(z.dtype) * (s[level] + e)

        merged = jax.tree.map(leaf, own, estimate, subtrees)
        return level + 1, merged, jax.tree.map(lambda x, s: x + s[level], taken, subtrees)

    def before_stands(carry):
        level, *_ = carry
        # Beyond the plan there are no weights; there, nothing is released either.
        return ((count >> level) & 1 == 1) & (level + 1 < strategy.num_levels)

    estimate = draw(0)
    start = jnp.zeros((), jnp.int32), estimate, jax.tree.map(jnp.zeros_like, estimate)
    level, estimate, taken = jax.lax.while_loop(before_stands, merge, start)
    noise = jax.tree.map(jnp.subtract, estimate, taken)
    return noise, jax.tree.map(lambda s, e: s.at[level].set(e), subtrees, estimate)


def _dense(strategy: Dense, draw_of: Any, count: Array) -> PyTree:
    row = jnp.asarray(strategy.noising_matrix().astype(np.float32))[count]

    def add(s, total):
        return jax.tree.map(lambda x, z: x + row[s].astype(z.dtype) * z, total, draw_of(s))

    zero = jnp.zeros((), jnp.int32)
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(draw_of, zero))
    return jax.lax.fori_loop(zero, count + 1, add, start)


@dataclasses.dataclass(frozen=True)
class CorrelatedNoise:
    """Which strategy a mechanism is to use; `dpjax.DPSGD` builds the best one for its plan.

    Attributes:
      kind: "banded" (matrix factorisation with few diagonals), "blt" (buffered linear Toeplitz: the
        least memory) or "tree" (DP-FTRL: binary tree aggregation).
      num_bands: of "banded"; default 8, or fewer if an example returns sooner. Memory: as many
        copies of the parameters, less one. At most the iterations between two participations.
      num_buffers: of "blt", default 3.

    Raises:
      DpjaxError: a setting that belongs to another kind, or out of range.

    Example:
      >>> CorrelatedNoise("banded", num_bands=2).strategy(10, min_sep=5, max_participations=2)
      BandedToeplitz(coefficients=(1.0, 0.5505...), iterations=10)
    """

    kind: Kind = "banded"
    num_bands: int | None = None
    num_buffers: int | None = None

    def __post_init__(self):
        if self.kind not in ("banded", "tree", "blt"):
            raise DpjaxError(f"kind is {self.kind!r}; use 'banded', 'tree' or 'blt'")
        for name, kind in (("num_bands", "banded"), ("num_buffers", "blt")):
            value = getattr(self, name)
            if value is not None and (self.kind != kind or value < 1):
                raise DpjaxError(
                    f"{name} is {value} with kind {self.kind!r}; it belongs to {kind!r}, and must "
                    "be at least 1"
                )

    def strategy(self, iterations: int, min_sep: int, max_participations: int) -> Strategy:
        """The best strategy of this kind for running sums, the same for the same plan."""
        if self.kind == "tree":
            return Tree(iterations)
        if self.kind == "blt":
            return optimal_buffered(iterations, min_sep, max_participations, self.num_buffers or 3)
        most = min(min_sep, iterations)
        num_bands = min(8, most) if self.num_bands is None else self.num_bands
        if num_bands > most:
            raise DpjaxError(
                f"num_bands is {num_bands}, but an example returns after {min_sep} of {iterations} "
                f"iterations; use at most {most}"
            )
        return optimal_banded(iterations, num_bands)
