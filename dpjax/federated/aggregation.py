"""How updates become a sum: encode on the client, add, decode on the server.

Whoever adds sees encodings only. With `fixed_point` these are integers modulo 2^32, which secure
aggregation and encryption add without reading them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm, LocalResult
from dpjax.types import PyTree, RandomKey

_CODE_KEY = 0x61676772  # far from the small numbers with which algorithms derive their own keys


class Aggregator(NamedTuple):
    """How the updates of one round are summed.

    Attributes:
      name: for records and errors.
      encode: ``encode(tree, key) -> tree``, on the client; float32 leaves to uint32 leaves of the
        same shapes (`plain` leaves them floats).
      decode: ``decode(total, num_clients) -> tree`` of float32 leaves, on the server, of the
        encodings' sum: elementwise, modulo 2^32.
      tolerance: most that a coordinate of the decoded sum differs from the sum of values within
        the range, besides the rounding of the sum itself to float32.
      clip_value: values outside [-clip_value, clip_value] are encoded as its nearer end.
      max_clients: for more, the sum could wrap, and decodes to NaN. None is any number.
      never_grows: encoding moves no value away from zero, so an L2 norm bound still holds.
    """

    name: str
    encode: Callable[[PyTree, RandomKey], PyTree]
    decode: Callable[[PyTree, Int[Array, ""]], PyTree]
    tolerance: float = 0.0
    clip_value: float = math.inf
    max_clients: int | None = None
    never_grows: bool = True


class _Weighted(NamedTuple):
    """What a client sends: its update times its share of the largest weight, and its weight."""

    update: PyTree
    weight: Array


def plain() -> Aggregator:
    """Floats, summed as they are.

    Example:
      >>> plain().encode({"w": jnp.ones(2)}, jax.random.key(0))
      {'w': Array([1., 1.], dtype=float32)}
    """
    return Aggregator("plain", lambda tree, key: tree, lambda total, num_clients: total)


def fixed_point(
    clip_value: float,
    *,
    max_clients: int,
    bits: int = 32,
    rounding: Literal["nearest", "stochastic", "toward_zero"] = "nearest",
) -> Aggregator:
    """Integers modulo 2^bits: x becomes round(x * scale), where scale is a power of two.

    The scale is the largest for which the sum of ``max_clients`` values cannot wrap. Values that
    are multiples of 1/scale are summed exactly, in any order.

    Args:
      clip_value: the range, [-clip_value, clip_value], of each coordinate of what is encoded.
      max_clients: most clients in one sum.
      bits: k, 2 to 32; fewer cost precision, and as many bits of each coordinate must be sent.
      rounding: "nearest", ties to even: tolerance max_clients * 0.5 / scale. "stochastic": up or
        down at random, so that the expected value is x: max_clients / scale. "toward_zero": never
        grows a value, as a bound on sensitivity needs: max_clients / scale.

    Values that are not finite have no code: `with_aggregator` leaves their client out.

    Raises:
      DpjaxError: a range that does not fit the bits.

    Example:
      >>> code = fixed_point(1.0, max_clients=3, bits=16)
      >>> sent = [code.encode(jnp.float32(x), jax.random.key(0)) for x in (0.5, -0.25, 7.0)]
      >>> [int(x) for x in sent]
      [4096, 63488, 8192]
      >>> float(code.decode(sum(sent), jnp.int32(3))), code.tolerance
      (1.25, 0.00018310546875)
    """
    if not 2 <= bits <= 32 or max_clients < 1:
        raise DpjaxError(
            f"bits is {bits} and max_clients {max_clients}; use 2 to 32 bits and at least 1 client"
        )
    if not 2.0**-60 <= clip_value <= 2.0**60:
        raise DpjaxError(f"clip_value is {clip_value}; it must be positive and finite")
    if rounding not in ("nearest", "stochastic", "toward_zero"):
        raise DpjaxError(f"rounding is {rounding!r}; use 'nearest', 'stochastic' or 'toward_zero'")
    levels = (2 ** (bits - 1) - 1) // max_clients
    if levels < 1:
        raise DpjaxError(
            f"the sum of {max_clients} clients wraps in {bits} bits; use more bits or fewer clients"
        )
    limit = np.float32(clip_value)
    if float(limit) > clip_value:  # rounded up, the range would be wider than what was checked
        limit = np.nextafter(limit, np.float32(0))
    scale = _power_of_two_below(levels / float(limit))
    mask = jnp.uint32(2**bits - 1)
    half = jnp.uint32(2 ** (bits - 1))

    def encode_leaf(x, key):
        # A product with a power of two is exact: rounding happens once, below.
        scaled = jnp.clip(x.astype(jnp.float32), -limit, limit) * jnp.float32(scale)
        if rounding == "nearest":
            whole = jnp.round(scaled)
        elif rounding == "toward_zero":
            whole = jnp.trunc(scaled)
        else:
            whole = jnp.floor(scaled)
            draw = jax.random.uniform(key, x.shape, jnp.float32)
            whole += (draw < scaled - whole).astype(jnp.float32)
        return jax.lax.bitcast_convert_type(whole.astype(jnp.int32), jnp.uint32) & mask

    def decode_leaf(total, too_many):
        # Sign extension from ``bits`` to 32: the subtraction wraps as two's complement does.
        signed = jax.lax.bitcast_convert_type(((total & mask) ^ half) - half, jnp.int32)
        return jnp.where(too_many, jnp.nan, signed.astype(jnp.float32) * jnp.float32(1.0 / scale))

    def encode(tree, key):
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(key, max(1, len(leaves))) if rounding == "stochastic" else leaves
        return structure.unflatten([encode_leaf(x, k) for x, k in zip(leaves, keys, strict=False)])

    def decode(total, num_clients):
        too_many = num_clients > max_clients
        return jax.tree.map(lambda x: decode_leaf(x, too_many), total)

    return Aggregator(
        name=f"fixed_point{bits}",
        encode=encode,
        decode=decode,
        tolerance=max_clients * (0.5 if rounding == "nearest" else 1.0) / scale,
        clip_value=float(limit),
        max_clients=max_clients,
        never_grows=rounding == "toward_zero",
    )


def with_aggregator(
    algorithm: Algorithm, aggregator: Aggregator, *, max_weight: float | None = None
) -> Algorithm:
    """The same algorithm, whose clients send encodings and whose server decodes their sum.

    A client sends its update times its share of ``max_weight`` (rounded up to a power of two), and
    its weight as one more coordinate; the server divides one sum by the other, so that it gets the
    weighted mean within the aggregator's tolerance over the sum of shares. Integer weights are
    summed exactly.

    The aggregator's range must cover all that the algorithm sends: FedNova also its number of
    steps, adaptive clipping a coordinate of 0.5. ``sensitive_metrics["clipped"]`` is the share of
    coordinates outside it. A client whose update or weight is not finite, or whose weight is
    negative, is rejected before encoding, and counted.

    Args:
      algorithm: any without ``combine``; `private` goes inside, so that the server adds noise to
        what it decoded.
      aggregator: e.g. `fixed_point`.
      max_weight: public bound; larger weights count as this. Not needed for `plain`, nor where
        ``algorithm.normalize_by`` is set: then weights are at most 1.

    Guarantee: with ``normalize_by`` the encoded update has at most the L2 norm of the algorithm's
      (rounding toward zero is required), so a client's sensitivity is not raised.

    Raises:
      DpjaxError: parts that do not fit together.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> inner = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1))
      >>> with_aggregator(inner, fixed_point(1.0, max_clients=8), max_weight=100).name
      'fed_avg+fixed_point32'
    """
    normalize_by = algorithm.normalize_by
    is_public = normalize_by is not None
    if algorithm.combine is not None:
        raise DpjaxError(
            f"{algorithm.name} combines single updates, which an aggregator hides; use one of both"
        )
    if is_public and not aggregator.never_grows:
        raise DpjaxError(
            f"{aggregator.name} rounds values up and {algorithm.name} bounds sensitivity; use "
            "fixed_point(..., rounding='toward_zero')"
        )
    bound = 1.0 if max_weight is None and is_public else max_weight
    if bound is None and aggregator.max_clients is not None:
        raise DpjaxError(
            f"max_weight is missing; give the largest weight of a client of {algorithm.name}, e.g. "
            "its most examples, or 1 with uniform_weights=True"
        )
    if bound is not None and not 0 < bound <= (1.0 if is_public else 2.0**30):
        most = "1: more would raise sensitivity" if is_public else "2^30"
        raise DpjaxError(f"max_weight is {bound}; it must be above 0 and at most {most}")
    unit, weight_scale = 1.0, None
    if bound is not None:
        # A power of two divides exactly, so whole updates with whole weights stay exact.
        unit = 2.0 ** math.ceil(math.log2(bound))
        if aggregator.max_clients is not None:
            weight_scale = _power_of_two_below((2**31 - 1) / (aggregator.max_clients * unit))

    def local_update(server, client, data, key):
        result = algorithm.local_update(server, client, data, key)
        if any(x.dtype == jnp.uint32 for x in jax.tree.leaves(result.update)):
            raise DpjaxError(f"{algorithm.name} sends integers already; it needs no aggregator")
        update = jax.tree.map(lambda x: x.astype(jnp.float32), result.update)
        weight = result.weight.astype(jnp.float32)
        finite = jnp.isfinite(weight) & (weight >= 0)
        for leaf in jax.tree.leaves(update):
            finite &= jnp.all(jnp.isfinite(leaf))
        if bound is not None:
            weight = jnp.minimum(weight, jnp.float32(bound))
        # An integer hides that a value was not finite: zeros here, and no weight below.
        weight = jnp.where(finite, weight, 0.0)
        shared = jax.tree.map(lambda x: jnp.where(finite, x, 0.0) * (weight / unit), update)
        code = _Weighted(
            aggregator.encode(shared, jax.random.fold_in(key, _CODE_KEY)),
            _encode_weight(weight, weight_scale),
        )
        metrics = dict(result.metrics)
        metrics["clipped"] = _share_outside(shared, aggregator.clip_value) * metrics.get(
            "examples", jnp.ones((), jnp.float32)
        )
        # One each: the round sums, and the weights are in the sum.
        counts = jnp.where(finite, 1.0, jnp.nan).astype(jnp.float32)
        return LocalResult(code, counts, result.client, metrics)

    def server_update(server, aggregate):
        total = aggregator.decode(aggregate.update.update, aggregate.num_clients)
        weight = _decode_weight(aggregate.update.weight, weight_scale)
        if normalize_by is not None:
            scale = jnp.float32(unit / normalize_by)
        else:
            scale = jnp.where(weight > 0, unit / jnp.where(weight > 0, weight, 1.0), 0.0)
        update = jax.tree.map(lambda x: x * scale, total)
        moved = algorithm.server_update(server, Aggregate(update, weight, aggregate.num_clients))
        if is_public:
            return moved
        return jax.tree.map(lambda new, old: jnp.where(weight > 0, new, old), moved, server)

    return Algorithm(
        f"{algorithm.name}+{aggregator.name}",
        algorithm.init,
        local_update,
        server_update,
        normalize_by=1.0,
    )


def _encode_weight(weight: Float[Array, ""], scale: float | None) -> Array:
    return weight if scale is None else jnp.round(weight * jnp.float32(scale)).astype(jnp.uint32)


def _decode_weight(total: UInt32[Array, ""] | Float[Array, ""], scale: float | None) -> Array:
    return total if scale is None else total.astype(jnp.float32) * jnp.float32(1.0 / scale)


def _share_outside(tree: PyTree, limit: float) -> Float[Array, ""]:
    leaves: list[Any] = jax.tree.leaves(tree)
    outside = sum(jnp.sum(jnp.abs(x) > limit, dtype=jnp.int32) for x in leaves)
    return jnp.asarray(outside, jnp.float32) / max(1, sum(x.size for x in leaves))


def _power_of_two_below(value: float) -> float:
    """Largest power of two that is at most ``value``, above 0."""
    return 2.0 ** (math.frexp(value)[1] - 1)
