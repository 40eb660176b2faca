"""The smoke presets of the experiments with language models."""

import importlib.util
import json
import math
import pathlib

import jax
import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture(autouse=True)
def standard_promotion(strict_arithmetic):
    """Optax's Adam multiplies by Python powers of an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(name):
    path = EXPERIMENTS / name / "run.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dp_lora_chitchat(tmp_path):
    run = load("dp_lora_chitchat")
    results = tmp_path / "results.json"
    found = run.main(run.Config("smoke", output=str(tmp_path / "runs"), results=str(results)))
    assert json.loads(results.read_text()) == found
    assert 7.9 < found["private"]["epsilon_rdp"] <= 8.0
    assert found["plain"]["epsilon_rdp"] is None
    assert found["private"]["trained_parameters"] == 4 * (2 * (128 + 128) + 2 * (128 + 64))
    # A random model over 259 tokens, hardly trained.
    for name in ("pretrained", "plain", "private"):
        assert abs(found[name]["nats_per_token"] - math.log(259)) < 0.3
    # A second call trains nothing and finds the same.
    again = run.main(run.Config("smoke", output=str(tmp_path / "runs"), results=str(results)))
    assert again["private"]["nats_per_token"] == found["private"]["nats_per_token"]


def test_dp_synthetic_records(tmp_path):
    run = load("dp_synthetic_records")
    results = tmp_path / "results.json"
    found = run.main(run.Config("smoke", output=str(tmp_path / "runs"), results=str(results)))
    assert found["records"] == 300 + 2 * 4
    assert found["real"]["all"]["accuracy"] > 0.8
    for name in ("plain", "private"):
        assert found[name]["quality"]["records"] == 20
        assert found[name]["secrets"]["of_the_people"]["num_texts_with_secret"] == 0
        assert found[name]["secrets"]["of_the_people"]["num_secrets"] > 400
        assert found[name]["secrets"]["of_the_people"]["sensitive_found"] is None


def test_committed_results_say_what_the_readmes_say():
    def accuracy(found):
        return found["private"]["quality"]["downstream"]["trained on synthetic"]["accuracy"]

    words = {
        "dp_lora_chitchat": lambda found: f"{found['private']['perplexity']:.1f}",
        "dp_synthetic_records": lambda found: f"{100 * accuracy(found):.1f}%",
    }
    for name, stated in words.items():
        found = json.loads((EXPERIMENTS / name / "results.json").read_text(encoding="utf-8"))
        assert stated(found) in (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
