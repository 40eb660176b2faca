"""Reading records from anything, in one clear line where that fails, leaving nothing behind."""

import csv
import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpjax.data import (
    NO_USER,
    Record,
    byte_tokenizer,
    dataset_from_records,
    records_from,
    stable_id,
)
from dpjax.errors import DpjaxError

ROWS = [
    {"text": "hello, world", "user": "ann"},
    {"text": "你好，世界 🙂", "user": "小明"},
    {"text": "", "user": "ann"},
    {"text": 'quotes " and\nlines', "user": "007"},
    {"text": "2018-05-02", "user": "2018-05-02"},  # type guessers make a timestamp of it
    {"text": "NA", "user": "NA"},  # ... and a null of this
    {"text": "one\u2028record", "user": "1e5"},  # a line separator to str.splitlines
]
RECORDS = [Record(row["text"], row["user"]) for row in ROWS]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(*arguments, **options):
    with pytest.raises(DpjaxError) as info:
        records_from(*arguments, **options)
    text = str(info.value)
    assert "\n" not in text and len(text) < 450
    return text


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_text_format_gives_the_same_records(tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", jsonl(ROWS)),
        write(tmp_path / "escaped.ndjson", "\n".join(json.dumps(row) for row in ROWS)),
        write(tmp_path / "windows.jsonl", "\ufeff" + jsonl(ROWS).replace("\n", "\r\n")),
        write(tmp_path / "blank_lines.jsonl", "\n" + jsonl(ROWS) + "\n\n"),
        write(tmp_path / "list.json", json.dumps(ROWS, indent=1)),
        write(tmp_path / "really_lines.json", jsonl(ROWS)),
    ]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(jsonl(ROWS))
    sources.append(tmp_path / "a.jsonl.gz")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["user", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        sources.append(tmp_path / name)
    for source in sources:
        assert records_from(source, "text", "user") == RECORDS, source
        assert records_from(str(source)) == [Record(r.text) for r in RECORDS]


def test_parquet_arrow_saved_and_loaded_datasets(tmp_path, no_network):
    import datasets

    loaded = datasets.Dataset.from_list(ROWS)
    loaded.to_parquet(tmp_path / "a[1].parquet")  # brackets are a pattern to the loader
    with loaded.with_format("arrow"):
        loaded.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"dev": loaded}).save_to_disk(tmp_path / "splits")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (tmp_path / "a[1].parquet", arrow, tmp_path / "saved", loaded):
        assert records_from(source, user_field="user") == RECORDS, source
    stream = loaded.to_iterable_dataset()
    assert records_from(stream, user_field="user") == RECORDS
    assert records_from(tmp_path / "splits", user_field="user", split="dev") == RECORDS
    assert "it has dev" in refusal(tmp_path / "splits")


def test_text_files_by_line_and_by_paragraph(tmp_path):
    path = write(tmp_path / "a.txt", "\n一行\r\n two  \n\n \nthree\nfour\n\n\n\nfive")
    lines = [r.text for r in records_from(path)]
    assert lines == ["一行", " two  ", "three", "four", "five"]
    paragraphs = [r.text for r in records_from(path, paragraphs=True)]
    assert paragraphs == ["一行\n two  ", "three\nfour", "five"]


def test_folders_and_lists_are_read_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", '{"text": "second"}\n')
    write(tmp_path / "a.txt", "first\n")
    write(tmp_path / "sub" / "c.txt", "third\n")
    write(tmp_path / "README.md", "no data\n")
    (tmp_path / ".tool").mkdir()
    write(tmp_path / ".tool" / "state.json", '[{"text": "not a record"}]')
    assert [r.text for r in records_from(tmp_path)] == ["first", "second", "third"]
    both = records_from([tmp_path / "b.jsonl", str(tmp_path / "a.txt")])
    assert [r.text for r in both] == ["second", "first"]
    assert "absent" in refusal([tmp_path / "a.txt", tmp_path / "absent.txt"])
    (tmp_path / "empty").mkdir()
    assert "holds no" in refusal(tmp_path / "empty")


def test_users_may_be_integers_or_nobody(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "a", "u": 7}, {"text": "b", "u": None}]))
    assert records_from(path, user_field="u") == [Record("a", "7"), Record("b", None)]
    for value, kind in ((1.0, "float"), (True, "bool"), (["x"], "list")):
        write(path, jsonl([{"text": "a", "u": "x"}, {"text": "b", "u": value}]))
        text = refusal(path, user_field="u")
        assert "record 1" in text and "line 2" in text and kind in text


