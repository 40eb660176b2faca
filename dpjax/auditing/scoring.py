"""Scores of many examples in one compiled, batched, sharded pass; cached and resumable."""

import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from dpjax.checkpoint import digest
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply
from dpjax.types import LossFn, PyTree, TrainingData

_CHUNK = 16  # batches in one file of the cache


class TokenStatistics(NamedTuple):
    """What a language model says of every predicted token of N sequences of T tokens."""

    log_probs: np.ndarray  # float32[N, T - 1], of the token that stands there, nats
    mean: np.ndarray  # float32[N, T - 1], of log-probabilities under the model's own distribution
    stddev: np.ndarray  # float32[N, T - 1], the same
    mask: np.ndarray  # bool[N, T - 1], where a token counts


def score_examples(
    loss_fn: LossFn,
    params: PyTree,
    dataset: TrainingData,
    *,
    batch_size: int = 64,
    devices: Sequence[Any] | None = None,
    cache: str | os.PathLike | None = None,
    cache_name: str | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The loss of every example: float64[N].

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for one example. Arrays that it reads beside
        the parameters belong into a ``jax.tree_util.Partial``.
      dataset: has ``len``, ``take`` and ``fingerprint``.
      batch_size: examples at once, over all devices; rounded up to a multiple of their number.
      devices: default all local ones; the batch axis is sharded over them.
      cache: folder for finished chunks. A pass that was stopped goes on there; other parameters or
        data never hit.
      cache_name: names the loss in the cache, e.g. "mlp cross-entropy 1"; required with ``cache``,
        because a function's content cannot be seen.
      progress: show a bar.

    Raises:
      DpjaxError: an empty data set, a batch size below 1, or a cache without a name.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = ArrayDataset({"x": np.arange(5.0, dtype=np.float32)})
      >>> score_examples(lambda w, e: (w - e["x"]) ** 2, jnp.float32(1.0), data, batch_size=2)
      array([1., 0., 1., 4., 9.])
    """
    if cache is not None and not cache_name:
        raise DpjaxError("cache_name is missing; name the loss that the cache keeps the values of")
    loss = loss_fn if isinstance(loss_fn, jax.tree_util.Partial) else jax.tree_util.Partial(loss_fn)
    found = map_examples(
        _losses, (loss, params), dataset, batch_size, devices, cache, cache_name, progress
    )
    return found[0].astype(np.float64)


def token_statistics(
    config: DecoderConfig,
    params: PyTree,
    dataset: TrainingData,
    *,
    batch_size: int = 64,
    devices: Sequence[Any] | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> TokenStatistics:
    """Log-probabilities of every token, with what the model expected there.

    Args:
      dataset: examples ``{"tokens": int32[T], "loss_mask": bool[T]}``; a token is predicted, and
        counts, where its own mask is true.
      batch_size, devices, cache, progress: as in `score_examples`.

    Example:
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> from dpjax.models import decoder_config, init_params
      >>> data = dataset_from_records([Record("hello"), Record("hi")], byte_tokenizer(), 8)
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> found = token_statistics(config, init_params(config, jax.random.key(0)), data)
      >>> found.log_probs.shape, found.mask.sum(axis=1).tolist()
      ((2, 7), [6, 3])
    """
    function = _compiled_statistics(config)
    name = f"tokens {config!r}"
    found = map_examples(function, (params,), dataset, batch_size, devices, cache, name, progress)
    mask = np.concatenate(
        [
            dataset.take(np.arange(start, min(start + 1024, len(dataset))))["loss_mask"][:, 1:]
            for start in range(0, len(dataset), 1024)
        ]
    )
    return TokenStatistics(found[0], found[1], found[2], np.asarray(mask, bool))


@jax.jit
def _losses(loss: LossFn, params: PyTree, batch: PyTree) -> tuple[jax.Array, ...]:
    return (jax.vmap(loss, (None, 0))(params, batch).astype(jnp.float32),)


def _statistics(
    config: DecoderConfig, params: PyTree, batch: dict[str, jax.Array]
) -> tuple[jax.Array, ...]:
    def one(tokens):
        log_probs = jax.nn.log_softmax(apply(config, params, tokens[:-1]).astype(jnp.float32))
        chosen = jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]
        probs = jnp.exp(log_probs)
        # A token that cannot occur has probability 0 and a log-probability of minus infinity.
        finite = jnp.where(probs > 0, log_probs, 0.0)
        mean = jnp.sum(probs * finite, axis=1)
        variance = jnp.sum(probs * (finite - mean[:, None]) ** 2, axis=1)
        return chosen, mean, jnp.sqrt(variance)

    return jax.vmap(one)(batch["tokens"])


@functools.lru_cache(maxsize=16)
def _compiled_statistics(config: DecoderConfig) -> Callable:
    return jax.jit(functools.partial(_statistics, config))


def map_examples(
    compiled: Callable,
    arguments: tuple,
    dataset: TrainingData,
    batch_size: int,
    devices: Sequence[Any] | None = None,
    cache: str | os.PathLike | None = None,
    name: str | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, ...]:
    """``compiled(*arguments, batch)`` over the data set: arrays with leading axis N.

    Args:
      compiled: a jitted function, the same object at every call; returns arrays with a leading
        axis of the batch.
      name: names what the function computes in the cache.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = ArrayDataset({"x": np.arange(3)})
      >>> double = jax.jit(lambda batch: (2 * batch["x"],))
      >>> map_examples(double, (), data, 2)[0].tolist()
      [0, 2, 4]
    """
    if len(dataset) == 0:
        raise DpjaxError("the data set is empty; there is nothing to score")
    if batch_size < 1:
        raise DpjaxError(f"batch_size is {batch_size}; it must be at least 1")
    devices = list(jax.local_devices() if devices is None else devices)
    size = -(-min(batch_size, len(dataset)) // len(devices)) * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_example = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    folder = None
    if cache is not None:
        content = f"{name} {digest(arguments)} {dataset.fingerprint()} {size}"
        folder = pathlib.Path(cache) / hashlib.sha256(content.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
    arguments = jax.device_put(arguments, everywhere)
    chunks = []
    starts = range(0, len(dataset), size * _CHUNK)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("scoring", total=len(dataset))
        for number, first in enumerate(starts):
            path = None if folder is None else folder / f"{number}.npz"
            chunk = None if path is None else _read(path)
            if chunk is None:
                parts = []
                for start in range(first, min(first + size * _CHUNK, len(dataset)), size):
                    rows = np.arange(start, start + size)
                    # The last batch repeats its first row, so that one compilation serves all.
                    inside = rows < len(dataset)
                    batch = jax.device_put(dataset.take(np.where(inside, rows, start)), by_example)
                    parts.append([np.asarray(x)[inside] for x in compiled(*arguments, batch)])
                chunk = [np.concatenate(x) for x in zip(*parts, strict=True)]
                if path is not None:
                    _write(path, chunk)
            chunks.append(chunk)
            bar.advance(task, len(chunk[0]))
    return tuple(np.concatenate(x) for x in zip(*chunks, strict=True))


def _read(path: pathlib.Path) -> list[np.ndarray] | None:
    """A finished chunk; None if there is none, or it is broken: it is computed again then."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            return [saved[f"arr_{i}"] for i in range(len(saved.files))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: pathlib.Path, chunk: Sequence[np.ndarray]) -> None:
    waiting = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with waiting.open("wb") as file:
            np.savez(file, *chunk)
        waiting.replace(path)
    except OSError as error:
        raise DpjaxError(f"{path} cannot be written ({error.strerror}); make room") from None
