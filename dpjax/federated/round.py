"""One round: clients shared out over devices, run in chunks, summed as they go."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm
from dpjax.federated.clients import Cohort
from dpjax.federated.shard import ShardResult, is_modular, run_shard
from dpjax.types import PyTree, RandomKey, require_key

Engine = Literal["shard_map", "pmap", "jit"]
AXIS = "clients"


class FederatedState(NamedTuple):
    """Everything that the next round needs."""

    server: Any  # the algorithm's; has ``params``
    clients: PyTree  # leaves [K, ...]: what each client keeps; () if nothing
    round: Int[Array, ""]  # int32, rounds so far

    @property
    def params(self) -> PyTree:
        """The shared parameters."""
        return self.server.params


class RoundInfo(NamedTuple):
    """What a round saw. Fields named ``sensitive_`` come from clients' data, without noise."""

    round: Int[Array, ""]  # int32, after it
    sensitive_num_clients: Int[Array, ""]  # int32, that took part; under sampling it is private
    sensitive_num_rejected: Int[Array, ""]  # int32, of these, whose update was not finite: left out
    sensitive_metrics: dict[str, Float[Array, ""]]  # means over examples; "examples" their number
    sensitive_update_norm: Float[Array, ""]  # float32, of the mean update


def init_federated(algorithm: Algorithm, params: PyTree, num_clients: int) -> FederatedState:
    """State before the first round.

    Args:
      algorithm: e.g. `fed_avg`.
      params: any pytree of float arrays.
      num_clients: K, all there are; each gets the algorithm's fresh client state.

    Example:
      >>> import optax
      >>> from dpjax.federated import scaffold
      >>> algorithm = scaffold(lambda w, e: w * e, 0.1, num_clients=4)
      >>> init_federated(algorithm, jnp.zeros(3), 4).clients.shape
      (4, 3)
    """
    if num_clients < 1:
        raise DpjaxError(f"num_clients is {num_clients}; it must be at least 1")
    server, client = algorithm.init(params)
    clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), client)
    return FederatedState(server, clients, jnp.zeros((), jnp.int32))


def client_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """A mesh with one axis of devices, over which clients are shared out.

    Example:
      >>> dict(client_mesh(1).shape)
      {'clients': 1}
    """
    devices = jax.devices()
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise DpjaxError(f"num_devices is {num_devices}; there are {len(devices)}")
    return jax.sharding.Mesh(np.array(devices[:num_devices]), (AXIS,))


def run_round(
    algorithm: Algorithm,
    state: FederatedState,
    cohort: Cohort,
    key: RandomKey,
    *,
    mesh: jax.sharding.Mesh | None = None,
    engine: Engine = "shard_map",
    clients_per_step: int = 1,
) -> tuple[FederatedState, RoundInfo]:
    """Every client of the cohort trains; the server takes the weighted mean of their updates.

    Memory is ``clients_per_step`` updates and one sum on each device, whatever the cohort. One
    compilation serves all cohorts of the same rounded shape.

    Args:
      algorithm: three pure functions.
      state: from `init_federated` or the round before.
      cohort: from `Clients.cohort`, with as many shards as the mesh has devices.
      key: JAX random key of the whole run; rounds and clients take their own parts of it.
      mesh: devices; default `client_mesh` with as many as the cohort has shards. "jit" needs none.
      engine: "shard_map"; "pmap", the same on the older interface; "jit", all shards one after
        another on one device, to compare with.
      clients_per_step: clients that a device trains side by side; 1 is fastest on CPUs.

    Returns:
      The next state, and what was seen. A cohort without any weight changes no parameter. An
      update that is not finite is left out, and its client keeps its state.

    Raises:
      DpjaxError: shards and devices that do not agree, or an unknown engine.

    Example:
      >>> import optax
      >>> from dpjax.federated import Clients, fed_avg
      >>> people = Clients({"x": np.float32([1, 3])}, (np.array([0]), np.array([1])), ("a", "b"))
      >>> algorithm = fed_avg(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5))
      >>> state = init_federated(algorithm, jnp.zeros(()), len(people))
      >>> cohort = people.cohort([0, 1], jax.random.key(0), batch_size=1)
      >>> state, info = run_round(algorithm, state, cohort, jax.random.key(1))
      >>> float(state.params), int(info.sensitive_num_clients)
      (2.0, 2)
    """
    key = require_key(key)
    shards, slots = cohort.client.shape
    if not clients_per_step >= 1:
        raise DpjaxError(f"clients_per_step is {clients_per_step}; it must be at least 1")
    if algorithm.combine is not None and algorithm.normalize_by is not None:
        raise DpjaxError(
            f"{algorithm.name} has both combine and normalize_by; privacy needs the plain sum, "
            "whose sensitivity is known: leave combine out, or the privacy"
        )
    # More side by side than there are places would train padding.
    at_once = min(clients_per_step, slots)
    if engine == "jit":
        return _compiled(algorithm, "jit", None, at_once)(state, cohort, key)
    if engine not in ("shard_map", "pmap"):
        raise DpjaxError(f"engine is {engine!r}; use 'shard_map', 'pmap' or 'jit'")
    if mesh is None:
        if shards > len(jax.devices()):
            raise DpjaxError(
                f"the cohort has {shards} shards and there are {len(jax.devices())} devices; make "
                "it with num_shards as many, or use engine='jit'"
            )
        mesh = client_mesh(shards)
    if AXIS not in mesh.shape or mesh.shape[AXIS] != shards:
        raise DpjaxError(
            f"the cohort has {shards} shards and the mesh {dict(mesh.shape)}; it must have as many "
            f"devices along an axis named {AXIS!r}"
        )
    return _compiled(algorithm, engine, mesh, at_once)(state, cohort, key)


