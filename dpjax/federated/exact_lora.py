"""Exact aggregation of low-rank adapters: the average of products, not the product of averages."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    difference,
    example_weight,
    local_training,
)
from dpjax.federated.fed_avg import ServerState
from dpjax.models import combine, partition
from dpjax.types import LossFn, PyTree


def exact_lora(
    loss_fn: LossFn,
    client_optimizer: optax.GradientTransformation,
    scaling: float,
    *,
    uniform_weights: bool = False,
) -> Algorithm:
    """FedAvg of adapters whose matrices move so that the model is the mean of the clients' models.

    Averaging A and B one by one gives the product of means, which is not the mean of products. Here
    the server also puts what is missing, ``scaling (mean(A_i B_i) - mean(A) mean(B))``, into the
    matrix beside the adapter, which clients do not train.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example, e.g. `tuned_loss` after
        `with_kernels`. ``params`` holds, besides whatever else is trained, dicts with "kernel"
        [..., in, out], "lora_a" [..., in, rank] and "lora_b" [..., rank, out].
      client_optimizer: fresh on every client in every round.
      scaling: alpha / rank, by which the model multiplies A B.
      uniform_weights: as in `fed_avg`.

    A client sends its adapters and, for each, the change of A B, which is as large as the kernel:
    sums hide single clients, also under `private` and `with_aggregator`, and that is their price.

    Source: Singhal et al. (2024), *FedEx-LoRA*, section 4, with the products summed, so that the
      server needs no single client's matrices.

    Example:
      >>> params = {"kernel": jnp.eye(2), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> def loss_fn(p, x):
      ...     return jnp.sum((x @ (p["kernel"] + p["lora_a"] @ p["lora_b"])) ** 2)
      >>> algorithm = exact_lora(loss_fn, optax.sgd(0.1), scaling=1.0)
      >>> algorithm.init(params)[0].params["kernel"].shape
      (2, 2)
    """

    def init(params):
        if not _products(params):
            raise DpjaxError(
                "params hold no dict with kernel, lora_a and lora_b; add adapters, and make their "
                "kernels part of the parameters (with_kernels)"
            )
        return ServerState(params, ()), ()

    def local_update(server, client, data, key):
        trained, kernels = partition(server.params, _is_trained)

        def loss(adapters, example):
            return loss_fn(combine(adapters, kernels), example)

        after, metrics = local_training(loss, client_optimizer, trained, data)
        products = difference(_products(after), _products(trained))
        update = {"adapters": difference(after, trained), "products": products}
        weight = example_weight(data.num_examples, uniform_weights)
        return LocalResult(update, weight, client, metrics)

    def server_update(server, aggregate):
        trained, kernels = partition(server.params, _is_trained)
        before = _products(trained)
        trained = jax.tree.map(
            lambda p, d: p + d.astype(p.dtype), trained, aggregate.update["adapters"]
        )
        after = _products(trained)
        missing = {
            where: scaling * (aggregate.update["products"][where] + before[where] - after[where])
            for where in after
        }
        moved = jax.tree_util.tree_map_with_path(
            lambda path, kernel: _moved(kernel, missing.get(_parent(path))), kernels
        )
        return ServerState(combine(trained, moved), ())

    return Algorithm("exact_lora", init, local_update, server_update)


def with_kernels(trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """Moves the matrices beside adapters from the frozen part to the parameters of the server.

    Args:
      trainable, frozen: from `dpjax.models.prepare_tuning` with "lora".

    Example:
      >>> lora = {"lora_a": 1, "lora_b": 2, "kernel": None}
      >>> rest = {"lora_a": None, "lora_b": None, "kernel": 3}
      >>> with_kernels({"query": lora, "norm": None}, {"query": rest, "norm": 4})[1]
      {'norm': 4, 'query': {'kernel': None, 'lora_a': None, 'lora_b': None}}
    """
    whole = combine(trainable, frozen)
    held = {
        _parent(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)
        if _name(path) == "lora_a"
    }  # fmt: skip
    kept = {_join(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    kept |= {f"{where}/kernel" if where else "kernel" for where in held}
    return partition(whole, lambda name: name in kept)


def _is_trained(name: str) -> bool:
    # The only kernels among the parameters are those beside adapters.
    return name.rpartition("/")[2] != "kernel"


def _products(params: PyTree) -> dict[str, Float[Array, "..."]]:
    """A B in float32 of every adapter, by the path of its dict."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _name(path) in ("lora_a", "lora_b"):
            found.setdefault(_parent(path), {})[_name(path)] = leaf.astype(jnp.float32)
    # Full precision: on accelerators the default product would round the adapters to bfloat16.
    highest = jax.lax.Precision.HIGHEST
    return {
        where: jnp.matmul(pair["lora_a"], pair["lora_b"], precision=highest)
        for where, pair in found.items()
    }


def _moved(kernel: Array, missing: Array | None) -> Array:
    if missing is None:
        return kernel
    return (kernel.astype(jnp.float32) + missing).astype(kernel.dtype)


def _join(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _name(path: Any) -> str:
    return _join(path[-1:])


def _parent(path: Any) -> str:
    return _join(path[:-1])
