"""The command line: one line and exit code 2 for bad input, numbers for good."""

import sys

import pytest

from dpjax.cli import main


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dpjax", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--data", "x.jsonl", "--target-epsilom", "3"],
            ["--target-epsilom", "did you mean --target-epsilon"],
        ),
        (["train", "--data", "x.jsonl", "--target-epsilon", "much"], ["--target-epsilon", "much"]),
        (["train", "--data", "x", "--lora.rank", "0"], ["dpjax: --lora: lora rank is 0"]),
        (["train"], ["--data"]),
        (["trian"], ["trian"]),
        ([], ["train"]),
        (["train", "--data", "no-such-file.jsonl"], ["no-such-file.jsonl"]),
        (["resume", "no-such-run"], ["no-such-run", "dpjax train"]),
        (["card", "no-such-run"], ["no-such-run"]),
        (["generate", "no-such-model"], ["no-such-model"]),
        (
            ["epsilon", "--noise-multiplier", "1", "--sampling-probability", "2",
             "--iterations", "9", "--delta", "1e-5"],
            ["sampling_probability is 2"],
        ),
        (
            ["epsilon", "--noise-multiplier", "1", "--sampling-probability", "0.1",
             "--iterations", "9", "--delta", "0.01", "--population", "100"],
            ["delta is 0.01", "1/n"],
        ),
        (
            ["calibrate", "--target-epsilon", "-3", "--target-delta", "1e-5",
             "--sampling-probability", "0.1", "--iterations", "9"],
            ["target_epsilon is -3"],
        ),
        (
            ["epsilon", "--noise-multiplier", "1", "--sampling-probability", "0.1",
             "--iterations", "9", "--delta", "1e-5", "--sampling", "lottery"],
            ["lottery", "poisson"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_exit_code_two(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.startswith("dpjax: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_epsilon_matches_the_literature(monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch, capsys, "epsilon", "--noise-multiplier", "1.5", "--sampling-probability",
        "0.04", "--iterations", "2250", "--delta", "1e-5",
    )  # fmt: skip
    assert code == 0
    assert "epsilon 7.3293 by RDP" in out and "epsilon 6.7688 by PLD" in out


def test_calibrate_inverts_epsilon(monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch, capsys, "calibrate", "--target-epsilon", "7.33", "--target-delta", "1e-5",
        "--sampling-probability", "0.04", "--iterations", "2250",
    )  # fmt: skip
    assert code == 0
    assert "noise multiplier 1.4999" in out or "noise multiplier 1.5" in out


def test_help_names_every_command(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0
    for name in ("demo", "train", "resume", "generate", "card", "epsilon", "calibrate"):
        assert name in out
