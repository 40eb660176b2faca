"""Aliases and Protocols shared by every part; nothing here computes on private data."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Bool, Float, Int

from dpjax.errors import DpjaxError

__all__ = [
    "Batch",
    "ClipInfo",
    "LossFn",
    "NeighboringRelation",
    "PyTree",
    "RandomKey",
    "TrainingData",
    "accumulation_dtype",
    "as_neighboring_relation",
    "require_key",
]

PyTree: TypeAlias = Any
"""Any nesting of dicts, lists, tuples and registered dataclasses with arrays as leaves."""

RandomKey: TypeAlias = jax.Array
"""A typed key from ``jax.random.key`` (or a legacy uint32[2] key)."""

LossFn: TypeAlias = Callable[..., Any]
"""``loss_fn(params, example) -> scalar``: the loss of ONE example, no batch axis."""


class ClipInfo(NamedTuple):
    """What clipping saw, example by example. Sensitive: never log, print or release it."""

    sensitive_norms: Float[Array, " batch"]  # float32, L2 norm before clipping; 0 on padding
    sensitive_losses: Float[Array, " batch"]  # float32, loss_fn's value; 0 on padding
    sensitive_aux: PyTree = None  # leading axis batch; only with has_aux=True


class Batch(NamedTuple):
    """Which examples take part in one iteration, in a fixed physical shape."""

    indices: Int[np.ndarray, " physical"]  # int32 rows of the data set; 0 where padding
    is_padding_example: Bool[np.ndarray, " physical"]


class TrainingData(Protocol):
    """What training asks of a data set."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> PyTree:
        """Examples at ``indices`` as a pytree whose leaves have that leading axis."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 of the content, so that a resume on other data is refused."""
        ...


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or float64 where the values are: what norms, sums and noise are computed in.

    Example:
      >>> accumulation_dtype(jnp.bfloat16)
      dtype('float32')
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def as_neighboring_relation(value: NeighboringRelation | str) -> NeighboringRelation:
    """Accepts dp_accounting's enum or its name in any case, with dashes or underscores.

    Example:
      >>> as_neighboring_relation("add-or-remove-one").name
      'ADD_OR_REMOVE_ONE'
    """
    if isinstance(value, NeighboringRelation):
        return value
    try:
        return NeighboringRelation[str(value).replace("-", "_").upper()]
    except KeyError:
        known = ", ".join(r.name.lower() for r in NeighboringRelation)
        raise DpjaxError(f"neighboring_relation is {value!r}; use one of: {known}") from None


def require_key(key: Any) -> RandomKey:
    """Returns a typed scalar key, or explains how to make one. There is no default key.

    Example:
      >>> require_key(7)
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: key is 7 (int); pass a JAX random key, e.g. jax.random.key(seed)
    """
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == np.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(key)
        found = f"an array of {key.dtype}{list(key.shape)}"
    else:
        found = f"{key!r} ({type(key).__name__})"
    raise DpjaxError(f"key is {found}; pass a JAX random key, e.g. jax.random.key(seed)")
