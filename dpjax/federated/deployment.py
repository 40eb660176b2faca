"""A federation of real machines, whatever carries their messages: the same three functions.

`local_round` is one client's part of `run_round`, `server_round` the server's. Between them travel
arrays and a few numbers. What a client is sent is what its local update reads and nothing else: an
optimizer's moments stay at home, and so do a noise key and the noise that it made.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Aggregate, Algorithm, LocalData
from dpjax.federated.clients import Clients
from dpjax.types import PyTree, RandomKey, require_key


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What server and clients agree on before the first message. Nothing in it is secret.

    Attributes:
      algorithm: the same on every machine.
      params: starting parameters. Clients use their shapes only.
      example: one example without a leading axis, or its shapes.
      num_clients: K, all there are, numbered from 0.
      batch_size, epochs, max_steps, drop_remainder: as in `Clients.cohort`.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> algorithm = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1), optax.adam(0.1))
      >>> plan = Plan(algorithm, jnp.zeros(()), np.float32(0), num_clients=2, batch_size=1)
      >>> plan.sent_names  # not the moments of Adam
      ('params',)
    """

    algorithm: Algorithm
    params: PyTree
    example: PyTree
    num_clients: int
    batch_size: int | None
    epochs: int = 1
    max_steps: int | None = None
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        if self.num_clients < 1:
            raise DpjaxError(f"num_clients is {self.num_clients}; it must be at least 1")
        if self.algorithm.combine is not None and self.algorithm.normalize_by is not None:
            raise DpjaxError(
                f"{self.algorithm.name} has both combine and normalize_by; privacy needs the plain "
                "sum: leave combine out, or the privacy"
            )

    @functools.cached_property
    def _shapes(self) -> tuple[PyTree, PyTree, PyTree, frozenset[int]]:
        """Of the server's state, a client's and its update; the server's leaves that are read."""
        server, client = jax.eval_shape(self.algorithm.init, self.params)
        leaves, structure = jax.tree.flatten(server)
        number: Any = jax.ShapeDtypeStruct((), jnp.int32)
        examples = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype),
            jax.eval_shape(lambda x: x, self.example),
        )
        batches: Any = jax.ShapeDtypeStruct((1, self.batch_size or 1), jnp.int32)
        data = LocalData(examples, batches, *[number] * 4)

        def local(leaves, client, data, key):
            return tuple(
                self.algorithm.local_update(structure.unflatten(leaves), client, data, key)
            )

        key = jax.eval_shape(jax.random.key, 0)
        traced, out = jax.make_jaxpr(local, return_shape=True)(leaves, client, data, key)
        read = {id(v) for equation in traced.jaxpr.eqns for v in equation.invars}
        read |= {id(v) for v in traced.jaxpr.outvars}
        used = frozenset(n for n in range(len(leaves)) if id(traced.jaxpr.invars[n]) in read)
        for n in used:
            if jnp.issubdtype(leaves[n].dtype, jax.dtypes.prng_key):
                raise DpjaxError(
                    f"the local update of {self.algorithm.name} reads a random key in the server's "
                    "state, which would be sent to clients; draw from the client's own key"
                )
        return server, client, out[0], used

    @property
    def client_like(self) -> PyTree:
        """Shapes of what a client keeps."""
        return self._shapes[1]

    @property
    def update_like(self) -> PyTree:
        """Shapes of what a client sends."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype if x.dtype == jnp.uint32 else jnp.float32
            ),
            self._shapes[2],
        )

    @property
    def sent_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what clients are sent, by name."""
        server, _, _, used = self._shapes
        leaves = jax.tree_util.tree_leaves_with_path(server)
        return {_name(leaves[n][0]): leaves[n][1] for n in sorted(used)}

    @property
    def sent_names(self) -> tuple[str, ...]:
        """Names of the server's arrays that clients are sent."""
        return tuple(self.sent_like)

    def fingerprint(self) -> str:
        """SHA-256 of what both sides must have in common: shapes and the local work."""
        trees = (self.sent_like, self.client_like, self.update_like)
        shapes = [
            [[_name(path), str(x.dtype), list(x.shape)] for path, x in leaves]
            for leaves in map(jax.tree_util.tree_leaves_with_path, trees)
        ]
        work = [self.batch_size, self.epochs, self.max_steps, self.drop_remainder]
        facts = [self.algorithm.name, self.num_clients, self.algorithm.normalize_by, work, shapes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class DeployedState(NamedTuple):
    """Everything that the server needs for the next round."""

    server: Any  # the algorithm's; has ``params``
    accepted: Int[Array, " clients"]  # int32, last round in which each one's update counted, or -1
    round: Int[Array, ""]  # int32, rounds so far; the number of the open one

    @property
    def params(self) -> PyTree:
        """The shared parameters."""
        return self.server.params


class Answer(NamedTuple):
    """What a client sends in a round."""

    update: PyTree  # numpy; float32, or uint32 to be summed modulo 2^32
    weight: float
    metrics: dict[str, float]  # sums over examples


def init_deployed(plan: Plan) -> DeployedState:
    """The server's state before the first round."""
    server, _ = plan.algorithm.init(plan.params)
    accepted = jnp.full((plan.num_clients,), -1, jnp.int32)
    return DeployedState(server, accepted, jnp.zeros((), jnp.int32))


def outgoing(plan: Plan, state: DeployedState) -> dict[str, np.ndarray]:
    """The arrays that clients are sent.

    Guarantee: of the server's state only what the local update reads. The state of a noise
      mechanism is not among it: the trace of ``local_update`` never touches it, and a random key
      that it does touch is refused.
    """
    leaves = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.server)}
    return {name: np.asarray(leaves[name]) for name in plan.sent_names}


