"""One example = one person: all of a person's rows together, so that clipping bounds the person."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dpjax.data.dataset import ArrayDataset, Dataset, checked_indices, read_only
from dpjax.errors import DpjaxError


@dataclasses.dataclass(frozen=True, eq=False)
class UserDataset:
    """Token rows grouped by person. The loss of one example is that of all rows of one person.

    With one gradient per person, clipped as a whole, the guarantee of the mechanism is for a
    person, whatever and how much that person wrote (McMahan et al., 2018, section 2).

    Attributes:
      tokens: int32[U, R, T]; rows that a person does not have are padding.
      loss_mask: bool[U, R, T].
      name, unit, examples_per_record, preprocessing: as in ``Dataset``.

    Example:
      >>> rows = Dataset(np.arange(6).reshape(3, 2), np.ones((3, 2), bool), np.array([7, 8, 7]))
      >>> people = by_user(rows, rows_per_user=2)
      >>> len(people), people.take([0])["tokens"].tolist()
      (2, [[[0, 1], [4, 5]]])
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    name: str = "data"
    unit: str = "person"
    examples_per_record: int = 1
    preprocessing: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        tokens, mask = np.asarray(self.tokens), np.asarray(self.loss_mask)
        if tokens.ndim != 3 or tokens.shape != mask.shape:
            raise DpjaxError(
                f"tokens have shape {tokens.shape} and loss_mask {mask.shape}; both must be "
                "[people, rows, tokens]"
            )
        object.__setattr__(self, "tokens", read_only(tokens.astype(np.int32, copy=False)))
        object.__setattr__(self, "loss_mask", read_only(mask.astype(np.bool_, copy=False)))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"UserDataset({self.name!r}, people={len(self)}, rows={self.tokens.shape[1:]})"

    @property
    def sequence_length(self) -> int:
        """Tokens in every row, T."""
        return self.tokens.shape[2]

    def take(self, indices: Any) -> dict[str, np.ndarray]:
        """``{"tokens": int32[B, R, T], "loss_mask": bool[B, R, T]}`` of these people.

        Raises:
          DpjaxError: for an index out of range.
        """
        checked = checked_indices(indices, len(self))
        return {"tokens": self.tokens[checked], "loss_mask": self.loss_mask[checked]}

    def fingerprint(self) -> str:
        """SHA-256 of the rows, the same on every machine."""
        return ArrayDataset({"tokens": self.tokens, "loss_mask": self.loss_mask}).fingerprint()

    def validate(self, vocabulary_size: int) -> None:
        """Refuses tokens that a model with this vocabulary has no embedding for."""
        flat = self.tokens.reshape(-1, self.sequence_length)
        mask = self.loss_mask.reshape(flat.shape)
        Dataset(flat, mask, np.full(len(flat), -1)).validate(vocabulary_size)


def by_user(dataset: Dataset, rows_per_user: int, *, pack: bool = False) -> UserDataset:
    """Groups rows by person; people without a name are their records.

    Args:
      dataset: rows of one record each. More than ``rows_per_user`` of one person are cut off in
        their order; bound them by a seeded choice first (``Dataset.bound_contributions``).
      rows_per_user: R; memory and time follow it, used or not.
      pack: join a person's records end to end into full rows instead of padding each. Only one
        person's records may share a row: rows packed across people would shift when somebody is
        removed, and change everybody's.

    Returns:
      A ``UserDataset``, in the order of the first row of each person.

    Raises:
      DpjaxError: for a bound below 1, or chunks of records, which must not be shuffled apart.

    Guarantee:
      A person's example depends on that person's records alone.

    Example:
      >>> mask = np.array([[True, True, False], [True, False, False]])
      >>> rows = Dataset(np.array([[1, 2, 0], [3, 0, 0]]), mask, np.array([7, 7]))
      >>> by_user(rows, 1, pack=True).tokens.tolist()
      [[[1, 2, 3]]]
    """
    if rows_per_user < 1:
        raise DpjaxError(f"rows_per_user is {rows_per_user}; it must be at least 1, e.g. 4")
    people = dataset.people()
    order: dict[int, list[int]] = {}
    for row, person in enumerate(people.tolist()):
        order.setdefault(person, []).append(row)
    length = dataset.sequence_length
    shape = (len(order), rows_per_user, length)
    padding = dataset.tokens[~dataset.loss_mask]
    tokens = np.full(shape, padding[0] if padding.size else 0, np.int32)
    mask = np.zeros(shape, bool)
    for number, rows in enumerate(order.values()):
        if pack:
            kept = dataset.loss_mask[rows]
            stream = dataset.tokens[rows][kept][: rows_per_user * length]
            tokens[number].reshape(-1)[: stream.size] = stream
            mask[number].reshape(-1)[: stream.size] = True
        else:
            rows = rows[:rows_per_user]
            tokens[number, : len(rows)] = dataset.tokens[rows]
            mask[number, : len(rows)] = dataset.loss_mask[rows]
    unit = f"person (all of one person's records, at most {rows_per_user} rows of {length} tokens)"
    note = {"step": f"grouped by {unit}", "data_dependent": False, "private": True}
    return UserDataset(
        tokens,
        mask,
        name=dataset.name,
        unit=unit,
        preprocessing=(*dataset.preprocessing, note),
    )
