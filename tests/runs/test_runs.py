"""A run on disk: killed and resumed, changed and refused, broken and explained."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from dpjax.artifact import Model, save_model
from dpjax.data import byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.models import DecoderConfig, init_params
from dpjax.runs.commands import drive, resume, train
from dpjax.runs.config import TrainConfig, default_delta
from dpjax.runs.execute import execute
from dpjax.runs.finish import finish
from dpjax.runs.folder import create, open_run, read_json, reopen

RECORDS = [
    {"text": f"note {i}: 病人 {i * 37 % 101} stable, pulse {60 + i % 40}", "patient": i // 2}
    for i in range(160)
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """One narrow layer: what is tested here is the run, not the model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = byte_tokenizer()
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size, num_layers=1, d_model=16, num_heads=2,
        num_kv_heads=1, d_ff=16,
    )  # fmt: skip
    save_model(folder, Model(shape, init_params(shape, jax.random.key(0)), tokenizer))
    return folder


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "notes.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS]
    path.write_text("".join(lines), encoding="utf-8")
    return TrainConfig(
        data=str(path),
        output=str(tmp_path / "run"),
        user_field="patient",
        sequence_length=16,
        iterations=6,
        expected_batch_size=16,
        microbatch_size=8,
        checkpoint_every=2,
        target_epsilon=8.0,
        model=str(tiny_model),
        seed=3,
    )


def params_sha256(folder):
    return read_json(pathlib.Path(folder) / "evaluation.json", "")["params_sha256"]


def run_to(config, stop):
    """Starts a run and abandons it after ``stop`` iterations, as a crash would."""
    run = open_run(config, pathlib.Path(config.output))
    create(run)
    with Ledger.open(run.ledger_path) as ledger:
        for step in execute(run, ledger):
            if step.iteration == stop:
                break
    return run


def test_train_leaves_model_card_ledger_and_report(config):
    train(config)
    folder = pathlib.Path(config.output)
    card = read_json(folder / "card.json", "")
    assert card["accounting"]["match"] is True
    assert card["accounting"]["steps_executed"] == 6
    assert 0 < card["claim"]["epsilon_rdp"] <= 8.0
    assert card["identity"]["artifact_sha256"] == params_sha256(folder)
    assert card["claim"]["max_units_per_person"] is None  # nothing was enforced
    assert any(h["code"] == "published_key" for h in card["hazards"]), card["hazards"]
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (folder / "metrics.jsonl").stat().st_mode & 0o077 == 0
    assert (folder / "checkpoints").stat().st_mode & 0o077 == 0
    released = "".join(p.read_text("utf-8") for p in (folder / "model").glob("*.json"))
    assert "病人" not in released and "pulse" not in released


def test_a_crash_at_any_iteration_changes_nothing(config, tmp_path):
    train(config)
    expected = params_sha256(config.output)
    for stop in (1, 2, 5):
        again = dataclasses.replace(config, output=str(tmp_path / f"stopped-{stop}"))
        run_to(again, stop)
        resume(again.output)
        assert params_sha256(again.output) == expected
        with Ledger.open(pathlib.Path(again.output) / "ledger.jsonl") as ledger:
            assert sum(count for _, count in ledger.releases()) == 6
        card = read_json(pathlib.Path(again.output) / "card.json", "")
        assert card["accounting"]["steps_executed"] == 6