def local_round(
    plan: Plan,
    arrays: Mapping[str, np.ndarray],
    client_state: PyTree,
    clients: Clients,
    client: int,
    *,
    number: int,
    round: int,
    key: RandomKey,
    cohort_key: RandomKey,
) -> tuple[Answer, PyTree]:
    """One client's part of `run_round`, with the same keys and the same batches.

    Args:
      plan: shared.
      arrays: from `outgoing`, by name.
      client_state: what it kept; `fresh_client` the first time.
      clients: the data on this machine; may hold this client only.
      client: its place in ``clients``. Its name there is the name it has in a simulation.
      number: its number in the federation, from 0.
      round: from 0.
      key: JAX random key of the whole run, as given to `run_round`. Where the client itself adds
        noise (local or distributed DP) nobody else may know it: give each client its own.
      cohort_key: as given to `Clients.cohort` in this round.

    Returns:
      What to send, and what to keep. An update that is not finite leaves the state as it was.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> algorithm = fed_avg(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5))
      >>> example = {"x": np.float32(0)}
      >>> plan = Plan(algorithm, jnp.zeros(()), example, num_clients=2, batch_size=1)
      >>> mine = Clients({"x": np.float32([3])}, ([0],), ("bob",))
      >>> keys = dict(key=jax.random.key(1), cohort_key=jax.random.key(0))
      >>> sent = outgoing(plan, init_deployed(plan))
      >>> answer, kept = local_round(plan, sent, (), mine, 0, number=1, round=0, **keys)
      >>> float(answer.update), answer.weight
      (3.0, 1.0)
    """
    cohort = clients.cohort(
        [client],
        cohort_key,
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        max_steps=plan.max_steps,
        drop_remainder=plan.drop_remainder,
    )
    if not 0 <= number < plan.num_clients:
        raise DpjaxError(
            f"client number is {number}; the federation has {plan.num_clients}, counted from 0"
        )
    data = LocalData(
        jax.tree.map(lambda x: x[0], cohort.examples),
        cohort.batches[0],
        *(
            x[0, 0]
            for x in (
                cohort.first_step,
                cohort.num_steps,
                cohort.steps_per_epoch,
                cohort.num_examples,
            )
        ),
    )
    arrays = {name: arrays[name] for name in plan.sent_names}
    places = np.array([round, number], np.int32)
    found = _compiled_local(plan)(arrays, client_state, data, require_key(key), places)
    update, weight, kept, metrics = jax.tree.map(np.asarray, found)
    return Answer(update, float(weight), {n: float(x) for n, x in metrics.items()}), kept


@functools.lru_cache(maxsize=8)
def _compiled_local(plan: Plan) -> Any:
    server, _, _, used = plan._shapes

    def local(arrays, client, data, key, places):
        # Leaves that the local update does not read exist inside this trace only.
        leaves = [
            arrays[_name(path)] if n in used else _nothing(x)
            for n, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(server))
        ]
        whole = jax.tree.unflatten(jax.tree.structure(server), leaves)
        own_key = jax.random.fold_in(jax.random.fold_in(key, places[0]), places[1])
        result = plan.algorithm.local_update(whole, client, data, own_key)
        update = jax.tree.map(_summand, result.update)
        finite = jnp.isfinite(result.weight) & (result.weight >= 0)
        for leaf in jax.tree.leaves(update):
            finite &= jnp.all(jnp.isfinite(leaf))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), result.client, client)
        metrics = {name: x.astype(jnp.float32) for name, x in result.metrics.items()}
        return update, result.weight.astype(jnp.float32), kept, metrics

    return jax.jit(local)


