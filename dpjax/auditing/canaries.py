"""Canaries: records that nobody wrote, some put into the training data and some held out.

A model that treats the inserted ones otherwise than their held-out twins has memorised them. Both
come from one distribution, so that nothing but training can tell them apart.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.auditing.exposure import secret_losses
from dpjax.data import Dataset, PlantedPII, Record, Tokenizer, plant_pii
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig
from dpjax.types import PyTree, RandomKey, require_key

Kind = Literal["random_token", "new_token", "natural", "echo"]
TEXT_KINDS = ("natural", "echo")  # records of text; the others are rows of tokens
Part = Literal["in", "held_out"]
_MAX_ROUNDS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class CanarySet:
    """Canaries and their held-out twins. The answer key of an audit: keep it secret.

    Attributes:
      kind: "random_token", "new_token", "natural" or "echo".
      in_: int32[N, L] token rows without padding, or N records ("natural", "echo").
      held_out: int32[M, L] or M records, from the same distribution, never inserted.
      repetitions: int64[N], how many records carry a canary when it is inserted.
      users: N names; every canary is one person, all its repetitions included.
      space_bits: float64[N], log2 of the number of values that the secret was drawn from
        uniformly; NaN where it is unknown.
      secret_start: index of the first secret token in a row; the tokens before it are the prompt.
        0 for "natural", whose secrets are in ``planted``.
      planted: prefixes and secrets of natural canaries.

    Example:
      >>> canaries = random_token_canaries(3, 300, 4, [7, 8], seed=0)
      >>> canaries.in_.shape, canaries.held_out.shape, canaries.users[0], canaries.secret_start
      ((3, 6), (3, 6), 'canary:0:0', 2)
    """

    kind: Kind
    in_: Any
    held_out: Any
    repetitions: np.ndarray
    users: tuple[str, ...]
    space_bits: np.ndarray
    secret_start: int = 0
    planted: PlantedPII | None = None

    def __len__(self) -> int:
        return len(self.in_)

    def __repr__(self) -> str:
        # The generated one would print the answer key.
        return f"CanarySet({self.kind!r}, in_={len(self.in_)}, held_out={len(self.held_out)})"


def random_token_canaries(
    num: int,
    vocabulary: Tokenizer | int,
    length: int,
    prefix_tokens: Sequence[int] = (),
    *,
    seed: int,
    repetitions: int | Sequence[int] = 1,
    num_held_out: int | None = None,
    alphabet: Sequence[int] | None = None,
) -> CanarySet:
    """Sequences of uniformly random tokens behind a fixed prefix.

    Args:
      num: canaries to insert, N.
      vocabulary: a tokenizer, whose special ids are never drawn and whose begin token is put in
        front; or the number of ids, of which all are drawn.
      length: secret tokens of each.
      prefix_tokens: the same for all canaries. With a bare number of ids it must not be empty: the
        first token of a sequence is predicted by nothing.
      seed: decides the secrets.
      repetitions: records that carry each canary; one number, or N of them.
      num_held_out: twins, M; default N.
      alphabet: ids to draw from, e.g. those of the digits; default all that are not special.

    Returns:
      A `CanarySet` whose N + M secrets are distinct. ``users`` are "canary:SEED:NUMBER".

    Raises:
      DpjaxError: for numbers below 1, a special id, or a space too small for distinct secrets.

    Source: Carlini et al. (2019), section 3.1, with tokens in place of digits.

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> digits = byte_tokenizer().encode("0123456789")
      >>> canaries = random_token_canaries(2, byte_tokenizer(), 4, seed=0, alphabet=digits)
      >>> byte_tokenizer().decode(canaries.in_[0]), canaries.space_bits[0].round(2)
      ('8652', np.float64(13.29))
    """
    num_held_out = num if num_held_out is None else num_held_out
    counts = _counts(num, num_held_out, repetitions)
    size, special, head = _ids(vocabulary, prefix_tokens)
    chosen = np.setdiff1d(np.arange(size), special) if alphabet is None else np.array(alphabet)
    if length < 1:
        raise DpjaxError(f"length is {length}; a canary needs at least 1 secret token, e.g. 8")
    _check_ids("alphabet", chosen, size, special)
    if np.unique(chosen).size != chosen.size:
        raise DpjaxError("alphabet names an id twice; name each once: draws are uniform over it")
    bits = length * math.log2(chosen.size)
    if chosen.size**length < num + num_held_out:
        raise DpjaxError(
            f"{num + num_held_out} distinct canaries of {length} tokens from {chosen.size} ids "
            f"do not fit {bits:.1f} bits; make them longer or fewer"
        )
    secrets = _distinct_rows(num + num_held_out, length, chosen.size, np.random.default_rng(seed))
    prefix = np.broadcast_to(np.array(head, np.int32), (len(secrets), len(head)))
    rows = np.concatenate([prefix, chosen[secrets].astype(np.int32)], axis=1)
    return CanarySet(
        "random_token",
        rows[:num],
        rows[num:],
        counts,
        _users(num, seed),
        np.full(num, bits),
        len(head),
    )


def natural_canaries(
    repetitions: dict[int, int],
    *,
    seed: int,
    num_held_out: int | None = None,
    locales: Sequence[str] = ("en_US",),
    kinds: Sequence[str] = ("name", "phone", "card", "diagnosis", "account"),
) -> CanarySet:
    """Natural-looking records with an invented personal secret each; see `dpjax.data.plant_pii`.

    Args:
      repetitions: times planted -> number of canaries.
      seed: decides everything.
      num_held_out: twins; default one for each canary.
      locales, kinds: as in `plant_pii`, in turn.

    Raises:
      DpjaxError: as `plant_pii`.

    Example:
      >>> canaries = natural_canaries({1: 2, 4: 1}, seed=0)
      >>> canaries.repetitions.tolist(), canaries.in_[0].user
      ([1, 1, 4], 'planted:in-0')
    """
    planted = plant_pii(
        [],
        repetitions=repetitions,
        seed=seed,
        num_held_out_twins=num_held_out,
        locales=locales,
        kinds=kinds,
    )[1]
    return CanarySet(
        "natural",
        tuple(Record(secret.text, secret.user) for secret in planted.inserted),
        tuple(Record(secret.text, secret.user) for secret in planted.held_out),
        np.array([secret.repetitions for secret in planted.inserted], np.int64),
        tuple(secret.user for secret in planted.inserted),
        np.array([secret.secret_bits for secret in planted.inserted]),
        planted=planted,
    )


def new_token_canaries(
    prefixes: np.ndarray,
    new_ids: Sequence[int] | np.ndarray,
    num: int,
    *,
    seed: int,
    repetitions: int | Sequence[int] = 1,
) -> CanarySet:
    """Ordinary text that ends in a token which occurs nowhere else, another one for each canary.

    No other record moves the embedding of such a token, so that one occurrence leaves a mark.
    Score them by the loss of the last token under the pretrained model minus that under the
    trained one (`canary_losses` with each).

    Args:
      prefixes: int32[N + M, P]: token rows of text like the training data but not from it, begin
        token included; they are shuffled, then the first ``num`` are inserted.
      new_ids: ids without another use, at least N + M: from `extend_vocabulary` or
        `unused_token_ids`.
      num: canaries to insert, N; the rest of the prefixes make held-out twins.
      seed: decides which prefix meets which id, and which are inserted.
      repetitions: records that carry each canary; one number, or N of them.

    Raises:
      DpjaxError: for too few or repeated ids, ids that a prefix has, or a number out of range.

    Source: Panda et al. (2025), "Privacy auditing of large language models", section 4.

    Example:
      >>> canaries = new_token_canaries(np.array([[1, 2], [3, 4]]), [300, 301], 1, seed=0)
      >>> sorted([int(canaries.in_[0, -1]), int(canaries.held_out[0, -1])])
      [300, 301]
    """
    prefixes, ids = np.asarray(prefixes), np.asarray(new_ids)
    if prefixes.ndim != 2 or 0 in prefixes.shape or not np.issubdtype(prefixes.dtype, np.integer):
        raise DpjaxError(
            f"prefixes are {prefixes.dtype} of shape {prefixes.shape}; expected integers "
            "[canaries, tokens], at least one of each"
        )
    total = len(prefixes)
    counts = _counts(num, total - num, repetitions)
    if ids.ndim != 1 or np.unique(ids).size != ids.size or ids.size < total:
        raise DpjaxError(
            f"there are {np.unique(ids).size} different new_ids for {total} canaries; "
            "give each canary its own"
        )
    if np.isin(prefixes, ids).any():
        raise DpjaxError("a prefix holds one of new_ids; they must occur nowhere else")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(ids)[:total].astype(np.int32)
    rows = np.concatenate([rng.permutation(prefixes).astype(np.int32), chosen[:, None]], axis=1)
    return CanarySet(
        "new_token",
        rows[:num],
        rows[num:],
        counts,
        _users(num, seed),
        np.full(num, math.log2(ids.size)),
        prefixes.shape[1],
    )


def unused_token_ids(
    dataset: Dataset, vocabulary_size: int, special_ids: Iterable[int] = ()
) -> np.ndarray:
    """Ids of the vocabulary that no example of the data set holds, int64, ascending.

    This counts over the private data set: an access that no epsilon covers, and that a privacy
    card must list. `extend_vocabulary` needs none.

    Args:
      special_ids: never returned, e.g. ``tokenizer.special_ids``.

    Example:
      >>> data = Dataset(np.array([[1, 2]]), np.ones((1, 2), bool), np.array([-1]))
      >>> unused_token_ids(data, 5, [0])
      array([3, 4])
    """
    used = np.unique(dataset.tokens[dataset.loss_mask])
    return np.setdiff1d(np.arange(vocabulary_size), [*used, *special_ids])


def extend_vocabulary(
    config: DecoderConfig, params: PyTree, count: int, key: RandomKey
) -> tuple[DecoderConfig, PyTree]:
    """The same model with ``count`` more tokens, ids from ``config.vocabulary_size`` up.

    New rows of the embedding (and new columns of an untied head) are Gaussian with the mean and
    the standard deviation of each coordinate over the old ones. They take a share of the
    probability, so that losses on old tokens rise a little.

    Returns:
      ``(config, params)``; the old parameters are not changed.

    Raises:
      DpjaxError: for a count below 1.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> config, params = extend_vocabulary(config, params, 10, jax.random.key(1))
      >>> config.vocabulary_size, params["embedding"]["embedding"].shape
      (310, (310, 128))
    """
    if count < 1:
        raise DpjaxError(f"count is {count}; add at least 1 token")
    embedding_key, head_key = jax.random.split(require_key(key))

    def more(table: jax.Array, axis: int, key: RandomKey) -> jax.Array:
        wide = table.astype(jnp.float32)
        mean, stddev = (f(wide, axis=axis, keepdims=True) for f in (jnp.mean, jnp.std))
        shape = (count, table.shape[1]) if axis == 0 else (table.shape[0], count)
        mean, stddev = (jnp.broadcast_to(x, shape) for x in (mean, stddev))
        drawn = mean + stddev * jax.random.normal(key, shape, jnp.float32)
        return jnp.concatenate([table, drawn.astype(table.dtype)], axis=axis)

    changed = dict(params)
    embedding = params["embedding"]["embedding"]
    changed["embedding"] = params["embedding"] | {"embedding": more(embedding, 0, embedding_key)}
    if not config.tied:
        changed["head"] = params["head"] | {"kernel": more(params["head"]["kernel"], 1, head_key)}
    size = config.vocabulary_size + count
    return dataclasses.replace(config, vocabulary_size=size), changed


def canary_losses(
    config: DecoderConfig,
    params: PyTree,
    canaries: CanarySet,
    part: Part,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Summed loss of each canary's secret tokens, behind its prefix: float64[N or M], nats.

    Only the secret counts: the prefix is the same for canaries and twins, or is told to both.

    Args:
      part: "in" or "held_out".
      tokenizer: for natural canaries.

    Raises:
      DpjaxError: for natural canaries without a tokenizer, or tokens beyond the vocabulary.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> canaries = random_token_canaries(3, 300, 4, [7], seed=0)
      >>> config = decoder_config("nano", 300)
      >>> losses = canary_losses(config, init_params(config, jax.random.key(0)), canaries, "in")
      >>> losses.shape, bool(np.all(np.abs(losses - 4 * np.log(300)) < 2))
      ((3,), True)
    """
    if part not in ("in", "held_out"):
        raise DpjaxError(f"part is {part!r}; use 'in' or 'held_out'")
    if canaries.planted is None:
        rows = canaries.in_ if part == "in" else canaries.held_out
        counted = np.broadcast_to(np.arange(rows.shape[1]) >= canaries.secret_start, rows.shape)
        return secret_losses(config, params, rows, counted, batch_size)
    if tokenizer is None:
        raise DpjaxError("tokenizer is None; natural canaries are text: pass the model's tokenizer")
    secrets = canaries.planted.inserted if part == "in" else canaries.planted.held_out
    full = [[tokenizer.bos_id, *tokenizer.encode(s.prefix + s.secret)] for s in secrets]
    before = [[tokenizer.bos_id, *tokenizer.encode(s.prefix)] for s in secrets]
    rows = np.full((len(full), max(map(len, full), default=2)), tokenizer.pad_id, np.int32)
    counted = np.zeros(rows.shape, bool)
    for number, (ids, prompt) in enumerate(zip(full, before, strict=True)):
        # A token may join the end of the prefix and the start of the secret: it is secret then.
        pairs = zip(ids, prompt, strict=False)
        start = next((place for place, (a, b) in enumerate(pairs) if a != b), len(prompt))
        rows[number, : len(ids)] = ids
        counted[number, start : len(ids)] = True
    return secret_losses(config, params, rows, counted, batch_size)


