"""DP-LoRA on SmolLM2-135M: one private step beside one ordinary step, time and peak memory.

    python experiments/benchmarks/lora.py                    # one core, batch 8 x 128 tokens
    python experiments/benchmarks/lora.py --device default   # all devices that JAX finds

Both steps train the same adapters with Adam. The rounds alternate; ratios are of CPU seconds on one
pinned core (wall seconds with --device default), the median over the rounds. Peak memory is the
resident set of a process of its own for each step, model and runtime included.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "smollm2"
    """A pretrained model, or "nano" for a quick check of this script."""
    batch_size: int = 8
    """Physical batch."""
    sequence_length: int = 128
    """Tokens."""
    rank: int = 16
    """Of the adapters, on every projection."""
    rounds: int = 5
    """Pairs of steps."""
    device: Literal["core", "default"] = "core"
    """"core" pins the process to one CPU core."""
    only: Literal["plain", "private"] | None = None
    """Used by the script itself, for peak memory."""


def main(config: Config) -> None:
    """Prints one line for time and one for memory."""
    if config.device == "core":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    if config.only is not None:
        run = steps(config)[config.only]
        for _ in range(2):
            run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        stats = jax.local_devices()[0].memory_stats() or {}
        print(json.dumps({"peak": stats.get("peak_bytes_in_use", peak)}))
        return
    runs = steps(config)
    clock = time.process_time if config.device == "core" else time.monotonic
    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    for name, run in runs.items():
        run()  # compiles
    for number in range(config.rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            began = clock()
            runs[name]()
            seconds[name].append(clock() - began)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["private"], strict=True)]
    device = jax.local_devices()[0].device_kind
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{config.model} batch {config.batch_size} x {config.sequence_length} on {device}: "
        f"ordinary {middle['plain']:.2f} s, private {middle['private']:.2f} s, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    peaks = {}
    for name in runs:
        flags = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}"
                 for f in dataclasses.fields(config) if f.name != "only"]  # fmt: skip
        out = subprocess.run(
            [sys.executable, __file__, *flags, f"--only={name}"], capture_output=True, check=True
        )
        peaks[name] = json.loads(out.stdout)["peak"] / 2**30
    print(f"peak memory: ordinary {peaks['plain']:.2f} GiB, private {peaks['private']:.2f} GiB")


def steps(config: Config):
    """Both steps as functions without arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from dpjax.data import chitchat, dataset_from_records
    from dpjax.mechanism import DPSGD
    from dpjax.models import ALL_TARGETS, LoRA, load_pretrained, prepare_tuning, tuned_loss
    from dpjax.runs.config import TrainConfig
    from dpjax.runs.sources import starting_point
    from dpjax.training import init_state, train_step

    if config.model == "nano":
        point = starting_point(TrainConfig(data="", tuning="lora"), jax.random.key(0))
        shape, trainable, frozen = point.model.config, point.trainable, point.frozen
        tokenizer = point.model.tokenizer
    else:
        model = load_pretrained(config.model)
        tokenizer = model.tokenizer
        shape, trainable, frozen = prepare_tuning(
            model.config,
            model.params,
            "lora",
            lora=LoRA(config.rank, targets=ALL_TARGETS),
            key=jax.random.key(0),
        )
        del model
    data = dataset_from_records(chitchat()[: config.batch_size], tokenizer, config.sequence_length)
    batch = jax.tree.map(jnp.asarray, data.take(np.arange(config.batch_size)))
    padding = jnp.zeros(config.batch_size, bool)
    loss_fn = tuned_loss(shape, frozen)
    optimizer = optax.adamw(1e-3)
    mechanism = DPSGD(1.0, 0.01, 100, noise_multiplier=0.6, normalize_by=config.batch_size)
    private = [init_state(mechanism, trainable, optimizer, jax.random.key(1))]
    plain = [(trainable, optimizer.init(trainable))]

    @jax.jit
    def ordinary(loss_fn, state, batch):
        params, inner = state

        def mean(params):
            return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

        updates, inner = optimizer.update(jax.grad(mean)(params), inner, params)
        return optax.apply_updates(params, updates), inner

    def run_plain():
        plain[0] = jax.block_until_ready(ordinary(loss_fn, plain[0], batch))

    def run_private():
        private[0], _ = jax.block_until_ready(
            train_step(
                private[0],
                batch,
                padding,
                mechanism=mechanism,
                loss_fn=loss_fn,
                optimizer=optimizer,
            )
        )

    chosen = {"plain": run_plain, "private": run_private}
    return chosen if config.only is None else {config.only: chosen[config.only]}


if __name__ == "__main__":
    main(tyro.cli(Config))
