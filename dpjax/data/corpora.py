"""Records out of files, folders, the Hugging Face hub or a loaded dataset.

Private text is read without leaving copies. Text formats (jsonl, json, csv, tsv, txt) are read
with the standard library and not with the loaders of ``datasets``, because those guess types: a
column of "2018-05-02" becomes timestamps, the text "NA" becomes a null and the user "007" becomes
7, and their errors name no line. Parquet, Arrow, saved datasets and the hub go through
``datasets``, local files in ways that write no copy to a shared cache and use no network.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.errors import DpjaxError

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


class Record(NamedTuple):
    """One record of a corpus.

    Attributes:
      text: the text.
      user: whose it is, or None where nobody is named.
      label: what kind of record it is, for conditional training, or None.

    Example:
      >>> Record("hello", "ann").user
      'ann'
    """

    text: str
    user: str | None = None
    label: str | None = None


class _Row(NamedTuple):
    where: str  # for error messages: file and line; never content
    fields: Mapping[str, Any]


def records_from(
    source: Any,
    text_field: str | None = None,
    user_field: str | None = None,
    split: str = "train",
    *,
    label_field: str | None = None,
    config_name: str | None = None,
    paragraphs: bool = False,
) -> list[Record]:
    """Reads records from nearly anything.

    Args:
      source: a path or list of paths to jsonl, json, csv, tsv, txt (each also ``.gz``), parquet or
        arrow files, all UTF-8; a folder of such files (read in order of their names, subfolders
        included) or one written by ``datasets``' ``save_to_disk``; a hub id such as
        "stanfordnlp/imdb" (downloaded to the usual cache); or a loaded ``datasets`` object.
      text_field: the field that holds the text. Default: "text", or the only field there is.
      user_field: the field that names the person (string or integer; null for nobody). Default:
        nobody is named, and every record counts as its own person.
      split: which split, where the source has several.
      label_field: the field that holds the label (string or integer). Default: no labels.
      config_name: configuration of a hub dataset that has several.
      paragraphs: in txt files one record is a paragraph (ended by a blank line), not a line.

    Returns:
      The records in the order of the source. An empty text in a field is a record like any other
      (dropping it would change the number of records that the accounting relies on); a blank line
      in a txt or jsonl file is not a record.

    Raises:
      DpjaxError: in one line, for a missing or empty file, broken JSON (with the line), a missing
        field (with the fields there are), text that is not a string (with index and type), bytes
        that are not UTF-8, an unknown hub id or no network.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "notes.jsonl"
      >>> _ = path.write_text('{"text": "你好", "by": 7}', encoding="utf-8")
      >>> records_from(path, user_field="by")
      [Record(text='你好', user='7', label=None)]
    """
    label, rows = _rows_of(source, split, config_name, paragraphs)
    records: list[Record] = []
    # Closed at once when a record is refused, not when the garbage collector finds the time.
    with contextlib.closing(rows):
        for index, row in enumerate(rows):
            if text_field is None:
                text_field = _default_text_field(row)
            text = _field(row, text_field, "text_field")
            if not isinstance(text, str):
                raise DpjaxError(
                    f"record {index} ({row.where}): field {text_field!r} is {type(text).__name__};"
                    " expected a string; convert or remove that record"
                )
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DpjaxError(
                    f"record {index} ({row.where}): field {text_field!r} holds half a surrogate"
                    f" pair at character {error.start}; it has no UTF-8 form; remove or replace it"
                ) from None
            user = _identity(row, user_field, "user", index)
            kind = _identity(row, label_field, "label", index)
            records.append(Record(text, user, kind))
    if not records:
        raise DpjaxError(f"{label} holds no records; check that this is the file you meant")
    return records


def _identity(row: _Row, field: str | None, what: str, index: int) -> str | None:
    """A person's or a label's name, as a string; None where there is none."""
    value = None if field is None else _field(row, field, f"{what}_field")
    # 1.0, True and 1 are equal in Python: only types with one spelling may name something.
    if not (value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))):
        raise DpjaxError(
            f"record {index} ({row.where}): {what} field {field!r} is"
            f" {type(value).__name__}; expected a string, an integer or null; convert it"
        )
    return None if value is None else str(value)


def _default_text_field(row: _Row) -> str:
    if "text" in row.fields or len(row.fields) != 1:
        return "text"
    return next(iter(row.fields))


def _field(row: _Row, name: str, argument: str) -> Any:
    if name not in row.fields:
        present = ", ".join(map(str, row.fields)) or "none"
        raise DpjaxError(
            f"field {name!r} is not in {row.where}; fields present: {present}; pass {argument}="
            " one of them"
        )
    return row.fields[name]


def _rows_of(
    source: Any, split: str, config_name: str | None, paragraphs: bool
) -> tuple[str, Generator[_Row, None, None]]:
    """A label for messages and the rows of any kind of source."""
    if isinstance(source, (list, tuple)) and all(isinstance(s, (str, os.PathLike)) for s in source):
        paths = [Path(path).expanduser() for path in source]
        for path in paths:
            if not path.is_file():
                raise DpjaxError(f"no file at {path}; check the path")
        if not paths:
            raise DpjaxError("the list of source files is empty; pass at least one path")
        return f"{paths[0]} and {len(paths) - 1} more", _rows_of_files(paths, paragraphs)
    if not isinstance(source, (str, os.PathLike)):
        return "the dataset", _rows_of_loaded(source, split)
    if not str(source):
        raise DpjaxError("source is empty; pass a path or a hub id")  # Path("") is this folder
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            import datasets

            return str(path), _rows_of_loaded(datasets.load_from_disk(str(path)), split)
        # Hidden files and folders belong to tools (.git, .venv), not to the corpus.
        paths = sorted(
            p
            for p in path.rglob("*")
            if p.is_file()
            and _suffix(p) in _SUFFIXES
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        if not paths:
            raise DpjaxError(f"folder {path} holds no {', '.join(_SUFFIXES)} file; check the path")
        return str(path), _rows_of_files(paths, paragraphs)
    if path.is_file():
        return str(path), _rows_of_files([path], paragraphs)
    text = str(source)
    looks_like_a_path = (
        isinstance(source, os.PathLike)
        or _suffix(path) in _SUFFIXES
        or text.startswith((".", "~", os.sep))
        or text.count("/") > 1
        or "\\" in text
    )
    if looks_like_a_path:
        raise DpjaxError(f"no file or folder at {text!r}; check the path")
    return text, _rows_of_loaded(_load_from_hub(text, config_name, split), split)


def _suffix(path: Path) -> str:
    """The format's suffix in lower case, that of ``a.jsonl.gz`` being ``.jsonl``."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _rows_of_files(paths: Sequence[Path], paragraphs: bool) -> Generator[_Row, None, None]:
    for path in paths:
        suffix = _suffix(path)
        if suffix not in _SUFFIXES:
            raise DpjaxError(
                f"{path} has no known suffix; expected one of {', '.join(_SUFFIXES)}; rename it"
            )
        if path.stat().st_size == 0:
            raise DpjaxError(f"{path} is empty (0 bytes); check that it was written completely")
        if suffix in (".parquet", ".arrow"):
            yield from _rows_of_columnar(path, suffix)
            continue
        reader = _paragraph_rows if paragraphs and suffix == ".txt" else _TEXT_READERS[suffix]
        with _open_text(path) as file:
            yield from reader(path, file)


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOBase]:
    """Opens as UTF-8 and turns what goes wrong into one line."""
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # utf-8-sig drops the byte order mark that some spreadsheet programs write. newline=None
        # splits on newlines only; str.splitlines would also split on U+2028, legal inside JSON.
        with opener(path, "rt", encoding="utf-8-sig", newline=None) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DpjaxError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, for example"
            f" with: iconv -f ENCODING -t UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DpjaxError(f"{path} cannot be read ({reason}); check the file") from error


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DpjaxError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}); correct or remove it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DpjaxError(
            f"{where} is not JSON that can be read ({type(error).__name__}); correct or remove it"
        ) from None


