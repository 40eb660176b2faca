"""The memorisation experiment: a tiny run, its arithmetic, and what its README states."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from dpjax.errors import DpjaxError

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "memorisation"


@pytest.fixture(autouse=True)
def standard_promotion(strict_arithmetic):
    """Optax's Adam multiplies by Python powers of an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("experiment_memorisation", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke(run, tmp_path, monkeypatch):
    config = run.Config("smoke", (0,), (8.0,), output=str(tmp_path / "runs"), results=str(tmp_path))
    found = run.main(config)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "exposure.svg").read_text().count("<svg") == 1
    assert list(found["arms"]) == ["not private", "epsilon 8"]
    private, plain = found["arms"]["epsilon 8"], found["arms"]["not private"]
    assert 7.9 < private["epsilon_rdp"] <= 8.0 and plain["epsilon_rdp"] is None
    assert private["records"] == 200 + 16 * (1 + 4)
    assert private["delta"] == pytest.approx(280**-1.1)
    for arm in (plain, private):
        assert arm["repetitions"]["4"]["canaries"] == 16
        assert 0 < arm["repetitions"]["1"]["mean_bits"] < np.log2(1001)
    # Finished models are kept: a second call trains none.
    monkeypatch.setattr(run, "fit", None)
    assert run.main(config) == found
    with pytest.raises(DpjaxError, match="seeds are empty"):
        run.main(run.Config("smoke", (), output=str(tmp_path)))


def test_control_scores_the_same_canaries_where_they_were_left_out(run, tmp_path):
    config = run.Config(
        "smoke", (0,), (8.0,), output=str(tmp_path / "runs"), results=str(tmp_path), control=True
    )
    found = run.main(config)
    assert json.loads((tmp_path / "control.json").read_text()) == found
    assert found["canaries"] == 16 and found["target_epsilon"] == 8.0
    difference = found["mean_bits_inserted"] - found["mean_bits_left_out"]
    assert found["mean_difference"] == pytest.approx(difference)
    made = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/smoke/control-*.json"))]
    assert [m["records"] for m in made] == [200 + 16 * (1 + 4), 200 + 16 * 4]
    assert made[0]["canary_losses"] != made[1]["canary_losses"]
    assert made[0]["repetitions"] == made[1]["repetitions"]


def invented(seed, shift):
    """Losses of a model that lowers a canary's by ``shift`` for every time it was inserted."""
    rng = np.random.default_rng(seed)
    repetitions = np.repeat([1, 64], 64)
    losses = rng.normal(50, 3, 128) - shift * repetitions
    return {
        "arm": "invented",
        "target_epsilon": None,
        "epsilon_rdp": None,
        "delta": None,
        "noise_multiplier": 0.0,
        "records": 1,
        "parameters": 1,
        "held_out_nats_per_token": 1.0,
        "seconds": 1.0,
        "space_bits": 48.0,
        "repetitions": repetitions.tolist(),
        "canary_losses": losses.tolist(),
        "twin_losses": rng.normal(50, 3, 2000).tolist(),
    }


def test_summary_tells_memorised_from_unseen(run):
    scale = run.Scale("micro", 1, 8, {1: 64, 64: 64}, 2000, 1, 1, 1)
    groups = run.summarised(scale, [invented(s, 1.0) for s in range(3)])["invented"]["repetitions"]
    assert groups["64"]["share_at_maximum"] == 1.0
    assert groups["64"]["mean_bits"] == pytest.approx(np.log2(2001))
    # A third of a standard deviation, 192 canaries: found.
    assert groups["1"]["z_against_unseen"] > 3
    assert groups["1"]["ks_p_value_against_unseen"] < 0.01
    unseen = run.summarised(scale, [invented(s, 0.0) for s in range(3)])["invented"]["repetitions"]
    for group in unseen.values():
        assert abs(group["z_against_unseen"]) < 2.5
        assert group["ks_p_value_against_unseen"] > 0.01


def test_the_readme_says_what_was_measured(run):
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert run.table(found) in readme
    assert found["preset"] == "cpu" and found["seeds"] == [0, 1, 2]
    plain = found["arms"]["not private"]["repetitions"]
    assert plain["64"]["share_at_maximum"] == 1.0
