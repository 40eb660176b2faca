"""The loss of one example, normalised by a public constant."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.models.config import DecoderConfig
from dpjax.models.decoder import apply
from dpjax.types import LossFn, PyTree


def next_token_losses(
    config: DecoderConfig, params: PyTree, example: dict[str, Any]
) -> tuple[Float[Array, " time_minus_1"], Float[Array, " time_minus_1"]]:
    """Cross-entropy of each next token in nats, and 1.0 where it counts.

    Args:
      example: ``tokens`` int32[time] and ``loss_mask`` [time]; a token is predicted, and counts,
        where its own mask is true. Padding must be masked.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> example = {"tokens": jnp.array([5, 6, 0]), "loss_mask": jnp.array([True, True, False])}
      >>> losses, counts = next_token_losses(config, params, example)
      >>> print(losses.shape, counts)
      (2,) [1. 0.]
    """
    tokens = example["tokens"]
    logits = apply(config, params, tokens[:-1])
    targets = tokens[1:]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - chosen
    return losses, example["loss_mask"][1:].astype(jnp.float32)


@functools.lru_cache(maxsize=32)
def language_model_loss(config: DecoderConfig, normalize_by: float | None = None) -> LossFn:
    """``loss_fn(params, example) -> scalar`` for one tokenised record, or one person's, in nats.

    An example's ``tokens`` and ``loss_mask`` are [time], or [rows, time] where one example is all
    rows of a person (`dpjax.data.by_user`). The sum over unmasked tokens is divided by a public
    constant, by default the number of positions that the example's shape predicts (rows times
    time - 1). Dividing by the record's own count would let a short record weigh each of its tokens
    more; dividing by the batch's count would couple the records.

    Args:
      normalize_by: the constant; None is that number.

    Returns:
      The same function object for the same arguments, so that jit compiles it once.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> loss_fn = language_model_loss(config)
      >>> example = {"tokens": jnp.array([5, 6, 7]), "loss_mask": jnp.ones(3, bool)}
      >>> loss = loss_fn(init_params(config, jax.random.key(0)), example)
      >>> bool(5.5 < loss < 6.0)  # about log(300) = 5.7 before training
      True
    """

    def loss_fn(params: PyTree, example: dict[str, Any]) -> Float[Array, ""]:
        each = lambda row: next_token_losses(config, params, row)  # noqa: E731
        losses, counts = (jax.vmap(each) if example["tokens"].ndim == 2 else each)(example)
        constant = float(losses.size) if normalize_by is None else normalize_by
        # where, not times: a masked position must not pass on a NaN of its own.
        return jnp.sum(jnp.where(counts > 0, losses, 0.0)) / constant

    return loss_fn
