"""Text to token ids and back, learned from nothing private.

A vocabulary is chosen by counting strings. Counted over private records, a rare string (a name, a
number) becomes a token that everybody with the tokenizer can read: a leak that no epsilon covers.
So there are bytes, which learn nothing, BPE on text that is public, and the tokenizers of public
pretrained models (`hub_tokenizer`).

No record can contain a special id (padding, begin, end) by writing its name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from dpjax.errors import DpjaxError

_FORMAT = "dpjax tokenizer 1"
_NUM_SPECIAL = 3
_NUM_BYTES = 256
# Encoding objects are large; converting a few thousand at a time bounds the memory.
_ENCODE_BATCH = 8192


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte: token id = byte value, then padding, begin and end.

    Lossless on any text, needs no training data, and has 259 tokens. A Chinese character takes
    three of them.

    Returns:
      A ``Tokenizer`` whose ``corpus`` is "none (bytes)".

    Example:
      >>> tokenizer = byte_tokenizer()
      >>> tokenizer.encode("hé")
      [104, 195, 169]
      >>> tokenizer.decode(tokenizer.encode("你好 🙂"))
      '你好 🙂'
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _with_special_ids(backend, corpus="none (bytes)")


def train_bpe(
    texts: Iterable[str], vocabulary_size: int, *, tokenizer_corpus: str | None = None
) -> Tokenizer:
    """Byte-level BPE, trained on text that you declare public.

    Byte level: all 256 bytes are tokens, so any text encodes and decodes without loss, whatever
    the training text was. The result is deterministic in ``texts`` and ``vocabulary_size``.

    Args:
      texts: the public text; it is read once.
      vocabulary_size: tokens wanted, special ids included; at least 259. A short text may yield
        fewer: read ``vocabulary_size`` of the result.
      tokenizer_corpus: must be "public", said by you: code cannot know whether text is.

    Returns:
      A ``Tokenizer`` whose ``corpus`` is "public".

    Raises:
      DpjaxError: without ``tokenizer_corpus="public"``, or if the vocabulary is too small.

    Source:
      Sennrich et al. (2016), section 3.2; bytes as in Radford et al. (2019), section 2.2.

    Example:
      >>> tokenizer = train_bpe(["to be or not to be"] * 3, 265, tokenizer_corpus="public")
      >>> tokenizer.vocabulary_size, len(tokenizer.encode("to be"))
      (265, 2)
      >>> train_bpe(["my diary"], 300)
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: tokenizer_corpus is None; ...
    """
    if tokenizer_corpus != "public":
        raise DpjaxError(
            f"tokenizer_corpus is {tokenizer_corpus!r}; a tokenizer trained on private records"
            " leaks their strings through its vocabulary, outside any epsilon; train it on public"
            ' text and say tokenizer_corpus="public", or use byte_tokenizer()'
        )
    if vocabulary_size < _NUM_BYTES + _NUM_SPECIAL:
        raise DpjaxError(
            f"vocabulary_size is {vocabulary_size}; 256 bytes and 3 special ids need at least"
            f" {_NUM_BYTES + _NUM_SPECIAL}; pass e.g. 1024"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size - _NUM_SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return _with_special_ids(backend, corpus="public")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads what ``Tokenizer.save`` wrote.

    Raises:
      DpjaxError: if the file is missing or is not one of ours.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "tokenizer.json"
      >>> byte_tokenizer().save(path)
      >>> load_tokenizer(path).fingerprint() == byte_tokenizer().fingerprint()
      True
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise KeyError("format")
        return Tokenizer(
            backend=tokenizers.Tokenizer.from_str(json.dumps(content["backend"])),
            pad_id=int(content["pad_id"]),
            bos_id=int(content["bos_id"]),
            eos_id=int(content["eos_id"]),
            corpus=str(content["corpus"]),
            stop_ids=tuple(map(int, content.get("stop_ids", ()))),
            chat_template=content.get("chat_template"),
            spare_rows=int(content.get("spare_rows", 0)),
        )
    except FileNotFoundError:
        raise DpjaxError(f"no tokenizer file at {path}; write one with Tokenizer.save") from None
    except DpjaxError:
        raise
    # The backend reports a bad file as a bare Exception, so nothing narrower catches it.
    except Exception as error:
        raise DpjaxError(
            f"{path} is not a dpjax tokenizer ({type(error).__name__}); write it again with"
            " Tokenizer.save"
        ) from error


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in the byte-level alphabet, by byte.

    Printable Latin-1 bytes stand for themselves and the other 68 take the code points from 256 up
    (Radford et al., 2019, released code).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(_NUM_BYTES)]


def _with_special_ids(backend: tokenizers.Tokenizer, corpus: str) -> Tokenizer:
    size = backend.get_vocab_size()
    return Tokenizer(backend, pad_id=size, bos_id=size + 1, eos_id=size + 2, corpus=corpus)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with three special ids that no text can spell.

    Attributes:
      backend: the ``tokenizers.Tokenizer`` that does the work.
      pad_id, bos_id, eos_id: padding, begin and end of a record.
      corpus: what the vocabulary was learned from, for the privacy card: "none (bytes)" or
        "public".
      stop_ids: further ids that end a text, where a pretrained model has several.
      chat_template: a pretrained model's own, handed on when it is exported.
      spare_rows: rows of a pretrained model's embedding behind the last id. They stand for no text,
        but a model can draw them.

    Example:
      >>> tokenizer = byte_tokenizer()
      >>> tokenizer.vocabulary_size, tokenizer.pad_id, tokenizer.corpus
      (259, 256, 'none (bytes)')
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    bos_id: int
    eos_id: int
    corpus: str
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    spare_rows: int = 0

    def __post_init__(self) -> None:
        # The name of a special token, written in a record, is text like any other; also where the
        # file that it came from does not mark it as special.
        for number in self.special_ids:
            name = self.backend.id_to_token(number)
            if name is not None and number in self.backend.get_added_tokens_decoder():
                token = tokenizers.AddedToken(name, normalized=False, special=True)
                self.backend.add_special_tokens([token])
        self.backend.encode_special_tokens = True
        # A stored tokenizer may cut or pad by itself; examples are made elsewhere.
        self.backend.no_truncation()
        self.backend.no_padding()

    @property
    def special_ids(self) -> frozenset[int]:
        """Padding, begin, end and further end ids: none of them is ever the id of text."""
        return frozenset((self.pad_id, self.bos_id, self.eos_id, *self.stop_ids))

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included: the rows of a model's embedding."""
        return 1 + max(*self.backend.get_vocab().values(), *self.special_ids)

    @functools.cached_property
    def num_embedded(self) -> int:
        """Rows that an embedding cannot do without: ids of text, and `special_ids`.

        A pretrained tokenizer may have further special tokens that its model has no row for (Gemma
        3: the place of an image); they are never the id of text.
        """
        added = self.backend.get_added_tokens_decoder()
        spelled = self.backend.get_vocab(with_added_tokens=False).values()
        also = [number for number, token in added.items() if not token.special]
        return 1 + max(*spelled, *also, *self.special_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without begin and end.

        Raises:
          DpjaxError: if the text is not a string or holds half a surrogate pair (no UTF-8 form).

        Example:
          >>> byte_tokenizer().encode("ab")
          [97, 98]
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, in order, on all cores.

        Raises:
          DpjaxError: naming the first text that is not valid Unicode.

        Example:
          >>> byte_tokenizer().encode_batch(["ab", ""])
          [[97, 98], []]
        """
        ids: list[list[int]] = []
        special = self.special_ids
        for start in range(0, len(texts), _ENCODE_BATCH):
            part = list(texts[start : start + _ENCODE_BATCH])
            try:
                encodings = self.backend.encode_batch_fast(part, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                _refuse_unencodable(part, start)
                raise
            ids.extend(encoding.ids for encoding in encodings)
        # In a few vocabularies a special token is a word like any other: it is left out.
        return [
            row if special.isdisjoint(row) else [number for number in row if number not in special]
            for row in ids
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special ids and spare rows have none.

        Bytes that are not UTF-8 (a model may produce them) become U+FFFD.

        Raises:
          DpjaxError: for an id outside the vocabulary.

        Example:
          >>> tokenizer = byte_tokenizer()
          >>> tokenizer.decode([tokenizer.bos_id, 104, 105, tokenizer.eos_id, tokenizer.pad_id])
          'hi'
        """
        numbers = [int(number) for number in ids]
        size = self.vocabulary_size
        for number in numbers:
            if not 0 <= number < size + self.spare_rows:
                raise DpjaxError(
                    f"token {number} is outside the vocabulary of {size}; decode with the"
                    " tokenizer that the model was trained with"
                )
        special = self.special_ids
        text = [number for number in numbers if number < size and number not in special]
        return self.backend.decode(text, skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one JSON file (UTF-8), whole or not at all.

        Example:
          >>> import tempfile
          >>> byte_tokenizer().save(Path(tempfile.mkdtemp()) / "tokenizer.json")
        """
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(self._content(), ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)

    def save_for_hub(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as ``transformers`` reads them.

        Special ids without a spelling get one there, and a begin token in front of every text.

        Example:
          >>> import tempfile
          >>> byte_tokenizer().save_for_hub(tempfile.mkdtemp())
        """
        folder = Path(folder)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        ids = {"pad_token": self.pad_id, "bos_token": self.bos_id, "eos_token": self.eos_id}
        if backend.id_to_token(self.bos_id) is None:
            names = [f"<|{name.removesuffix('_token')}|>" for name in ids]
            backend.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in names])
            begin = names[1]
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, self.bos_id)]
            )
        described: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: backend.id_to_token(number) for name, number in ids.items()},
        }
        if self.chat_template is not None:
            described["chat_template"] = self.chat_template
        backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids: 64 hexadecimal digits.

        Example:
          >>> byte_tokenizer().fingerprint() == byte_tokenizer().fingerprint()
          True
        """
        content = json.dumps(self._content(), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def _content(self) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "corpus": self.corpus,
            "pad_id": self.pad_id,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "backend": json.loads(self.backend.to_str()),
            **({"stop_ids": list(self.stop_ids)} if self.stop_ids else {}),
            **({"chat_template": self.chat_template} if self.chat_template else {}),
            **({"spare_rows": self.spare_rows} if self.spare_rows else {}),
        }


def _refuse_unencodable(texts: Sequence[object], offset: int) -> None:
    for index, text in enumerate(texts, offset):
        if not isinstance(text, str):
            raise DpjaxError(
                f"text {index} is {type(text).__name__}; expected a string; convert it first"
            ) from None
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DpjaxError(
                f"text {index} holds half a surrogate pair at character {error.start}; it has no"
                " UTF-8 form; remove or replace that character"
            ) from None
