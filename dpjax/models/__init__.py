"""Language models as pure functions over plain parameter pytrees."""

from dpjax.models.config import (
    DecoderConfig,
    LoRA,
    Preset,
    RopeScaling,
    config_from_dict,
    decoder_config,
)
from dpjax.models.decoder import (
    Cache,
    Decoder,
    abstract_params,
    apply,
    apply_cached,
    count_parameters,
    hidden_states,
    init_caches,
    init_params,
)
from dpjax.models.losses import language_model_loss, next_token_losses

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "LoRA",
    "Preset",
    "RopeScaling",
    "abstract_params",
    "apply",
    "apply_cached",
    "config_from_dict",
    "count_parameters",
    "decoder_config",
    "hidden_states",
    "init_caches",
    "init_params",
    "language_model_loss",
    "next_token_losses",
]
