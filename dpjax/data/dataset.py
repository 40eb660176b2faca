"""Tokenised examples of a fixed length, each with the person it came from.

All of it is private: passed to functions, never kept in a configuration, never printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dpjax.errors import DpjaxError

NO_USER = -1
"""The user id of an example whose record names no person; it then counts as its own person."""


def stable_id(*parts: str) -> int:
    """A 63-bit id that depends on its arguments alone.

    A running number would change for everybody when one record is added or removed; a hash does
    not, so that a person's id (and every decision derived from it) depends on that person only.
    It is a pseudonym, not protection: whoever can guess a name can recompute its id.

    Args:
      *parts: strings; their boundaries count, ``("ab", "c")`` differs from ``("a", "bc")``.

    Returns:
      An integer in ``[0, 2**63)``.

    Example:
      >>> stable_id("user", "ann") == stable_id("user", "ann") != stable_id("user", "bob")
      True
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # surrogatepass: an id must exist even for text that is not valid Unicode.
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def _uniform_scores(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """One score in [0, 1) per id, f64[N], from a keyed hash of that id alone."""
    key = f"dpjax {purpose} {seed}".encode()
    scores = {
        value: int.from_bytes(
            hashlib.blake2b(
                value.to_bytes(8, "little", signed=True), key=key, digest_size=8
            ).digest(),
            "little",
        )
        / 2**64
        for value in np.unique(ids).tolist()
    }
    return np.array([scores[value] for value in ids.tolist()], np.float64)


def checked_indices(indices: Any, size: int) -> np.ndarray:
    """``indices`` as an integer array, refused where numpy would wrap around or misread it."""
    checked = np.asarray(indices)
    if checked.size == 0:
        return checked.astype(np.int64)
    if not np.issubdtype(checked.dtype, np.integer):
        raise DpjaxError(
            f"indices have dtype {checked.dtype}; they must be integers;"
            " turn a boolean mask into indices with numpy.flatnonzero"
        )
    low, high = int(checked.min()), int(checked.max())
    if low < 0 or high >= size:
        raise DpjaxError(
            f"index {low if low < 0 else high} is outside the dataset; it has {size} examples;"
            f" pass indices in [0, {size})"
        )
    return checked


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that refuses to be written."""
    view = array.view()
    view.setflags(write=False)
    return view


def _hash_array(digest: Any, label: str, array: np.ndarray) -> None:
    """Adds name, type, shape and bytes, in one byte order whatever the machine's."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    digest.update(f"{label} {little.dtype.str} {little.shape}\n".encode())
    digest.update(little.tobytes())


def _leaves(arrays: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(arrays):
        value = arrays[key]
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _map_leaves(function: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _map_leaves(function, value) if isinstance(value, Mapping) else function(value)
        for key, value in arrays.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Text as fixed-length token rows; one row is one example of the loss function.

    The arrays are private. The other fields are public constants that the privacy card prints:
    none of them may be computed from the records.

    Attributes:
      tokens: int32[N, T], padded on the right.
      loss_mask: bool[N, T], True on real tokens, False on padding. A next-token loss predicts
        ``tokens[1:]`` and therefore reads ``loss_mask[1:]``.
      user_ids: int64[N], ``stable_id`` of the person, or ``NO_USER``. Names are not kept.
      record_ids: int64[N], ``stable_id`` of the record's text: equal for the chunks of one record
        and for exact duplicates. Defaults to the row number.
      name: what the data is called in reports.
      unit: in words, what one example is: the thing that record-level privacy protects.
      examples_per_record: public bound on the examples that one record became. Above 1, epsilon
        for a record is that of a group of this size.
      max_examples_per_user: public bound on one person's examples, or None for no bound.
      preprocessing: one dict per step for the privacy card, with ``step`` (words),
        ``data_dependent`` (does it look at more than one person's data at a time?) and
        ``private`` (does the guarantee still hold behind it?).

    Raises:
      DpjaxError: on wrong shapes or types.

    Example:
      >>> data = Dataset(
      ...     tokens=np.array([[5, 6], [7, 0]], np.int32),
      ...     loss_mask=np.array([[True, True], [True, False]]),
      ...     user_ids=np.array([1, 2]),
      ... )
      >>> len(data), data.sequence_length
      (2, 2)
      >>> data.take([1])["tokens"].tolist()
      [[7, 0]]
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    user_ids: np.ndarray
    record_ids: np.ndarray | None = None
    name: str = "data"
    unit: str = "example (one row of tokens)"
    examples_per_record: int = 1
    max_examples_per_user: int | None = None
    preprocessing: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        tokens, loss_mask = np.asarray(self.tokens), np.asarray(self.loss_mask)
        user_ids = np.asarray(self.user_ids)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise DpjaxError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers [N, T];"
                " pad every example to one length"
            )
        if loss_mask.shape != tokens.shape:
            raise DpjaxError(
                f"loss_mask has shape {loss_mask.shape}; it must be that of tokens, {tokens.shape};"
                " pass one boolean per token"
            )
        record_ids = np.arange(len(tokens)) if self.record_ids is None else self.record_ids
        record_ids = np.asarray(record_ids)
        for label, ids in (("user_ids", user_ids), ("record_ids", record_ids)):
            if ids.shape != tokens.shape[:1] or not np.issubdtype(ids.dtype, np.integer):
                raise DpjaxError(
                    f"{label} are {ids.dtype} of shape {ids.shape}; expected integers"
                    f" [{len(tokens)}]; pass one id per example ({NO_USER} where none is known)"
                )
        # Narrowing to int32 before the range check would wrap a wrong token into a right one.
        if tokens.size and (tokens.min() < -(2**31) or tokens.max() >= 2**31):
            raise DpjaxError(
                "a token does not fit int32; token ids start at 0; check the tokenizer"
            )
        for label, array in (
            ("tokens", tokens.astype(np.int32, copy=False)),
            ("loss_mask", loss_mask.astype(np.bool_, copy=False)),
            ("user_ids", user_ids.astype(np.int64, copy=False)),
            ("record_ids", record_ids.astype(np.int64, copy=False)),
        ):
            object.__setattr__(self, label, read_only(array))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        # The generated one would print private rows.
        return (
            f"Dataset({self.name!r}, examples={len(self)}, sequence_length={self.sequence_length})"
        )

    @property
    def sequence_length(self) -> int:
        """Tokens in every example, T."""
        return self.tokens.shape[1]

    def take(self, indices: Any) -> dict[str, np.ndarray]:
        """The batch at ``indices``: what ``loss_fn`` takes, with a leading axis.

        Args:
          indices: integers of any shape [B], repeats allowed, each in [0, N).

        Returns:
          ``{"tokens": int32[B, T], "loss_mask": bool[B, T]}``, copies.

        Raises:
          DpjaxError: for an index out of range (a negative one would silently wrap around).

        Example:
          >>> data = Dataset(np.array([[5, 6]]), np.array([[True, True]]), np.array([NO_USER]))
          >>> {name: array.shape for name, array in data.take([0, 0]).items()}
          {'tokens': (2, 2), 'loss_mask': (2, 2)}
        """
        checked = checked_indices(indices, len(self))
        return {"tokens": self.tokens[checked], "loss_mask": self.loss_mask[checked]}

    def select(self, indices: Any) -> Dataset:
        """The dataset of these rows, with all public fields kept.

        Args:
          indices: integers [M] in [0, N).

        Returns:
          A ``Dataset`` of M examples.

        Raises:
          DpjaxError: for an index out of range.

        Example:
          >>> data = Dataset(np.array([[5], [6]]), np.array([[True], [True]]), np.array([1, 2]))
          >>> data.select([1]).user_ids.tolist()
          [2]
        """
        checked = checked_indices(indices, len(self))
        assert self.record_ids is not None  # set by __post_init__
        return dataclasses.replace(
            self,
            tokens=self.tokens[checked],
            loss_mask=self.loss_mask[checked],
            user_ids=self.user_ids[checked],
            record_ids=self.record_ids[checked],
        )

    def people(self) -> np.ndarray:
        """One id per example, int64[N], equal where the examples may belong to one person.

        The user id, or where there is none an id of the record, so that the chunks of a record and
        exact duplicates stay together.

        Example:
          >>> data = Dataset(np.ones((3, 1), int), np.ones((3, 1), bool), np.array([7, 7, NO_USER]))
          >>> np.unique(data.people()).size
          2
        """
        assert self.record_ids is not None
        # The two kinds of id are hashes from one range: the bit inversion keeps them apart.
        return np.where(self.user_ids == NO_USER, ~self.record_ids, self.user_ids)

    def split(self, held_out: float | int, seed: int) -> tuple[Dataset, Dataset]:
        """Divides people, never one person's examples, into training and held-out parts.

        Args:
          held_out: a fraction in (0, 1) or a count of examples.
          seed: any integer; the same seed gives the same split.

        Returns:
          ``(train, held_out)``, both in the order of this dataset.

        Raises:
          DpjaxError: if either part would be empty, or the argument is out of range.

        Guarantee:
          - No user and no record is in both parts; neither are two records with the same text
            where no user is known.
          - With a fraction, the side of a person is a keyed hash of that person's id: adding or
            removing anybody else changes nothing, so the split costs no privacy and the fraction
            is met in expectation over people, not exactly over examples.
          - With a count, people are taken in the order of that hash while they fit: at most
            ``held_out`` examples, exactly that many where nobody has more than one. Another
            person's size then can move a person across; prefer a fraction for the private data.

        Example:
          >>> rows = np.arange(100)[:, None]
          >>> data = Dataset(rows, rows >= 0, user_ids=np.arange(100) // 2)
          >>> train, test = data.split(0.2, seed=0)
          >>> len(train) + len(test), set(train.user_ids) & set(test.user_ids)
          (100, set())
          >>> len(data.split(10, seed=0)[1])
          10
        """
        is_count = isinstance(held_out, (int, np.integer)) and not isinstance(held_out, bool)
        if not (0 < held_out < (len(self) if is_count else 1)):
            raise DpjaxError(
                f"held_out is {held_out} for {len(self)} examples; expected a fraction in (0, 1) or"
                f" a count in [1, {len(self) - 1}]; pass e.g. 0.1"
            )
        people = self.people()
        scores = _uniform_scores(people, seed, "split")
        if is_count:
            names, first, sizes = np.unique(people, return_index=True, return_counts=True)
            chosen, room = [], int(held_out)
            for position in np.argsort(scores[first], kind="stable"):
                if sizes[position] <= room:
                    chosen.append(names[position])
                    room -= int(sizes[position])
            is_held_out = np.isin(people, np.array(chosen, np.int64))
        else:
            is_held_out = scores < held_out
        if not is_held_out.any() or is_held_out.all():
            raise DpjaxError(
                f"held_out={held_out} leaves one part empty: {len(self)} examples belong to"
                f" {np.unique(people).size} people who cannot be divided; use another fraction or"
                " seed, or more data"
            )
        return self.select(np.flatnonzero(~is_held_out)), self.select(np.flatnonzero(is_held_out))

    def bound_contributions(self, max_examples_per_user: int, seed: int) -> Dataset:
        """Keeps at most so many examples of each person, chosen at random, and drops the rest.

        Examples without a user are kept: nobody knows whose they are, so the bound does not speak
        about them.

        Args:
          max_examples_per_user: at least 1.
          seed: any integer.

        Returns:
          A ``Dataset`` in the same order with ``max_examples_per_user`` set.

        Raises:
          DpjaxError: for a bound below 1.

        Guarantee:
          - Which examples of a person stay depends on that person's examples and the seed alone,
            so removing one person changes at most ``max_examples_per_user`` rows and a user-level
            epsilon is that of a group of this size.

        Example:
          >>> rows, mask = np.ones((5, 1), int), np.ones((5, 1), bool)
          >>> data = Dataset(rows, mask, np.array([1, 1, 1, 2, NO_USER]))
          >>> data.bound_contributions(2, seed=0).user_ids.tolist()
          [1, 1, 2, -1]
        """
        if max_examples_per_user < 1:
            raise DpjaxError(
                f"max_examples_per_user is {max_examples_per_user}; it must be at least 1;"
                " pass None for no bound"
            )
        # A fresh score for each (person, how manieth example of theirs): independent of others.
        positions = np.zeros(len(self), np.int64)
        counts: dict[int, int] = {}
        for row, user in enumerate(self.user_ids.tolist()):
            positions[row] = counts[user] = counts.get(user, -1) + 1
        mixed = np.array(
            [stable_id(f"{u} {p}") for u, p in zip(self.user_ids, positions, strict=True)], np.int64
        )
        order = np.argsort(_uniform_scores(mixed, seed, "bound"), kind="stable")
        kept, used = np.zeros(len(self), bool), dict.fromkeys(counts, 0)
        for row in order.tolist():
            user = int(self.user_ids[row])
            if user == NO_USER or used[user] < max_examples_per_user:
                kept[row] = True
                used[user] += 1
        note = {
            "step": f"kept at most {max_examples_per_user} examples per person (seeded choice)",
            "data_dependent": False,
            "private": True,
        }
        return dataclasses.replace(
            self.select(np.flatnonzero(kept)),
            max_examples_per_user=max_examples_per_user,
            preprocessing=(*self.preprocessing, note),
        )

    def fingerprint(self) -> str:
        """SHA-256 of tokens, mask, user ids and T: equal exactly when training sees equal data.

        A checkpoint stores it, and a resume on changed data is refused. Names and notes do not
        count. It identifies the private data: keep it beside the checkpoint, do not publish it.

        Returns:
          64 hexadecimal digits, the same on every machine.

        Example:
          >>> data = Dataset(np.array([[5, 6]]), np.array([[True, True]]), np.array([1]))
          >>> data.fingerprint() == data.select([0]).fingerprint()
          True
        """
        digest = hashlib.sha256(b"dpjax dataset 1\n")
        for label in ("tokens", "loss_mask", "user_ids"):
            _hash_array(digest, label, getattr(self, label))
        return digest.hexdigest()

    def validate(self, vocabulary_size: int) -> None:
        """Refuses tokens that a model with this vocabulary has no embedding for.

        An out-of-range lookup is clamped or filled by the accelerator without a word, so it must
        be caught here. Padding is checked too.

        Args:
          vocabulary_size: rows of the embedding.

        Raises:
          DpjaxError: naming the first such example, position and token.

        Example:
          >>> data = Dataset(np.array([[5, 6], [7, 300]]), np.ones((2, 2), bool), np.array([1, 2]))
          >>> data.validate(256)
          Traceback (most recent call last):
          ...
          dpjax.errors.DpjaxError: record 1 holds token 300 at position 1; ...
        """
        bad = np.argwhere((self.tokens < 0) | (self.tokens >= vocabulary_size))
        if bad.size:
            row, position = bad[0].tolist()
            raise DpjaxError(
                f"record {row} holds token {self.tokens[row, position]} at position {position};"
                f" tokens must lie in [0, {vocabulary_size}); use the tokenizer that the model was"
                " built for, or raise its vocabulary_size"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Arrays with one leading axis (images and labels, say), for the same training loop.

    Attributes:
      arrays: a dict of arrays [N, ...], nested dicts allowed.
      name: what the data is called in reports.
      unit: in words, what one example is.
      preprocessing: as in ``Dataset``.

    Raises:
      DpjaxError: if there is no array, or the leading axes differ.

    Example:
      >>> images = np.zeros((3, 28, 28, 1), np.float32)
      >>> data = ArrayDataset({"image": images, "label": np.array([0, 1, 2], np.int32)})
      >>> len(data), data.take([2])["label"].tolist()
      (3, [2])
    """

    arrays: Mapping[str, Any]
    name: str = "arrays"
    unit: str = "record (one row of the arrays)"
    preprocessing: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        arrays = _map_leaves(lambda leaf: read_only(np.asarray(leaf)), self.arrays)
        shapes = {path: leaf.shape for path, leaf in _leaves(arrays)}
        if not shapes or any(not shape for shape in shapes.values()):
            raise DpjaxError(f"arrays have shapes {shapes}; each needs a leading axis of examples")
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise DpjaxError(
                f"arrays have shapes {shapes}; the leading axis must be one number of examples;"
                " cut them to the same length"
            )
        object.__setattr__(self, "arrays", arrays)

    def __len__(self) -> int:
        return len(next(_leaves(self.arrays))[1])

    def __repr__(self) -> str:
        return f"ArrayDataset({self.name!r}, examples={len(self)})"

    def take(self, indices: Any) -> dict[str, Any]:
        """The batch at ``indices``, with the structure of ``arrays`` and a leading axis [B].

        Raises:
          DpjaxError: for an index out of range.

        Example:
          >>> ArrayDataset({"x": np.arange(4.0)}).take([3, 0])
          {'x': array([3., 0.])}
        """
        checked = checked_indices(indices, len(self))
        return _map_leaves(lambda leaf: leaf[checked], self.arrays)

    def fingerprint(self) -> str:
        """SHA-256 of names, types, shapes and values, the same on every machine.

        Example:
          >>> one, two = ArrayDataset({"x": np.arange(4)}), ArrayDataset({"y": np.arange(4)})
          >>> one.fingerprint() == two.fingerprint()
          False
        """
        digest = hashlib.sha256(b"dpjax arrays 1\n")
        for path, leaf in _leaves(self.arrays):
            _hash_array(digest, path, leaf)
        return digest.hexdigest()