def test_the_only_field_is_the_text_field(tmp_path):
    path = write(tmp_path / "a.csv", "body\nhello\n")
    assert records_from(path) == [Record("hello")]


def test_missing_and_empty_files(tmp_path):
    assert "no file or folder" in refusal(tmp_path / "absent.jsonl")
    assert "no file or folder" in refusal("data/absent.jsonl")
    assert "empty" in refusal("")  # and not the files of the current folder
    assert "0 bytes" in refusal(write(tmp_path / "a.jsonl", ""))
    assert "no records" in refusal(write(tmp_path / "b.jsonl", "\n \n"))
    assert "no records" in refusal(write(tmp_path / "c.csv", "text,user\n"))
    assert "no known suffix" in refusal(write(tmp_path / "d.docx", "x"))


def test_broken_json_names_its_line_and_not_its_content(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n\n{"text": "my secret"\n{"text": "ok"}\n')
    text = refusal(path)
    assert "line 3" in text and "secret" not in text
    assert "JSON list" in refusal(write(path, '{"text": "ok"}\n["my secret"]\n'))
    assert "line 1" in refusal(write(path, "[" * 100_000 + "\n"))
    assert "list.json" in refusal(write(tmp_path / "list.json", '[{"text": "a"}, {"te'))


def test_missing_fields_list_those_present(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"body": "a", "by": "x"}]))
    text = refusal(path)
    assert "'text'" in text and "body, by" in text and "text_field" in text
    text = refusal(path, "body", "user")
    assert "'user'" in text and "user_field" in text
    later = write(tmp_path / "b.jsonl", jsonl([{"text": "a"}, {"body": "b"}]))
    assert "line 2" in refusal(later)


def test_text_that_is_not_a_string_gives_index_and_type(tmp_path):
    for value, kind in ((5, "int"), (None, "NoneType"), ({"a": 1}, "dict")):
        path = write(tmp_path / "a.jsonl", jsonl([{"text": "a"}, {"text": value}]))
        text = refusal(path)
        assert "record 1" in text and "line 2" in text and kind in text
    surrogate = write(tmp_path / "b.jsonl", '{"text": "ab\\ud83d"}\n')
    assert "half a surrogate pair at character 2" in refusal(surrogate)


def test_files_that_are_not_utf8_or_not_readable(tmp_path):
    for encoding in ("gb18030", "utf-16", "latin-1"):
        path = write(
            tmp_path / "a.jsonl",
            jsonl([{"text": "é你" if encoding != "latin-1" else "é"}]),
            encoding,
        )
        assert "not UTF-8" in refusal(path)
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(b"not gzip")
    assert "cannot be read" in refusal(broken)
    truncated = tmp_path / "c.jsonl.gz"
    truncated.write_bytes(gzip.compress(jsonl(ROWS * 50).encode())[:-20])
    assert "cannot be read" in refusal(truncated)
    assert "not a readable .parquet" in refusal(write(tmp_path / "d.parquet", "PAR1 no"))


def test_csv_with_wrong_columns_or_long_fields(tmp_path):
    path = write(tmp_path / "a.csv", "text,user\na,b\nno, quotes, here\n")
    assert "line 3" in refusal(path)
    assert "line 2" in refusal(write(path, "text,user\nonly one\n"))
    assert "not valid CSV" in refusal(write(path, 'text,user\n"open, b\n'))
    limit = csv.field_size_limit()
    long = write(path, "text,user\n" + "x" * 200_000 + ",ann\n")
    assert len(records_from(long)[0].text) == 200_000
    assert csv.field_size_limit() == limit


