"""A worker as a process of its own: `python -m dpjax.federated.worker_cli --name alice ...`.

It prints one JSON line with its port, then answers until it is stopped. The certificate that
requesters need is certificate.pem in the folder.
"""

import dataclasses
import json
import pathlib
import secrets
import sys
import threading
from typing import Literal

import numpy as np
import tyro

from dpjax.errors import DpjaxError
from dpjax.federated.worker import Worker
from dpjax.federated.worker_policy import Policy
from dpjax.federated.worker_server import make_certificate, serve, write_secret


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """Keep arrays, and let others compute on them as the policy permits."""

    name: str
    """Shown to requesters."""
    folder: str
    """Certificate, ledger and one token file for each requester; kept from run to run."""
    data: tuple[str, ...] = ()
    """NAME=FILE.npy; axis 0 is the records."""
    requesters: tuple[str, ...] = ()
    """Names of who may connect; the file NAME.token in the folder is theirs."""
    policy: Literal["deny", "allow", "laplace", "gaussian"] = "deny"
    """Of all the arrays."""
    lower: float = 0.0
    """Public bound of the values, for noise."""
    upper: float = 1.0
    """Public bound of the values, for noise."""
    noise_multiplier: float = 10.0
    """Noise / sensitivity of an answer; a requester may ask for more."""
    target_epsilon: float | None = None
    """Budget of each requester."""
    target_delta: float = 0.0
    """Budget of each requester; above 0 for Gaussian noise."""
    epsilon_of_all: float | None = None
    """Budget of all requesters together."""
    host: str = "127.0.0.1"
    """Where to listen."""
    port: int = 0
    """0 takes a free one."""


def start(config: WorkerConfig):
    """The worker and its server, running.

    Raises:
      DpjaxError: a file that is none, or settings that do not fit.
    """
    folder = pathlib.Path(config.folder)
    certificate = make_certificate(folder, ("localhost", "127.0.0.1", config.host))
    policy = (
        Policy.dp(
            config.lower,
            config.upper,
            noise_multiplier=config.noise_multiplier,
            mechanism=config.policy,
        )
        if config.policy in ("laplace", "gaussian")
        else Policy(config.policy)
    )
    worker = Worker(
        config.name,
        policy,
        target_epsilon=config.target_epsilon,
        target_delta=config.target_delta,
        epsilon_of_all=config.epsilon_of_all,
        ledger=folder / "answers.jsonl",
    )
    for entry in config.data:
        name, _, path = entry.partition("=")
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            raise DpjaxError(f"data is {entry!r}; pass NAME=FILE.npy, a file of numpy") from None
        worker.put(array, name=name)
    for requester in config.requesters:
        path = folder / f"{requester}.token"
        token = path.read_text().strip() if path.exists() else secrets.token_urlsafe(32)
        worker.enrol(requester, token=token)
        if not path.exists():
            write_secret(path, token.encode())
    return worker, serve(worker, certificate, host=config.host, port=config.port)


def main() -> int:
    """Runs until it is stopped; 2 if it cannot start."""
    try:
        worker, server = start(tyro.cli(WorkerConfig, prog="python -m dpjax.federated.worker_cli"))
    except DpjaxError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"name": worker.name, "port": server.port}), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
