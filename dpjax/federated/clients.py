"""Clients' ragged data, and the cohort of one round in shapes that compile once."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpjax.data import ArrayDataset, stable_id
from dpjax.errors import DpjaxError
from dpjax.types import PyTree, RandomKey, require_key


class Cohort(NamedTuple):
    """The clients of one round, shared out over S shards. Padding clients have no steps.

    Every array has a leading axis of shards, one for each device.
    """

    examples: PyTree  # leaves [S, M, ...]: the clients' own examples, one after another
    batches: Any  # int32[S, T, B]: rows of ``examples`` for each local step; -1 is padding
    client: Any  # int32[S, C]: who it is; the number of all clients where padding
    first_step: Any  # int32[S, C]: where a client's steps begin in ``batches``
    num_steps: Any  # int32[S, C]: 0 for a client without examples, and for padding
    steps_per_epoch: Any  # int32[S, C]
    num_examples: Any  # int32[S, C]
    is_client: Any  # bool[S, C], False where padding

    @property
    def num_clients(self) -> int:
        """Clients that take part, those without examples included."""
        return int(self.is_client.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Clients:
    """Who holds which examples.

    Attributes:
      examples: pytree of arrays with leading axis N.
      rows: for each of K clients the rows that it holds, int64[n_k]; none is held twice.
      names: K distinct names.

    Example:
      >>> found = Clients({"x": np.arange(5)}, (np.array([0, 3]), np.array([4])), ("ann", "bob"))
      >>> len(found), found.sizes.tolist()
      (2, [2, 1])
    """

    examples: PyTree
    rows: tuple[Any, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        data = ArrayDataset(self.examples)
        rows = tuple(np.asarray(r, np.int64) for r in self.rows)
        if not rows or len(rows) != len(self.names) or len(set(self.names)) != len(self.names):
            raise DpjaxError(
                f"there are {len(rows)} clients with {len(set(self.names))} distinct names; give "
                "one name for each, and at least one client"
            )
        held = np.concatenate(rows)
        if held.size and (held.min() < 0 or held.max() >= len(data)):
            raise DpjaxError(
                f"a client holds row {held.min() if held.min() < 0 else held.max()} of "
                f"{len(data)} examples; rows are counted from 0"
            )
        if len(np.unique(held)) != len(held):
            raise DpjaxError("an example is held twice; give every row to one client, once")
        object.__setattr__(self, "examples", data.take(np.arange(len(data))))
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Clients({len(self)}, examples={int(self.sizes.sum())})"

    @property
    def sizes(self) -> np.ndarray:
        """int64[K], examples of each client."""
        return np.array([len(r) for r in self.rows], np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of examples and who holds them."""
        content = hashlib.sha256(ArrayDataset(self.examples).fingerprint().encode())
        for name, rows in zip(self.names, self.rows, strict=True):
            content.update(f"{stable_id('client', name)} {len(rows)} ".encode() + rows.tobytes())
        return content.hexdigest()

    def cohort(
        self,
        chosen: Sequence[int] | np.ndarray,
        key: RandomKey,
        *,
        batch_size: int | None,
        epochs: int = 1,
        max_steps: int | None = None,
        num_shards: int = 1,
        drop_remainder: bool = False,
    ) -> Cohort:
        """The chosen clients with their local batches, in shapes rounded up to powers of two.

        Clients are dealt to shards so that each has about as many steps; in a shard those with
        most steps come first, so that clients that run side by side are alike.

        Args:
          chosen: client numbers, distinct; may be none.
          key: JAX random key. A client's shuffles depend on it and on the client, not on who else
            takes part or on the number of shards.
          batch_size: examples of one local step; None is all of a client's.
          epochs: passes over a client's examples, each in a new order.
          max_steps: cuts every client's work.
          num_shards: devices.
          drop_remainder: leaves out a last batch that is not full (of clients with a full one).

        Raises:
          DpjaxError: an unknown or repeated client, or sizes below 1.

        Example:
          >>> people = Clients({"x": np.arange(5)}, (np.arange(3), np.arange(3, 5)), ("a", "b"))
          >>> cohort = people.cohort([0, 1], jax.random.key(0), batch_size=2)
          >>> cohort.num_steps.tolist(), cohort.batches.shape, cohort.num_clients
          ([[2, 1]], (1, 4, 2), 2)
        """
        ids = [int(c) for c in chosen]
        if len(set(ids)) != len(ids) or any(not 0 <= c < len(self) for c in ids):
            raise DpjaxError(f"chosen clients must be distinct numbers below {len(self)}")
        least = min(epochs, num_shards, 1 if max_steps is None else max_steps)
        if least < 1 or (batch_size is not None and batch_size < 1):
            raise DpjaxError(
                f"batch_size is {batch_size}, epochs {epochs}, max_steps {max_steps}, num_shards "
                f"{num_shards}; each must be at least 1"
            )
        seed = np.asarray(jax.random.key_data(require_key(key))).astype(np.uint32).tolist()
        width = batch_size or max([1, *(len(self.rows[c]) for c in ids)])
        if batch_size is None:
            width = _power_of_two(width)
        plans = {
            c: _batches(
                len(self.rows[c]),
                width,
                epochs,
                max_steps,
                drop_remainder,
                # The name, not the number: a client keeps its shuffles when others join.
                np.random.default_rng([*seed, stable_id("client", self.names[c]) % 2**32]),
            )
            for c in ids
        }
        shards: list[list[int]] = [[] for _ in range(num_shards)]
        work = [0] * num_shards
        for c in sorted(ids, key=lambda c: (-len(plans[c][0]), c)):
            least_busy = min(range(num_shards), key=lambda s: (work[s], len(shards[s]), s))
            shards[least_busy].append(c)
            work[least_busy] += len(plans[c][0])
        slots = _power_of_two(max(1, max(map(len, shards))))
        steps = _power_of_two(max(1, max(work)))
        held = [sum(len(self.rows[c]) for c in shard) for shard in shards]
        room = _power_of_two(max(1, max(held)))
        batches = np.full((num_shards, steps, width), -1, np.int32)
        table = np.zeros((num_shards, 5, slots), np.int32)
        table[:, 0] = len(self)
        is_client = np.zeros((num_shards, slots), bool)
        taken = np.zeros((num_shards, room), np.int64)
        for s, shard in enumerate(shards):
            at, begin = 0, 0
            for place, c in enumerate(shard):
                plan, per_epoch = plans[c]
                rows = self.rows[c]
                taken[s, begin : begin + len(rows)] = rows
                batches[s, at : at + len(plan)] = np.where(plan >= 0, plan + begin, -1)
                table[s, :, place] = (c, at, len(plan), per_epoch, len(rows))
                is_client[s, place] = True
                at, begin = at + len(plan), begin + len(rows)
        examples = jax.tree.map(lambda x: np.asarray(x)[taken], self.examples)
        return Cohort(examples, batches, *(table[:, n] for n in range(5)), is_client)


