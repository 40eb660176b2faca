"""Distributed privacy: integer noise from every client under secure aggregation."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int, Int32

from dpjax import discrete_accounting
from dpjax.clipping.rules import clip_rule
from dpjax.discrete_noise import Noise, centred, exact_discrete_gaussian, noise_table
from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm, LocalResult
from dpjax.federated.private import clip_update
from dpjax.types import PyTree, RandomKey, require_key

_ROUNDING_STREAM, _NOISE_STREAM = 2**31 - 4, 2**31 - 5
_ORDERS = np.array([*range(2, 129), 192, 256, 512, 1024], np.float64)
_LARGEST_NORM = 2.0**18  # on the grid: float32 then places a norm well within the rounding's slack
_TRIES = 64


@dataclasses.dataclass(frozen=True)
class DistributedPrivacy:
    """Public settings of rounds in which clients add integer noise to what only their sum shows.

    Attributes:
      l2_clip_norm: of all that one client sends.
      noise_multiplier: stddev of all clients' noise together / sensitivity, when all are there.
      num_clients: of one round: each adds ``1 / num_clients`` of the noise's variance.
      dimension: numbers in one update.
      min_survivors: the protocol releases no sum of fewer. Accounting takes their noise only.
      scale: grid points per unit; a finer grid loses less and needs more bits.
      bits: the sum is taken modulo 2^bits, at most 32.
      noise: "skellam" or "discrete_gaussian".
      beta: in [0, 1): a rounding whose norm is beyond the bound is drawn again, at most this often;
        0 bounds every rounding, at the price of a larger sensitivity.
      rotate: spreads an update evenly over its coordinates before rounding, by a random Hadamard
        transform with public signs.
      overflow_probability: of any coordinate of one round to wrap, at most. It costs no privacy.

    Raises:
      DpjaxError: values out of range, or a sum that does not fit the bits.

    Guarantee:
      ``epsilon`` holds for everybody who sees the sum modulo 2^bits of at least ``min_survivors``
      honest clients, and nothing else of any client: the server need not be trusted, the secure
      aggregation protocol must be. Neighbours: a client's data against none (its update is zero,
      its noise and its presence stay): replace_special. No amplification by sampling is claimed:
      who runs the protocol knows who takes part.

    Source: Kairouz, Liu and Steinke (2021), algorithms 1 and 2; Agarwal, Kairouz and Liu (2021).

    Example:
      >>> mechanism = DistributedPrivacy(
      ...     1.0, 1.0, num_clients=100, dimension=1000, min_survivors=80, scale=2000.0, bits=20)
      >>> print(f"{mechanism.epsilon(1e-5, participations=1):.2f}")
      5.38
    """

    l2_clip_norm: float
    noise_multiplier: float
    num_clients: int
    dimension: int
    min_survivors: int
    scale: float
    bits: int = 32
    noise: Noise = "skellam"
    beta: float = math.exp(-0.5)
    rotate: bool = True
    overflow_probability: float = 1e-6

    def __post_init__(self):
        clip_rule(self.l2_clip_norm)
        for name in ("l2_clip_norm", "noise_multiplier", "scale"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise DpjaxError(f"{name} is {value}; it must be positive and finite")
        if not 1 <= self.min_survivors <= self.num_clients or self.dimension < 1:
            raise DpjaxError(
                f"min_survivors is {self.min_survivors}, num_clients {self.num_clients} and "
                f"dimension {self.dimension}; 1 <= min_survivors <= num_clients, 1 <= dimension"
            )
        if not (2 <= self.bits <= 32 and 0 <= self.beta <= 0.9):
            raise DpjaxError(
                f"bits is {self.bits} and beta {self.beta}; use 2 to 32 bits and 0 <= beta <= 0.9"
            )
        if not 0 < self.overflow_probability < 1:
            raise DpjaxError(f"overflow_probability is {self.overflow_probability}; use e.g. 1e-6")
        if self.scale * self.l2_clip_norm > _LARGEST_NORM:
            raise DpjaxError(
                f"scale * l2_clip_norm is {self.scale * self.l2_clip_norm:g}, beyond "
                f"{_LARGEST_NORM:g}: float32 rounds too much there; use a coarser grid"
            )
        _ = self._noise_table  # its variance must be in range
        _ = self.renyi_divergences  # and that of a summand proven
        needed = 1 + math.ceil(math.log2(self.largest_sum + 1))
        if needed > self.bits:
            raise DpjaxError(
                f"bits is {self.bits}, but a sum of {self.num_clients} clients needs {needed} to "
                f"wrap with probability at most {self.overflow_probability:g}; raise bits or lower "
                "scale"
            )

    @property
    def padded_dimension(self) -> int:
        """Numbers that are sent: the next power of two, which the transform needs."""
        return 1 << (self.dimension - 1).bit_length()

    @property
    def rounded_l2_norm(self) -> float:
        """Largest L2 norm, on the grid, of what a client sends before noise: the sensitivity.

        Source: Kairouz, Liu and Steinke (2021), theorem 1.
        """
        norm, size = self.scale * self.l2_clip_norm, self.padded_dimension
        always = norm + math.sqrt(size)
        if self.beta == 0:
            return always
        usually = norm**2 + size / 4
        usually += math.sqrt(2 * math.log(1 / self.beta)) * (norm + math.sqrt(size) / 2)
        return min(always, math.sqrt(usually))

    @property
    def rounded_l1_norm(self) -> float:
        """Largest L1 norm: by Cauchy-Schwarz, and since integers are at most their squares."""
        norm = self.rounded_l2_norm
        return norm * min(math.sqrt(self.padded_dimension), norm)

    @property
    def local_variance(self) -> float:
        """sigma^2 of one client's noise, on the grid."""
        return (self.noise_multiplier * self.rounded_l2_norm) ** 2 / self.num_clients

    @functools.cached_property
    def _noise_table(self):
        return noise_table(self.noise, self.local_variance)

    @property
    def stddev(self) -> float:
        """Noise of the sum of ``num_clients`` clients, per coordinate, in units of the update."""
        return math.sqrt(self.num_clients * self._noise_table.variance) / self.scale

    @property
    def largest_sum(self) -> float:
        """No coordinate of a round's sum exceeds it, but with ``overflow_probability``.

        With the transform a coordinate of the sum is subgaussian over the public signs (Hoeffding);
        the noise has Bernstein's tail; rounding moves each client's by less than 1.
        """
        tail = math.log(4 * self.padded_dimension / self.overflow_probability)
        signal = self.num_clients * self.scale * self.l2_clip_norm
        if self.rotate:
            signal *= min(1.0, math.sqrt(2 * tail / self.padded_dimension))
        variance = self.num_clients * self.local_variance
        noise = tail / 3 + math.sqrt((tail / 3) ** 2 + 2 * variance * tail)
        return signal + self.num_clients + noise

    @functools.cached_property
    def renyi_divergences(self) -> np.ndarray:
        """Bounds of one round at integer orders, with the noise of ``min_survivors`` clients."""
        one, two = self.rounded_l1_norm, self.rounded_l2_norm
        if self.noise == "skellam":
            variance = self.min_survivors * self.local_variance
            return discrete_accounting.skellam_renyi(_ORDERS, variance, one, two)
        return discrete_accounting.summed_discrete_gaussian_renyi(
            _ORDERS, self.local_variance, self.min_survivors, one, two, self.padded_dimension
        )

    def epsilon(self, delta: float, participations: int) -> float:
        """Epsilon in nats for a client that takes part in at most so many rounds."""
        if participations < 0:
            raise DpjaxError(f"participations is {participations}; it counts rounds")
        if participations == 0:
            return 0.0
        return discrete_accounting.renyi_epsilon(
            _ORDERS, participations * self.renyi_divergences, delta
        )


