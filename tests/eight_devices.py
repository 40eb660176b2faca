"""Run by test_training: data parallelism on eight simulated devices against one."""

import os

if __name__ == "__main__":  # not when pytest looks for doctests
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.data import ArrayDataset
from dpjax.mechanism import DPSGD
from dpjax.noise import gaussian_privatizer
from dpjax.training import fit, init_state


def loss_fn(params, example):
    return jnp.sum((jnp.tanh(example["x"] @ params) - example["y"]) ** 2)


def train(devices, microbatch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    data = ArrayDataset({"x": x, "y": x[:, :1]})
    mechanism = DPSGD(
        0.5, 0.1, 12, noise_multiplier=1.0, normalize_by=30.0, microbatch_size=microbatch_size
    )
    optimizer = optax.adam(0.05)
    state = init_state(mechanism, jnp.zeros((6, 1)), optimizer, jax.random.key(0))
    norms = []
    for state, info in fit(state, mechanism, loss_fn, optimizer, data, devices=devices):
        norms.append(float(info.noisy_grad_norm))
    return np.asarray(state.params), np.array(norms)


def main():
    assert len(jax.local_devices()) == 8
    for size in (None, 16):
        one, norms_one = train(jax.local_devices()[:1], size)
        eight, norms_eight = train(None, size)
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-5)
        # Noise added on every device would make these about 2.8 times as large.
        np.testing.assert_allclose(norms_one, norms_eight, rtol=1e-4)

    # Noise for a parameter that is sharded does not depend on the number of devices, bit for bit.
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    privatizer = gaussian_privatizer(1.0, jax.random.key(1))
    draw = jax.jit(lambda tree: privatizer.update(tree, privatizer.init(tree))[0])
    whole = jnp.zeros((64, 8))
    sharded = jax.device_put(
        whole, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    np.testing.assert_array_equal(draw(whole), draw(sharded))
    print("equal")


if __name__ == "__main__":
    main()