def _as_fields(value: Any, where: str) -> _Row:
    if isinstance(value, str):
        return _Row(where, {"text": value})
    if not isinstance(value, dict):
        raise DpjaxError(
            f"{where} is a JSON {type(value).__name__}; expected an object such as"
            ' {"text": "..."}; correct or remove it'
        )
    return _Row(where, value)


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            yield _as_fields(_json_value(line, where), where)


def _json_rows(path: Path, file: io.TextIOBase) -> Iterator[_Row]:
    content = file.read()
    if not content.lstrip().startswith("["):
        # JSON lines under the name .json is common. An object spread over lines fails with its
        # line, as it must: it is one object, not a list of records.
        yield from _jsonl_rows(path, io.StringIO(content))
        return
    for index, value in enumerate(_json_value(content, str(path))):
        yield _as_fields(value, f"{path} item {index}")


def _csv_rows(path: Path, file: io.TextIOBase) -> Iterator[_Row]:
    # The csv module refuses fields over 128 KiB by a process-wide setting; records may be longer.
    previous = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(
            file, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True
        )
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            if None in fields or None in fields.values():
                raise DpjaxError(
                    f"{where} has not the {len(reader.fieldnames or ())} columns of the header;"
                    " quote fields that hold the separator"
                )
            yield _Row(where, fields)
    except csv.Error as error:
        raise DpjaxError(f"{path} is not valid CSV ({error}); correct the quoting") from None
    finally:
        csv.field_size_limit(previous)