def _batches(
    size: int,
    width: int,
    epochs: int,
    max_steps: int | None,
    drop_remainder: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """int32[steps, width] of a client's own example numbers, and its steps in one epoch."""
    per_epoch = -(-size // width)
    if drop_remainder and size >= width:
        per_epoch = size // width
    parts = []
    for _ in range(epochs if size else 0):
        order = rng.permutation(size)[: per_epoch * width]
        padded = np.full(per_epoch * width, -1, np.int32)
        padded[: len(order)] = order
        parts.append(padded.reshape(per_epoch, width))
    plan = np.concatenate(parts) if parts else np.zeros((0, width), np.int32)
    return plan[:max_steps], per_epoch


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def clients_by(dataset: Any, owners: Sequence[Any] | np.ndarray) -> Clients:
    """One client for each distinct owner: the natural partition.

    Args:
      dataset: pytree of arrays with leading axis N, or anything with ``take`` and ``len``.
      owners: N names or numbers.

    Example:
      >>> clients_by({"x": np.arange(3)}, ["bob", "ann", "bob"]).names
      ('ann', 'bob')
    """
    examples = as_pytree(dataset)
    owners = np.asarray([str(o) for o in owners])
    names, inverse = np.unique(owners, return_inverse=True)
    rows = tuple(np.flatnonzero(inverse == n) for n in range(len(names)))
    return Clients(examples, rows, tuple(str(n) for n in names))


def as_pytree(dataset: Any) -> PyTree:
    if hasattr(dataset, "take") and not isinstance(dataset, np.ndarray):
        return dataset.take(np.arange(len(dataset)))
    return dataset
