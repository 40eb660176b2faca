"""Utility on held-out records: loss in nats per token, with its standard error; text features."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.data import Record, Tokenizer, dataset_from_records
from dpjax.models import DecoderConfig, hidden_states, next_token_losses
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
    total, count = record_losses(config, params, dataset, batch_size)
    mean = total.sum() / max(count.sum(), 1.0)
    residual = total - mean * count
    error = np.sqrt(np.sum(residual**2)) / max(count.sum(), 1.0)
    return HeldOutLoss(float(mean), float(error), len(dataset), int(count.sum()))


def record_losses(
    config: DecoderConfig, params: PyTree, dataset: TrainingData, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of predicted tokens of every record.

    Returns:
      float64[N] in nats, float64[N].

    Example:
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> from dpjax.models import decoder_config, init_params
      >>> data = dataset_from_records([Record("hello"), Record("hi")], byte_tokenizer(), 8)
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> losses, counts = record_losses(config, init_params(config, jax.random.key(0)), data)
      >>> print(counts, bool(losses[0] > losses[1]))
      [6. 3.] True
    """
    totals, counts = [], []
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch repeats its first row to keep the shape, and drops the repeats below.
        inside = rows < len(dataset)
        total, count = _sums(config, params, dataset.take(np.where(inside, rows, start)))
        totals.append(np.asarray(total, np.float64)[inside])
        counts.append(np.asarray(count, np.float64)[inside])
    return np.concatenate(totals), np.concatenate(counts)


@functools.partial(jax.jit, static_argnames="config")
def _features(config, params, batch):
    def one(tokens, mask):
        states = hidden_states(config, params, tokens).astype(jnp.float32)
        counted = mask.astype(jnp.float32)
        total = jnp.einsum("td,t->d", states, counted)
        return total / jnp.maximum(jnp.sum(counted), 1.0)

    return jax.vmap(one)(batch["tokens"], batch["loss_mask"])


def embed_texts(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sequence_length: int = 128,
    batch_size: int = 32,
) -> np.ndarray:
    """A vector for each text: the mean of the model's last hidden states over its tokens.

    Args:
      config, params, tokenizer: a pretrained model; embed both sides of a comparison with one.
      texts: any texts; what is beyond ``sequence_length`` tokens is cut.

    Returns:
      float32[N, d_model].

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> params = init_params(config, jax.random.key(0))
      >>> embed_texts(config, params, byte_tokenizer(), ["hello", "hi"], 16).shape
      (2, 128)
    """
    if not texts:
        return np.zeros((0, config.d_model), np.float32)
    data = dataset_from_records([Record(text) for text in texts], tokenizer, sequence_length)
    rows = []
    for start in range(0, len(data), batch_size):
        wanted = np.arange(start, start + batch_size)
        inside = wanted < len(data)
        batch = data.take(np.where(inside, wanted, start))
        rows.append(np.asarray(_features(config, params, batch))[inside])
    return np.concatenate(rows)
