"""Utility on held-out records: loss in nats per token, with its standard error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models import DecoderConfig, next_token_losses
from dpjax.types import PyTree, TrainingData


class HeldOutLoss(NamedTuple):
    """Mean next-token loss over held-out records."""

    nats_per_token: float
    standard_error: float  # over records, by the ratio estimator's delta method
    num_records: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats_per_token))


@functools.partial(jax.jit, static_argnames="config")
def _sums(config, params, batch):
    losses, counts = jax.vmap(lambda example: next_token_losses(config, params, example))(batch)
    return jnp.sum(jnp.where(counts > 0, losses, 0.0), axis=1), jnp.sum(counts, axis=1)


def held_out_loss(
    config: DecoderConfig, params: PyTree, dataset: TrainingData, batch_size: int = 64
) -> HeldOutLoss:
    """Evaluates a language model on records that it was not trained on.

    Reads the held-out records without noise: the numbers are not covered by any epsilon.

    Example:
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> from dpjax.models import decoder_config, init_params
      >>> data = dataset_from_records([Record("hello"), Record("hi")], byte_tokenizer(), 8)
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> loss = held_out_loss(config, init_params(config, jax.random.key(0)), data)
      >>> loss.num_tokens, 5.4 < loss.nats_per_token < 5.8
      (9, True)
    """
    totals, counts = [], []
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch repeats its first row to keep the shape, and drops the repeats below.
        inside = rows < len(dataset)
        total, count = _sums(config, params, dataset.take(np.where(inside, rows, start)))
        totals.append(np.asarray(total, np.float64)[inside])
        counts.append(np.asarray(count, np.float64)[inside])
    total, count = np.concatenate(totals), np.concatenate(counts)
    mean = total.sum() / max(count.sum(), 1.0)
    residual = total - mean * count
    error = np.sqrt(np.sum(residual**2)) / max(count.sum(), 1.0)
    return HeldOutLoss(float(mean), float(error), len(dataset), int(count.sum()))
