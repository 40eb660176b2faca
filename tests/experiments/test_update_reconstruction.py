"""The reconstruction experiment: its smoke preset, and its README against the results."""

import importlib.util
import json
import pathlib

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "update_reconstruction"


def load():
    spec = importlib.util.spec_from_file_location(
        "experiment_update_reconstruction", FOLDER / "run.py"
    )
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run


def test_smoke_preset(tmp_path):
    run = load()
    results = tmp_path / "results.json"
    found = run.main(run.Config("smoke", results=str(results)))
    assert json.loads(results.read_text(encoding="utf-8")) == found
    assert (tmp_path / "images.png").exists()
    images = {(r["view"], r["attack"]): r["psnr"] for r in found["images"]}
    assert images["plain", "algebra"] > 80 and images["clipped", "algebra"] > 80
    assert images["epsilon 8", "algebra"] < 15
    texts = {(r["head"], r["view"]): r for r in found["texts"]}
    for head in ("untied", "tied"):
        for view in ("plain", "clipped", "sum of 2"):
            assert texts[head, view]["exact_sequences"] == 1.0
        assert texts[head, "sum of 2"]["sequences_found"] == 4
        assert texts[head, "epsilon 8"]["exact_sequences"] == 0.0
    assert 0.3 < found["noise_multiplier"] < 1.0  # of one release at epsilon 8, delta 1e-5


def test_readme_says_what_was_measured():
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for row in found["images"]:
        assert f"{row['psnr']:.1f}" in text
    for row in found["texts"]:
        assert f"{row['exact_sequences']:.2f}" in text and f"{row['rouge_l']:.2f}" in text
    assert f"{found['noise_multiplier']:.3f}" in text
    assert (FOLDER / "images.png").stat().st_size < 200_000