def test_an_unknown_hub_id_or_no_network_is_one_line(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    text = refusal("somebody/some-data")
    assert "somebody/some-data" in text and "network" in text and "second line" not in text


def test_a_hub_dataset_gets_its_split_and_configuration(monkeypatch):
    import datasets

    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert records_from("owner/name", split="test", config_name="zh", user_field="user") == RECORDS
    assert calls == [(("owner/name",), {"name": "zh", "split": "test"})]


def test_other_objects_are_refused():
    assert "dict" in refusal({"text": ["a"]})
    assert "empty" in refusal([])


def test_local_files_use_no_network_and_leave_no_copy(tmp_path):
    # In a fresh process with its own home and temporary folder: afterwards both must be empty.
    import datasets

    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    write(tmp_path / "a.jsonl", jsonl(ROWS))
    sources = [tmp_path / name for name in ("a.jsonl", "a.parquet", "saved")]
    code = (
        "import socket, sys\n"
        # Not an Exception, which a library might swallow.
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from dpjax.data import records_from\n"
        "for path in sys.argv[1:]: print(len(records_from(path)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    # JAX and pytest plugins may keep caches of their own; none of them is asked for here.
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, sources)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.stdout.split() == ["7", "7", "7"], result.stderr
    for folder in ("home", "tmp"):
        left = [p for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert left == [], left


def test_examples_are_padded_cut_and_masked_by_length():
    tokenizer = byte_tokenizer()
    records = [Record("abc", "ann"), Record(""), Record("x" * 100, "bob"), Record("你好", "ann")]
    data = dataset_from_records(records, tokenizer, 8)
    begin, end, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert data.tokens.tolist() == [
        [begin, 97, 98, 99, end, pad, pad, pad],
        [begin, end, *[pad] * 6],
        [begin, *[120] * 7],
        [begin, *"你好".encode(), end],
    ]
    assert data.loss_mask.sum(1).tolist() == [5, 2, 8, 8]
    assert data.tokens.dtype == np.int32 and len(data) == len(records)
    assert data.user_ids.tolist()[1] == NO_USER
    assert data.user_ids[0] == data.user_ids[3] == stable_id("user", "ann") != data.user_ids[2]
    data.validate(tokenizer.vocabulary_size)


def test_one_record_is_one_example_unless_chunks_are_bounded():
    tokenizer = byte_tokenizer()
    records = [Record("x" * 100, "ann"), Record("ab", "bob"), Record("y" * 14)]
    data = dataset_from_records(records, tokenizer, 8)
    assert len(data) == 3 and data.examples_per_record == 1
    chunked = dataset_from_records(records, tokenizer, 8, chunk=True, max_examples_per_record=4)
    assert chunked.examples_per_record == 4 and "at most 4 chunks" in chunked.unit
    # 4 of the 13 chunks of the first, 1 of the second, and begin + 14 + end fill exactly 2.
    assert len(chunked) == 4 + 1 + 2
    assert chunked.loss_mask.sum() == 32 + 4 + 16
    joined = chunked.tokens[5:].ravel().tolist()
    assert joined == [tokenizer.bos_id, *b"y" * 14, tokenizer.eos_id]
    assert np.unique(chunked.people()).size == 3
    for options in ({"chunk": True}, {"max_examples_per_record": 3}):
        with pytest.raises(DpjaxError, match="epsilon grows"):
            dataset_from_records(records, tokenizer, 8, **options)


def test_a_cut_chunked_record_has_no_end_token():
    tokenizer = byte_tokenizer()
    data = dataset_from_records(
        [Record("x" * 100)], tokenizer, 8, chunk=True, max_examples_per_record=2
    )
    assert tokenizer.eos_id not in data.tokens and data.loss_mask.all()


def test_an_example_depends_on_its_own_record_alone():
    tokenizer = byte_tokenizer()
    records = [Record(f"text {i}" * (i + 1), f"user {i % 3}") for i in range(9)]
    whole = dataset_from_records(records, tokenizer, 16)
    for gone in range(9):
        rest = dataset_from_records(records[:gone] + records[gone + 1 :], tokenizer, 16)
        kept = np.delete(np.arange(9), gone)
        assert rest.fingerprint() == whole.select(kept).fingerprint()


def test_names_are_not_kept():
    data = dataset_from_records([Record("hi", "Ann Lee")], byte_tokenizer(), 4)
    assert "Ann" not in str(vars(data))


def test_contribution_bound_and_notes_for_the_privacy_card():
    records = [Record(f"message {i}", "ann") for i in range(20)] + [Record("x", "bob")]
    data = dataset_from_records(
        records, byte_tokenizer(), 8, name="notes", max_examples_per_user=3, seed=1
    )
    assert len(data) == 4 and data.max_examples_per_user == 3 and data.name == "notes"
    assert data.unit == "record (one record of notes, cut to 8 tokens)"
    for note in data.preprocessing:
        assert set(note) == {"step", "data_dependent", "private"}
    assert "none (bytes)" in data.preprocessing[0]["step"]


@pytest.mark.parametrize(
    ("records", "length"), [([], 8), ([Record("a")], 1), ([Record("a\udc80")], 8)]
)
def test_what_cannot_become_a_dataset_is_refused(records, length):
    with pytest.raises(DpjaxError) as info:
        dataset_from_records(records, byte_tokenizer(), length)
    assert "\n" not in str(info.value)


def test_paths_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "hi\n")
    assert records_from("~/a.txt") == [Record("hi")] == records_from(Path("~/a.txt"))
