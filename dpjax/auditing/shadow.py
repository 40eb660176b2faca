"""Shadow models: many small models trained at once, each on its own random half of the examples."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from dpjax.checkpoint import Checkpointer, digest
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.sampling import Sampler
from dpjax.training import TrainState, arrange, init_state, train_step
from dpjax.types import Batch, LossFn, PyTree, RandomKey, TrainingData, require_key

_LONGEST_CHUNK = 64  # iterations between two looks at the progress, and two checkpoints


class ShadowModels(NamedTuple):
    """Trained models and what each was trained on. Private where the examples are."""

    params: PyTree  # every leaf has a leading axis K
    included: np.ndarray  # bool[K, N], whether model k was trained on example i


def balanced_inclusion(num_models: int, num_examples: int, key: RandomKey) -> np.ndarray:
    """Random halves in complementary pairs: bool[num_models, num_examples].

    Every example is in exactly half of the models, and every model has half of the examples (one
    more or less where they are odd). Pairs are independent: whether a model has an example tells
    nothing about the others but its partner (see `leave_one_out_targets`).

    Raises:
      DpjaxError: an odd number of models, or fewer than two examples.

    Example:
      >>> found = balanced_inclusion(4, 10, jax.random.key(0))
      >>> found.sum(axis=0).tolist(), found.sum(axis=1).tolist()
      ([2, 2, 2, 2, 2, 2, 2, 2, 2, 2], [5, 5, 5, 5])
    """
    if num_models < 2 or num_models % 2:
        raise DpjaxError(
            f"num_models is {num_models}; use an even number, so that every example is in half"
        )
    if num_examples < 2:
        raise DpjaxError(f"there are {num_examples} examples; halves need at least 2")
    keys = jax.random.split(require_key(key), num_models // 2)
    included = np.zeros((num_models, num_examples), bool)
    for pair, one in enumerate(keys):
        order = np.asarray(jax.random.permutation(one, num_examples))
        included[2 * pair, order[: num_examples // 2]] = True
        included[2 * pair + 1] = ~included[2 * pair]
    return included


def train_shadow_models(
    mechanism: DPSGD,
    init_params_fn: Callable[[RandomKey], PyTree],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    dataset: TrainingData,
    *,
    num_models: int,
    key: RandomKey,
    included: np.ndarray | None = None,
    repeats: np.ndarray | None = None,
    models_at_once: int | None = None,
    devices: Sequence[Any] | None = None,
    checkpoint: str | os.PathLike | None = None,
    on_chunk: Callable[[int, PyTree], None] | None = None,
    iterations_per_chunk: int | None = None,
    progress: bool = False,
) -> ShadowModels:
    """Trains ``num_models`` models in one compiled run; the step is that of `dpjax.train_step`.

    Args:
      mechanism: of each model: clipping, noise, sampling, iterations. Its population is one
        model's number of examples, counted with their repeats.
      init_params_fn: a model's first parameters from a key.
      loss_fn: ``loss_fn(params, example) -> scalar`` for one example.
      dataset: N examples, all held on each device.
      num_models: K, even.
      key: for halves, first parameters, sampling and noise.
      included: bool[K, N]; default `balanced_inclusion`.
      repeats: int[N], how often an example that is included occurs; default once.
      models_at_once: models that one device advances by one vectorised step; default all. Fewer
        need less memory, and on CPUs, where several small products are no faster than one after
        another, they may take less time.
      devices: default all local ones; models are shared out evenly.
      checkpoint: folder; a run that was stopped goes on there, to the same bits.
      on_chunk: called with the iteration and all parameters after each chunk.
      iterations_per_chunk: default the largest divisor of the iterations up to 64.
      progress: show a bar.

    Guarantee:
      What model k becomes does not depend on examples that it does not include: rows are drawn by
      a sampler over its own ones. A model does not depend on how many are trained beside it.

    Source: Carlini et al. (2022), section V, for the halves.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = ArrayDataset({"x": np.arange(8, dtype=np.float32)})
      >>> mechanism = DPSGD(float("inf"), 1.0, 50, noise_multiplier=0.0, normalize_by=4.0)
      >>> shadow = train_shadow_models(
      ...     mechanism, lambda key: jnp.zeros(()), lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.2),
      ...     data, num_models=2, key=jax.random.key(0))
      >>> bool(jnp.isclose(shadow.params[0], np.arange(8)[shadow.included[0]].mean(), atol=1e-4))
      True
    """
    require_key(key)
    if len(dataset) == 0:
        raise DpjaxError("the data set is empty; give it at least two examples")
    if included is None:
        included = balanced_inclusion(num_models, len(dataset), jax.random.fold_in(key, 0))
    included = _checked_inclusion(included, num_models, len(dataset))
    devices = list(jax.local_devices() if devices is None else devices)
    if num_models % len(devices):
        raise DpjaxError(
            f"{num_models} models cannot be shared evenly by {len(devices)} devices; use a "
            "multiple, or name fewer devices"
        )
    keys = jax.random.split(jax.random.fold_in(key, 1), num_models)
    states = _first_states(
        keys, mechanism=mechanism, init_params_fn=init_params_fn, optimizer=optimizer
    )
    rows = _member_rows(included, repeats)
    samplers = _samplers(mechanism, rows, states.sampling_key)
    chunk = iterations_per_chunk or _largest_divisor(mechanism.iterations)
    if mechanism.iterations % chunk:
        raise DpjaxError(
            f"iterations_per_chunk is {chunk}, which does not divide the {mechanism.iterations} "
            "iterations"
        )
    facts = {
        "mechanism": repr(mechanism),
        "data": dataset.fingerprint(),
        "models": digest({"included": included, "rows": np.concatenate(rows), "keys": keys}),
        "chunk": chunk,
    }
    checkpointer = None if checkpoint is None else Checkpointer(checkpoint)
    if checkpointer is not None and checkpointer.latest() is not None:
        states, found = checkpointer.restore(states)
        for name, value in facts.items():
            if found.get(name) != value:
                raise DpjaxError(
                    f"{checkpoint} holds shadow models of another {name}; use another folder"
                )
    mesh = jax.sharding.Mesh(np.array(devices), ("models",))
    over_models = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("models"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    states = jax.device_put(states, over_models)
    examples = jax.device_put(dataset.take(np.arange(len(dataset))), replicated)
    loss = loss_fn if isinstance(loss_fn, jax.tree_util.Partial) else jax.tree_util.Partial(loss_fn)
    with Progress(disable=not progress) as bar:
        first = int(states.iteration[0])
        task = bar.add_task(
            f"{num_models} shadow models", total=mechanism.iterations, completed=first
        )
        for start in range(first, mechanism.iterations, chunk):
            batches = [
                _drawn(s, r, mechanism, start, chunk) for s, r in zip(samplers, rows, strict=True)
            ]
            states = _advance(
                states,
                examples,
                jax.device_put(_stacked(batches), over_models),
                jax.device_put(loss, replicated),
                mechanism=mechanism,
                optimizer=optimizer,
                mesh=mesh,
                models_at_once=models_at_once,
            )
            if checkpointer is not None:
                checkpointer.save(start + chunk, states, facts)
            if on_chunk is not None:
                on_chunk(start + chunk, states.params)
            bar.update(task, completed=start + chunk)
    if checkpointer is not None:
        checkpointer.close()
    return ShadowModels(states.params, included)


def score_shadow_models(
    loss_fn: LossFn,
    params: PyTree,
    dataset: TrainingData,
    *,
    batch_size: int = 64,
    devices: Sequence[Any] | None = None,
) -> np.ndarray:
    """Minus the loss of every example under every model: float64[K, N], higher = member.

    Args:
      params: of K models, every leaf with a leading axis K.
      batch_size: examples at once.
      devices: default all local ones, if they share the models evenly; else one.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = ArrayDataset({"x": np.arange(3, dtype=np.float32)})
      >>> score_shadow_models(lambda w, e: (w - e["x"]) ** 2, jnp.arange(2.0), data).tolist()
      [[-0.0, -1.0, -4.0], [-1.0, -0.0, -1.0]]
    """
    count = len(dataset)
    if count == 0:
        raise DpjaxError("the data set is empty; give it at least one example")
    num_models = len(jax.tree.leaves(params)[0])
    devices = list(jax.local_devices() if devices is None else devices)
    devices = devices if num_models % len(devices) == 0 else devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("models",))
    params = jax.device_put(
        params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("models"))
    )
    loss = loss_fn if isinstance(loss_fn, jax.tree_util.Partial) else jax.tree_util.Partial(loss_fn)
    found = []
    for start in range(0, count, batch_size):
        # The last batch repeats its last example, so that one compilation serves all.
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        found.append(np.asarray(_model_losses(loss, params, dataset.take(rows)), np.float64))
    return -np.concatenate(found, axis=1)[:, :count]


@jax.jit
def _model_losses(loss: LossFn, params: PyTree, batch: PyTree) -> jax.Array:
    return jax.vmap(lambda one: jax.vmap(loss, (None, 0))(one, batch))(params)


@functools.partial(jax.jit, static_argnames=("mechanism", "init_params_fn", "optimizer"))
def _first_states(
    keys: RandomKey,
    *,
    mechanism: DPSGD,
    init_params_fn: Callable[[RandomKey], PyTree],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    def one(key: RandomKey) -> TrainState:
        params_key, training_key = jax.random.split(key)
        return init_state(mechanism, init_params_fn(params_key), optimizer, training_key)

    return jax.vmap(one)(keys)


def _checked_inclusion(included: np.ndarray, num_models: int, num_examples: int) -> np.ndarray:
    included = np.asarray(included, bool)
    if included.shape != (num_models, num_examples):
        raise DpjaxError(
            f"included has shape {included.shape}; it must be ({num_models}, {num_examples}): "
            "models by examples"
        )
    if not included.any(axis=1).all():
        empty = int(np.argmin(included.any(axis=1)))
        raise DpjaxError(f"model {empty} includes no example; give each model one at least")
    return included


def _member_rows(included: np.ndarray, repeats: np.ndarray | None) -> list[np.ndarray]:
    """Rows of the data set that each model is trained on, a repeated one several times."""
    counts = np.ones(included.shape[1], np.int64) if repeats is None else np.asarray(repeats)
    if counts.shape != (included.shape[1],) or counts.min() < 1:
        raise DpjaxError(
            f"repeats has shape {counts.shape} and least value {counts.min()}; give each of the "
            f"{included.shape[1]} examples at least 1"
        )
    return [np.repeat(np.flatnonzero(own), counts[own]).astype(np.int32) for own in included]


def _samplers(mechanism: DPSGD, rows: list[np.ndarray], keys: RandomKey) -> list[Sampler]:
    """Each model's own; batches of all have one physical size."""
    found = []
    for model, own in enumerate(rows):
        population = mechanism.population or len(own)
        if mechanism.is_private and population != len(own):
            raise DpjaxError(
                f"model {model} has {len(own)} examples, but the mechanism was accounted for "
                f"population {population}; use poisson sampling or equal halves"
            )
        planned = mechanism.planned_sampler(population)
        found.append(dataclasses.replace(planned, population=len(own), key=keys[model]))
    return found