def test_kill_minus_nine_twice_then_bitwise_equal(config, tmp_path):
    longer = dataclasses.replace(config, iterations=40, checkpoint_every=3)
    train(longer)
    killed = dataclasses.replace(longer, output=str(tmp_path / "killed"))
    first = [sys.executable, "-m", "dpjax.cli", "train"]
    for name in (
        "data", "output", "user_field", "sequence_length", "iterations", "expected_batch_size",
        "microbatch_size", "checkpoint_every", "target_epsilon", "model", "seed",
    ):  # fmt: skip
        first += ["--" + name.replace("_", "-"), str(getattr(killed, name))]
    again = [sys.executable, "-m", "dpjax.cli", "resume", killed.output]
    ledger = pathlib.Path(killed.output) / "ledger.jsonl"
    for command, lines in ((first, 8), (again, 22)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
                    break
                time.sleep(0.01)
            assert process.poll() is None, process.stdout.read().decode()
            os.kill(process.pid, signal.SIGKILL)
    assert not (pathlib.Path(killed.output) / "card.json").exists()
    resume(killed.output)
    assert params_sha256(killed.output) == params_sha256(longer.output)
    with Ledger.open(ledger) as opened:
        assert sum(count for _, count in opened.releases()) == 40


def test_resume_of_a_finished_run_changes_nothing(config):
    train(config)
    folder = pathlib.Path(config.output)
    before = (folder / "ledger.jsonl").read_bytes()
    expected = params_sha256(folder)
    resume(str(folder))
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert params_sha256(folder) == expected


def test_resume_on_changed_data_is_refused_by_name(config):
    run_to(config, 3)
    path = pathlib.Path(config.data)
    path.write_text(path.read_text("utf-8").replace("note 7:", "note seven:"), encoding="utf-8")
    with pytest.raises(DpjaxError, match="data_sha256 was"):
        resume(config.output)


def test_resume_on_changed_configuration_is_refused_by_name(config):
    run_to(config, 3)
    path = pathlib.Path(config.output) / "run.json"
    saved = json.loads(path.read_text("utf-8"))
    saved["config"]["l2_clip_norm"] = 2.0
    path.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(DpjaxError, match=r"config\.l2_clip_norm was 1.0 and is now 2.0"):
        resume(config.output)


def test_lost_checkpoints_are_not_replaced_by_new_keys(config):
    run = run_to(config, 3)
    (run.folder / "checkpoints").rename(run.folder / "elsewhere")
    with pytest.raises(DpjaxError, match="keys are lost"):
        resume(config.output)


def test_a_shortened_ledger_is_refused(config):
    run = run_to(config, 5)
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    run.ledger_path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(DpjaxError, match="does not contain"):
        resume(config.output)


def test_an_unfinished_ledger_line_is_dropped(config):
    run = run_to(config, 3)
    with run.ledger_path.open("ab") as file:
        file.write(b'{"half": ')
    resume(config.output)
    assert read_json(run.folder / "card.json", "")["accounting"]["steps_executed"] == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_corrupt_checkpoint_is_named_and_the_one_before_still_works(config, tmp_path):
    train(config)
    expected = params_sha256(config.output)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    run = run_to(broken, 5)
    newest = run.folder / "checkpoints" / "4"
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 2000]
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))
    with pytest.raises(DpjaxError, match="corrupt") as caught:
        resume(broken.output)
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)
    newest.rename(tmp_path / "moved")
    resume(broken.output)
    assert params_sha256(broken.output) == expected


def test_trials_that_share_a_ledger_share_the_budget(config, tmp_path):
    """The second run gets what the first left, and stops before the total passes the budget."""
    shared = str(tmp_path / "shared.jsonl")
    first = dataclasses.replace(config, ledger=shared, noise_multiplier=None, target_epsilon=8.0)
    train(first)
    second = dataclasses.replace(first, output=str(tmp_path / "second"), target_epsilon=9.0)
    train(second)
    card = read_json(tmp_path / "second" / "card.json", "")
    assert card["claim"]["total"]["runs"] == 2
    assert card["claim"]["total"]["epsilon_rdp"] <= 9.0
    assert 0 < card["accounting"]["steps_executed"] < 6
    with Ledger.open(shared) as ledger:
        assert ledger.records[-1]["reason"] == "budget"


def test_without_noise_the_card_has_no_epsilon(config):
    open_to_all = dataclasses.replace(config, noise_multiplier=0.0, iterations=2)
    train(open_to_all)
    card = read_json(pathlib.Path(config.output) / "card.json", "")
    assert card["claim"]["epsilon"] is None
    assert "no formal guarantee" in card["claim"]["statement"].lower()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_epsilon": -1.0}, "target_epsilon is -1.0"),
        ({"target_epsilon": None}, "target_epsilon and noise_multiplier are both None"),
        ({"target_delta": 0.01}, "not below 1/n"),
        ({"target_delta": 0.0}, "delta is 0.0"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm is 0.0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"expected_batch_size": 0}, "expected_batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"model": "nowhere"}, "neither a preset"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"text_field": "body"}, "body"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(config, changes, words):
    with pytest.raises(DpjaxError) as caught:
        train(dataclasses.replace(config, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not pathlib.Path(config.output).exists()


def test_an_occupied_folder_is_left_alone(config):
    run_to(config, 2)
    with pytest.raises(DpjaxError, match="already holds a run"):
        train(config)


def test_fine_tuning_starts_from_a_model_folder(config, tmp_path):
    train(config)
    later = dataclasses.replace(
        config, output=str(tmp_path / "later"), model=f"{config.output}/model", iterations=2
    )
    run = open_run(later, pathlib.Path(later.output))
    create(run)
    with Ledger.open(run.ledger_path) as ledger:
        done = finish(run, ledger, drive(run, ledger, "later", quiet=True))
    names = [entry["name"] for entry in done.card["coverage"]["pretraining"]]
    assert names == ["notes.jsonl"]
    assert reopen(later.output).identifier == run.identifier


def test_default_delta_is_below_one_over_n():
    for population in (10, 999, 7168, 60_000, 10**7):
        assert default_delta(population) < 1 / population
