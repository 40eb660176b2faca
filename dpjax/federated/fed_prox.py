"""FedProx: FedAvg with a pull back to where the round began."""

import optax

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm
from dpjax.federated.fed_avg import fed_avg
from dpjax.types import LossFn


def fed_prox(
    loss_fn: LossFn,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    proximal: float,
    uniform_weights: bool = False,
) -> Algorithm:
    """Clients minimise their loss plus ``proximal / 2 * |params - start|^2``.

    Args:
      proximal: mu, above 0; `fed_avg` is the same with 0.
      loss_fn, client_optimizer, server_optimizer, uniform_weights: as in `fed_avg`.

    Source: Li et al. (2020), *Federated optimization in heterogeneous networks*, algorithm 2.

    Example:
      >>> fed_prox(lambda w, e: w * e, optax.sgd(0.1), proximal=0.1).name
      'fed_prox'
    """
    if not proximal > 0:
        raise DpjaxError(f"proximal is {proximal}; it must be above 0 (0 is fed_avg)")
    return fed_avg(
        loss_fn,
        client_optimizer,
        server_optimizer,
        uniform_weights=uniform_weights,
        proximal=proximal,
    )
