"""DP-SGD as ready-made optax optimizers that take per-example gradients.

For code that already has per-example gradients, or comes from other libraries. `dpjax.fit` uses
`clipped_grad` and `gaussian_privatizer` instead; for one key the two routes give the same numbers.
"""

from typing import Any

import jax
import optax

from dpjax.clipping import clip_and_sum
from dpjax.errors import DpjaxError
from dpjax.noise import gaussian_privatizer
from dpjax.types import RandomKey


def dp_aggregate(
    l2_clip_norm: float,
    noise_multiplier: float,
    key: RandomKey,
    *,
    normalize_by: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Per-example gradients in, noisy sum of clipped gradients out.

    Args:
      l2_clip_norm: largest L2 norm of one example's gradient over all leaves.
      noise_multiplier: noise stddev / sensitivity under add-or-remove-one (or replace-special),
        so the stddev is ``noise_multiplier * l2_clip_norm / normalize_by``.
      key: JAX random key; required.
      normalize_by: public constant that divides the sum, e.g. the expected batch size. Never the
        realised one.

    Returns:
      An optax transformation. ``update(per_example_grads, state, params)`` takes leaves with a
      leading axis ``batch`` and returns leaves of the parameters' shapes in float32; the keyword
      ``is_padding_example`` (bool[batch]) marks rows to leave out.

    Guarantee:
      As `clipped_grad` (NaN, padding, empty batch, bfloat16) followed by `gaussian_privatizer`.

    Source: Abadi et al. (2016). Unlike optax.contrib's transformation of this purpose it never
    divides by the realised batch and has no default key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = dp_aggregate(l2_clip_norm=1.0, noise_multiplier=0.0, key=jax.random.key(0))
      >>> grads = jnp.array([[0.5, 0.0], [0.0, 8.0]])
      >>> print(tx.update(grads, tx.init(jnp.zeros(2)))[0])
      [0.5 1. ]
    """
    if not l2_clip_norm > 0:
        raise DpjaxError(f"l2_clip_norm is {l2_clip_norm}; it must be positive, e.g. 1.0")
    if not normalize_by > 0:
        raise DpjaxError(f"normalize_by is {normalize_by}; use a positive public constant")
    privatizer = gaussian_privatizer(noise_multiplier * (l2_clip_norm / normalize_by), key)

    def update(updates, state, params=None, *, is_padding_example=None, **extra: Any):
        del extra
        total, _ = clip_and_sum(updates, l2_clip_norm, is_padding_example)
        if normalize_by != 1.0:
            total = jax.tree.map(lambda x: x / normalize_by, total)
        return privatizer.update(total, state, params)

    return optax.GradientTransformationExtraArgs(privatizer.init, update)


def dp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    l2_clip_norm: float,
    noise_multiplier: float,
    key: RandomKey,
    *,
    normalize_by: float = 1.0,
    momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`dp_aggregate` followed by optax.sgd; takes per-example gradients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = dp_sgd(0.1, 1.0, 0.0, jax.random.key(0), normalize_by=2.0)
      >>> print(tx.update(jnp.array([[1.0], [1.0]]), tx.init(jnp.zeros(1)))[0])
      [-0.1]
    """
    return optax.chain(
        dp_aggregate(l2_clip_norm, noise_multiplier, key, normalize_by=normalize_by),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def dp_adam(
    learning_rate: optax.ScalarOrSchedule,
    l2_clip_norm: float,
    noise_multiplier: float,
    key: RandomKey,
    *,
    normalize_by: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`dp_aggregate` followed by optax.adam (adamw with ``weight_decay``).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = dp_adam(0.1, 1.0, 0.0, jax.random.key(0))
      >>> print(tx.update(jnp.array([[1.0], [1.0]]), tx.init(jnp.zeros(1)))[0].round(3))
      [-0.1]
    """
    if weight_decay:
        optimizer = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    else:
        optimizer = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    return optax.chain(
        dp_aggregate(l2_clip_norm, noise_multiplier, key, normalize_by=normalize_by), optimizer
    )
