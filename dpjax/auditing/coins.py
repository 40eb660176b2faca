"""Canaries that enter a training run by fair coins, for an audit from that one run.

Everything is derived from one secret, whose hash is written into the ledger before the first
release. The audit reveals the secret there; so anybody can check that the coins were not chosen
after the scores were seen.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from dpjax.auditing.canaries import CanarySet, random_token_canaries
from dpjax.auditing.insertion import insert
from dpjax.data import Dataset, Tokenizer, UserDataset
from dpjax.errors import DpjaxError


class CoinCanaries(NamedTuple):
    """Canaries and their coins. The coins are secret until the audit."""

    canaries: CanarySet  # m of them, no twins: the excluded ones are
    included: np.ndarray  # bool[m]
    places: int  # seed for where they stand


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
      sequence_length: T; every canary fills a row.
      rows: records of one canary. Above 1 it is a person whose whole contribution they are.

    Raises:
      DpjaxError: too few canaries for any bound above 0.

    Source: Steinke et al. (2023), algorithm 1; random tokens as in Carlini et al. (2019).

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> found = coin_canaries(bytes(32), 100, byte_tokenizer(), 16)
      >>> found.canaries.in_.shape, 30 < int(found.included.sum()) < 70
      ((100, 16), True)
    """
    if num_canaries < 10:
        raise DpjaxError(
            f"num_canaries is {num_canaries}; fewer than 10 show nothing, 1000 show up to 5.78"
        )
    commitment(secret)

    def derived(purpose: str) -> int:
        digest = hashlib.sha256(b"dpjax audit " + purpose.encode() + secret).digest()
        return int.from_bytes(digest[:8], "little")

    canaries = random_token_canaries(
        num_canaries,
        tokenizer,
        sequence_length - 1,
        seed=derived("tokens"),
        repetitions=rows,
        num_held_out=0,
    )
    included = np.random.default_rng(derived("coins")).random(num_canaries) < 0.5
    return CoinCanaries(canaries, included, derived("places"))


def with_coin_canaries(
    dataset: Dataset | UserDataset, drawn: CoinCanaries
) -> Dataset | UserDataset:
    """The data set with the canaries whose coins say so among its rows.

    Guarantee:
      Each canary is a unit of its own, sampled, clipped and accounted for like any other.
    """
    return insert(dataset, drawn.canaries, drawn.included, seed=drawn.places)
