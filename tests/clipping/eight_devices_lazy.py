"""Run by test_lazy_devices: sharded batches and parameters give the numbers of one device."""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dpjax.clipping import clipped_grad
from dpjax.noise import gaussian_privatizer

VOCABULARY, WIDTH, LAYERS, TIME, SIZE = 16, 8, 8, 3, 16


def loss_fn(params, example):
    """Tied embedding, scanned and checkpointed layers, a convolution and a bias."""
    tokens = example["tokens"]

    @jax.checkpoint
    def layer(h, p):
        return h + jnp.tanh(h @ p["up"]) @ p["down"], None

    h = params["embedding"][tokens[:-1]]
    h, _ = jax.lax.scan(layer, h, params["layers"])
    h = jax.lax.conv_general_dilated(
        h[None], params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]
    h = jnp.einsum("td,dhk->thk", h, params["heads"]).reshape(TIME, WIDTH) + params["bias"][None]
    chosen = jnp.take_along_axis(h @ params["embedding"].T, tokens[1:, None], axis=1)
    return example["weight"] * jnp.sum(jnp.sin(chosen))


def inputs():
    """Parameters and a batch with two rows of padding, as numpy."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.25 * rng.normal(size=shape)).astype(np.float32)

    params = {
        "embedding": draw(VOCABULARY, WIDTH),
        "layers": {"up": draw(LAYERS, WIDTH, 16), "down": draw(LAYERS, 16, WIDTH)},
        "kernel": draw(3, WIDTH, WIDTH),
        "heads": draw(WIDTH, 2, 4),
        "bias": draw(WIDTH),
    }
    batch = {
        "tokens": rng.integers(0, VOCABULARY, (SIZE, TIME + 1)).astype(np.int32),
        "weight": (10.0 ** rng.uniform(-2, 2, SIZE)).astype(np.float32),
    }
    return params, batch, np.arange(SIZE) >= SIZE - 2


# FSDP: every large leaf is split along one of its axes, stacked ones also along the layers.
SPECS = {
    "embedding": P("data"),
    "layers": {"up": P(None, None, "data"), "down": P("data")},
    "kernel": P(None, None, "data"),
    "heads": P("data"),
    "bias": P(),
}


def main(methods: Any) -> None:
    assert len(jax.local_devices()) == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, batch, padding = inputs()
    specs = jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS)
    by_row = NamedSharding(mesh, P("data"))
    everywhere = NamedSharding(mesh, P())
    privatizer = gaussian_privatizer(1.0, jax.random.key(1))

    def close(found, expected):
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            f, e = np.asarray(f), np.asarray(e)
            assert np.linalg.norm(f - e) <= 1e-5 * max(np.linalg.norm(e), 1.0)

    first = None
    for method in methods:
        for microbatch_size in (None, 8):
            grad_fn = clipped_grad(loss_fn, 1.0, method=method, microbatch_size=microbatch_size)
            run = jax.jit(lambda *args, f=grad_fn: f(*args))
            expected = run(params, batch, padding)
            first = expected if first is None else first
            close(expected, first)
            for shardings in (everywhere, specs):
                sharded = jax.device_put(params, shardings)
                rows, is_padding = jax.device_put((batch, padding), by_row)
                total, info = run(sharded, rows, is_padding)
                close((total, info), first)
                norms = np.asarray(info.sensitive_norms)[:-2]
                assert norms.min() < 1 < norms.max()

    # Noise is drawn where the sum lies, nothing is gathered, and it is that of one device to the
    # bit.
    assert first is not None
    draw = jax.jit(lambda tree: privatizer.update(tree, privatizer.init(tree))[0])
    zeros = jax.tree.map(np.zeros_like, params)
    lying = jax.device_put(zeros, specs)
    one, sharded = draw(zeros), draw(lying)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(a, b)
    pairs = zip(jax.tree.leaves(sharded), jax.tree.leaves(specs), strict=True)
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in pairs)
    text = draw.lower(lying).compile().as_text()
    assert text is not None
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
    noisy = draw(jax.device_put(first[0], specs))
    close(jax.tree.map(lambda a, b: a - b, noisy, first[0]), one)
    print("equal")


if __name__ == "__main__":  # also what keeps the doctest collector from running it
    if "--xla_force_host_platform_device_count=8" not in os.environ.get("XLA_FLAGS", ""):
        raise SystemExit("set XLA_FLAGS=--xla_force_host_platform_device_count=8")
    main(sys.argv[1:])