class DistributedServer(NamedTuple):
    """The inner algorithm's server state, and how many rounds there were."""

    inner: Any  # has ``params``
    round: Int[Array, ""]  # int32; chooses the signs

    @property
    def params(self) -> PyTree:
        """The shared parameters."""
        return self.inner.params


def distributed(
    algorithm: Algorithm,
    mechanism: DistributedPrivacy,
    public_key: RandomKey,
    *,
    update_like: PyTree | None = None,
    hardened: bool = False,
) -> Algorithm:
    """The same algorithm, where clients send noisy integers modulo 2^bits, made for secure sums.

    A client clips its update, rotates it, rounds it at random to the grid and adds its share of the
    noise. Its update is one uint32 vector, which `run_round` sums modulo 2^32; the server takes the
    sum modulo 2^bits, undoes grid and rotation, and gives the mean to the inner ``server_update``.

    Args:
      algorithm: e.g. `fed_avg`; its weights are replaced by 1.
      mechanism: public settings.
      public_key: JAX random key of the rotation's signs; no secret, but chosen before the data.
      update_like: pytree shaped like the algorithm's update; default: like the parameters.
      hardened: draws the noise exactly, from the operating system's entropy, on the client's host
        (discrete Gaussian only). Otherwise it comes from the key of the round: for simulations.

    Raises:
      DpjaxError: an update of another dimension, or an algorithm that normalises by itself.

    Guarantee:
      One client's integers before noise have L2 norm at most ``mechanism.rounded_l2_norm``, checked
      on the integers themselves; ``mechanism.epsilon`` follows. An update that is not finite is
      sent as noise around zero. Metrics are not sent. A round of fewer than ``min_survivors``
      clients, or more than ``num_clients``, leaves the inner server state as it was. Simulated
      noise is within ``2^-75`` total variation of the right one per coordinate.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> mechanism = DistributedPrivacy(1.0, 1.0, 10, dimension=4, min_survivors=8, scale=100.0)
      >>> inner = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.5))
      >>> distributed(inner, mechanism, jax.random.key(0)).name
      'distributed fed_avg'
    """
    public_key = require_key(public_key)
    if algorithm.normalize_by is not None or algorithm.combine is not None:
        raise DpjaxError(
            f"{algorithm.name} has its own normalize_by or combine; distribute the plain algorithm"
        )
    if hardened and mechanism.noise != "discrete_gaussian":
        raise DpjaxError(
            f"hardened is True with {mechanism.noise} noise; only noise='discrete_gaussian' has an "
            "exact sampler"
        )

    def signs(server):
        key = jax.random.fold_in(public_key, server.round)
        return jax.random.rademacher(key, (mechanism.padded_dimension,), jnp.float32)

    def init(params):
        server, client = algorithm.init(params)
        return DistributedServer(server, jnp.zeros((), jnp.int32)), client

    def local_update(server, client, data, key):
        result = algorithm.local_update(server.inner, client, data, key)
        vector = _flat(result.update, mechanism)
        whole = on_grid(vector, mechanism, signs(server), jax.random.fold_in(key, _ROUNDING_STREAM))
        noise_key = jax.random.fold_in(key, _NOISE_STREAM)
        shape = (mechanism.padded_dimension,)
        if hardened:
            # The key only tells clients apart: without it, those side by side would share a draw.
            noise = io_callback(
                lambda _: exact_discrete_gaussian(mechanism.local_variance, *shape).astype(
                    np.int32
                ),
                jax.ShapeDtypeStruct(shape, jnp.int32),
                jax.random.key_data(noise_key),
            )
        else:
            noise = mechanism._noise_table.sample(noise_key, shape)
        sent = jax.lax.bitcast_convert_type(whole + noise, jnp.uint32)
        sent &= jnp.uint32(2**mechanism.bits - 1)
        return LocalResult(sent, jnp.ones((), jnp.float32), result.client, {})

    def server_update(server, aggregate):
        whole = centred(aggregate.update, mechanism.bits).astype(jnp.float32) / mechanism.scale
        if mechanism.rotate:
            whole = hadamard(whole) * signs(server)
        count = jnp.maximum(aggregate.num_clients, 1).astype(jnp.float32)
        like = server.params if update_like is None else update_like
        mean = _unflat(whole / count, like)
        # Rejecting by rounds would leave weight and number apart; every client here weighs 1.
        public = Aggregate(mean, count, aggregate.num_clients)
        enough = aggregate.num_clients >= mechanism.min_survivors
        enough &= aggregate.num_clients <= mechanism.num_clients  # beyond, the sum may wrap
        moved = jax.tree.map(
            lambda new, old: jnp.where(enough, new, old),
            algorithm.server_update(server.inner, public),
            server.inner,
        )
        return DistributedServer(moved, server.round + 1)

    return Algorithm(f"distributed {algorithm.name}", init, local_update, server_update)