def _drawn(sampler: Sampler, rows: np.ndarray, mechanism: DPSGD, start: int, count: int) -> Batch:
    """Rows of the data set in ``count`` iterations: shapes (count, physical)."""
    drawn = [
        arrange(sampler.batch(i), mechanism.microbatch_size) for i in range(start, start + count)
    ]
    widest = max(len(batch.indices) for batch in drawn)
    indices = np.zeros((count, widest), np.int32)
    is_padding = np.ones((count, widest), bool)
    for i, batch in enumerate(drawn):
        indices[i, : len(batch.indices)] = rows[batch.indices]
        is_padding[i, : len(batch.indices)] = batch.is_padding_example
    return Batch(indices, is_padding)


def _stacked(batches: list[Batch]) -> Batch:
    """All models' batches: shapes (models, iterations, physical), padded to the widest."""
    widest = max(batch.indices.shape[1] for batch in batches)

    def pad(x: np.ndarray, value: Any) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, widest - x.shape[1])), constant_values=value)

    return Batch(
        np.stack([pad(batch.indices, 0) for batch in batches]),
        np.stack([pad(batch.is_padding_example, True) for batch in batches]),
    )


@functools.partial(
    jax.jit, static_argnames=("mechanism", "optimizer", "mesh", "models_at_once"), donate_argnums=0
)
def _advance(
    states: TrainState,
    examples: PyTree,
    batches: Batch,
    loss: LossFn,
    *,
    mechanism: DPSGD,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    models_at_once: int | None,
) -> TrainState:
    """A chunk of iterations of all models; each device has models of its own."""
    models, whole = jax.sharding.PartitionSpec("models"), jax.sharding.PartitionSpec()

    def one_model(state: TrainState, batches: Batch, examples: PyTree, loss: LossFn) -> TrainState:
        def step(state: TrainState, rows: Batch) -> tuple[TrainState, None]:
            batch = jax.tree.map(lambda x: x[rows.indices], examples)
            after, _ = train_step(
                state,
                batch,
                jnp.asarray(rows.is_padding_example),
                mechanism=mechanism,
                loss_fn=loss,
                optimizer=optimizer,
            )
            return after, None

        return jax.lax.scan(step, state, batches)[0]

    def own_models(
        states: TrainState, examples: PyTree, batches: Batch, loss: LossFn
    ) -> TrainState:
        count = len(states.iteration)
        if models_at_once is None or models_at_once >= count:
            return jax.vmap(lambda s, b: one_model(s, b, examples, loss))(states, batches)
        return jax.lax.map(
            lambda both: one_model(both[0], both[1], examples, loss),
            (states, batches),
            batch_size=models_at_once if models_at_once > 1 else None,
        )

    return jax.shard_map(
        own_models,
        mesh=mesh,
        in_specs=(models, whole, models, whole),
        out_specs=models,
        check_vma=False,
    )(states, examples, batches, loss)


def _largest_divisor(iterations: int) -> int:
    return next(n for n in range(min(iterations, _LONGEST_CHUNK), 0, -1) if iterations % n == 0)
