"""Engines on one, two and eight devices, sharded parameters, and two processes."""

import os
import pathlib
import socket
import subprocess
import sys

import federated_devices as alone
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


def start(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(900)
def test_engines_agree_with_a_loop_on_one_two_and_eight_devices():
    """And parameters stay sharded along the mesh's other axis; updates can be collected."""
    out, errors = start("federated_devices.py").communicate()
    assert out.splitlines() == [
        "engines agree",
        "parameters stay sharded",
        "updates are collected",
    ], errors


@pytest.mark.timeout(900)
def test_two_processes_with_their_own_data_agree_with_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [start("federated_processes.py", str(n), port) for n in range(2)]
    try:
        found = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    # Gloo speaks of its connections on the same stream.
    said = [[x for x in out.splitlines() if not x.startswith("[Gloo]")] for out, _ in found]
    assert said[0] == said[1] and len(said[0]) == 5, found
    rounds = [np.float64(line.split()) for line in said[0][:2]]
    for got, wanted in zip(rounds, alone.expected("scaffold", 1), strict=False):
        np.testing.assert_allclose(got, [*wanted["a"], wanted["b"]], rtol=1e-4, atol=1e-6)
    assert said[0][3:] == ["refused different shapes", "refused pmap"]
