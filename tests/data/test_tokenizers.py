"""Tokenizers: lossless, deterministic, unspoofable, and never trained on private text."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax.data import byte_tokenizer, load_tokenizer, train_bpe
from dpjax.errors import DpjaxError

PUBLIC = ["The quick brown fox jumps over the lazy dog. " * 3, "敏捷的棕色狐狸跳过懒狗。" * 3] * 4
BYTES = byte_tokenizer()
BPE = train_bpe(PUBLIC, 320, tokenizer_corpus="public")
# Any Unicode text that has a UTF-8 form.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_round_trip_on_any_text(text):
    for tokenizer in (BYTES, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
        assert all(0 <= i < tokenizer.pad_id for i in ids)
    assert BYTES.encode(text) == list(text.encode("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界。",
        "👩‍👩‍👧 family",
        "  two  spaces\n\n\ttab \r\n",
        "e\u0301 stays decomposed, \ufb01 stays a ligature",  # a normaliser would lose this
        "<|endoftext|><pad></s>[MASK]",
        "\x00\x7f\u2028\U0010ffff",
        "",
    ],
)
def test_round_trip_on_texts_that_break_other_tokenizers(text):
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_is_its_own_token_even_outside_utf8():
    assert BYTES.vocabulary_size == 259
    for byte in range(128):
        assert BYTES.encode(chr(byte)) == [byte]
    assert BYTES.decode([0xE4, 0xBD]) == "\ufffd"  # half a character from a model
    assert BYTES.decode([0xE4, 0xBD, 0xA0]) == "你"


def test_batch_equals_single_across_internal_batches():
    texts = [f"message {i} 好" for i in range(9000)]
    ids = BPE.encode_batch(texts)
    assert len(ids) == 9000
    for index in (0, 8191, 8192, 8999):
        assert ids[index] == BPE.encode(texts[index])
        assert BPE.decode(ids[index]) == texts[index]


def test_bpe_compresses_what_it_was_trained_on():
    text = PUBLIC[0]
    assert len(BPE.encode(text)) < len(text) / 2


@pytest.mark.parametrize("said", [None, "private", "Public", "", True])
def test_training_on_undeclared_text_is_refused_with_the_reason(said):
    with pytest.raises(DpjaxError, match="outside any epsilon") as info:
        train_bpe(iter(["my secret"]), 300, tokenizer_corpus=said)
    assert "\n" not in str(info.value) and "byte_tokenizer()" in str(info.value)
    assert "my secret" not in str(info.value)


def test_corpus_travels_for_the_privacy_card():
    assert (BYTES.corpus, BPE.corpus) == ("none (bytes)", "public")


def test_vocabulary_size_is_met_or_honestly_smaller():
    assert BPE.vocabulary_size == 320
    short = train_bpe(["ab"], 5000, tokenizer_corpus="public")
    assert 259 <= short.vocabulary_size < 270
    assert short.eos_id == short.vocabulary_size - 1
    with pytest.raises(DpjaxError, match="at least 259"):
        train_bpe(PUBLIC, 258, tokenizer_corpus="public")
    assert train_bpe(PUBLIC, 259, tokenizer_corpus="public").vocabulary_size == 259


def test_training_is_deterministic_across_processes():
    # Hash tables are seeded per process, so ties would show here and not within one process.
    code = (
        "from dpjax.data import train_bpe;"
        "t = ['ab cd ef gh ij kl mn op qr st uv wx yz ' * 4, '天地玄黄 宇宙洪荒 ' * 4];"
        "print(train_bpe(t, 280, tokenizer_corpus='public').fingerprint())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert len({run.communicate()[0] for run in runs}) == 1
    assert all(run.returncode == 0 for run in runs)


def test_save_and_load_keep_everything(tmp_path):
    for tokenizer in (BYTES, BPE):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.corpus == tokenizer.corpus
        assert loaded.encode("quick 敏捷") == tokenizer.encode("quick 敏捷")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert BYTES.fingerprint() != BPE.fingerprint()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "dpjax tokenizer 1"}', "\x00"])
def test_loading_a_file_that_is_no_tokenizer_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DpjaxError, match="not a dpjax tokenizer") as info:
        load_tokenizer(path)
    assert "\n" not in str(info.value)
    with pytest.raises(DpjaxError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")


def test_text_without_utf8_form_and_ids_outside_are_refused():
    with pytest.raises(DpjaxError, match="text 1 holds half a surrogate pair at character 2"):
        BYTES.encode_batch(["fine", "ab\ud83d"])
    with pytest.raises(DpjaxError, match="text 0 is int"):
        BYTES.encode_batch([5])
    for bad in (-1, 259):
        with pytest.raises(DpjaxError, match="outside the vocabulary"):
            BYTES.decode([bad])
