"""Speed and memory of one private training step, beside the same step without privacy.

    .venv/bin/python experiments/benchmarks/step.py

Interleaved runs, medians, ratios of pairs; CPU seconds beside wall seconds, because machines are
shared. Memory is XLA's own count of temporary bytes for the compiled step.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.clipping import clipped_grad
from dpjax.mechanism import DPSGD
from dpjax.models import decoder_config, init_params, language_model_loss
from dpjax.training import init_state, train_step

SEQUENCE_LENGTH, VOCABULARY = 64, 1024


def batch_of(size):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (size, SEQUENCE_LENGTH))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "loss_mask": jnp.ones((size, SEQUENCE_LENGTH), bool),
    }


def timed(function):
    """(CPU seconds, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(function())
    return time.process_time() - cpu, time.perf_counter() - wall


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--microbatch-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = decoder_config("nano", VOCABULARY)
    loss_fn = language_model_loss(config)
    params = init_params(config, jax.random.key(0))
    batch, size = batch_of(arguments.examples), arguments.examples
    padding = jnp.zeros(size, bool)
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)

    def plain(microbatch_size):
        """Ordinary training: gradients of sums, accumulated over microbatches."""

        @jax.jit
        def step(params, opt_state, batch):
            def body(total, chunk):
                loss = lambda p: jnp.sum(jax.vmap(loss_fn, (None, 0))(p, chunk))  # noqa: E731
                return jax.tree.map(jnp.add, total, jax.grad(loss)(params)), None

            chunks = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)
            total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), chunks)
            updates, opt_state = optimizer.update(total, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return lambda: step(params, opt_state, batch)

    def private(microbatch_size):
        mechanism = DPSGD(
            1.0, 0.1, 10, noise_multiplier=1.0, normalize_by=size, microbatch_size=microbatch_size
        )
        state = init_state(mechanism, params, optimizer, jax.random.key(0))
        return lambda: train_step(
            state, batch, padding, mechanism=mechanism, loss_fn=loss_fn, optimizer=optimizer
        )

    steps = {f"without privacy, microbatch {m}": plain(m) for m in (8, 16, size)}
    steps |= {f"private, microbatch {m}": private(m) for m in arguments.microbatch_sizes}
    times = {name: [] for name in steps}
    for step in steps.values():
        timed(step)  # compiles
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            times[name].append(timed(step))
    print(f"nano, {size} examples of {SEQUENCE_LENGTH} tokens, {jax.devices()[0].device_kind}")
    print("| step | examples/s | CPU ms per example | CPU against the best without privacy |")
    print("| --- | --- | --- | --- |")
    plains = [runs for name, runs in times.items() if name.startswith("without")]
    base = [cpu for cpu, _ in min(plains, key=lambda runs: statistics.median(c for c, _ in runs))]
    for name, runs in times.items():
        wall = statistics.median(w for _, w in runs)
        cpu = statistics.median(c for c, _ in runs)
        ratio = statistics.median(c / b for (c, _), b in zip(runs, base, strict=True))
        print(f"| {name} | {size / wall:.0f} | {1000 * cpu / size:.2f} | {ratio:.2f} |")

    print("\n| logical batch | temporary MB, microbatch 8 | temporary MB, whole batch |")
    print("| --- | --- | --- |")
    for logical in (16, 64, 256, 1024):
        row = []
        for microbatch_size in (8, None):
            grad_fn = clipped_grad(loss_fn, 1.0, microbatch_size=microbatch_size)
            step = jax.jit(lambda p, b, m, f=grad_fn: f(p, b, m)[0])
            lowered = step.lower(params, batch_of(logical), jnp.zeros(logical, bool))
            row.append(lowered.compile().memory_analysis().temp_size_in_bytes / 1e6)
        print(f"| {logical} | {row[0]:.1f} | {row[1]:.1f} |")


if __name__ == "__main__":
    main()
