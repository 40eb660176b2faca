"""Clipped gradients of tuned parts: lazy equals one gradient per example, in every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.clipping import clipped_grad
from dpjax.data import ArrayDataset
from dpjax.mechanism import DPSGD
from dpjax.models import (
    ALL_TARGETS,
    DecoderConfig,
    LoRA,
    combine,
    init_params,
    language_model_loss,
    prepare_tuning,
    tuned_loss,
)
from dpjax.training import fit, init_state

BASE = DecoderConfig(
    vocabulary_size=37, num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, d_ff=32
)
LAYOUTS = {
    "apart": {},
    "stacked": {"segments": (3,)},
    "recomputed": {"segments": (3,), "remat": True},
}
LORA = LoRA(3, targets=ALL_TARGETS)


def prepared(tuning, seed=0, **changes):
    config = dataclasses.replace(BASE, **changes)
    params = init_params(config, jax.random.key(seed))
    config, trainable, frozen = prepare_tuning(
        config, params, tuning, lora=LORA, last_layers=1, key=jax.random.key(1)
    )
    # Away from the start, where half of the adapters' gradient is zero.
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x + 0.1 * jax.random.normal(k, x.shape).astype(x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return config, jax.tree.unflatten(treedef, moved), frozen


def batch_of(size=5, rows=None, time=12):
    rng = np.random.default_rng(0)
    shape = (size, time) if rows is None else (size, rows, time)
    mask = np.arange(time) < rng.integers(4, time, shape[:-1])[..., None]
    return {"tokens": jnp.asarray(rng.integers(0, 37, shape)), "loss_mask": jnp.asarray(mask)}


def difference(a, b):
    return max(
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tuning", ["lora", "last_layers", "full"])
def test_lazy_is_one_gradient_per_example(tuning, layout):
    config, trainable, frozen = prepared(tuning, **layout)
    loss_fn, batch = tuned_loss(config, frozen), batch_of()
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(trainable, batch)
    norms = jnp.sqrt(
        sum(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(each))
    )
    clip = float(jnp.median(norms))
    scale = jnp.minimum(1.0, clip / norms)
    expected = jax.tree.map(lambda x: jnp.tensordot(scale, x, 1), each)
    for method in ("lazy", "auto"):
        found, info = clipped_grad(loss_fn, clip, method=method)(trainable, batch)
        np.testing.assert_allclose(info.sensitive_norms, norms, rtol=2e-5)
        assert difference(found, expected) < 1e-5
    assert float(jnp.max(norms)) > 1.01 * clip  # something was clipped


def test_layouts_compute_the_same():
    sums = []
    for layout in LAYOUTS.values():
        config, trainable, frozen = prepared("full", **layout)
        loss = jax.vmap(tuned_loss(config, frozen), (None, 0))(trainable, batch_of())
        sums.append(np.asarray(loss))
    # The same keys draw other weights for stacked layers: recomputation alone changes nothing.
    np.testing.assert_allclose(sums[1], sums[2], rtol=1e-6)


def test_only_what_is_trained_gets_a_gradient():
    config, trainable, frozen = prepared("lora", segments=(3,))
    total, _ = clipped_grad(tuned_loss(config, frozen), 1.0)(trainable, batch_of())
    assert jax.tree.structure(total) == jax.tree.structure(trainable)
    whole = combine(trainable, frozen)
    loss = language_model_loss(config)
    full, _ = clipped_grad(loss, 1e9)(whole, batch_of())
    part, _ = clipped_grad(tuned_loss(config, frozen), 1e9)(trainable, batch_of())
    names = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(full)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        np.testing.assert_allclose(leaf, names[jax.tree_util.keystr(path)], atol=1e-6)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bfloat16_activations_keep_float32_norms_sums_and_weights(tuning):
    config, trainable, frozen = prepared(tuning, segments=(3,))
    mixed = dataclasses.replace(config, compute_dtype="bfloat16")
    batch = batch_of()
    exact, exact_info = clipped_grad(tuned_loss(config, frozen), 0.5)(trainable, batch)
    found, info = clipped_grad(tuned_loss(mixed, frozen), 0.5)(trainable, batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert info.sensitive_norms.dtype == jnp.float32
    np.testing.assert_allclose(info.sensitive_norms, exact_info.sensitive_norms, rtol=0.05)
    assert 1e-5 < difference(found, exact) < 0.05  # bfloat16 was used, and is close
    slow, slow_info = clipped_grad(tuned_loss(mixed, frozen), 0.5, method="vmap")(trainable, batch)
    np.testing.assert_allclose(info.sensitive_norms, slow_info.sensitive_norms, rtol=0.02)


def test_the_loss_of_a_person_is_that_of_all_rows():
    config, trainable, frozen = prepared("lora", segments=(3,))
    loss_fn, batch = tuned_loss(config, frozen), batch_of(rows=3)
    one = jax.tree.map(lambda x: x[0], batch)
    rows = [loss_fn(trainable, jax.tree.map(lambda x, r=r: x[r], one)) for r in range(3)]
    np.testing.assert_allclose(loss_fn(trainable, one), np.mean(rows), rtol=1e-5)
    lazy, info = clipped_grad(loss_fn, 0.1, method="lazy")(trainable, batch)
    plain, plain_info = clipped_grad(loss_fn, 0.1, method="vmap")(trainable, batch)
    np.testing.assert_allclose(info.sensitive_norms, plain_info.sensitive_norms, rtol=2e-5)
    assert difference(lazy, plain) < 1e-6


def test_frozen_weights_are_arguments_and_compiled_once(caplog):
    config, trainable, frozen = prepared("lora", segments=(3,))
    data = ArrayDataset(jax.tree.map(np.asarray, batch_of(16)))
    mechanism = DPSGD(1.0, 0.5, 3, noise_multiplier=1.0, population=16, normalize_by=8.0)
    optimizer = optax.sgd(0.1)
    ends = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for scale in (1.0, 2.0):  # other frozen values: the same program
            other = jax.tree.map(lambda x, s=scale: x * s, frozen)
            state = init_state(mechanism, trainable, optimizer, jax.random.key(0))
            for state, _ in fit(state, mechanism, tuned_loss(config, other), optimizer, data):
                pass
            ends.append(state.params)
    messages = [record.getMessage() for record in caplog.records]
    programs = [m for m in messages if m.startswith("Compiling jit(_train_step)")]
    # The embedding is not trained, and is an argument of the one program.
    assert len(programs) == 1 and "float32[37,24]" in programs[0]
    assert difference(*ends) > 1e-4
