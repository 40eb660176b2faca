"""Smaller updates: a few bits for each coordinate, or only the largest coordinates.

Both wrap an algorithm: its server gets what can be read back from the small message. They save
bytes of messages that are sent alone. Under secure aggregation a sum is of whole vectors:
`fixed_point` with fewer bits and stochastic rounding is the smaller message there.
"""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm, LocalResult
from dpjax.types import PyTree

_CODE_KEY = 0x636F6D70  # far from the small numbers with which algorithms derive their own keys


class Sparse(NamedTuple):
    """What a client of `top_k` keeps: the inner algorithm's state, and what it has not sent."""

    inner: PyTree
    residual: PyTree  # float32, like params


def quantised(algorithm: Algorithm, bits: int) -> Algorithm:
    """Each leaf in 2^bits - 1 even levels between its largest absolute value and minus that.

    Rounds up or down at random, so that the expected value is the update itself; the error of a
    coordinate is below one step, 2 * largest / (2^bits - 2). See `quantised_bytes`.

    Args:
      algorithm: any whose clients send float leaves. `private` goes outside: random rounding can
        raise a norm, and the clipping of what is sent must come last.
      bits: 2 to 16 for each coordinate.

    Source: Alistarh et al. (2017), *QSGD*, section 3.1, with the largest value in place of the
      norm.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> quantised(fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1)), bits=8).name
      'fed_avg+quantised8'
    """
    if not 2 <= bits <= 16:
        raise DpjaxError(f"bits is {bits}; use 2 to 16")
    _refuse_private(algorithm, f"quantised(..., bits={bits})")

    def local_update(server, client, data, key):
        result = algorithm.local_update(server, client, data, key)
        leaves, structure = jax.tree.flatten(_floats(algorithm, result.update))
        keys = jax.random.split(jax.random.fold_in(key, _CODE_KEY), max(1, len(leaves)))
        read = [dequantise(*quantise(x, bits, k), bits) for x, k in zip(leaves, keys, strict=False)]
        return result._replace(update=structure.unflatten(read))

    return algorithm._replace(name=f"{algorithm.name}+quantised{bits}", local_update=local_update)


