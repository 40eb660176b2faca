"""The command line of clipping.py, and what must be settled before JAX starts."""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

WORKLOADS = ("W1", "W1t", "W2", "W3", "W4", "W5", "GPT2")
OWN = ("vmap", "lazy", "auto")
DEFAULT = (*OWN, "jax-privacy", "jax-privacy-best", "opacus-hooks", "opacus-ghost")
# "-best": at the best of several microbatch sizes, found by trying them.
METHODS = (*DEFAULT, "non-private-best", "vmap-best", "auto-best")
PRESETS = {
    "cpu": ("W1", "W1t", "W2", "W3", "W4", "W5"),
    "gpu": ("W1", "W5", "GPT2"),
    "smoke": ("W1", "W1t", "W2", "W3", "W4", "W5"),
}


def fail(message: str) -> NoReturn:
    print(f"clipping.py: {message}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options, with the defaults that depend on the preset filled in."""
    parser = _Parser(description="Time and memory of clipped gradients.", allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="sizes, workloads and machine settings")
    add("--workloads", nargs="+", choices=WORKLOADS, help="default: those of the preset")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT, help="default: all but own -best")
    add("--repeats", type=int, help="rounds; default: 7, for W5 and GPT2 on a CPU 2, smoke 1")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    add("--batch", type=int, help="examples, in place of each workload's own number")
    add("--remat", action="store_true", help="jax.checkpoint around each layer of W5")
    add("--microbatches", type=int, nargs="+", default=(1, 4, 8, 16), help="sizes for -best")
    add("--memory-limit", type=float, help="GB a step may need; default: what is free, with room")
    add("--core", type=int, help="which one to run on; default: the last")
    add("--no-pin", action="store_true", help="run on all cores")
    add("--multi-thread", action="store_true", help="leave XLA's threads as they are")
    add("--opacus-python", help="interpreter of an environment with torch and opacus")
    add("--dump-hlo", type=pathlib.Path, metavar="DIR", help="write each compiled step's text")
    add("--output", type=pathlib.Path, metavar="FILE", help="write results as JSON")
    options = parser.parse_args(argv)
    for name in ("repeats", "batch", "memory_limit"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            fail(f"--{name.replace('_', '-')} is {value}; use a positive number")
    if min(options.microbatches) < 1:
        fail(f"--microbatches has {min(options.microbatches)}; use positive integers")
    options.microbatches = sorted(set(options.microbatches))
    options.workloads = tuple(dict.fromkeys(options.workloads or PRESETS[options.preset]))
    options.methods = tuple(m for m in METHODS if m in options.methods)
    if options.preset == "smoke" and "GPT2" in options.workloads:
        fail("GPT2 has no smoke size; use --preset cpu or gpu")
    if options.opacus_python and not os.access(options.opacus_python, os.X_OK):
        fail(f"--opacus-python is {options.opacus_python}; it must be an executable interpreter")
    if options.output and not options.output.parent.is_dir():
        fail(f"--output is {options.output}; its folder does not exist")
    if options.dtype is None:
        options.dtype = "bfloat16" if options.preset == "gpu" else "float32"
    _choose_core(options)
    return options


def _choose_core(options: argparse.Namespace) -> None:
    """Pins only for preset cpu, and only where the system can."""
    can_pin = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if can_pin else []
    if options.core is not None and options.core not in cores:
        fail(f"--core is {options.core}; the cores at hand are {cores}")
    if options.no_pin or options.preset != "cpu" or not cores:
        options.core = None
    elif options.core is None:
        options.core = cores[-1]


def settle(options: argparse.Namespace) -> None:
    """Pins this process and keeps XLA to one thread. Before JAX is imported."""
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    flags = os.environ.get("XLA_FLAGS", "").split()
    if options.preset == "cpu" and not options.multi_thread:
        flags.append("--xla_cpu_multi_thread_eigen=false")
        os.environ["NPROC"] = "1"  # the size of XLA's own thread pool
        os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    if options.preset == "smoke":  # a quarter of the time to compile; its times mean nothing
        flags += ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if options.preset != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
