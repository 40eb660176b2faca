"""Processes of other libraries, each in an environment of its own, that run rounds on request."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from federated_workloads import Workload

# Each with torch, whose CPU build must come first or pip may take one of several GB.
REQUIRES = {
    "pfl": ("torch==2.13.0", "pfl==0.6.0"),
    "flower": ("torch==2.13.0", "flwr[simulation]>=1.41,<1.43"),
}


class PeerError(Exception):
    """The other process ended; the message is its last line."""


def environment(name: str, folder: pathlib.Path) -> str:
    """The interpreter of ``folder/name``, made and filled by pip where it is not there yet."""
    home = folder / name
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"installing {name} into {home}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        for requirement in REQUIRES[name]:
            command = [str(python), "-m", "pip", "install", "--quiet", requirement]
            subprocess.run(command, check=True)
        (home / "complete").touch()
    return str(python)


class Peer:
    """One library on one workload."""

    def __init__(self, name: str, python: str, work: Workload, core: int | None):
        here = pathlib.Path(__file__).parent
        self._folder = tempfile.TemporaryDirectory()
        self._errors = open(pathlib.Path(self._folder.name) / "stderr", "w+")  # noqa: SIM115
        path = pathlib.Path(self._folder.name) / "arrays.npz"
        # In the order in which the first cohort trains: peers do not shuffle.
        examples = jax.tree.map(lambda x: x[0], work.cohort(0).examples)
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in work.params.items()}
        np.savez(path, **arrays, **examples)
        options = {
            "model": work.name,
            "clients": len(work.people),
            "steps": work.steps,
            "batch_size": work.batch_size,
            "learning_rate": work.learning_rate,
        }
        self._process = subprocess.Popen(
            [
                python,
                str(here / f"federated_{name}.py"),
                str(path),
                json.dumps(options),
                str(-1 if core is None else core),
            ],
            # Not JAX's settings; Ray's workers import the model from here.
            env={k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
            | {"PYTHONPATH": str(here)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.versions = self._reply()

    def round(self, check: bool = False) -> dict[str, float]:
        """CPU and wall seconds of one round, and with ``check`` the loss over all examples."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # where it died, the reply says why
            self._process.stdin.write("check\n" if check else "time\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Libraries print what they like; only lines in braces are ours.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise PeerError(lines[-1] if lines else f"exit code {self._process.returncode}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.read()
        self._process.wait(timeout=120)
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()