def quantise(
    x: Float[Array, "..."], bits: int, key: Array
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Levels -(2^(bits-1) - 1) to 2^(bits-1) - 1 as whole float32 numbers, and the largest value.

    Example:
      >>> level, largest = quantise(jnp.float32([1.0, -0.5, 0.0]), 2, jax.random.key(0))
      >>> float(level[0]), float(level[2]), float(largest)
      (1.0, 0.0, 1.0)
    """
    x = x.astype(jnp.float32)
    most = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(x), initial=0.0)
    # NaN and infinity stay, for the round to find and reject.
    scaled = x / jnp.where(largest > 0, largest, 1.0) * most
    below = jnp.floor(scaled)
    draw = jax.random.uniform(key, x.shape, jnp.float32)
    level = below + (draw < scaled - below).astype(jnp.float32)
    return jnp.where(jnp.isfinite(largest), level, jnp.nan), largest


def dequantise(
    level: Float[Array, "..."], largest: Float[Array, ""], bits: int
) -> Float[Array, "..."]:
    """The values that levels stand for."""
    return level * (largest / (2 ** (bits - 1) - 1))


def top_k(algorithm: Algorithm, share: float) -> Algorithm:
    """Sends the largest coordinates of the update and what was held back before, keeps the rest.

    With error feedback: what a client sent and what it still keeps always add up to all its
    updates. The k = ceil(share * d) coordinates of largest absolute value over all leaves are sent;
    a client of weight 0 sends nothing and keeps all. See `top_k_bytes`.

    Args:
      algorithm: any whose update is like the parameters. `private` goes outside: what was held
        back is not within any clip norm.
      share: of coordinates that are sent, above 0 and at most 1.

    Clients keep one residual each, as large as the parameters.

    Source: Stich et al. (2018), *Sparsified SGD with memory*, algorithm 1.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> algorithm = top_k(fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1)), share=0.1)
      >>> algorithm.init(jnp.zeros(2))[1]
      Sparse(inner=(), residual=Array([0., 0.], dtype=float32))
    """
    if not 0 < share <= 1:
        raise DpjaxError(f"share is {share}; it must be above 0 and at most 1")
    _refuse_private(algorithm, f"top_k(..., share={share})")

    def init(params):
        server, client = algorithm.init(params)
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return server, Sparse(client, zeros)

    def local_update(server, client, data, key):
        result = algorithm.local_update(server, client.inner, data, key)
        update = _floats(algorithm, result.update)
        if jax.tree.structure(update) != jax.tree.structure(client.residual):
            raise DpjaxError(
                f"{algorithm.name} sends more than a change of the parameters; top_k needs one "
                "that does not, such as fed_avg"
            )
        whole = jax.tree.map(jnp.add, client.residual, update)
        takes_part = result.weight > 0
        sent = jax.tree.map(lambda x: jnp.where(takes_part, x, 0.0), largest_only(whole, share))
        kept = Sparse(result.client, jax.tree.map(jnp.subtract, whole, sent))
        return LocalResult(sent, result.weight, kept, result.metrics)

    return algorithm._replace(name=f"{algorithm.name}+top_k", init=init, local_update=local_update)


def largest_only(tree: PyTree, share: float) -> PyTree:
    """The tree with zeros in place of all but its ceil(share * d) largest absolute values.

    Example:
      >>> largest_only({"a": jnp.float32([3, -5]), "b": jnp.float32(1)}, 0.5)["a"].tolist()
      [3.0, -5.0]
    """
    leaves, structure = jax.tree.flatten(tree)
    flat = jnp.concatenate([x.ravel() for x in leaves])
    _, at = jax.lax.top_k(jnp.abs(flat), kept_coordinates(tree, share))
    flat = jnp.zeros_like(flat).at[at].set(flat[at])
    ends = np.cumsum([x.size for x in leaves])[:-1].tolist()
    parts = jnp.split(flat, ends)
    return structure.unflatten(
        [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    )


def kept_coordinates(tree: PyTree, share: float) -> int:
    """k: ceil(share * d), at least 1.

    Example:
      >>> kept_coordinates({"w": np.zeros(30)}, 0.1)
      3
    """
    # Less a hair: 0.1 * 30 is above 3 in binary.
    return max(1, int(np.ceil(share * _size(tree) * (1 - 1e-12))))


def quantised_bytes(tree: PyTree, bits: int) -> int:
    """Bytes of one client's message under `quantised`: bits for each coordinate, and 4 a leaf.

    Example:
      >>> quantised_bytes({"w": np.zeros((10, 10))}, 4)
      54
    """
    return sum(4 + -(-int(np.size(x)) * bits // 8) for x in jax.tree.leaves(tree))


def top_k_bytes(tree: PyTree, share: float) -> int:
    """Bytes of one client's message under `top_k`: 4 for the place and 4 for the value of each.

    Example:
      >>> top_k_bytes({"w": np.zeros((10, 10))}, 0.1)
      80
    """
    return 8 * kept_coordinates(tree, share)


def pack_quantised(levels: Any, largest: float, bits: int) -> bytes:
    """One leaf as it is sent: its largest value, then levels of ``bits`` bits without gaps.

    Example:
      >>> data = pack_quantised(np.float32([1, -1, 0]), 2.0, bits=2)
      >>> len(data), unpack_quantised(data, (3,), bits=2)[0].tolist()
      (5, [1.0, -1.0, 0.0])
    """
    codes = (np.asarray(levels).ravel().astype(np.int32) + 2 ** (bits - 1) - 1).astype(np.uint32)
    each = (codes[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return struct.pack("<f", float(largest)) + np.packbits(each.astype(np.uint8)).tobytes()


def unpack_quantised(data: bytes, shape: tuple[int, ...], bits: int) -> tuple[np.ndarray, float]:
    """Levels and largest value from `pack_quantised`.

    Raises:
      DpjaxError: bytes of another length.
    """
    size = int(np.prod(shape))
    if len(data) != 4 + -(-size * bits // 8):
        raise DpjaxError(f"{len(data)} bytes are not {size} levels of {bits} bits")
    each = np.unpackbits(np.frombuffer(data, np.uint8, offset=4), count=size * bits)
    codes = each.reshape(size, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    levels = (codes - (2 ** (bits - 1) - 1)).astype(np.float32).reshape(shape)
    return levels, struct.unpack_from("<f", data)[0]


def _size(tree: PyTree) -> int:
    return sum(int(np.size(x)) for x in jax.tree.leaves(tree))


def _floats(algorithm: Algorithm, update: PyTree) -> PyTree:
    if any(x.dtype == jnp.uint32 for x in jax.tree.leaves(update)):
        raise DpjaxError(f"{algorithm.name} sends integers already; compress before encoding")
    return jax.tree.map(lambda x: x.astype(jnp.float32), update)


def _refuse_private(algorithm: Algorithm, wrapper: str) -> None:
    if algorithm.normalize_by is not None:
        raise DpjaxError(
            f"{algorithm.name} bounds sensitivity or is summed already, and {wrapper} could raise "
            "a norm; compress first, then make it private or give it an aggregator"
        )
