"""The smoke preset of the one-run audit, and what its README says of the committed numbers."""

import importlib.util
import json
import pathlib

import jax
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "audit_one_run"


@pytest.fixture(autouse=True)
def standard_promotion(strict_arithmetic):
    """Optax's Adam multiplies by Python powers of an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_smoke_preset_audits_every_task(tmp_path):
    spec = importlib.util.spec_from_file_location("experiment_audit", FOLDER / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    results = tmp_path / "results.json"
    config = run.Config("smoke", "digits", str(tmp_path / "runs"), str(results))
    found = run.main(config)
    assert json.loads(results.read_text()) == found
    assert len({row["task"] for row in found["rows"]}) == 5
    for row in found["rows"]:
        assert {b["method"] for b in row["bounds"]} == {
            "one_run",
            "one_run_fdp_gaussian",
            "gaussian_dp",
        }
        assert all(b["epsilon_lower"] <= b["ceiling"] for b in row["bounds"])
        assert 0 < row["included"] < 20
    assert "<svg" in (tmp_path / "audited.svg").read_text()
    # A second call trains nothing.
    assert run.main(config) == found


def test_no_bound_without_an_assumption_passes_its_theory():
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        if row["epsilon"] is None:
            continue
        by_method = {b["method"]: b["epsilon_lower"] for b in row["bounds"]}
        assert by_method["one_run"] <= row["epsilon"]
        if row["epsilon"] == 8.0:
            assert f"{by_method['gaussian_dp']:.2f}" in readme, row["task"]
