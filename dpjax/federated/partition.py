"""Partitions of a data set over clients: from alike to as unlike as can be."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.clients import Clients, as_pytree


def partition_iid(
    dataset: Any, num_clients: int, *, seed: int, size_concentration: float | None = None
) -> Clients:
    """Every client has a random part of all.

    Args:
      dataset: pytree of arrays with leading axis N, or anything with ``take`` and ``len``.
      num_clients: K.
      seed: decides who gets what.
      size_concentration: None gives equal sizes (one more or less); otherwise shares are drawn
        from a symmetric Dirichlet distribution with this concentration: small is uneven.

    Source: McMahan et al. (2017), section 3.

    Example:
      >>> partition_iid({"x": np.arange(10)}, 3, seed=0).sizes.tolist()
      [4, 3, 3]
    """
    examples, size = _sized(dataset)
    rng = np.random.default_rng(seed)
    order = rng.permutation(size)
    if size_concentration is None:
        parts = np.array_split(order, _count(num_clients, size))
    else:
        shares = rng.dirichlet(np.full(_count(num_clients, size), _positive(size_concentration)))
        parts = np.split(order, np.round(np.cumsum(shares)[:-1] * size).astype(int))
    return _clients(examples, parts)


def partition_dirichlet(
    dataset: Any,
    labels: Sequence[Any] | np.ndarray,
    num_clients: int,
    *,
    concentration: float,
    seed: int,
    min_size: int = 1,
) -> Clients:
    """Each label's examples are shared out by a Dirichlet draw of their own.

    Args:
      dataset: as in `partition_iid`.
      labels: N labels.
      num_clients: K.
      concentration: alpha; 0.1 gives clients of one or two labels, 100 is nearly IID.
      seed: decides who gets what.
      min_size: draws are repeated until every client has as many; at most 1,000 times.

    Raises:
      DpjaxError: no draw gives every client its least.

    Source: Hsu et al. (2019), *Measuring the effects of non-identical data distribution for
      federated visual classification*; per label as in Yurochkin et al. (2019).

    Example:
      >>> labels = np.repeat([0, 1], 50)
      >>> found = partition_dirichlet({"y": labels}, labels, 4, concentration=0.5, seed=0)
      >>> int(found.sizes.sum()), bool(found.sizes.min() >= 1)
      (100, True)
    """
    examples, size = _sized(dataset)
    codes = _codes(labels, size)
    _count(num_clients, size)
    _positive(concentration)
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for label in range(codes.max() + 1):
            rows = rng.permutation(np.flatnonzero(codes == label))
            shares = rng.dirichlet(np.full(num_clients, concentration))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(chunk.tolist())
        if min(map(len, parts)) >= min_size:
            return _clients(examples, [np.array(p, np.int64) for p in parts])
    raise DpjaxError(
        f"no draw in 1,000 gave each of {num_clients} clients {min_size} examples; raise the "
        f"concentration ({concentration}) or use fewer clients"
    )


def partition_shards(
    dataset: Any,
    labels: Sequence[Any] | np.ndarray,
    num_clients: int,
    *,
    shards_per_client: int = 2,
    seed: int,
) -> Clients:
    """The pathological partition: sorted by label, cut into shards, a few shards for each client.

    Source: McMahan et al. (2017), section 3: two shards of 300 for each of 100 clients.

    Example:
      >>> labels = np.repeat(np.arange(10), 20)
      >>> found = partition_shards({"y": labels}, labels, 10, seed=0)
      >>> max(len(set(labels[rows])) for rows in found.rows) <= 4
      True
    """
    examples, size = _sized(dataset)
    codes = _codes(labels, size)
    total = _count(num_clients, size) * shards_per_client
    if shards_per_client < 1 or total > size:
        raise DpjaxError(
            f"{num_clients} clients with {shards_per_client} shards need {total} examples; there "
            f"are {size}"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(size)
    shards = np.array_split(shuffled[np.argsort(codes[shuffled], kind="stable")], total)
    dealt = rng.permutation(total).reshape(num_clients, shards_per_client)
    return _clients(examples, [np.concatenate([shards[s] for s in own]) for own in dealt])


def label_counts(clients: Clients, labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """int64[K, labels]: how many examples of each label each client has; labels in sorted order.

    Example:
      >>> found = Clients({"y": np.arange(3)}, (np.array([0, 1]), np.array([2])), ("a", "b"))
      >>> label_counts(found, ["cat", "dog", "cat"]).tolist()
      [[1, 1], [1, 0]]
    """
    codes = _codes(labels, len(labels))
    return np.stack([np.bincount(codes[rows], minlength=codes.max() + 1) for rows in clients.rows])


def _clients(examples: Any, parts: Sequence[np.ndarray]) -> Clients:
    names = tuple(f"client-{n}" for n in range(len(parts)))
    return Clients(examples, tuple(np.sort(p) for p in parts), names)


def _sized(dataset: Any) -> tuple[Any, int]:
    examples = as_pytree(dataset)
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(examples)}
    if len(sizes) != 1 or 0 in sizes:
        raise DpjaxError(f"leading axes are {sorted(sizes)}; give examples, all in one axis")
    return examples, sizes.pop()


def _codes(labels: Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    found = np.asarray(labels)
    if found.shape != (size,):
        raise DpjaxError(f"labels have shape {found.shape}; give one for each of {size} examples")
    return np.unique(found, return_inverse=True)[1]


def _count(num_clients: int, size: int) -> int:
    if not 1 <= num_clients <= size:
        raise DpjaxError(f"num_clients is {num_clients}; use 1 to {size}, the number of examples")
    return num_clients


def _positive(concentration: float) -> float:
    if not concentration > 0:
        raise DpjaxError(f"concentration is {concentration}; it must be above 0")
    return concentration
