"""Language models as pure functions over plain parameter pytrees."""

from dpjax.models.decoder import (
    Decoder,
    DecoderConfig,
    Preset,
    abstract_params,
    apply,
    count_parameters,
    decoder_config,
    init_params,
)
from dpjax.models.losses import language_model_loss, next_token_losses

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Preset",
    "abstract_params",
    "apply",
    "count_parameters",
    "decoder_config",
    "init_params",
    "language_model_loss",
    "next_token_losses",
]
