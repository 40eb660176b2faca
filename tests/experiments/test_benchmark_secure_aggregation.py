"""The benchmark of secure aggregation runs, and its sums are checked inside."""

import importlib.util
import pathlib

import pytest

from dpjax.errors import DpjaxError

FILE = (
    pathlib.Path(__file__).resolve().parents[2]
    / "experiments"
    / "benchmarks"
    / "secure_aggregation.py"
)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("secure_aggregation", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke(benchmark, capsys):
    found = benchmark.main(benchmark.Config(preset="smoke"))
    assert 4.0 < found.bytes_per_parameter < 4.1
    assert found.plain > 0 and found.secure > 0
    assert "50,000 parameters, 6 clients, 2 drop out" in capsys.readouterr().out


def test_too_many_dropouts_are_refused(benchmark):
    with pytest.raises(DpjaxError, match="the threshold is 4"):
        benchmark.main(benchmark.Config(preset="smoke", dropout=0.5))
