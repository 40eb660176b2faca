"""Model folders: parameters, shape and tokenizer together, fit for release or as a start."""

import dataclasses
import json
import os
import pathlib

from dpjax.checkpoint import load_params, save_params
from dpjax.data import load_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import Model, abstract_params, config_from_dict

_CONFIG, _TOKENIZER, _PARAMS = "config.json", "tokenizer.json", "params"


def save_model(folder: str | os.PathLike, model: Model) -> str:
    """Writes a model folder and returns the sha256 of its parameters.

    The folder holds no key, no optimizer state and no records.

    Example:
      >>> import jax, tempfile
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> model = Model(config, init_params(config, jax.random.key(0)), byte_tokenizer())
      >>> folder = tempfile.TemporaryDirectory()
      >>> len(save_model(f"{folder.name}/model", model))
      64
      >>> load_model(f"{folder.name}/model").config == config
      True
      >>> folder.cleanup()
    """
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        model.tokenizer.save(path / _TOKENIZER)
        written = save_params(path / _PARAMS, model.params)
        described = {
            "format": 1,
            "decoder": dataclasses.asdict(model.config),
            "pretraining": list(model.pretraining),
            "params_sha256": written,
        }
        # The description comes last: a folder that has one is complete.
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (path / _CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DpjaxError(f"model folder {path} cannot be written ({error.strerror})") from None
    return written


def is_model_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder has this format's description.

    Example:
      >>> is_model_folder("nowhere")
      False
    """
    try:
        described = json.loads((pathlib.Path(folder) / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and "decoder" in described


def load_model(folder: str | os.PathLike) -> Model:
    """Reads a model folder.

    Raises:
      DpjaxError: not a model folder, unreadable content, or a tokenizer that does not fit.
    """
    path = pathlib.Path(folder)
    try:
        described = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        config = config_from_dict(described["decoder"])
    except FileNotFoundError:
        raise DpjaxError(
            f"{path} is not a model folder: it has no {_CONFIG}; give the model/ folder of a run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DpjaxError(f"{path / _CONFIG} is corrupt ({error}); restore the folder") from None
    tokenizer = load_tokenizer(path / _TOKENIZER)
    if tokenizer.num_embedded > config.vocabulary_size:
        raise DpjaxError(
            f"the tokenizer in {path} has {tokenizer.num_embedded} tokens, the model only "
            f"{config.vocabulary_size}; use the tokenizer that the model was trained with"
        )
    params = load_params(path / _PARAMS, abstract_params(config))
    return Model(config, params, tokenizer, tuple(described.get("pretraining", ())))
