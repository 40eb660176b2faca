"""Examples of one length out of records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dpjax.data.corpora import Record
from dpjax.data.dataset import NO_USER, Dataset, stable_id
from dpjax.data.tokenizers import Tokenizer
from dpjax.errors import DpjaxError


def dataset_from_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    name: str = "records",
    chunk: bool = False,
    max_examples_per_record: int = 1,
    max_examples_per_user: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> Dataset:
    """Tokenises records into examples of one length.

    A record becomes begin + its tokens + end, padded on the right or cut after ``sequence_length``
    tokens (a cut record has no end token). An empty text becomes begin + end.

    Args:
      records: the records.
      tokenizer: see ``byte_tokenizer`` and ``train_bpe``.
      sequence_length: tokens per example, T, at least 2.
      name: what the data is called in reports (public).
      chunk: cut a long record into several examples instead of dropping its rest.
      max_examples_per_record: with ``chunk``, how many at most; must then be given.
      max_examples_per_user: bound on one person's examples; more are dropped by a seeded choice.
      seed: for that choice.
      prompts: one text per record (a control code, such as its label) that stands between the begin
        token and the record and is read, but not predicted: its tokens are masked. Tokenised on its
        own, so that the same prompt starts the same way in generation.

    Returns:
      A ``Dataset`` whose ``examples_per_record`` is the bound above: where it is over 1, the
      accounting must multiply it into the group size, and one record is not one privacy unit.

    Raises:
      DpjaxError: for no records, a length below 2, or chunks without a bound.

    Guarantee:
      - Without ``chunk``, one record is exactly one example, whatever its length.
      - An example depends on its own record alone, so that record-level privacy of the examples
        is record-level privacy of the records.

    Example:
      >>> from dpjax.data.tokenizers import byte_tokenizer
      >>> data = dataset_from_records([Record("hi", "ann"), Record("hello")], byte_tokenizer(), 5)
      >>> data.tokens.tolist()
      [[257, 104, 105, 258, 256], [257, 104, 101, 108, 108]]
      >>> data.loss_mask[0].tolist(), data.unit
      ([True, True, True, True, False], 'record (one record of records, cut to 5 tokens)')
    """
    if sequence_length < 2:
        raise DpjaxError(
            f"sequence_length is {sequence_length}; a next-token loss needs 2 or more; pass 64"
        )
    if max_examples_per_record < 1:
        raise DpjaxError(f"max_examples_per_record is {max_examples_per_record}; pass at least 1")
    if chunk != (max_examples_per_record > 1):
        raise DpjaxError(
            f"chunk={chunk} with max_examples_per_record={max_examples_per_record}; chunks need a"
            " bound above 1, because epsilon grows with the examples of one record; pass"
            " chunk=True, max_examples_per_record=4, or neither"
        )
    records = list(records)
    if not records:
        raise DpjaxError("there are no records to make a dataset of; check the source")
    encoded = tokenizer.encode_batch([record.text for record in records])
    heads = [[] for _ in records] if prompts is None else tokenizer.encode_batch(prompts)
    if len(heads) != len(records) or (chunk and prompts is not None):
        raise DpjaxError(
            f"there are {len(heads)} prompts for {len(records)} records, chunk={chunk}; pass one "
            "prompt per record, and whole records"
        )
    longest = max(map(len, heads))
    if longest + 2 > sequence_length:
        raise DpjaxError(
            f"a prompt has {longest} tokens; sequence_length {sequence_length} leaves no room for "
            "its record; shorten it or raise sequence_length"
        )
    starts: list[list[int]] = []  # per record, where its examples begin
    for ids in encoded:
        total = len(ids) + 2 if chunk else 1
        starts.append(list(range(0, total, sequence_length))[:max_examples_per_record])
    num_examples = sum(map(len, starts))
    tokens = np.full((num_examples, sequence_length), tokenizer.pad_id, np.int32)
    # A mask by count and not by `tokens != pad_id`: only the former survives a pad id that a
    # pretrained tokenizer shares with its end token.
    lengths = np.zeros(num_examples, np.int64)
    first = np.zeros(num_examples, np.int64)  # where the record begins, behind its prompt
    user_ids = np.empty(num_examples, np.int64)
    record_ids = np.empty(num_examples, np.int64)
    row = 0
    for record, head, ids, offsets in zip(records, heads, encoded, starts, strict=True):
        user_id = NO_USER if record.user is None else stable_id("user", record.user)
        record_id = stable_id("record", record.text)
        # Only what is kept is copied: a record may be far longer than its examples.
        room = len(offsets) * sequence_length
        ids = [tokenizer.bos_id, *head, *ids[:room], tokenizer.eos_id]
        for start in offsets:
            part = ids[start : start + sequence_length]
            tokens[row, : len(part)] = part
            lengths[row] = len(part)
            first[row] = 1 + len(head) if head else 0
            user_ids[row], record_ids[row] = user_id, record_id
            row += 1
    if chunk:
        unit = (
            f"chunk (at most {max_examples_per_record} chunks of {sequence_length} tokens from one"
            f" record of {name})"
        )
    else:
        unit = f"record (one record of {name}, cut to {sequence_length} tokens)"
    per_record = {"data_dependent": False, "private": True}
    columns = np.arange(sequence_length)
    dataset = Dataset(
        tokens=tokens,
        loss_mask=(columns < lengths[:, None]) & (columns >= first[:, None]),
        user_ids=user_ids,
        record_ids=record_ids,
        name=name,
        unit=unit,
        examples_per_record=max_examples_per_record,
        preprocessing=(
            {"step": f"tokenised; vocabulary learned from: {tokenizer.corpus}", **per_record},
            {"step": unit, **per_record},
        ),
    )
    if max_examples_per_user is not None:
        dataset = dataset.bound_contributions(max_examples_per_user, seed)
    return dataset