def on_grid(
    vector: Float[Array, " padded"],
    mechanism: DistributedPrivacy,
    signs: Float[Array, " padded"],
    key: RandomKey,
) -> Int32[Array, " padded"]:
    """Clips, rotates, scales and rounds one update, without noise.

    Guarantee:
      The integers' L2 norm is at most ``mechanism.rounded_l2_norm``, whatever the update.
    """
    clipped, _ = clip_update(vector, clip_rule(mechanism.l2_clip_norm))
    clipped = jnp.where(jnp.isfinite(clipped), clipped, 0.0)
    if mechanism.rotate:
        clipped = hadamard(clipped * signs)
    scaled = clipped * mechanism.scale
    below = jnp.floor(scaled)
    # The squares are summed pairwise: the margin covers that many roundings of float32.
    margin = (mechanism.padded_dimension.bit_length() + 4) * 2.0**-23
    limit = mechanism.rounded_l2_norm**2 * (1 - margin)

    def rounded(number):
        draw = jax.random.uniform(jax.random.fold_in(key, number), vector.shape, jnp.float32)
        return below + (draw < scaled - below).astype(jnp.float32)

    def try_again(carry):
        number, whole = carry
        return (_square_norm(whole) > limit) & (number < _TRIES)

    first = jnp.zeros((), jnp.int32), rounded(jnp.zeros((), jnp.int32))
    _, whole = jax.lax.while_loop(try_again, lambda c: (c[0] + 1, rounded(c[0] + 1)), first)
    # Never seen: towards zero no norm grows, and zeros are always within the bound.
    for safe in (jnp.trunc(scaled), jnp.zeros_like(scaled)):
        whole = jnp.where(_square_norm(whole) <= limit, whole, safe)
    return whole.astype(jnp.int32)


