"""The loop over rounds: the mechanism's cohorts, the ledger before each release, one state."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm
from dpjax.federated.clients import Clients
from dpjax.federated.private import check_private_state
from dpjax.federated.round import Engine, FederatedState, RoundInfo, init_federated, run_round
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.types import PyTree, RandomKey, require_key


class FederatedTrainState(NamedTuple):
    """Everything that a resume needs. Secret: it holds the noise, sampling and shuffling keys."""

    federated: FederatedState
    sampling_key: RandomKey  # typed scalar key; never changes
    round_key: RandomKey  # typed scalar key of local shuffles and clients; never changes

    @property
    def params(self) -> PyTree:
        """The shared parameters."""
        return self.federated.params

    @property
    def iteration(self) -> Int[Array, ""]:
        """int32, rounds so far; also the sampler's position."""
        return self.federated.round


class LocalWork(NamedTuple):
    """What a client does in one round; public."""

    batch_size: int | None = 32  # examples of one local step; None: all of a client's
    epochs: int = 1
    max_steps: int | None = None


def init_training(
    algorithm: Algorithm, params: PyTree, num_clients: int, key: RandomKey
) -> FederatedTrainState:
    """State before the first round.

    Args:
      algorithm: e.g. ``private(fed_avg(...), mechanism, noise_key)``.
      params: any pytree of float arrays.
      num_clients: K, all there are.
      key: JAX random key, another one than the noise has. For a guarantee that holds against
        people, draw it from the operating system's entropy and keep it secret.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from dpjax.federated import fed_avg
      >>> algorithm = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1))
      >>> int(init_training(algorithm, jnp.zeros(2), 10, jax.random.key(0)).iteration)
      0
    """
    sampling_key, round_key = jax.random.split(require_key(key))
    return FederatedTrainState(
        init_federated(algorithm, params, num_clients), sampling_key, round_key
    )


def fit(
    state: FederatedTrainState,
    algorithm: Algorithm,
    mechanism: DPSGD,
    clients: Clients,
    *,
    local: LocalWork = LocalWork(),  # noqa: B008 (immutable)
    ledger: Ledger | None = None,
    run: int | None = None,
    max_iterations: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    engine: Engine = "shard_map",
    clients_per_step: int | Literal["auto"] = "auto",
) -> Iterator[tuple[FederatedTrainState, RoundInfo]]:
    """Runs rounds from ``state.iteration`` to the planned end, yielding after every one.

    Args:
      state: from `init_training` or a checkpoint; the loop continues where it stands.
      algorithm: with noise, it must be ``private(..., mechanism, key)`` of this very mechanism.
      mechanism: whose sampler draws the cohorts: its examples are the clients, ``iterations`` the
        rounds. With ``noise_multiplier=0`` nothing is claimed.
      clients: who holds what.
      local: what each client does.
      ledger: where every release is written before its round is computed.
      run: the ledger's number of this run (`Ledger.start_run`); required with a ledger.
      max_iterations: stop after this round, e.g. from `affordable_iterations`.
      mesh, engine, clients_per_step: see `run_round`; default: one shard on one device.

    Yields:
      ``(state, info)`` after each round.

    Raises:
      DpjaxError: an algorithm, population or ledger that the mechanism does not account for.

    Guarantee:
      The server's states are the result of at most ``mechanism.iterations`` releases of
      ``mechanism.dp_event``'s kind, each client being one unit. A loop that is resumed from a
      saved state draws the same cohorts, shuffles and noise as one that never stopped.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from dpjax.federated import clients_by, fed_avg, private
      >>> rows = {"x": np.ones((40, 2), np.float32)}
      >>> people = clients_by(rows, np.arange(40) // 2)
      >>> mechanism = DPSGD(1.0, 0.5, 8, noise_multiplier=0.5, normalize_by=10.0, population=20)
      >>> keys = jax.random.split(jax.random.key(0))
      >>> algorithm = fed_avg(lambda w, e: jnp.sum((w - e["x"]) ** 2), optax.sgd(0.2))
      >>> algorithm = private(algorithm, mechanism, keys[0])
      >>> state = init_training(algorithm, jnp.zeros(2), len(people), keys[1])
      >>> for state, info in fit(state, algorithm, mechanism, people):
      ...     pass
      >>> bool(jnp.all(jnp.abs(state.params - 1) < 0.3)), int(state.iteration)
      (True, 8)
    """
    if (ledger is None) != (run is None):
        raise DpjaxError(f"run is {run}; pass ledger and run together (Ledger.start_run)")
    if mechanism.is_private:
        check_private_state(mechanism, state.federated, clients)
    sampler = mechanism.sampler(len(clients), state.sampling_key)
    num_shards = 1 if mesh is None else mesh.shape["clients"]
    end = mechanism.iterations
    if max_iterations is not None:
        end = min(end, max_iterations)
    for number in range(int(state.iteration), end):
        rows = sampler.batch(number)
        cohort = clients.cohort(
            np.asarray(rows.indices)[~np.asarray(rows.is_padding_example)],
            jax.random.fold_in(state.round_key, number),
            batch_size=local.batch_size,
            epochs=local.epochs,
            max_steps=local.max_steps,
            num_shards=num_shards,
            cohort_size=len(rows.indices),  # the sampler's physical one: few shapes to compile
        )
        if ledger is not None and run is not None:
            ledger.record_release(
                run, number, sampler, mechanism.noise_multiplier or 0.0, mechanism.strategy
            )
        federated, info = run_round(
            algorithm,
            state.federated,
            cohort,
            state.round_key,
            mesh=mesh,
            engine=engine,
            clients_per_step=clients_per_step,
        )
        state = state._replace(federated=federated)
        yield state, info
