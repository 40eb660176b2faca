"""The clipping benchmark runs, checks its own methods, and its networks are what they claim."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
WORKLOADS = ("W1", "W1t", "W2", "W3", "W4", "W5")


def _module(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def _run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(FOLDER / "clipping.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.timeout(120)
def test_smoke_preset_times_every_workload_and_own_methods_agree(tmp_path):
    output = tmp_path / "results.json"
    run = _run("--preset", "smoke", "--methods", "vmap", "lazy", "auto", "--output", str(output))
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert set(results["workloads"]) == set(WORKLOADS)
    for name in WORKLOADS:
        measured = results["workloads"][name]
        assert set(measured["rows"]) == {"non-private", "vmap", "lazy", "auto"}
        for method, row in measured["rows"].items():
            assert row["note"] == "", (name, method, row["note"])
            assert row["time_ratio"][0] > 0 and row["temp_bytes"] > 0 and row["flops"] > 0
        assert max(d["norms"] for d in measured["differences"].values()) < 1e-5
        assert max(d["sum"] for d in measured["differences"].values()) < 1e-5
        assert f"## {name}: " in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workloads", "W9"), "W9"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--core", "100000"), "--core is 100000"),
        (("--preset", "smoke", "--workloads", "GPT2"), "GPT2 has no smoke size"),
        (("--output", "/no/such/folder/x.json"), "its folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    run = _run(*arguments)
    assert run.returncode == 2 and not run.stdout
    assert message in run.stderr and len(run.stderr.splitlines()) == 1


def test_copied_bytes_counts_what_is_written_outside_of_fusions():
    copied_bytes = _module("clipping_measure").copied_bytes
    text = """HloModule jit_step, entry_computation_layout={(f32[4,2]{1,0})->f32[2,4]{1,0}}
%fused_computation.1 (p: f32[4,2]) -> f32[2,4] {
  ROOT %transpose.9 = f32[2,4]{1,0} transpose(%p), dimensions={1,0}
}
%rare (p: f32[4,2]) -> f32[4,2] {
  ROOT %copy.7 = f32[4,2]{0,1} copy(%p)
}
%usual (p: f32[4,2]) -> f32[4,2] {
  ROOT %copy.8 = f32[1,2]{0,1} copy(%p)
}
%body (p: f32[5]) -> f32[5] {
  ROOT %copy.9 = f32[5]{0} copy(%p)
}
ENTRY %main.1 (x: f32[4,2]) -> f32[2,4] {
  %copy.1 = bf16[2,3]{0,1} copy(%y)
  %add_fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation.2
  %while.1 = f32[5]{0} while(%z), condition=%until, body=%body
  %cond.1 = f32[4,2]{1,0} conditional(%i, %x, %x), branch_computations={%rare, %usual}
  ROOT %wrapped_transpose.3 = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation.1
}
"""
    assert copied_bytes(text) == 2 * 2 * 3 + 4 * 5 + 4 * 2 + 4 * 2 * 4