def hadamard(vector: Float[Array, " size"]) -> Float[Array, " size"]:
    """Walsh-Hadamard transform, orthonormal and its own inverse; the size is a power of two.

    Example:
      >>> hadamard(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    size = vector.shape[0]
    for bit in range(size.bit_length() - 1):
        pairs = vector.reshape(-1, 2, 1 << bit)
        vector = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(size)
    return vector / math.sqrt(size)


def _square_norm(vector: Array) -> Array:
    squares = jnp.square(vector)
    while squares.shape[0] > 1:
        half = squares.shape[0] // 2
        squares = squares[:half] + squares[half:]
    return squares[0]


def _flat(update: PyTree, mechanism: DistributedPrivacy) -> Float[Array, " padded"]:
    leaves = jax.tree.leaves(update)
    if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise DpjaxError("the update has leaves that are not floats; they have no place on a grid")
    vector = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    if vector.shape[0] != mechanism.dimension:
        raise DpjaxError(
            f"dimension is {mechanism.dimension}, but an update has {vector.shape[0]} numbers; "
            f"build the mechanism with dimension={vector.shape[0]}"
        )
    return jnp.pad(vector, (0, mechanism.padded_dimension - mechanism.dimension))


def _unflat(vector: Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    sizes = [math.prod(jnp.shape(x)) for x in leaves]
    parts = jnp.split(vector[: sum(sizes)], np.cumsum(sizes)[:-1].tolist())
    return structure.unflatten(p.reshape(jnp.shape(x)) for p, x in zip(parts, leaves, strict=True))