def _nothing(like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, like)
        return jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype))
    return jnp.zeros(like.shape, like.dtype)


def _summand(x: Array) -> Array:
    return x if x.dtype == jnp.uint32 else x.astype(jnp.float32)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def fresh_client(plan: Plan) -> PyTree:
    """The state of a client that never took part."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.params)
    # Personal parts may start from the parameters: those of the plan, if it has values.
    has_values = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(plan.params))
    return jax.tree.map(np.asarray, plan.algorithm.init(plan.params if has_values else zeros)[1])


def server_round(plan: Plan, state: DeployedState, answers: Mapping[int, Answer]) -> DeployedState:
    """The server's part of `run_round`: the sum of what came, and one server update.

    Args:
      plan: shared.
      state: before the round.
      answers: by client number, checked (`boundary.check_update`). Who did not answer is as if it
        had not been asked; a round without answers is a round under a public divisor, and moves
        nothing otherwise.

    Sums are float32 in the order of client numbers, whatever order the answers came in.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> algorithm = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.5))
      >>> plan = Plan(algorithm, jnp.zeros(()), np.float32(0), num_clients=2, batch_size=1)
      >>> answers = {1: Answer(np.float32(9), 1.0, {}), 0: Answer(np.float32(0), 2.0, {})}
      >>> state = server_round(plan, init_deployed(plan), answers)
      >>> float(state.params), int(state.round), state.accepted.tolist()
      (3.0, 1, [0, 0])
    """
    present = sorted(answers)
    if any(not 0 <= n < plan.num_clients for n in present):
        raise DpjaxError(f"answers are from {present}; there are {plan.num_clients} clients")
    add, _ = _compiled_server(plan)
    weight = np.float32(0)
    if plan.algorithm.combine is not None:
        like = plan.update_like
        rows = [answers[n].update for n in present]
        weights = np.array([answers[n].weight for n in present], np.float32)
        if not present:  # rows of weight 0 are absent
            rows = [jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)]
            weights = np.zeros(1, np.float32)
        total = jax.tree.map(lambda *x: np.stack(x), *rows)
        total = plan.algorithm.combine(total, jnp.asarray(weights))
        weight = weights.sum(dtype=np.float32)
    else:
        total = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.update_like)
        for n in present:
            own = np.float32(answers[n].weight)
            total, weight = add(total, weight, answers[n].update, own)
    return close_round(plan, state, total, float(weight), present)


def close_round(
    plan: Plan, state: DeployedState, total: PyTree, weight: float, present: Sequence[int]
) -> DeployedState:
    """The server's update from a sum that somebody else took, e.g. secure aggregation.

    Args:
      total: sum of updates, float leaves times their weights; or what ``combine`` made of them.
      weight: sum of weights.
      present: numbers of the clients that are in the sum.
    """
    _, finish = _compiled_server(plan)
    server = finish(state.server, total, np.float32(weight), np.int32(len(present)))
    accepted = state.accepted
    if len(present):
        accepted = accepted.at[np.array(present)].set(state.round)
    return DeployedState(server, accepted, state.round + 1)


@functools.lru_cache(maxsize=8)
def _compiled_server(plan: Plan) -> tuple[Any, Any]:
    algorithm = plan.algorithm

    def add(total, weights, update, weight):
        # As in run_round: the product and the sum in one place, in float32.
        def one(sum_, x):
            return sum_ + x * (jnp.ones((), x.dtype) if x.dtype == jnp.uint32 else weight)

        return jax.tree.map(one, total, update), weights + weight

    def finish(server, total, weight, num_clients):
        if algorithm.combine is not None:
            scale = jnp.ones((), jnp.float32)
        elif algorithm.normalize_by is None:
            scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        else:
            scale = jnp.float32(1.0 / algorithm.normalize_by)
        mean = jax.tree.map(lambda x: x if x.dtype == jnp.uint32 else x * scale, total)
        moved = algorithm.server_update(server, Aggregate(mean, weight, num_clients))
        if algorithm.normalize_by is not None:
            return moved
        # Nobody came: a server optimizer with momentum would move all the same.
        return jax.tree.map(lambda new, old: jnp.where(weight > 0, new, old), moved, server)

    return jax.jit(add), jax.jit(finish)
