"""Scoring sequences for membership attacks: one batched pass, one sequence at a time, and cached.

    python experiments/benchmarks/scoring.py                      # 10,000 sequences of 64 tokens
    python experiments/benchmarks/scoring.py --num-sequences 500  # a quick look

All ways give the same log-probabilities (checked). Rounds alternate; the ratios are medians of
pairs. "one at a time" is a jitted forward pass in a Python loop: what a notebook does first.
"""

import dataclasses
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dpjax.auditing import token_statistics
from dpjax.data import ArrayDataset
from dpjax.errors import DpjaxError
from dpjax.models import apply, decoder_config, init_params


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_sequences: int = 10_000
    """Sequences in the batched pass."""
    sequence_length: int = 64
    """Tokens."""
    batch_size: int = 64
    """Of the batched pass."""
    one_at_a_time: int = 500
    """Sequences of the slow way; its time is scaled up."""
    rounds: int = 3
    """Pairs."""
    preset: str = "nano"
    """Model."""
    vocabulary_size: int = 2048
    """Of the model."""


def main(config: Config) -> None:
    """Prints seconds and ratios."""
    shape = decoder_config(config.preset, config.vocabulary_size)
    params = init_params(shape, jax.random.key(0))
    rng = np.random.default_rng(0)
    size = (config.num_sequences, config.sequence_length)
    tokens = rng.integers(0, config.vocabulary_size, size).astype(np.int32)
    data = ArrayDataset({"tokens": tokens, "loss_mask": np.ones(size, bool)})

    @jax.jit
    def one(params, row):
        logs = jax.nn.log_softmax(apply(shape, params, row[:-1]).astype(jnp.float32))
        return jnp.take_along_axis(logs, row[1:, None], axis=1)[:, 0]

    def batched(cache=None):
        began = time.perf_counter(), time.process_time()
        found = token_statistics(shape, params, data, batch_size=config.batch_size, cache=cache)
        return time.perf_counter() - began[0], time.process_time() - began[1], found.log_probs

    few = min(config.one_at_a_time, config.num_sequences)

    def loop():
        began = time.perf_counter(), time.process_time()
        found = np.stack([np.asarray(one(params, row)) for row in tokens[:few]])
        scale = config.num_sequences / few
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        return scale * wall, scale * cpu, found

    with tempfile.TemporaryDirectory() as cache:
        batched(cache)  # compiles, and fills the cache
        one(params, tokens[0]).block_until_ready()
        rows = []
        for number in range(config.rounds):
            order = (batched, loop) if number % 2 == 0 else (loop, batched)
            found = {way.__name__: way() for way in order}
            found["cached"] = batched(cache)
            rows.append(found)
    np.testing.assert_allclose(rows[0]["batched"][2][:few], rows[0]["loop"][2], atol=1e-3)
    np.testing.assert_array_equal(rows[0]["cached"][2], rows[0]["batched"][2])
    names = {"batched": "one batched pass", "loop": "one at a time", "cached": "from the cache"}
    device = jax.local_devices()[0].device_kind
    print(
        f"{config.num_sequences:,} sequences of {config.sequence_length} tokens, {config.preset}, "
        f"{jax.local_device_count()} x {device}, {config.rounds} rounds"
    )
    for name, label in names.items():
        wall, cpu = (statistics.median(r[name][i] for r in rows) for i in (0, 1))
        ratios = sorted(r["loop"][0] / r[name][0] for r in rows)
        print(
            f"{label:18} {wall:9.2f} s wall {cpu:9.2f} s CPU  {statistics.median(ratios):7.2f} "
            f"times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"scoring: {error}", file=sys.stderr)
        sys.exit(2)
