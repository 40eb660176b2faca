"""The one training loop: pure steps over a frozen mechanism, and a generator that drives them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dpjax import sampling as samplers
from dpjax.adaptive import next_relative_clip_norm
from dpjax.clipping import microbatch_order
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.types import Batch, ClipInfo, LossFn, PyTree, RandomKey, TrainingData, require_key


class TrainState(NamedTuple):
    """Everything that a resume needs. Secret: it holds the noise and sampling keys."""

    params: PyTree
    opt_state: PyTree  # (NoiseState, the optimizer's own state)
    sampling_key: RandomKey  # typed scalar key; never changes
    iteration: Int[Array, ""]  # int32, releases so far; also the sampler's position
    # float32, the clip norm as a multiple of the mechanism's: 1 unless it adapts
    relative_clip_norm: Float[Array, ""]


class StepInfo(NamedTuple):
    """What a step saw. Fields named ``sensitive_`` are private data: show them to nobody else."""

    iteration: int | Int[Array, ""]  # int32, after the step
    noisy_grad_norm: Float[Array, ""]  # float32, L2 norm of the released noisy sum
    sensitive_loss: Float[Array, ""]  # float32, mean loss over the examples of this batch
    sensitive_num_examples: Int[Array, ""]  # int32, realised batch size
    # float32, share of examples whose whole gradient exceeds the clip norm
    sensitive_clipped_fraction: Float[Array, ""]
    clip: ClipInfo


def init_state(
    mechanism: DPSGD,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: RandomKey,
) -> TrainState:
    """State before the first step.

    Args:
      mechanism: the frozen configuration.
      params: any pytree of float arrays.
      optimizer: a plain optax optimizer; the noise is put in front of it here.
      key: JAX random key. Noise and sampling take separate keys from it. For a guarantee that
        holds against people, draw it from the operating system's entropy and keep it secret.

    Example:
      >>> mechanism = DPSGD(1.0, 0.5, 10, noise_multiplier=1.0)
      >>> state = init_state(mechanism, jnp.zeros(3), optax.sgd(0.1), jax.random.key(0))
      >>> int(state.iteration), int(state.opt_state[0].count)
      (0, 0)
    """
    noise_key, sampling_key = jax.random.split(require_key(key))
    opt_state = optax.chain(mechanism.privatizer(noise_key), optimizer).init(params)
    one = jnp.ones((), jnp.float32)
    return TrainState(params, opt_state, sampling_key, jnp.zeros((), jnp.int32), one)


def _train_step(
    state: TrainState,
    batch: PyTree,
    is_padding_example: Bool[Array, " physical"],
    *,
    mechanism: DPSGD,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state_sharding: jax.sharding.Sharding | None = None,
) -> tuple[TrainState, StepInfo]:
    grad_fn = mechanism.clipped_grad(loss_fn)
    relative = state.relative_clip_norm
    moves = mechanism.adaptive_clipping is not None
    sum_of_clipped_grads, clip = grad_fn(
        state.params, batch, is_padding_example, relative if moves else None
    )
    noise = state.opt_state[0]
    privatizer = mechanism.privatizer(noise.key)
    noisy, noise_state = privatizer.update(sum_of_clipped_grads, noise)
    next_relative = relative
    if mechanism.adaptive_clipping is not None:
        noisy = jax.tree.map(lambda x: x * relative.astype(x.dtype), noisy)
        next_relative = next_relative_clip_norm(
            mechanism.adaptive_clipping,
            relative,
            mechanism.l2_clip_norm,
            clip.sensitive_norms,
            is_padding_example,
            expected_batch_size=mechanism.expected_batch_size,
            stddev=mechanism.count_stddev,
            key=noise.key,
            release=noise.count,
        )
    updates, inner = optimizer.update(noisy, state.opt_state[1], state.params)
    params = optax.apply_updates(state.params, updates)
    iteration = state.iteration + 1
    present = jnp.sum(~is_padding_example)
    cut = jnp.sum(clip.sensitive_norms > relative * mechanism.l2_clip_norm)
    losses = clip.sensitive_losses
    share = 1.0 / jnp.maximum(present, 1).astype(jnp.float32)
    info = StepInfo(
        iteration,
        optax.tree.norm(noisy),
        jnp.sum(jnp.where(jnp.isfinite(losses), losses, 0.0)) * share,
        present,
        cut.astype(jnp.float32) * share,
        clip,
    )
    after = TrainState(params, (noise_state, inner), state.sampling_key, iteration, next_relative)
    if state_sharding is not None:
        after = jax.lax.with_sharding_constraint(after, state_sharding)
    return after, info


_compiled_step = jax.jit(_train_step, static_argnames=("mechanism", "optimizer", "state_sharding"))


def train_step(
    state: TrainState,
    batch: PyTree,
    is_padding_example: Bool[Array, " physical"],
    *,
    mechanism: DPSGD,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state_sharding: jax.sharding.Sharding | None = None,
) -> tuple[TrainState, StepInfo]:
    """One iteration: clip, sum, add noise once, update. Compiled once for each combination.

    Args:
      state: from `init_state` or the step before.
      batch: pytree whose leaves have a leading axis ``physical``.
      is_padding_example: bool[physical].
      mechanism, optimizer: compiled in.
      loss_fn: the function is compiled in; arrays that it reads beside the parameters belong into
        a ``jax.tree_util.Partial``, which passes them as arguments.
      state_sharding: where the new state lies. With several devices it must be where the old one
        lay, or the next step compiles again for what XLA chose.

    Guarantee:
      Of the batch, only the noisy sum reaches the new parameters and optimizer state. An empty
      batch (all padding) is a step too: its update is noise.
    """
    return _compiled_step(
        state,
        batch,
        is_padding_example,
        mechanism=mechanism,
        loss_fn=_with_arrays(loss_fn),
        optimizer=optimizer,
        state_sharding=state_sharding,
    )


def _with_arrays(loss_fn: LossFn) -> jax.tree_util.Partial:
    """The loss as a pytree; a Partial of a Partial would hide the inner one's arrays."""
    is_one = isinstance(loss_fn, jax.tree_util.Partial)
    return loss_fn if is_one else jax.tree_util.Partial(loss_fn)


