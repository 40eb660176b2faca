"""Clients' ragged data, and the cohort of one round in shapes that compile a few times at most."""

import dataclasses
import functools
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


class CohortShape(NamedTuple):
    """Room in each shard of a cohort; what does not fill it is padding and takes no time."""

    clients: int
    steps: int  # of all clients of the shard
    examples: int
    width: int  # examples of one step


@dataclasses.dataclass(frozen=True, eq=False)
class Clients:
    """Who holds which examples.

    In a job of several processes each has a `Clients` with every name, and with the rows of its
    own clients only.

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
        if held.size and np.bincount(held).max() > 1:
            raise DpjaxError("an example is held twice; give every row to one client, once")
        object.__setattr__(self, "examples", data.take(np.arange(len(data))))
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Clients({len(self)}, examples={int(self.sizes.sum())})"

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64[K], examples of each client."""
        return np.array([len(r) for r in self.rows], np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of examples and who holds them."""
        content = hashlib.sha256(ArrayDataset(self.examples).fingerprint().encode())
        for name, rows in zip(self.names, self.rows, strict=True):
            content.update(f"{stable_id('client', name)} {len(rows)} ".encode() + rows.tobytes())
        return content.hexdigest()

    def shapes(
        self,
        *,
        batch_size: int | None,
        epochs: int = 1,
        max_steps: int | None = None,
        num_shards: int = 1,
        drop_remainder: bool = False,
        cohort_size: int | None = None,
    ) -> tuple[CohortShape, ...]:
        """At most four shapes, ascending; the last holds any cohort. `cohort` takes the least.

        They depend on the population, never on who was drawn: a round compiles at most four times.
        Which of the four it was tells how large a cohort's data were. That stays on the host, like
        the cohort itself; the noise does not cover it.

        Args:
          cohort_size: expected clients of a cohort; the first shapes then fit just that. None
            allows for a 64th, a 16th, a quarter and all of the clients.
          batch_size, epochs, max_steps, num_shards, drop_remainder: as in `cohort`.

        Example:
          >>> people = Clients({"x": np.arange(5)}, (np.arange(3), np.arange(3, 5)), ("a", "b"))
          >>> people.shapes(batch_size=2)[-1]
          CohortShape(clients=2, steps=3, examples=5, width=2)
        """
        work = _Work(batch_size, epochs, max_steps, num_shards, drop_remainder)
        work.check()
        return self._shapes(work, cohort_size)

    def _shapes(self, work: "_Work", cohort_size: int | None) -> tuple[CohortShape, ...]:
        everybody = len(self)
        if cohort_size is None:
            counts = [-(-everybody // part) for part in (64, 16, 4, 1)]
        elif cohort_size < 1:
            raise DpjaxError(f"cohort_size is {cohort_size}; it must be at least 1")
        else:
            # Poisson sampling hardly ever draws more than the second.
            wide = cohort_size + int(np.ceil(4 * np.sqrt(cohort_size)))
            counts = [min(n, everybody) for n in (cohort_size, wide, 4 * cohort_size, everybody)]
        width = work.width(self.sizes)
        _, steps, used = work.plan(self.sizes, width)
        found = []
        for count in sorted(set(counts)):
            room, held = (_room(x, count, work.num_shards) for x in (steps, used))
            found.append(CohortShape(-(-count // work.num_shards), room, held, width))
        return tuple(found)

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
        cohort_size: int | None = None,
        shape: CohortShape | None = None,
    ) -> Cohort:
        """The chosen clients with their local batches, in the least of `shapes` that holds them.

        Clients are dealt to shards by size, there and back, so that each has as many clients, and
        about as many steps; in a shard the largest come first, so that clients that run side by
        side are alike.

        Args:
          chosen: client numbers, distinct; may be none.
          key: JAX random key. A client's shuffles depend on it and on the client, not on who else
            takes part or on the number of shards.
          batch_size: examples of one local step; None is all of a client's, padded to the largest
            client's number.
          epochs: passes over a client's examples, each in a new order.
          max_steps: cuts every client's work.
          num_shards: devices (of this process).
          drop_remainder: leaves out a last batch that is not full (of clients with a full one).
          cohort_size: as in `shapes`; spares padding where cohorts are about as large.
          shape: one that all processes of a job agree on, in place of `shapes`.

        Raises:
          DpjaxError: an unknown or repeated client, sizes below 1, or a shape that is too small.

        Example:
          >>> people = Clients({"x": np.arange(5)}, (np.arange(3), np.arange(3, 5)), ("a", "b"))
          >>> cohort = people.cohort([0, 1], jax.random.key(0), batch_size=2)
          >>> cohort.num_steps.tolist(), cohort.batches.shape, cohort.num_clients
          ([[2, 1]], (1, 3, 2), 2)
        """
        ids = np.asarray(chosen, np.int64).reshape(-1)
        if len(np.unique(ids)) != len(ids) or np.any((ids < 0) | (ids >= len(self))):
            raise DpjaxError(f"chosen clients must be distinct numbers below {len(self)}")
        work = _Work(batch_size, epochs, max_steps, num_shards, drop_remainder)
        work.check()
        seed = np.asarray(jax.random.key_data(require_key(key))).astype(np.uint64)

        # Dealt by size, there and back (0 1 2 2 1 0 ...), then sorted by shard and place.
        ids = ids[np.lexsort((ids, -self.sizes[ids]))]
        turn, place = np.arange(len(ids)) % num_shards, np.arange(len(ids)) // num_shards
        shard = np.where(place % 2 == 1, num_shards - 1 - turn, turn)
        order = np.argsort(shard, kind="stable")
        ids, shard, place = ids[order], shard[order], place[order]

        sizes = self.sizes[ids]
        width = work.width(self.sizes) if shape is None else shape.width
        per_epoch, steps, used = work.plan(sizes, width)
        first_step, all_steps = _offsets(steps, shard, num_shards)
        first_row, all_rows = _offsets(used, shard, num_shards)
        need = CohortShape(-(-len(ids) // num_shards), max(all_steps), max(all_rows), width)
        allowed = self._shapes(work, cohort_size) if shape is None else (shape,)
        fitting = [s for s in allowed if all(n <= room for n, room in zip(need, s, strict=True))]
        if not fitting or (batch_size or 0) > width:
            raise DpjaxError(
                f"the cohort needs {need} and has room for {allowed[-1]}; give a larger shape"
            )
        room = fitting[0]

        batches = np.full((num_shards, room.steps, width), -1, np.int32)
        held = np.concatenate([self.rows[c] for c in ids]) if len(ids) else np.zeros(0, np.int64)
        owner = np.repeat(np.arange(len(ids)), sizes)
        within = np.arange(len(held)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        # The name, not the number: a client keeps its shuffles when others join.
        names = np.array([stable_id("client", self.names[c]) % 2**64 for c in ids], np.uint64)
        seeds = _scrambled(_scrambled(names ^ seed[0]) ^ seed[-1])
        stored = None
        for epoch in range(int(np.max(-(-steps // np.maximum(per_epoch, 1)), initial=0))):
            rank = _shuffled(seeds, owner, within, epoch)
            if stored is None:
                stored = rank  # examples lie in the order of the first epoch
            at = epoch * per_epoch[owner] + rank // width
            seen = (rank < per_epoch[owner] * width) & (at < steps[owner])
            who = owner[seen]
            batches[shard[who], first_step[who] + at[seen], rank[seen] % width] = (
                first_row[who] + stored[seen]
            )
        table = np.zeros((5, num_shards, room.clients), np.int32)
        table[0] = len(self)
        is_client = np.zeros((num_shards, room.clients), bool)
        table[:, shard, place] = ids, first_step, steps, per_epoch, sizes
        is_client[shard, place] = True
        kept = stored < used[owner] if stored is not None else np.zeros(len(held), bool)
        source = np.zeros((num_shards, max(all_rows)), np.int64)
        if stored is not None:
            source[shard[owner[kept]], (first_row[owner] + stored)[kept]] = held[kept]

        def gathered(x):
            out = np.zeros((num_shards, room.examples, *x.shape[1:]), x.dtype)
            for s, rows in enumerate(all_rows):
                np.take(x, source[s, :rows], axis=0, out=out[s, :rows], mode="clip")
            return out

        examples = jax.tree.map(lambda x: gathered(np.asarray(x)), self.examples)
        who, first, count, epoch, size = table
        return Cohort(examples, batches, who, first, count, epoch, size, is_client)


class _Work(NamedTuple):
    """How clients train: what turns a number of examples into steps."""

    batch_size: int | None
    epochs: int
    max_steps: int | None
    num_shards: int
    drop_remainder: bool

    def check(self) -> None:
        least = min(self.epochs, self.num_shards, *(x for x in self[:3:2] if x is not None))
        if least < 1:
            raise DpjaxError(
                f"batch_size is {self.batch_size}, epochs {self.epochs}, max_steps "
                f"{self.max_steps}, num_shards {self.num_shards}; each must be at least 1"
            )

    def width(self, sizes: np.ndarray) -> int:
        """Of all cohorts alike: the population's largest, not the cohort's."""
        return self.batch_size or max(1, int(sizes.max()))

    def plan(self, sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each client its steps in an epoch, its steps, and how many examples they touch."""
        per_epoch = -(-sizes // width)
        if self.drop_remainder:
            per_epoch = np.where(sizes >= width, sizes // width, per_epoch)
        steps = self.epochs * per_epoch
        if self.max_steps is not None:
            steps = np.minimum(steps, self.max_steps)
        return per_epoch, steps, np.where(
            steps > per_epoch, sizes, np.minimum(sizes, steps * width)
        )  # fmt: skip


def _room(amounts: np.ndarray, count: int, num_shards: int) -> int:
    """Enough for each shard of nearly any ``count`` clients; of any, where that is everybody."""
    largest = np.sort(amounts)[::-1]
    usual = count * amounts.mean() + 4 * np.sqrt(count) * amounts.std()
    total = min(largest[:count].sum(), usual) if count < len(amounts) else largest.sum()
    # Dealt there and back in falling order, shards differ by no more than the largest.
    return max(1, int(np.ceil(total / num_shards)) + (int(largest[0]) if num_shards > 1 else 0))


def _offsets(
    amounts: np.ndarray, shard: np.ndarray, num_shards: int
) -> tuple[np.ndarray, list[int]]:
    """Where each client begins in its shard, and what the shards hold; clients sorted by shard."""
    totals = np.bincount(shard, amounts, num_shards).astype(np.int64)
    before = np.cumsum(totals) - totals
    return np.cumsum(amounts) - amounts - before[shard], [int(t) for t in totals]


def _shuffled(seeds: np.ndarray, owner: np.ndarray, within: np.ndarray, epoch: int) -> np.ndarray:
    """For every example its place in its client's new order; clients lie one after another."""
    with np.errstate(over="ignore"):
        start = _scrambled(seeds + np.uint64(epoch))
        draws = _scrambled(start[owner] + within.astype(np.uint64) * np.uint64(_GOLDEN))
    # One sort for all: the owner in the upper bits, 40 random ones below.
    draws = (owner.astype(np.uint64) << np.uint64(40)) | (draws >> np.uint64(24))
    order = np.argsort(draws, kind="stable")
    rank = np.empty(len(owner), np.int64)
    rank[order] = within  # the n-th of a client's sorted draws is at its n-th place
    return rank


_GOLDEN = 0x9E3779B97F4A7C15


def _scrambled(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al., 2014): 64 good random bits for each number, all at once."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def clients_by(
    dataset: Any, owners: Sequence[Any] | np.ndarray | None = None, *, min_size: int = 1
) -> Clients:
    """One client for each distinct owner: the natural partition.

    Args:
      dataset: pytree of arrays with leading axis N, or anything with ``take`` and ``len``.
      owners: N names or numbers, of any column. None asks the data set whose each example is, by
        its ``people``: senders of `dpjax.data.chitchat`, speakers of `dpjax.data.shakespeare`.
      min_size: owners with fewer examples are left out. Choose it without looking at the private
        data, or say so in the report.

    Raises:
      DpjaxError: no owners, or none with as many examples.

    Example:
      >>> clients_by({"x": np.arange(3)}, ["bob", "ann", "bob"]).names
      ('ann', 'bob')
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> said = (("To be", "Hamlet"), ("or not", "Hamlet"), ("All hail", "Macbeth"))
      >>> records = [Record(*speech) for speech in said]
      >>> people = clients_by(dataset_from_records(records, byte_tokenizer(), 8), min_size=2)
      >>> people.sizes.tolist()
      [2]
    """
    examples = as_pytree(dataset)
    if owners is None:
        if not hasattr(dataset, "people"):
            raise DpjaxError("the data set does not say whose its examples are; give owners")
        owners = dataset.people()
    assert owners is not None
    owners = np.asarray([str(o) for o in owners])
    names, inverse, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
    kept = np.flatnonzero(sizes >= min_size)
    if not kept.size:
        raise DpjaxError(f"no owner of {len(names)} has {min_size} examples; lower min_size")
    return Clients(examples, tuple(rows[n] for n in kept), tuple(str(names[n]) for n in kept))


def as_pytree(dataset: Any) -> PyTree:
    """All examples of a data set with ``take`` and ``len``; a pytree of arrays as it is."""
    if hasattr(dataset, "take") and not isinstance(dataset, np.ndarray):
        return dataset.take(np.arange(len(dataset)))
    return dataset
