"""pfl 0.6 on the workloads of federated.py, in a process and environment of its own.

federated.py starts it, gives it data and parameters in a file, and asks for one round at a time so
that rounds of both processes alternate. Nothing of JAX or dpjax is imported here.

    python federated_pfl.py ARRAYS.npz '{"model": "mlp", "batch_size": 20, ...}' CORE

A negative CORE pins nothing. Then a line on stdin for each round, one JSON object on stdout: CPU
and wall seconds, and the loss over all clients where the line is "check".
"""

# pyright: reportMissingImports=false

import importlib.metadata
import json
import sys
import time
import warnings

import torch
from federated_torch import Model, read, settle
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Gate(TrainingProcessCallback):
    """Between rounds: reports the one that ended, and waits until the next is asked for."""

    def __init__(self, examples, labels):
        self.data = torch.from_numpy(examples), torch.from_numpy(labels)
        self.wait()

    def wait(self):
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        self.check = line.strip() == "check"
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        reply = {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}
        if self.check:
            with torch.no_grad():
                net = model.pytorch_model
                reply["loss"] = float(net.loss(*self.data))
        print(json.dumps(reply), flush=True)
        self.wait()
        return False, Metrics()


def main():
    warnings.simplefilter("ignore")
    path, options, core = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    settle(core)
    arrays, examples, labels = read(path)
    clients, size = options["clients"], options["steps"] * options["batch_size"]
    versions = {"pfl": importlib.metadata.version("pfl"), "torch": torch.__version__}
    print(json.dumps(versions), flush=True)

    net = Model(options["model"], arrays)
    users = {
        n: Dataset(
            raw_data=[examples[n * size : (n + 1) * size], labels[n * size : (n + 1) * size]]
        )
        for n in range(clients)
    }
    turn = iter(range(10**9))
    data = FederatedDataset(users.__getitem__, lambda: next(turn) % clients)
    model = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**9,
            evaluation_frequency=10**9,
            train_cohort_size=clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=options["learning_rate"],
            local_batch_size=options["batch_size"],
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Gate(examples, labels)],
    )


if __name__ == "__main__":
    main()
