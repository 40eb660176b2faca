"""Gradient inversion: from an update back to the images that it was computed on."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dpjax.errors import DpjaxError
from dpjax.types import PyTree, RandomKey, require_key


class Inversion(NamedTuple):
    """The best of several restarts."""

    images: np.ndarray  # float32[B, ...], in the box
    objective: float  # 1 - cosine similarity + prior, of the best restart; lower is better
    objectives: np.ndarray  # float32[restarts]
    cosine_similarity: float  # of the images' own update with the observed one


def invert_gradients(
    update_fn: Callable[[Float[Array, "B *image"]], PyTree],
    observed: PyTree,
    shape: tuple[int, ...],
    key: RandomKey,
    *,
    iterations: int = 1000,
    restarts: int = 4,
    learning_rate: float = 0.1,
    total_variation: float = 1e-3,
    box: tuple[float, float] = (0.0, 1.0),
) -> Inversion:
    """Searches images whose update points where the observed one does.

    Signed Adam on ``1 - cos(update_fn(x), observed) + total_variation * TV(x)``, clipped to the box
    after every step; the cosine does not see a scaling, so that clipping changes nothing. All
    restarts run at once.

    Args:
      update_fn: the update that a client would send for images ``x``, differentiable twice where
        training is (smooth activations); labels are inside it, see `infer_labels`. For many clients
        pass ``jax.tree_util.Partial(function, labels)`` with one function: it is compiled once.
      observed: pytree like its result.
      shape: of ``x``: (B, height, width) or (B, height, width, channels), or any (B, ...) with
        ``total_variation=0``.
      key: JAX random key, for the starting points.
      iterations, restarts, learning_rate: of the search; the rate falls to a hundredth.
      total_variation: weight of the prior that neighbouring pixels are alike.
      box: smallest and largest pixel.

    Raises:
      DpjaxError: an observed update that is all zero or not finite, or a shape without pixels.

    Source: Geiping et al. (2020), *Inverting gradients: how easy is it to break privacy in
      federated learning?*, equation 4 and section 6.

    Example:
      >>> w = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
      >>> def update_fn(x):
      ...     return jax.grad(lambda w: jnp.sum(jnp.tanh(x.reshape(1, 4) @ w) ** 2))(w)
      >>> truth = jnp.array([[[0.9, 0.1], [0.2, 0.6]]])
      >>> found = invert_gradients(update_fn, update_fn(truth), (1, 2, 2), jax.random.key(0),
      ...                          iterations=300, restarts=2, total_variation=0.0)
      >>> found.cosine_similarity > 0.99
      True
    """
    if iterations < 1 or restarts < 1 or not box[0] < box[1]:
        raise DpjaxError(
            f"iterations is {iterations}, restarts {restarts}, box {box}; use at least 1, at least"
            " 1, and low below high"
        )
    if total_variation and len(shape) not in (3, 4):
        raise DpjaxError(
            f"shape is {shape}; total variation needs (B, height, width[, channels]), or"
            " total_variation=0"
        )
    norm = float(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(observed)))
    if not 0 < norm < np.inf:
        raise DpjaxError(f"the update has squared norm {norm}; there is no direction to follow")
    low, high = box
    keys = jax.random.split(require_key(key), restarts)
    start = jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32, low, high))(keys)
    if not isinstance(update_fn, jax.tree_util.Partial):
        update_fn = jax.tree_util.Partial(update_fn)
    images, objectives = _search(
        update_fn,
        observed,
        start,
        total_variation=total_variation,
        box=(float(low), float(high)),
        learning_rate=learning_rate * (high - low),
        iterations=iterations,
    )
    best = int(jnp.nanargmin(objectives))
    cosine = float(_own_cosine(update_fn, images[best], observed))
    return Inversion(
        np.asarray(images[best]), float(objectives[best]), np.asarray(objectives), cosine
    )


@functools.partial(
    jax.jit, static_argnames=("total_variation", "box", "learning_rate", "iterations")
)
def _search(update_fn, observed, start, *, total_variation, box, learning_rate, iterations):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations, 0.01))

    def objective(x):
        return 1.0 - _cosine(update_fn(x), observed) + total_variation * _total_variation(x)

    def one(x):
        def step(carry, _):
            x, state = carry
            # The sign: what matters is which pixel is off, not how flat the loss is there.
            gradient = jnp.sign(jax.grad(objective)(x))
            # Optax's Adam mixes dtypes in its bias correction.
            with jax.numpy_dtype_promotion("standard"):
                change, state = optimizer.update(gradient, state, x)
            return (jnp.clip(x + change, *box), state), None

        (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), None, iterations)
        return x, objective(x)

    return jax.vmap(one)(start)


@jax.jit
def _own_cosine(update_fn, images, observed):
    return _cosine(update_fn(images), observed)


def _cosine(a: PyTree, b: PyTree) -> jax.Array:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    inner = jnp.stack([jnp.vdot(x, y) for x, y in pairs]).sum()
    squares = [jnp.stack([jnp.vdot(p[i], p[i]) for p in pairs]).sum() for i in (0, 1)]
    # Away from 0, where the square root has no slope: a dead network has no gradient.
    return inner / jnp.sqrt(jnp.maximum(squares[0] * squares[1], 1e-30))


def _total_variation(x: Array) -> jax.Array:
    if x.ndim not in (3, 4):
        return jnp.zeros(())
    down = jnp.abs(x[:, 1:] - x[:, :-1]).mean()
    across = jnp.abs(x[:, :, 1:] - x[:, :, :-1]).mean()
    return down + across


def infer_labels(head_bias_gradient: Float[np.ndarray, " classes"], batch_size: int) -> list[int]:
    """Labels from the gradient of the last layer's bias under softmax cross-entropy.

    For one example only the true class has a negative entry: exact. For more the labels found are
    those of the ``batch_size`` most negative entries, which is a guess: two examples of one class
    count once.

    Args:
      head_bias_gradient: float[classes].
      batch_size: examples in the update.

    Source: Zhao et al. (2020), *iDLG: improved deep leakage from gradients*, section 3.1.

    Example:
      >>> infer_labels(np.array([0.2, -0.9, 0.7]), 1)
      [1]
    """
    gradient = np.asarray(head_bias_gradient)
    if gradient.ndim != 1 or not 1 <= batch_size <= len(gradient):
        raise DpjaxError(
            f"the gradient has shape {gradient.shape} for {batch_size} examples; give that of the"
            " last layer's bias, and at most as many examples as classes"
        )
    return [int(n) for n in np.argsort(gradient, kind="stable")[:batch_size]]


def first_linear_layer_input(
    kernel_gradient: Float[np.ndarray, "inputs outputs"],
    bias_gradient: Float[np.ndarray, " outputs"],
) -> Float[np.ndarray, " inputs"]:
    """The input of a linear layer ``x W + b``, exactly, from the gradient of ONE example.

    Each column of the kernel's gradient is the input times that column's bias gradient. No search,
    any scaling; for a batch the result is a mixture of its inputs.

    Raises:
      DpjaxError: a bias gradient that is all zero (no unit was active).

    Source: Phong et al. (2017), *Privacy-preserving deep learning: revisited and enhanced*,
      section 3.

    Example:
      >>> first_linear_layer_input(np.outer([1.0, 2.0], [0.5, -4.0]), np.array([0.5, -4.0]))
      array([1., 2.])
    """
    kernel, bias = (np.asarray(g, np.float64) for g in (kernel_gradient, bias_gradient))
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        raise DpjaxError(
            f"gradients have shapes {kernel.shape} and {bias.shape}; give [inputs, outputs] and"
            " [outputs]"
        )
    if not np.any(bias):
        raise DpjaxError("the bias gradient is all zero; no unit of the layer was active")
    # All columns say the same; weighted by the square of their size, so that noise is averaged.
    return kernel @ bias / np.sum(bias**2)


def psnr(found: np.ndarray, truth: np.ndarray, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels: 10 log10(peak^2 / mean squared error).

    Example:
      >>> psnr(np.full((2, 2), 0.6), np.full((2, 2), 0.5))
      20.0
    """
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.shape != truth.shape:
        raise DpjaxError(f"images have shapes {found.shape} and {truth.shape}; they must agree")
    error = float(np.mean((found - truth) ** 2))
    return float("inf") if error == 0 else round(10 * float(np.log10(peak**2 / error)), 10)
