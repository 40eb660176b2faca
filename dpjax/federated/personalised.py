"""Personalised heads: some parameters never leave their client."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    difference,
    example_weight,
    local_training,
    server_step,
)
from dpjax.federated.fed_avg import ServerState
from dpjax.types import LossFn, PyTree


def personalised(
    loss_fn: LossFn,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    is_personal: Callable[[str], bool],
    uniform_weights: bool = False,
) -> Algorithm:
    """FedAvg on the shared parameters; personal ones are trained along and kept by each client.

    Args:
      loss_fn, client_optimizer, server_optimizer, uniform_weights: as in `fed_avg`.
      is_personal: whether a leaf is personal, from its path such as "head/kernel".

    The server sees zeros in the place of personal leaves. A client that never took part has those
    of the initial parameters; see `personal_params`.

    Source: Arivazhagan et al. (2019), *Federated learning with personalization layers*.

    Example:
      >>> algorithm = personalised(
      ...     lambda p, e: (p["body"] + p["head"] - e) ** 2, optax.sgd(0.1),
      ...     is_personal=lambda path: path.startswith("head"))
      >>> algorithm.init({"body": jnp.zeros(2), "head": jnp.ones(())})[1]
      {'body': None, 'head': Array(1., dtype=float32)}
    """
    optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def init(params):
        own = personal_part(params, is_personal)
        kept = [own_leaf is not None for own_leaf in jax.tree.leaves(own, is_leaf=_is_none)]
        if not any(kept) or all(kept):
            raise DpjaxError(
                f"{sum(kept)} of {len(kept)} leaves are personal; some, and not all, must be"
            )
        return ServerState(params, optimizer.init(params)), own

    def local_update(server, client, data, key):
        start = personal_params(server.params, client)
        params, metrics = local_training(loss_fn, client_optimizer, start, data)
        change = jax.tree.map(
            lambda own, d: d if own is None else jnp.zeros_like(d),
            client,
            difference(params, start),
            is_leaf=_is_none,
        )
        fresh = personal_part(params, is_personal)
        weight = example_weight(data.num_examples, uniform_weights)
        return LocalResult(change, weight, fresh, metrics)

    def server_update(server, aggregate):
        return ServerState(
            *server_step(optimizer, server.params, server.optimizer, aggregate.update)
        )

    return Algorithm("personalised", init, local_update, server_update)


def personal_part(params: PyTree, is_personal: Callable[[str], bool]) -> PyTree:
    """The personal leaves, None where a leaf is shared."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_personal(jax.tree_util.keystr(path, simple=True, separator="/"))
        else None,
        params,
    )  # fmt: skip


def personal_params(shared: PyTree, own: PyTree) -> PyTree:
    """A client's whole model: the server's parameters with its personal leaves put in.

    Example:
      >>> personal_params({"body": 1.0, "head": 2.0}, {"body": None, "head": 5.0})
      {'body': 1.0, 'head': 5.0}
    """
    return jax.tree.map(lambda o, s: s if o is None else o, own, shared, is_leaf=_is_none)


def _is_none(x) -> bool:
    return x is None