@functools.lru_cache(maxsize=64)
def _compiled(algorithm: Algorithm, engine: Engine, mesh: Any, at_once: int) -> Any:
    run = functools.partial(_round, algorithm, engine, mesh, at_once)
    return run if engine == "pmap" else jax.jit(run)


def _round(
    algorithm: Algorithm,
    engine: Engine,
    mesh: Any,
    at_once: int,
    state: FederatedState,
    cohort: Cohort,
    key: RandomKey,
) -> tuple[FederatedState, RoundInfo]:
    if engine == "pmap":
        return _pmap_round(algorithm, mesh, at_once, state, cohort, key)
    mine = _client_states(state, cohort)
    key = jax.random.fold_in(key, state.round)
    if engine == "jit":
        found = _one_after_another(algorithm, at_once, state.server, mine, cohort, key)
    else:
        spec = jax.sharding.PartitionSpec
        along, everywhere = spec(AXIS), spec()

        def on_device(server, mine, cohort, key):
            result = run_shard(algorithm, at_once, server, *_take((mine, cohort), 0), key)
            totals = jax.lax.psum(result.totals, AXIS)
            return ShardResult(totals, *jax.tree.map(lambda x: x[None], result[1:]))

        found = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(everywhere, along, along, everywhere),
            out_specs=ShardResult(everywhere, along, along, along),
            check_vma=False,
        )(state.server, mine, cohort, key)
    return _finish(algorithm, state, cohort, found)


def _one_after_another(algorithm, at_once, server, mine, cohort, key) -> ShardResult:
    """All shards on one device."""

    def shard(carry, number):
        result = run_shard(algorithm, at_once, server, *_take((mine, cohort), number), key)
        return jax.tree.map(jnp.add, carry, result.totals), result[1:]

    first = run_shard(algorithm, at_once, server, *_take((mine, cohort), 0), key)
    if cohort.client.shape[0] == 1:
        return ShardResult(first.totals, *jax.tree.map(lambda x: x[None], first[1:]))
    shapes = jax.eval_shape(lambda: first.totals)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    totals, rest = jax.lax.scan(shard, zeros, jnp.arange(cohort.client.shape[0]))
    return ShardResult(totals, *rest)


def _pmap_round(algorithm, mesh, at_once, state, cohort, key):
    prepare, run, finish = _pmapped(algorithm, mesh, at_once)
    mine, key = prepare(state, cohort, key)
    found = run(state.server, mine, cohort, key)
    return finish(state, cohort, found._replace(totals=_take(found.totals, 0)))


@functools.lru_cache(maxsize=64)
def _pmapped(algorithm: Algorithm, mesh: Any, at_once: int) -> Any:
    def prepare(state, cohort, key):
        return _client_states(state, cohort), jax.random.fold_in(key, state.round)

    def on_device(server, mine, cohort, key):
        result = run_shard(algorithm, at_once, server, mine, cohort, key)
        return result._replace(totals=jax.lax.psum(result.totals, AXIS))

    run = jax.pmap(
        on_device,
        axis_name=AXIS,
        in_axes=(None, 0, 0, None),
        devices=list(mesh.devices.ravel()),
    )
    return jax.jit(prepare), run, jax.jit(functools.partial(_finish, algorithm))


def _client_states(state: FederatedState, cohort: Cohort) -> PyTree:
    """What the cohort's clients kept, [S, C, ...]; padding reads some row, and is never written."""
    return jax.tree.map(lambda x: jnp.take(x, cohort.client, axis=0, mode="clip"), state.clients)


def _take(tree: PyTree, shard: Any) -> PyTree:
    return jax.tree.map(lambda x: x[shard], tree)


def _finish(
    algorithm: Algorithm, state: FederatedState, cohort: Cohort, found: ShardResult
) -> tuple[FederatedState, RoundInfo]:
    totals = found.totals
    weight = totals.weight
    if algorithm.combine is not None:
        shards, slots = cohort.client.shape
        updates, weights = jax.tree.map(
            lambda x: x.reshape(shards * slots, *x.shape[2:]), (found.updates, found.weights)
        )
        mean = algorithm.combine(updates, weights)
    else:
        if algorithm.normalize_by is None:
            scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        else:
            scale = jnp.float32(1.0 / algorithm.normalize_by)
        mean = jax.tree.map(lambda x: x if is_modular(x) else x * scale, totals.update)
    taken = totals.num_clients - totals.num_rejected
    server = algorithm.server_update(state.server, Aggregate(mean, weight, taken))
    if algorithm.normalize_by is None:
        # Nobody came: a server optimizer with momentum would move all the same.
        server = jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), server, state.server
        )
    clients = jax.tree.map(
        lambda all_, new: all_.at[cohort.client].set(new, mode="drop"),
        state.clients,
        found.clients,
    )
    seen = totals.metrics.get("examples", jnp.ones((), jnp.float32))
    metrics = {
        name: total if name == "examples" else total / jnp.maximum(seen, 1.0)
        for name, total in totals.metrics.items()
    }
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(mean) if not is_modular(x)]
    norm = jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros((), jnp.float32)))
    number = state.round + 1
    info = RoundInfo(number, totals.num_clients, totals.num_rejected, metrics, norm)
    return FederatedState(server, clients, number), info
