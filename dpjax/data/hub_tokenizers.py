"""Tokenizers of pretrained models, with begin, end and padding found for training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dpjax.data.tokenizers import Tokenizer
from dpjax.errors import DpjaxError


def hub_tokenizer(
    folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face's format.

    A pretrained tokenizer learned from public text, so it leaks nothing of the private records.

    Args:
      folder: holds tokenizer.json; tokenizer_config.json and generation_config.json are read too.
      config: what config.json says, for the special ids; read from the folder by default.

    Returns:
      A ``Tokenizer``. Without a begin token of its own, its end token begins a text as well
      (GPT-2's way); without a padding token, its end token pads (masks decide, not ids).

    Raises:
      DpjaxError: no tokenizer.json, a corrupt one, or no end token.

    Example:
      >>> import tempfile
      >>> from dpjax.data.tokenizers import byte_tokenizer
      >>> folder = tempfile.mkdtemp()
      >>> byte_tokenizer().save_for_hub(folder)
      >>> hub_tokenizer(folder).encode("hi"), hub_tokenizer(folder).eos_id
      ([104, 105], 258)
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise DpjaxError(
            f"{folder} has no tokenizer.json; save the model's fast tokenizer there "
            "(save_pretrained of transformers)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The backend reports a bad file as a bare Exception, so nothing narrower catches it.
    except Exception as error:
        first = " ".join(str(error).split())[:120]
        raise DpjaxError(f"{path} is corrupt ({first}); fetch it again") from None
    described = _read(folder / "tokenizer_config.json")
    generation = _read(folder / "generation_config.json")
    found = _read(folder / "config.json") if config is None else config

    def special(kind: str) -> Any:
        token = described.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        by_name = backend.token_to_id(token) if isinstance(token, str) else None
        by_id = found.get(f"{kind}_token_id")
        return by_id if by_name is None else by_name

    ends: list[Any] = []
    for where in (special("eos"), found.get("eos_token_id"), generation.get("eos_token_id")):
        ends += where if isinstance(where, Sequence) else [where]
    template = described.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if template is None and jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    return pretrained_tokenizer(
        backend,
        bos_id=special("bos"),
        eos_id=[end for end in dict.fromkeys(ends) if end is not None],
        pad_id=special("pad"),
        where=str(folder),
        chat_template=template if isinstance(template, str) else None,
    )


def pretrained_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    bos_id: Any,
    eos_id: Any,
    pad_id: Any,
    where: str,
    chat_template: str | None = None,
) -> Tokenizer:
    """Wraps a backend; ids are integers or None, ``eos_id`` may be several.

    Example:
      >>> from dpjax.data.tokenizers import byte_tokenizer
      >>> backend = byte_tokenizer().backend
      >>> pretrained_tokenizer(backend, bos_id=None, eos_id=10, pad_id=None, where="x").bos_id
      10
    """
    for kind, value in (("bos", bos_id), ("pad", pad_id), ("eos", eos_id)):
        ids = value if isinstance(value, list | tuple) else [value]
        bad = [x for x in ids if not (x is None or (isinstance(x, int) and x >= 0))]
        if bad:
            raise DpjaxError(
                f"{where}: {kind}_token_id is {bad[0]!r}; it must be a token number; restore its "
                "config.json"
            )
    ends = [int(end) for end in (eos_id if isinstance(eos_id, Sequence) else [eos_id])
            if end is not None]  # fmt: skip
    if not ends:
        raise DpjaxError(f"{where} names no end token (eos_token); add it to tokenizer_config.json")
    return Tokenizer(
        backend=backend,
        pad_id=ends[0] if pad_id is None else int(pad_id),
        bos_id=ends[0] if bos_id is None else int(bos_id),
        eos_id=ends[0],
        corpus="public",
        stop_ids=tuple(ends[1:]),
        chat_template=chat_template,
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DpjaxError(f"{path} is corrupt ({error}); fetch it again") from None
    return value if isinstance(value, dict) else {}
