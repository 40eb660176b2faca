"""The federated experiments: their smoke presets, and their READMEs against the results."""

import importlib.util
import json
import pathlib
import sys

import jax

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", FOLDER / name / "run.py")
    run = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = run  # dataclasses look their module up by name
    spec.loader.exec_module(run)
    return run


def test_fedavg_smoke(tmp_path):
    run = load("fedavg")
    results = tmp_path / "results.json"
    found = run.main(run.Config("smoke", results=str(results)))
    assert json.loads(results.read_text(encoding="utf-8")) == found
    images = {(r["partition"], r["arm"]): r for r in found["rows"] if r["task"] == "images"}
    assert images["alike", "FedAvg, E = 5, B = 10"]["rounds"] <= 4
    # One gradient a round has not got there yet, which is what the paper is about.
    assert images["alike", "FedSGD"]["rounds"] is None
    assert found["tasks"]["images"]["skew"]["unlike"] > 0.5
    assert found["tasks"]["images"]["skew"]["alike"] < 0.2
    assert (tmp_path / "rounds.svg").stat().st_size > 10_000


def test_fedprox_smoke(tmp_path):
    run = load("fedprox")
    results = tmp_path / "results.json"
    found = run.main(run.Config("smoke", results=str(results)))
    losses = {r["arm"]: r["final_loss"] for r in found["rows"]}
    # Work that is thrown away does not help.
    assert losses["FedProx, mu = 0"] < losses["FedAvg"]
    assert (tmp_path / "loss.svg").exists()


def test_dp_fedavg_smoke(tmp_path):
    run = load("dp_fedavg")
    results = tmp_path / "results.json"
    # Optax's Adam multiplies by Python powers of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        found = run.main(run.Config("smoke", results=str(results)))
    rows = {r["arm"]: r for r in found["rows"]}
    assert rows["epsilon 8"]["epsilon_pld"] < rows["epsilon 8"]["epsilon_rdp"] <= 8.0
    assert "SIMULATED epsilon 8" in found["simulated"] and "actual" in found["simulated"]
    assert rows["SIMULATED"]["epsilon_rdp"] > 100
    assert rows["clipping only"]["epsilon_rdp"] is None
