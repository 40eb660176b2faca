"""Canaries that enter a training run by fair coins, for an audit from that one run.

Everything is derived from one secret, whose hash is written into the ledger before the first
release. The audit reveals the secret there; so anybody can check that the coins were not chosen
after the scores were seen.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np

from dpjax.data import Dataset, Tokenizer, UserDataset
from dpjax.data.dataset import stable_id
from dpjax.errors import DpjaxError


class CoinCanaries(NamedTuple):
    """Canaries and their coins. The coins are secret until the audit."""

    tokens: np.ndarray  # int32[m, rows, T]; rows is 1 unless the unit is a person
    included: np.ndarray  # bool[m]


def commitment(secret: bytes) -> str:
    """SHA-256 that binds to a secret of 32 random bytes without telling it.

    Example:
      >>> len(commitment(bytes(32)))
      64
    """
    if len(secret) != 32:
        raise DpjaxError(f"the audit's secret has {len(secret)} bytes; it must have 32")
    return hashlib.sha256(b"dpjax audit coins" + secret).hexdigest()


def coin_canaries(
    secret: bytes, num_canaries: int, tokenizer: Tokenizer, sequence_length: int, rows: int = 1
) -> CoinCanaries:
    """Random-token canaries and a fair coin for each.

    Args:
      secret: 32 bytes; decides everything.
      num_canaries: m.
      tokenizer: whose ordinary tokens the canaries are made of, uniformly.
      sequence_length: T; every row is full.
      rows: of one canary. Above 1 it stands for a person with that many rows.

    Raises:
      DpjaxError: too few canaries for any bound above 0.

    Source: Steinke et al. (2023), algorithm 1; random tokens as in Carlini et al. (2019).

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> canaries = coin_canaries(bytes(32), 100, byte_tokenizer(), 16)
      >>> canaries.tokens.shape, 30 < int(canaries.included.sum()) < 70
      ((100, 1, 16), True)
    """
    if num_canaries < 10:
        raise DpjaxError(
            f"num_canaries is {num_canaries}; fewer than 10 show nothing, 1000 show up to 5.78"
        )
    digest = hashlib.sha256(b"dpjax audit canaries" + secret + commitment(secret).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    included = rng.random(num_canaries) < 0.5
    special = set(tokenizer.special_ids)
    ordinary = np.array([i for i in range(tokenizer.vocabulary_size) if i not in special])
    tokens = rng.choice(ordinary, (num_canaries, rows, sequence_length)).astype(np.int32)
    tokens[..., 0] = tokenizer.bos_id
    return CoinCanaries(tokens, included)


def with_canaries(dataset: Any, canaries: CoinCanaries) -> Any:
    """The data set with the canaries whose coins say so, behind the records.

    Args:
      dataset: a `Dataset` (canaries of one row) or a `UserDataset` (of as many rows as a person).

    Guarantee:
      Records keep their places. Each canary is a unit of its own, sampled, clipped and accounted
      for like any other.
    """
    tokens = canaries.tokens[canaries.included]
    mask = np.ones(tokens.shape, bool)
    note = {
        "step": f"{len(canaries.included)} random-token canaries, each included by a fair coin",
        "data_dependent": False,
        "private": True,
    }
    steps = (*dataset.preprocessing, note)
    if isinstance(dataset, UserDataset):
        if tokens.shape[1:] != dataset.tokens.shape[1:]:
            raise DpjaxError(
                f"canaries have {tokens.shape[1:]} rows and tokens, people have "
                f"{dataset.tokens.shape[1:]}; make them alike"
            )
        return dataclasses.replace(
            dataset,
            tokens=np.concatenate([dataset.tokens, tokens]),
            loss_mask=np.concatenate([dataset.loss_mask, mask]),
            preprocessing=steps,
        )
    assert isinstance(dataset, Dataset)
    ids = np.array(
        [stable_id("dpjax canary", str(i)) for i in np.flatnonzero(canaries.included)], np.int64
    )
    return dataclasses.replace(
        dataset,
        tokens=np.concatenate([dataset.tokens, tokens[:, 0]]),
        loss_mask=np.concatenate([dataset.loss_mask, mask[:, 0]]),
        user_ids=np.concatenate([dataset.user_ids, ids]),
        record_ids=np.concatenate([np.asarray(dataset.record_ids), ids]),
        preprocessing=steps,
    )
