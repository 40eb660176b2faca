"""Images from updates: exact where algebra suffices, better than guesses where search is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.auditing import gradient_inversion
from dpjax.auditing.gradient_inversion import (
    first_linear_layer_input,
    infer_labels,
    invert_gradients,
    psnr,
)
from dpjax.auditing.updates import observe_update
from dpjax.data import load_digits
from dpjax.errors import DpjaxError


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits()[0]
    return np.asarray(images, np.float32).reshape(-1, 8, 8), np.asarray(labels)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": jax.random.normal(keys[0], (64, 48)) / 8,
        "hidden_bias": jnp.zeros(48),
        "head": jax.random.normal(keys[1], (48, 10)) / 7,
        "head_bias": jnp.zeros(10),
    }


def loss_fn(params, image, label):
    hidden = jax.nn.sigmoid(image.reshape(-1) @ params["hidden"] + params["hidden_bias"])
    return -jax.nn.log_softmax(hidden @ params["head"] + params["head_bias"])[label]


def update_of(params, images, labels):
    def mean_loss(p):
        return jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(p, images, jnp.asarray(labels)))

    return jax.grad(mean_loss)(params)


def test_views_of_an_update(params, digits):
    images, labels = digits
    updates = [update_of(params, images[i : i + 1], labels[i : i + 1]) for i in range(3)]

    def flat(tree):
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])

    plain = flat(observe_update(updates, "plain"))
    np.testing.assert_array_equal(plain, flat(updates[0]))
    clipped = flat(observe_update(updates, "clipped", l2_clip_norm=0.1))
    assert np.linalg.norm(clipped) == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_allclose(clipped / 0.1, plain / np.linalg.norm(plain), atol=1e-6)
    # A short update is left alone.
    loose = flat(observe_update(updates, "clipped", l2_clip_norm=1e3))
    np.testing.assert_array_equal(loose, plain)
    noisy = flat(
        observe_update(
            updates, "noised", l2_clip_norm=0.1, noise_multiplier=2.0, key=jax.random.key(1)
        )
    )
    added = noisy - clipped
    assert np.std(added) == pytest.approx(0.2, rel=0.05)  # rejects 2/3 and 3/2 of it
    assert abs(np.mean(added)) < 5 * 0.2 / len(added) ** 0.5
    total = flat(observe_update(updates, "aggregated", l2_clip_norm=0.1))
    alone = [flat(observe_update([u], "clipped", l2_clip_norm=0.1)) for u in updates]
    np.testing.assert_allclose(total, np.sum(alone, axis=0), atol=3 * 2**-20)
    # The order of clients leaves no trace, to the last bit.
    again = flat(
        observe_update([updates[2], updates[0], updates[1]], "aggregated", l2_clip_norm=0.1)
    )
    np.testing.assert_array_equal(again, total)


def test_first_layer_input_is_exact_for_one_and_a_mixture_for_two(params, digits):
    images, labels = digits
    one = update_of(params, images[:1], labels[:1])
    for view in ("plain", "clipped"):
        seen = observe_update([one], view, l2_clip_norm=0.01)
        found = first_linear_layer_input(seen["hidden"], seen["hidden_bias"])
        assert psnr(found, images[0].ravel()) > 80
    two = update_of(params, images[:2], labels[:2])
    mixed = first_linear_layer_input(two["hidden"], two["hidden_bias"])
    assert max(psnr(mixed, images[i].ravel()) for i in (0, 1)) < 30
    noisy = observe_update(
        [one], "noised", l2_clip_norm=1.0, noise_multiplier=1.0, key=jax.random.key(0)
    )
    assert (
        psnr(first_linear_layer_input(noisy["hidden"], noisy["hidden_bias"]), images[0].ravel())
        < 12
    )


def test_labels_of_single_examples_are_exact(params, digits):
    images, labels = digits
    for i in range(40):
        update = update_of(params, images[i : i + 1], labels[i : i + 1])
        assert infer_labels(np.asarray(update["head_bias"]), 1) == [labels[i]]
    several = update_of(params, images[:3], labels[:3])
    assert sorted(infer_labels(np.asarray(several["head_bias"]), 3)) == sorted(labels[:3])


@pytest.fixture(scope="module")
def searches(params, digits):
    """Best of three restarts for each view of one digit's update, the bias left out."""
    images, labels = digits

    # Without the biases no algebra gives the input away: only the search can.
    def update_fn(x, at=0):
        update = update_of(params, x, labels[at : at + 1])
        return {name: update[name] for name in ("hidden", "head")}

    updates = [update_fn(jnp.asarray(images[i : i + 1]), i) for i in range(8)]
    found, compiled = {}, gradient_inversion._search._cache_size()
    for view in ("plain", "clipped", "noised", "aggregated"):
        seen = observe_update(
            updates, view, l2_clip_norm=0.5, noise_multiplier=0.8, key=jax.random.key(2)
        )
        found[view] = invert_gradients(
            update_fn, seen, (1, 8, 8), jax.random.key(3), iterations=300, restarts=3,
            total_variation=1e-4,
        )  # fmt: skip
    assert gradient_inversion._search._cache_size() == compiled + 1  # for all views
    return found


def test_search_recovers_plain_and_clipped_updates_only(searches, digits):
    truth, others = digits[0][:1], digits[0]
    # What one gets without the update: the mean image.
    baseline = psnr(others.mean(axis=0, keepdims=True), truth)
    reached = {view: psnr(found.images, truth) for view, found in searches.items()}
    assert reached["plain"] > baseline + 12 and reached["clipped"] > baseline + 12
    assert reached["noised"] < baseline + 2 and reached["aggregated"] < baseline + 4
    assert searches["plain"].cosine_similarity > 0.999 > searches["noised"].cosine_similarity
    for found in searches.values():
        assert found.images.min() >= 0 and found.images.max() <= 1
        assert found.objective == pytest.approx(found.objectives.min())


def test_refusals(params):
    with pytest.raises(DpjaxError, match="squared norm 0.0"):
        invert_gradients(lambda x: x, jnp.zeros(3), (1, 2, 2), jax.random.key(0))
    with pytest.raises(DpjaxError, match="total variation needs"):
        invert_gradients(lambda x: x, jnp.ones(3), (1, 3), jax.random.key(0))
    with pytest.raises(DpjaxError, match="restarts 0"):
        invert_gradients(lambda x: x, jnp.ones(3), (1, 2, 2), jax.random.key(0), restarts=0)
    with pytest.raises(DpjaxError, match="all zero"):
        first_linear_layer_input(np.ones((2, 2)), np.zeros(2))
    with pytest.raises(DpjaxError, match="for 3 examples"):
        infer_labels(np.zeros(2), 3)
    with pytest.raises(DpjaxError, match="must agree"):
        psnr(np.zeros(2), np.zeros(3))
    one = {"w": jnp.ones(2)}
    with pytest.raises(DpjaxError, match="'masked' is unknown"):
        observe_update([one, one], "masked")
    with pytest.raises(DpjaxError, match="1 client"):
        observe_update([one], "aggregated")
    with pytest.raises(DpjaxError, match="key"):
        observe_update([one], "noised")
    with pytest.raises(DpjaxError, match="no updates"):
        observe_update([], "plain")
