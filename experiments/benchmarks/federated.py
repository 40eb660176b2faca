"""Clients per CPU-second of federated rounds, beside pfl, Flower and a plain vmap.

    python experiments/benchmarks/federated.py --peers pfl flower --output results.json
    python experiments/benchmarks/federated.py --workloads mlp --rounds 15
    python experiments/benchmarks/federated.py --preset smoke

Every library trains the same clients on the same batches from the same parameters; after the first
round the loss over all examples is compared. Rounds are then timed in turn, the order reversed
every second time: CPU seconds, on one pinned core, with the host's layout of the cohort counted.
Reported are medians, and medians of the ratios within a turn. Peers run in processes and
environments of their own, made where they are missing (``--environments``). Exit code 1: the losses
do not agree.
"""

import argparse
import os
import pathlib
import sys
import tempfile

WORKLOADS = ("mlp", "cnn", "flat")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Clients per CPU-second of federated rounds.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=("cpu", "smoke"), default="cpu", help="sizes and machine settings")
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    add("--peers", nargs="*", choices=("pfl", "flower"), default=(), help="others to run beside")
    add("--rounds", type=int, help="timed ones; default: 9, for the CNN 3, smoke 1")
    add("--core", type=int, help="which one to run on; default: the last")
    add("--environments", type=pathlib.Path, help="folder of the peers' environments")
    add("--output", type=pathlib.Path, metavar="FILE", help="write results as JSON")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; use 1 or more")
    if options.environments is None:
        options.environments = pathlib.Path(tempfile.gettempdir()) / "dpjax-benchmark-peers"
    flags = os.environ.get("XLA_FLAGS", "").split()
    if options.preset == "smoke":  # its times mean nothing
        options.core = None
        flags.append("--xla_backend_optimization_level=0")
    elif hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        options.core = cores[-1] if options.core is None else options.core
        if options.core not in cores:
            parser.error(f"--core is {options.core}; the cores at hand are {cores}")
        os.sched_setaffinity(0, {options.core})
        flags.append("--xla_cpu_multi_thread_eigen=false")
        os.environ["NPROC"] = "1"  # the size of XLA's own thread pool
        os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    os.environ["XLA_FLAGS"] = " ".join(flags)
    from federated_run import run  # imports JAX, which reads what was settled

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
