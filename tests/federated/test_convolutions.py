"""Rewritten convolutions give the same numbers, whatever their layout, and the right ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.federated.convolutions import canonical_convolutions

LAYOUTS = (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW"))


def convolved(x, w, layout, **options):
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)


def arrays(layout, features=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"N": 2, "H": 9, "W": 8, "C": features}
    kernel = {"H": 3, "W": 2, "I": features, "O": 4}
    x = rng.normal(size=[sizes[c] for c in layout[0]]).astype(np.float32)
    w = rng.normal(size=[kernel[c] for c in layout[1]]).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (2, 1), "padding": "SAME", "rhs_dilation": (1, 2)},
        {"window_strides": (1, 2), "padding": ((1, 0), (0, 2)), "lhs_dilation": (2, 1)},
    ],
)
def test_gradients_are_the_same(layout, options):
    x, w = arrays(layout)

    def loss(x, w):
        return jnp.sum(jnp.sin(convolved(x, w, layout, **options)))

    both = jax.value_and_grad(loss, (0, 1))
    for got, wanted in zip(
        jax.tree.leaves(jax.jit(canonical_convolutions(both))(x, w)),
        jax.tree.leaves(both(x, w)),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_by_a_kernel_against_a_loop():
    x, w = arrays(LAYOUTS[0])

    def loss(w):
        return jnp.sum(
            jnp.square(convolved(x, w, LAYOUTS[0], window_strides=(1, 1), padding="VALID"))
        )

    y = np.zeros((2, 7, 7, 4))
    expected = np.zeros(w.shape)
    x64, w64 = np.float64(x), np.float64(w)
    for i, j in np.ndindex(7, 7):
        y[:, i, j] = np.einsum("nhwc,hwco->no", x64[:, i : i + 3, j : j + 2], w64)
    for i, j in np.ndindex(7, 7):
        expected += 2 * np.einsum("nhwc,no->hwco", x64[:, i : i + 3, j : j + 2], y[:, i, j])
    np.testing.assert_allclose(canonical_convolutions(jax.grad(loss))(w), expected, rtol=1e-4)


def test_inside_of_jit_scan_remat_and_vmap():
    x, w = arrays(LAYOUTS[1])

    def loss(w, x):
        @jax.checkpoint
        @jax.jit
        def layer(x):
            return jnp.tanh(convolved(x, w, LAYOUTS[1], window_strides=(1, 1), padding="VALID"))

        def step(total, scale):
            return total + jnp.sum(layer(x * scale)), scale

        return jax.lax.scan(step, jnp.float32(0), jnp.arange(3.0))[0]

    plain = jax.grad(loss)
    np.testing.assert_allclose(
        canonical_convolutions(plain)(w, x), plain(w, x), rtol=1e-4, atol=1e-5
    )
    several = jnp.stack([w, 2 * w, -w])
    np.testing.assert_allclose(
        jax.vmap(canonical_convolutions(plain), (0, None))(several, x),
        jnp.stack([plain(one, x) for one in several]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_function_without_convolutions_is_left_alone():
    calls = []

    def function(tree):
        calls.append(tree)
        return {"y": tree["x"] * 2}

    assert float(canonical_convolutions(function)({"x": jnp.float32(3)})["y"]) == 6
    assert len(calls) == 2 and float(calls[1]["x"]) == 3