def _line_rows(path: Path, file: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _Row(f"{path} line {number}", {"text": line.removesuffix("\n")})


def _paragraph_rows(path: Path, file: Iterable[str]) -> Iterator[_Row]:
    lines: list[str] = []
    number = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield _Row(f"{path} line {number - len(lines)}", {"text": "".join(lines).rstrip("\n")})
            lines = []
    if lines:
        yield _Row(f"{path} line {number + 1 - len(lines)}", {"text": "".join(lines).rstrip("\n")})


_TEXT_READERS: dict[str, Callable[[Path, Any], Iterator[_Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".txt": _line_rows,
}


def _rows_of_columnar(path: Path, suffix: str) -> Iterator[_Row]:
    # `datasets` takes seconds to import, so only those who need it wait.
    import datasets
    import pyarrow

    # Neither way goes through datasets.load_dataset, which reports every use to the hub, for local
    # files too. Streaming reads the file in place, and an Arrow file is mapped: nothing puts a copy
    # of the private text under the home folder, where it would outlive this run. The lock files
    # that are still made go to a folder that is removed.
    with tempfile.TemporaryDirectory() as cache:
        try:
            if suffix == ".arrow":
                loaded: Any = datasets.Dataset.from_file(str(path))
            else:
                # A path is a pattern to `datasets`: unescaped, "a[1].parquet" is not found.
                pattern = glob.escape(str(path.resolve()))
                loaded = datasets.Dataset.from_parquet(pattern, cache_dir=cache, streaming=True)
            for row in _rows_of_loaded(loaded, "train"):
                yield row._replace(where=f"{path} {row.where}")
        except (pyarrow.ArrowException, OSError) as error:
            raise DpjaxError(
                f"{path} is not a readable {suffix} file ({_first_line(error)}); write it again"
            ) from None


def _rows_of_loaded(loaded: Any, split: str) -> Generator[_Row, None, None]:
    """Rows of a ``datasets`` object; a dict of splits gives its ``split``."""
    import datasets

    if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in loaded:
            raise DpjaxError(
                f"split {split!r} is not in the dataset; it has {', '.join(map(str, loaded))};"
                " pass split= one of them"
            )
        loaded = loaded[split]
    if not isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        raise DpjaxError(
            f"source is {type(loaded).__name__}; expected a path, a list of paths, a hub id or a"
            " datasets.Dataset; for records in memory call dataset_from_records"
        )
    for index, fields in enumerate(loaded):
        yield _Row(f"row {index}", fields)


def _load_from_hub(hub_id: str, config_name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, name=config_name, split=split)
    # Downloading and parsing by a dozen libraries: whatever it is, the user gets one line.
    except Exception as error:
        raise DpjaxError(
            f"{hub_id!r} is no local file and the hub could not give it"
            f" ({type(error).__name__}: {_first_line(error)}); check the spelling, split,"
            " config_name and network, or pass a local path"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
