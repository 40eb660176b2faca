"""Files of a checkpoint in Hugging Face's format: safetensors and JSON, with one-line errors."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpjax.errors import DpjaxError


def write_safetensors(path: pathlib.Path, named: dict[str, np.ndarray]) -> None:
    """Writes arrays of float32 or bfloat16, whole or not at all."""
    library = _safetensors()
    save = importlib.import_module("safetensors.flax").save_file
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save(named, os.fspath(partial), metadata={"format": "pt"})
        os.replace(partial, path)
    except library.SafetensorError as error:
        # Its own word for a full disk.
        raise OSError(None, " ".join(str(error).split())[:120]) from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError:
        raise DpjaxError(
            "safetensors is missing and reads weights; run: pip install 'dpjax[pretrained]'"
        ) from None


def read_json(path: pathlib.Path, missing: str) -> dict[str, Any]:
    """A JSON object from disk; ``missing`` is what to say where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DpjaxError(missing) from None
    except (OSError, ValueError) as error:
        raise DpjaxError(f"{path} is corrupt ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise DpjaxError(f"{path} is corrupt (not an object); fetch it again")
    return value


def open_tensors(path: pathlib.Path) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """Names and reader of all safetensors files of a folder."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.exists():
        files = [single]
    elif index.exists():
        weights = read_json(index, "").get("weight_map")
        if not isinstance(weights, dict):
            raise DpjaxError(f"{index} is corrupt (no weight_map); fetch it again")
        files = [path / name for name in sorted(set(weights.values()))]
    else:
        other = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt")))
        hint = f"; {other[0]} is a pickle, which could run code: convert it" if other else ""
        raise DpjaxError(f"{path} has no model.safetensors{hint or '; fetch it again'}")
    safetensors = _safetensors()
    opened, where = [], {}
    for file in files:
        try:
            handle = safetensors.safe_open(os.fspath(file), framework="flax")
            names = list(handle.keys())
        except FileNotFoundError:
            raise DpjaxError(f"{file} is missing; the checkpoint is incomplete: fetch it") from None
        except Exception as error:
            first = " ".join(str(error).split())[:120]
            raise DpjaxError(f"{file} is corrupt ({first}); fetch it again") from None
        opened.append(handle)
        where |= dict.fromkeys(names, handle)
    return list(where), lambda name: np.asarray(where[name].get_tensor(name))