def _counts(num: int, num_held_out: int, repetitions: int | Sequence[int]) -> np.ndarray:
    if num < 1 or num_held_out < 0:
        raise DpjaxError(
            f"there are {num} canaries and {num_held_out} twins; make at least 1 and 0"
        )
    counts = np.asarray(repetitions)
    if counts.shape not in ((), (num,)) or not np.issubdtype(counts.dtype, np.integer):
        raise DpjaxError(f"repetitions are {repetitions!r}; pass one integer, or {num} of them")
    if counts.min() < 1:
        raise DpjaxError(f"repetitions are as low as {counts.min()}; each must be at least 1")
    return np.broadcast_to(counts, (num,)).astype(np.int64)


def _ids(vocabulary: Tokenizer | int, prefix: Sequence[int]) -> tuple[int, np.ndarray, list[int]]:
    """Number of ids, the special ones, and what stands in front of every secret."""
    head = [int(number) for number in prefix]
    if isinstance(vocabulary, Tokenizer):
        special = np.array(sorted(vocabulary.special_ids))
        _check_ids("prefix_tokens", np.array(head, np.int64), vocabulary.vocabulary_size, special)
        return vocabulary.vocabulary_size, special, [vocabulary.bos_id, *head]
    if not head:
        raise DpjaxError(
            "prefix_tokens are empty; the first secret token would be predicted by nothing: give "
            "at least the begin token, or pass a tokenizer"
        )
    none = np.array([], np.int64)
    _check_ids("prefix_tokens", np.array(head), vocabulary, none)
    return vocabulary, none, head


