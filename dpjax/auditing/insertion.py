"""Puts canaries among the training examples: into records, token rows or whole people."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, overload

import jax
import numpy as np

from dpjax.auditing.canaries import TEXT_KINDS, CanarySet
from dpjax.data import Dataset, Record, UserDataset, stable_id
from dpjax.errors import DpjaxError
from dpjax.types import RandomKey, require_key


def fair_coins(num: int, key: RandomKey) -> np.ndarray:
    """Which canaries are included: ``num`` independent fair coins, bool[num].

    Example:
      >>> fair_coins(4, jax.random.key(0)).dtype
      dtype('bool')
    """
    if num < 1:
        raise DpjaxError(f"num is {num}; toss at least 1 coin")
    return np.asarray(jax.random.bernoulli(require_key(key), 0.5, (num,)))


@overload
def insert(
    target: Sequence[Record], canaries: CanarySet, included: Any = None, *, seed: int
) -> list[Record]: ...
@overload
def insert(target: Dataset, canaries: CanarySet, included: Any = None, *, seed: int) -> Dataset: ...
@overload
def insert(
    target: UserDataset, canaries: CanarySet, included: Any = None, *, seed: int
) -> UserDataset: ...
def insert(target: Any, canaries: CanarySet, included: Any = None, *, seed: int) -> Any:
    """Puts canaries at random places among the training examples, whose order is kept.

    Args:
      target: records (for natural and echo canaries), a `Dataset` of token rows (for token
        canaries: each repetition is a row of the canary's person, padded, with no end token), or a
        `UserDataset` (each canary is one person, whose whole contribution are its repetitions).
      canaries: what to put in.
      included: bool[N], e.g. `fair_coins`; default all.
      seed: for the places; they do not depend on the canaries.

    Returns:
      What ``target`` was, with the canaries.

    Raises:
      DpjaxError: for canaries of another kind or too long, a person who is there already, or more
        repetitions than one person may have.

    Example:
      >>> from dpjax.auditing.canaries import natural_canaries
      >>> canaries = natural_canaries({2: 2}, seed=0)
      >>> len(insert([Record("hello")], canaries, [True, False], seed=0))
      3
    """
    flags = np.ones(len(canaries), bool) if included is None else np.asarray(included)
    if flags.shape != (len(canaries),) or flags.dtype != np.bool_:
        raise DpjaxError(
            f"included is {flags.dtype}{list(flags.shape)}; expected one bool for each of the "
            f"{len(canaries)} canaries"
        )
    chosen = np.flatnonzero(flags)
    is_text = not isinstance(target, (Dataset, UserDataset))
    if is_text != (canaries.kind in TEXT_KINDS):
        wanted = "a Dataset or UserDataset" if is_text else "records, before they are tokenised"
        raise DpjaxError(f"{canaries.kind} canaries were given the wrong target; pass {wanted}")
    rng = np.random.default_rng(seed)
    if isinstance(target, UserDataset):
        return _insert_people(target, canaries, chosen, rng)
    carried = np.repeat(chosen, canaries.repetitions[chosen])
    if isinstance(target, Dataset):
        return _insert_rows(target, canaries, carried, rng)
    present = {record.user for record in target} & set(canaries.users)
    _refuse_present(present)
    joined = [*target, *(canaries.in_[number] for number in carried)]
    return [joined[place] for place in _places(len(target), len(carried), rng)]


def _places(num: int, added: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of num + added that keeps the first num in order and mixes the others in."""
    order = np.empty(num + added, np.int64)
    is_added = np.zeros(num + added, bool)
    is_added[rng.choice(num + added, added, replace=False)] = True
    order[is_added] = num + rng.permutation(added)
    order[~is_added] = np.arange(num)
    return order


def _refuse_present(present: Collection[Any]) -> None:
    if len(present):
        raise DpjaxError(
            f"{len(present)} canaries are there already; insert each set once, and give sets "
            "different seeds"
        )


def _padding(tokens: np.ndarray, mask: np.ndarray) -> int:
    masked = tokens[~mask]
    return int(masked[0]) if masked.size else 0


def _padded(canaries: CanarySet, chosen: np.ndarray, like: Dataset | UserDataset):
    """Rows of the data set's length, int32 and bool [number, T]."""
    rows, length = canaries.in_[chosen], like.sequence_length
    width = canaries.in_.shape[1]
    if width > length:
        raise DpjaxError(
            f"a canary has {width} tokens and an example {length}; it would be cut: shorten it"
        )
    padding = np.full((len(rows), length - width), _padding(like.tokens, like.loss_mask), np.int32)
    mask = np.broadcast_to(np.arange(length) < width, (len(rows), length))
    return np.concatenate([rows, padding], axis=1), mask


def _note(count: int) -> dict[str, Any]:
    return {"step": f"{count} canaries inserted", "data_dependent": False, "private": True}


def _insert_rows(data: Dataset, canaries: CanarySet, carried: np.ndarray, rng) -> Dataset:
    most = int(np.bincount(carried).max(initial=0))
    if data.max_examples_per_user is not None and most > data.max_examples_per_user:
        raise DpjaxError(
            f"a canary is repeated {most} times, but a person has at most "
            f"{data.max_examples_per_user} examples; raise the bound or repeat less"
        )
    ids = np.array([stable_id("user", user) for user in canaries.users], np.int64)
    _refuse_present(np.intersect1d(ids, data.user_ids))
    tokens, mask = _padded(canaries, carried, data)
    record_ids = np.array([stable_id("canary", user) for user in canaries.users], np.int64)
    assert data.record_ids is not None
    order = _places(len(data), len(carried), rng)
    return dataclasses.replace(
        data,
        tokens=np.concatenate([data.tokens, tokens])[order],
        loss_mask=np.concatenate([data.loss_mask, mask])[order],
        user_ids=np.concatenate([data.user_ids, ids[carried]])[order],
        record_ids=np.concatenate([data.record_ids, record_ids[carried]])[order],
        preprocessing=(*data.preprocessing, _note(np.unique(carried).size)),
    )


def _insert_people(data: UserDataset, canaries: CanarySet, chosen: np.ndarray, rng) -> UserDataset:
    rows_per_user, repeats = data.tokens.shape[1], canaries.repetitions[chosen]
    if repeats.max(initial=0) > rows_per_user:
        raise DpjaxError(
            f"a canary is repeated {repeats.max()} times, but a person has at most "
            f"{rows_per_user} rows; raise rows_per_user or repeat less"
        )
    tokens, mask = _padded(canaries, chosen, data)
    own = np.arange(rows_per_user)[None, :, None] < repeats[:, None, None]
    mask = mask[:, None, :] & own
    padding = np.int32(_padding(data.tokens, data.loss_mask))
    tokens = np.where(own, tokens[:, None, :], padding)
    order = _places(len(data), len(chosen), rng)
    return dataclasses.replace(
        data,
        tokens=np.concatenate([data.tokens, tokens])[order],
        loss_mask=np.concatenate([data.loss_mask, mask])[order],
        preprocessing=(*data.preprocessing, _note(len(chosen))),
    )
