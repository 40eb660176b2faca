"""Sharded batches and sharded parameters, on eight simulated devices."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("method", ["vmap", "lazy", "auto"])
def test_eight_devices_give_the_numbers_of_one(method):
    """In a process of its own, because the number of simulated devices is fixed at start."""
    script = pathlib.Path(__file__).parent / "eight_devices_lazy.py"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, str(script), method]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")
