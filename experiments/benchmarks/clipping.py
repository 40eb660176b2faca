"""Time and memory of clipped gradients beside the same gradients without privacy.

    python experiments/benchmarks/clipping.py --workloads W1 W1t W2 W3 W4 --output results.json
    python experiments/benchmarks/clipping.py --preset smoke --methods vmap lazy auto
    python experiments/benchmarks/clipping.py --preset gpu

Every step returns the sum over the batch of (clipped) gradients, all leaves: no noise and no
optimiser. Steps are compiled first, checked against each other, then run in turn, the order
reversed every second round. Reported are medians, and the median over rounds of the ratio to the
non-private step of the same round: CPU seconds on a CPU, wall seconds elsewhere. Temporary memory,
FLOPs and copies are XLA's own account of the compiled step; it counts the body of a loop once.

jax_privacy is timed where it is installed. Opacus runs in another process, from the environment of
``--opacus-python``, one step at a time in the same rounds. Exit code 1: own methods disagree.
"""

import sys

from clipping_options import parse, settle


def main() -> int:
    options = parse()
    settle(options)
    from clipping_run import run  # imports JAX, which reads what was settled

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
