"""The strong-attacks experiment: its smoke preset, and its README against the results."""

import importlib.util
import json
import pathlib

import jax

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "strong_mia"


def test_smoke_preset(tmp_path):
    spec = importlib.util.spec_from_file_location("experiment_strong_mia", FOLDER / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    results = tmp_path / "results.json"
    config = run.Config("smoke", output=str(tmp_path / "runs"), results=str(results))
    # Optax's Adam multiplies by Python powers of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        found = run.main(config)
        again = run.main(config)
    assert found["rows"] == again["rows"]  # nothing was trained twice
    cells = {(r["arm"], r["epochs"], r["attack"], r["repeats"]) for r in found["rows"]}
    assert len(cells) == len(found["rows"]) == 3 * 4 * 4
    assert all(0.3 < row["auc"] < 0.8 for row in found["rows"] if row["repeats"] == "all")
    assert (tmp_path / "roc.svg").exists() and (tmp_path / "auc.svg").exists()


def test_readme_says_what_was_measured():
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        if row["attack"] == "lira_online" and row["repeats"] in (1, 16):
            assert f"{row['auc']:.3f}" in text
    assert f"{found['timing']['speed_up']:.2f}" in text
    assert found["scale"]["models"] >= 16 and 1.2e5 < found["num_parameters"] < 1.6e5