def fit(
    state: TrainState,
    mechanism: DPSGD,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    dataset: TrainingData,
    *,
    sampler: samplers.Sampler | None = None,
    ledger: Ledger | None = None,
    run: int | None = None,
    max_iterations: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Iterator[tuple[TrainState, StepInfo]]:
    """Trains from ``state.iteration`` to the planned end, yielding after every iteration.

    Args:
      state: from `init_state` or a checkpoint; the loop continues where it stands.
      mechanism: the frozen configuration; its sampler chooses the batches.
      loss_fn: ``loss_fn(params, example) -> scalar`` for one example; see `train_step`.
      optimizer: the optax optimizer that `init_state` was given.
      dataset: has ``len``, ``take`` and ``fingerprint`` (`dpjax.data.Dataset`, `ArrayDataset`).
      sampler: default: ``mechanism.sampler(len(dataset), state.sampling_key)``. Another one is
        refused unless its event is the one that the mechanism accounts for.
      ledger: where every release is written before it is computed.
      run: the ledger's number of this run (`Ledger.start_run`); required with a ledger.
      max_iterations: stop after this iteration, e.g. from `affordable_iterations`; at most the
        planned number.
      devices: default: all local devices. The batch axis is sharded over them, parameters are
        replicated, noise is added once to the sum.

    Yields:
      ``(state, info)`` after each iteration.

    Raises:
      DpjaxError: an empty data set, another population or sampler than accounted for.

    Guarantee:
      Each yielded state is the result of at most ``mechanism.iterations`` releases of
      ``mechanism.dp_event``'s kind. A loop that is resumed from a saved state draws the same rows
      and noise as one that never stopped. All steps share one compilation (a Poisson batch beyond
      its physical shape, probability 1e-12, costs a second).

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = ArrayDataset({"x": np.ones((64, 2), np.float32)})
      >>> loss_fn = lambda w, example: jnp.sum((w - example["x"]) ** 2)
      >>> mechanism = DPSGD(1.0, 0.25, 20, noise_multiplier=1.0, normalize_by=16.0)
      >>> optimizer = optax.sgd(0.2)
      >>> state = init_state(mechanism, jnp.zeros(2), optimizer, jax.random.key(0))
      >>> for state, info in fit(state, mechanism, loss_fn, optimizer, data):
      ...     pass
      >>> bool(jnp.all(jnp.abs(state.params - 1) < 0.5)), int(state.iteration)
      (True, 20)
    """
    if len(dataset) == 0:
        raise DpjaxError("the data set is empty; give it at least one record")
    if (ledger is None) != (run is None):
        raise DpjaxError(f"run is {run}; pass ledger and run together (Ledger.start_run)")
    if sampler is None:
        sampler = mechanism.sampler(len(dataset), state.sampling_key)
    else:
        mechanism.check_sampler(sampler)
        if sampler.population != len(dataset):
            raise DpjaxError(
                f"the sampler draws from {sampler.population} examples, but the data set has "
                f"{len(dataset)}"
            )
    devices = list(jax.local_devices() if devices is None else devices)
    microbatch_size = mechanism.microbatch_size
    sampler = dataclasses.replace(sampler, multiple_of=math.lcm(microbatch_size or 1, len(devices)))
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_example = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = jax.device_put(state, replicated)
    # Arrays that the loss reads beside the parameters, such as frozen weights, go along.
    loss_fn = jax.device_put(_with_arrays(loss_fn), replicated)

    end = mechanism.iterations
    if max_iterations is not None:
        end = min(end, max_iterations)
    for iteration in range(int(state.iteration), end):
        rows = arrange(sampler.batch(iteration), microbatch_size)
        batch, is_padding_example = jax.device_put(
            (dataset.take(rows.indices), rows.is_padding_example), by_example
        )
        if ledger is not None and run is not None:
            ledger.record_release(
                run, iteration, sampler, mechanism.noise_multiplier or 0.0, mechanism.strategy
            )
        state, info = train_step(
            state,
            batch,
            is_padding_example,
            mechanism=mechanism,
            loss_fn=loss_fn,
            optimizer=optimizer,
            state_sharding=replicated,
        )
        yield state, info


def arrange(rows: Batch, microbatch_size: int | None) -> Batch:
    """Reorders rows so that padding gathers in the last microbatches, which are then skipped."""
    if microbatch_size is None or microbatch_size >= len(rows.indices):
        return rows
    order = microbatch_order(len(rows.indices), microbatch_size)
    return Batch(rows.indices[order], rows.is_padding_example[order])
