"""Flower's Ray simulation on the workloads of federated.py, in an environment of its own.

federated.py starts it, gives it data and parameters in a file, and asks for one round at a time.
Clients train with torch. CPU time is that of this process and of all that it started, Ray's too.

    python federated_flower.py ARRAYS.npz '{"model": "mlp", "batch_size": 20, ...}' CORE

Then a line on stdin for each round, one JSON object on stdout.
"""

# pyright: reportMissingImports=false

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time
import warnings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import torch
from federated_torch import Model, read, read_once, settle
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def train(path, options, core, message, context):
    """One client's local steps."""
    settle(core)
    arrays, examples, labels = read_once(path)
    size = options["steps"] * options["batch_size"]
    first = int(context.node_config["partition-id"]) * size
    net = Model(options["model"], arrays)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sgd = torch.optim.SGD(net.parameters(), lr=options["learning_rate"])
    for start in range(first, first + size, options["batch_size"]):
        stop = start + options["batch_size"]
        sgd.zero_grad()
        batch = torch.from_numpy(examples[start:stop]), torch.from_numpy(labels[start:stop])
        net.loss(*batch).backward()
        sgd.step()
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": size}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def cpu_seconds():
    """Of this process and all its descendants, those that ended included."""
    parents, used = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = sum(map(int, fields[11:15]))
    total = 0
    for process in used:
        at = process
        while at not in (0, os.getpid()):
            at = parents.get(at, 0)
        total += used[process] if at else 0
    return total / os.sysconf("SC_CLK_TCK")


def main():
    warnings.simplefilter("ignore")
    path, options, core = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    settle(core)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Flower and Ray print
    names = ("flwr", "ray", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps(versions), file=replies, flush=True)

    client, server = ClientApp(), ServerApp()
    client.train()(functools.partial(train, path, options, core))

    @server.main()
    def serve(grid, context):
        arrays, examples, labels = read(path)
        net = Model(options["model"], arrays)
        record = ArrayRecord(net.state_dict())
        everybody = options["clients"]
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=everybody)
        for line in sys.stdin:
            cpu, wall = cpu_seconds(), time.perf_counter()
            record = strategy.start(grid, record, num_rounds=1).arrays
            reply = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
            if line.strip() == "check":
                net.load_state_dict(record.to_torch_state_dict())
                with torch.no_grad():
                    reply["loss"] = float(
                        net.loss(torch.from_numpy(examples), torch.from_numpy(labels))
                    )
            print(json.dumps(reply), file=replies, flush=True)

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=options["clients"],
        backend_config={
            "init_args": {"num_cpus": 1, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
