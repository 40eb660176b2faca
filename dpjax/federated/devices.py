"""Where a round's arrays lie: meshes of devices, sharded parameters, several processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.clients import Cohort
from dpjax.types import PyTree, RandomKey

AXIS = "clients"


def client_mesh(num_devices: int | None = None, *, model_devices: int = 1) -> jax.sharding.Mesh:
    """A mesh of devices over which clients are shared out.

    Args:
      num_devices: how many; None takes all, those of other processes too.
      model_devices: above 1, a second axis "model" of so many devices, which train the same clients
        together: place parameters along it, e.g.
        ``jax.device_put(w, NamedSharding(mesh, PartitionSpec("model")))``.

    Example:
      >>> dict(client_mesh(1).shape)
      {'clients': 1}
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise DpjaxError(
            f"num_devices (or the cohort's shards) is {count}; there are {len(devices)} devices"
        )
    if model_devices < 1 or count % model_devices:
        raise DpjaxError(f"model_devices is {model_devices}; it must divide {count} devices")
    chosen = np.array(devices[:count])
    if model_devices == 1:
        return jax.sharding.Mesh(chosen, (AXIS,))
    return jax.sharding.Mesh(chosen.reshape(-1, model_devices), (AXIS, "model"))


def cohort_on_devices(cohort: Cohort, mesh: jax.sharding.Mesh) -> tuple[jax.sharding.Mesh, Cohort]:
    """The cohort with one shard at each place of the mesh's axis of clients, and the mesh.

    In a job of several processes, the cohort is this process's part of the whole; parts must have
    one shape (compared before anything is sent: a difference would hang).
    """
    if AXIS not in mesh.shape:
        raise DpjaxError(f"the mesh has axes {mesh.axis_names}; one must be named {AXIS!r}")
    # The compiler places what explicit axes would have us place.
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    shards, places = cohort.client.shape[0], mesh.shape[AXIS]
    if all(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in jax.tree.leaves(cohort)):
        here = places  # placed before
    elif jax.process_count() == 1:
        here = places
    else:
        from jax.experimental import multihost_utils

        rows = np.moveaxis(mesh.devices, mesh.axis_names.index(AXIS), 0).reshape(places, -1)
        own = [{d.process_index for d in row} == {jax.process_index()} for row in rows]
        here = sum(own)
        own_shapes = np.array([jnp.shape(x)[1] for x in jax.tree.leaves(cohort)])
        shapes = multihost_utils.process_allgather(own_shapes)
        if np.any(shapes != own_shapes):
            raise DpjaxError(
                "processes have cohorts of different shapes; give Clients.cohort a shape that all "
                "agreed on"
            )
    if shards != here:
        raise DpjaxError(
            f"the cohort has {shards} shards and the mesh {dict(mesh.shape)}; it must have as many "
            f"shards as the axis {AXIS!r} has places{' in this process' * (here != places)}"
        )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    if jax.process_count() == 1 or here == places:
        return mesh, jax.device_put(cohort, sharding)
    return mesh, jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), cohort
    )


def server_shardings(server: PyTree, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Where each leaf stays: along other axes of the mesh as it lies now, or everywhere."""
    return tuple(_sharding(x, mesh) for x in jax.tree.leaves(server))


def state_on_devices(
    state: Any, key: RandomKey, mesh: jax.sharding.Mesh, shardings: tuple[Any, ...]
) -> tuple[Any, RandomKey]:
    """State and key where the round wants them; costs nothing where they lie there already."""
    leaves, structure = jax.tree.flatten(state.server)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rest, kind = jax.tree.flatten((state.clients, state.round, key))
    if jax.process_count() == 1:
        leaves, rest = jax.device_put((leaves, rest), (list(shardings), everywhere))
    else:
        leaves = [_to_all(x, where) for x, where in zip(leaves, shardings, strict=True)]
        rest = [_to_all(x, everywhere) for x in rest]
    clients, number, key = jax.tree.unflatten(kind, rest)
    server = jax.tree.unflatten(structure, leaves)
    return state._replace(server=server, clients=clients, round=number), key


def _sharding(x: Any, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    spec: Any = getattr(getattr(x, "sharding", None), "spec", None)
    names = {n for part in spec or () if part for n in (part if type(part) is tuple else (part,))}
    if not names or not names <= set(mesh.axis_names):
        spec = jax.sharding.PartitionSpec()
    return jax.sharding.NamedSharding(mesh, spec)


def _to_all(x: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """What each process has whole, as one array of all of them."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(x), sharding)
