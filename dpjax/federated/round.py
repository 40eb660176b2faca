"""One round: clients shared out over devices, run in chunks, summed as they go."""

import functools
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm
from dpjax.federated.clients import Cohort
from dpjax.federated.devices import (
    AXIS,
    client_mesh,
    cohort_on_devices,
    server_shardings,
    state_on_devices,
)
from dpjax.federated.shard import ShardResult, is_modular, run_shard
from dpjax.types import PyTree, RandomKey, require_key

Engine = Literal["shard_map", "pmap", "jit"]


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


def run_round(
    algorithm: Algorithm,
    state: FederatedState,
    cohort: Cohort,
    key: RandomKey,
    *,
    mesh: jax.sharding.Mesh | None = None,
    engine: Engine = "shard_map",
    clients_per_step: int | Literal["auto"] = "auto",
) -> tuple[FederatedState, RoundInfo]:
    """Every client of the cohort trains; the server takes the weighted mean of their updates.

    Memory is ``clients_per_step`` updates and one sum on each device, whatever the cohort. One
    compilation serves all cohorts of one shape, of which a population has at most four.

    In a job of several processes (`jax.distributed`) every process calls this with its own clients'
    cohort, made with the ``shape`` that all agreed on, and with the same state and key.

    Args:
      algorithm: three pure functions.
      state: from `init_federated` or the round before. Parameters that are sharded along other
        axes of the mesh stay so.
      cohort: from `Clients.cohort`, with as many shards as the mesh has places for clients (in this
        process).
      key: JAX random key of the whole run; rounds and clients take their own parts of it.
      mesh: devices; default `client_mesh` with as many as the cohort has shards. "jit" needs none.
      engine: "shard_map"; "pmap", the same on the older interface; "jit", all shards one after
        another on one device, to compare with.
      clients_per_step: clients that a device trains side by side. "auto" is 1 on CPUs and 16
        elsewhere: fixed for a platform, since other numbers round sums otherwise; see
        `tune_clients_per_step`.

    Returns:
      The next state, and what was seen. A cohort without any weight changes no parameter. An
      update that is not finite is left out, and its client keeps its state.

    Raises:
      DpjaxError: shards and devices that do not agree, or an unknown engine.

    Example:
      >>> import optax, numpy as np
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
    if engine not in ("shard_map", "pmap", "jit"):
        raise DpjaxError(f"engine is {engine!r}; use 'shard_map', 'pmap' or 'jit'")
    if algorithm.combine is not None and algorithm.normalize_by is not None:
        raise DpjaxError(
            f"{algorithm.name} has both combine and normalize_by; privacy needs the plain sum, "
            "whose sensitivity is known: leave combine out, or the privacy"
        )
    slots = cohort.client.shape[1]
    if engine == "jit":
        at_once = _at_once(clients_per_step, slots, jax.default_backend())
        return _compiled(algorithm, "jit", None, at_once, None)(state, cohort, key)
    if mesh is None:
        mesh = client_mesh(cohort.client.shape[0] * jax.process_count())
    mesh, cohort = cohort_on_devices(cohort, mesh)
    if engine == "pmap" and (jax.process_count() > 1 or mesh.devices.size != mesh.shape[AXIS]):
        raise DpjaxError("engine='pmap' has one process and one axis; use 'shard_map'")
    at_once = _at_once(clients_per_step, slots, mesh.devices.flat[0].platform)
    shardings = server_shardings(state.server, mesh)
    # Where everything lies is settled here: compiled code is of no use for another placement.
    state, key = state_on_devices(state, key, mesh, shardings)
    return _compiled(algorithm, engine, mesh, at_once, shardings)(state, cohort, key)


def tune_clients_per_step(
    algorithm: Algorithm,
    state: FederatedState,
    cohort: Cohort,
    key: RandomKey,
    *,
    mesh: jax.sharding.Mesh | None = None,
    candidates: Sequence[int] = (1, 4, 16, 64),
    repeats: int = 3,
) -> int:
    """The fastest ``clients_per_step`` for cohorts of this shape: each is compiled and timed.

    Call it once before training and keep the number with the run: another one rounds sums
    otherwise, so that a resumed run would not be the same to the bit.

    Example:
      >>> import optax, numpy as np
      >>> from dpjax.federated import Clients, fed_avg
      >>> people = Clients({"x": np.float32([1, 3])}, (np.array([0]), np.array([1])), ("a", "b"))
      >>> algorithm = fed_avg(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5))
      >>> state = init_federated(algorithm, jnp.zeros(()), len(people))
      >>> cohort = people.cohort([0, 1], jax.random.key(0), batch_size=1)
      >>> key = jax.random.key(1)
      >>> tune_clients_per_step(algorithm, state, cohort, key, candidates=(1, 2, 4)) in (1, 2)
      True
    """
    slots = cohort.client.shape[1]
    times = {}
    for number in dict.fromkeys(min(n, slots) for n in candidates):
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(
                run_round(algorithm, state, cohort, key, mesh=mesh, clients_per_step=number)
            )
            taken.append(time.perf_counter() - start)
        times[number] = min(taken[1:])  # the first one compiles
    return min(times, key=times.__getitem__)


def _at_once(clients_per_step: int | Literal["auto"], slots: int, platform: str) -> int:
    """More side by side than there are places would train padding."""
    if clients_per_step == "auto":
        clients_per_step = 1 if platform == "cpu" else 16
    if not clients_per_step >= 1:
        raise DpjaxError(f"clients_per_step is {clients_per_step}; it must be at least 1")
    return min(clients_per_step, slots)


@functools.lru_cache(maxsize=64)
def _compiled(algorithm: Algorithm, engine: Engine, mesh: Any, at_once: int, shardings: Any) -> Any:
    if engine == "jit":

        def in_turn(state, cohort, key):
            mine, key = _prepare(state, cohort, key)
            found = _one_after_another(algorithm, at_once, state.server, mine, cohort, key)
            return _finish(algorithm, state, cohort, found)

        return jax.jit(in_turn)

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def settled(state, info):
        leaves, structure = jax.tree.flatten(state.server)
        server = jax.tree.unflatten(
            structure, map(jax.lax.with_sharding_constraint, leaves, shardings)
        )
        rest = jax.lax.with_sharding_constraint((state.clients, state.round, info), everywhere)
        return FederatedState(server, *rest[:2]), rest[2]

    def finish(state, cohort, found):
        return settled(*_finish(algorithm, state, cohort, found))

    if engine == "pmap":

        def part(server, mine, cohort, key):
            result = run_shard(algorithm, at_once, server, mine, cohort, key)
            return result._replace(totals=jax.lax.psum(result.totals, AXIS))

        devices = list(mesh.devices.ravel())
        run = jax.pmap(part, axis_name=AXIS, in_axes=(None, 0, 0, None), devices=devices)
        prepare, finish = jax.jit(_prepare), jax.jit(finish)

        def three(state, cohort, key):
            mine, key = prepare(state, cohort, key)
            found = run(state.server, mine, cohort, key)
            return finish(state, cohort, found._replace(totals=_take(found.totals, 0)))

        return three

    def on_device(server, mine, cohort, key):
        own, part = _take((mine, cohort), 0)
        result = run_shard(algorithm, at_once, server, own, part, key)
        rest = jax.tree.map(lambda x: x[None], result._replace(totals=()))
        return rest._replace(totals=jax.lax.psum(result.totals, AXIS))

    spec = jax.sharding.PartitionSpec
    # Other axes of the mesh are left to the compiler, which follows where parameters lie.
    spread = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(spec(), spec(AXIS), spec(AXIS), spec()),
        out_specs=ShardResult(spec(), spec(AXIS), spec(AXIS), spec(AXIS)),
        axis_names={AXIS},
        check_vma=False,
    )

    def whole(state, cohort, key):
        mine, key = _prepare(state, cohort, key)
        return finish(state, cohort, spread(state.server, mine, cohort, key))

    return jax.jit(whole)


def _prepare(state: FederatedState, cohort: Cohort, key: RandomKey) -> tuple[PyTree, RandomKey]:
    """What the cohort's clients kept, [S, C, ...], and this round's key."""
    # Padding reads some row; what it keeps is dropped.
    mine = jax.tree.map(lambda x: jnp.take(x, cohort.client, axis=0, mode="clip"), state.clients)
    return mine, jax.random.fold_in(key, state.round)


def _one_after_another(algorithm, at_once, server, mine, cohort, key) -> ShardResult:
    """All shards on one device."""

    def shard(number):
        own, part = _take((mine, cohort), number)
        return run_shard(algorithm, at_once, server, own, part, key)

    def step(total, number):
        result = shard(number)
        return jax.tree.map(jnp.add, total, result.totals), result._replace(totals=())

    if cohort.client.shape[0] == 1:
        only = shard(0)
        rest = jax.tree.map(lambda x: x[None], only._replace(totals=()))
        return rest._replace(totals=only.totals)
    shapes = jax.eval_shape(shard, 0).totals
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    totals, rest = jax.lax.scan(step, zeros, jnp.arange(cohort.client.shape[0]))
    return rest._replace(totals=totals)


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