def _check_ids(name: str, ids: np.ndarray, size: int, special: np.ndarray) -> None:
    if ids.ndim != 1 or (name == "alphabet" and not ids.size):
        raise DpjaxError(f"{name} has shape {ids.shape}; expected a list of ids")
    wrong = ids[(ids < 0) | (ids >= size) | np.isin(ids, special)]
    if wrong.size:
        raise DpjaxError(
            f"{name} has id {wrong[0]}, which is special or outside the vocabulary of {size}"
        )


def _distinct_rows(num: int, length: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform rows in [0, size), those that came before drawn again: uniform without repeats."""
    if size**length <= 4 * num:  # drawing again would take long in a space that is nearly full
        codes = rng.permutation(size**length)[:num]
        return codes[:, None] // size ** np.arange(length)[::-1] % size
    rows = rng.integers(0, size, (num, length))
    for _ in range(_MAX_ROUNDS):
        first = np.unique(rows, axis=0, return_index=True)[1]
        again = np.setdiff1d(np.arange(num), first)
        if not again.size:
            return rows
        rows[again] = rng.integers(0, size, (again.size, length))
    raise DpjaxError(f"{num} distinct canaries of {length} tokens were not found; make them longer")


def _users(num: int, seed: int) -> tuple[str, ...]:
    return tuple(f"canary:{seed}:{number}" for number in range(num))
