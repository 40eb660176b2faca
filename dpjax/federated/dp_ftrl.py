"""DP-FTRL: federated averaging with correlated noise, for cohorts that nobody sampled."""

import optax

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm
from dpjax.federated.fed_avg import fed_avg
from dpjax.federated.private import private
from dpjax.mechanism import DPSGD
from dpjax.types import LossFn, RandomKey


def dp_ftrl(
    loss_fn: LossFn,
    client_optimizer: optax.GradientTransformation,
    mechanism: DPSGD,
    key: RandomKey,
    *,
    server_learning_rate: float = 1.0,
    server_momentum: float = 0.0,
) -> Algorithm:
    """Follow the regularised leader on noisy running sums of clipped client updates.

    The server's parameters are the first ones plus the learning rate times a running sum (with
    momentum, a decaying sum of running sums), and each running sum has little noise because later
    rounds take back what earlier ones added. As a step per round this is gradient descent with
    momentum on noise that is correlated over rounds.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example.
      client_optimizer: fresh on every client in every round.
      mechanism: with ``correlated_noise`` (kind "tree" is the paper's; "banded" and "blt" have less
        noise) and ``sampling="cyclic"``; "example" is read as "client". See `private`.
      key: JAX random key of the noise; secret.
      server_learning_rate: one over the regulariser's strength.
      server_momentum: in [0, 1).

    Returns:
      An `Algorithm` as `private` returns it. Draw cohorts by `sample_cohort`.

    Raises:
      DpjaxError: a mechanism with independent noise; impossible rates.

    Guarantee:
      That of `private`: all rounds together are one Gaussian mechanism for users, provided that
      clients return no sooner and no more often than the cyclic cohorts say. Nothing rests on
      chance in who takes part. Clients that do not answer only take part less.

    Source: Kairouz et al. (2021), "Practical and private (deep) learning without sampling or
      shuffling", algorithms 1 and 2; McMahan, Xu and Zhang (2022) and Xu et al. (2023), "Federated
      learning of Gboard language models with differential privacy", for federated use.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from dpjax.correlated_noise import CorrelatedNoise
      >>> from dpjax.federated import Clients, init_federated, run_round, sample_cohort
      >>> people = Clients({"x": np.float32([5, 7, 9, 7])}, ([0], [1], [2], [3]), tuple("abcd"))
      >>> mechanism = DPSGD(1.0, 0.5, 20, noise_multiplier=0.05, sampling="cyclic", population=4,
      ...                   normalize_by=2.0, correlated_noise=CorrelatedNoise("tree"))
      >>> algorithm = dp_ftrl(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5), mechanism,
      ...                     jax.random.key(0))
      >>> state = init_federated(algorithm, jnp.zeros(()), len(people))
      >>> for number in range(20):
      ...     chosen = sample_cohort(mechanism, people, number, jax.random.key(1))
      ...     cohort = people.cohort(chosen, jax.random.key(2), batch_size=None)
      ...     state, info = run_round(algorithm, state, cohort, jax.random.key(3), engine="jit")
      >>> bool(abs(state.params - 7.0) < 1.0), mechanism.dp_event
      (True, GaussianDpEvent(noise_multiplier=0.05))
    """
    if mechanism.strategy is None:
        raise DpjaxError(
            "the mechanism's noise is independent in every round; DP-FTRL needs "
            "DPSGD(..., sampling='cyclic', correlated_noise=CorrelatedNoise('tree')), or use "
            "private(fed_avg(...), mechanism, key)"
        )
    if not (server_learning_rate > 0 and 0 <= server_momentum < 1):
        raise DpjaxError(
            f"server_learning_rate is {server_learning_rate} and server_momentum "
            f"{server_momentum}; the rate must be above 0, the momentum in [0, 1)"
        )
    server_optimizer = optax.sgd(server_learning_rate, momentum=server_momentum or None)
    inner = fed_avg(loss_fn, client_optimizer, server_optimizer, uniform_weights=True)
    return private(inner, mechanism, key)._replace(name="dp_ftrl")
