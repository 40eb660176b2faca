"""Language models as pure functions over plain parameter pytrees."""

from dpjax.models.config import (
    ALL_TARGETS,
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
from dpjax.models.pretrained import (
    Model,
    bundled_names,
    is_pretrained_source,
    load_pretrained,
    save_pretrained,
)
from dpjax.models.tuning import (
    Tuning,
    add_lora,
    combine,
    merge_lora,
    partition,
    prepare_tuning,
    tuned_loss,
    with_segments,
)

__all__ = [
    "ALL_TARGETS",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "LoRA",
    "Model",
    "Preset",
    "RopeScaling",
    "Tuning",
    "abstract_params",
    "add_lora",
    "apply",
    "apply_cached",
    "bundled_names",
    "combine",
    "config_from_dict",
    "count_parameters",
    "decoder_config",
    "hidden_states",
    "init_caches",
    "init_params",
    "is_pretrained_source",
    "language_model_loss",
    "load_pretrained",
    "merge_lora",
    "next_token_losses",
    "partition",
    "prepare_tuning",
    "save_pretrained",
    "tuned_loss",
    "with_segments",
]
