"""Views of a client's update: scaling, noise of the right size, masks that hide and cancel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpjax.auditing.updates import clip_update, decode_sum, masked_updates, observe
from dpjax.errors import DpjaxError

KEY = jax.random.key(3)


def tree(seed, scale=1.0):
    drawn = np.random.default_rng(seed).normal(0, scale, 4000).astype(np.float32)
    return {"a": jnp.asarray(drawn[:3000].reshape(60, 50)), "b": [jnp.asarray(drawn[3000:])]}


def flat(update):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(update)])


def test_clipping_is_over_all_leaves_and_keeps_the_direction():
    update = tree(0)
    clipped = flat(clip_update(update, 2.0))
    np.testing.assert_allclose(clipped, flat(update) * 2 / np.linalg.norm(flat(update)), rtol=1e-6)
    np.testing.assert_array_equal(flat(clip_update(update, 1e6)), flat(update))
    np.testing.assert_array_equal(flat(clip_update({"a": jnp.zeros(2)}, 1.0)), [0, 0])


def test_plain_is_the_update():
    update = tree(0)
    assert observe(update, "plain", KEY) is update


def test_noise_has_the_stated_scale():
    update = tree(1)
    seen = flat(observe(update, "noised", KEY, l2_clip_norm=2.0, noise_multiplier=1.5))
    noise = seen - flat(clip_update(update, 2.0))
    # 4000 draws: the stddev is known to 1.1%; 2/3 and 3/2 are far away.
    assert abs(noise.std() / 3.0 - 1) < 0.05
    assert stats.kstest(noise / 3.0, "norm").pvalue > 0.01
    again = flat(
        observe(update, "noised", jax.random.key(4), l2_clip_norm=2.0, noise_multiplier=1.5)
    )
    assert not np.allclose(seen, again)


@pytest.mark.parametrize("clients", [2, 3, 5])
def test_masks_cancel_in_the_sum_only(clients):
    updates = [tree(seed, 0.1) for seed in range(clients)]
    sent = masked_updates(updates, KEY)
    total = flat(decode_sum(sent))
    expected = np.sum([flat(u) for u in updates], axis=0)
    # Each entry is rounded once for each client; the sum, once more to float32.
    np.testing.assert_allclose(total, expected, atol=clients * 2.0**-25 + 1e-7, rtol=0)
    for message in sent:
        drawn = flat(message) / 2.0**32
        # Ten such tests at fixed keys; an unmasked message is at 0 and 1, with p below 1e-300.
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    # Without one client nothing is left of the others.
    partial = flat(decode_sum(sent[:-1])) if clients > 2 else flat(decode_sum(sent[:1]))
    rest = np.sum([flat(u) for u in updates[:-1]], axis=0)
    assert np.abs(partial - rest).mean() > 10
    assert abs(np.corrcoef(partial, rest)[0, 1]) < 0.06


def test_no_two_masks_are_alike():
    zeros = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    sent = [np.asarray(x) for m in masked_updates([zeros] * 3, KEY) for x in jax.tree.leaves(m)]
    assert len({x.tobytes() for x in sent}) == 6


def test_negative_and_large_entries():
    updates = [{"a": jnp.array([-100.0, 100.0, 0.0])}, {"a": jnp.array([-27.0, 27.0, -0.5])}]
    np.testing.assert_array_equal(
        np.asarray(decode_sum(masked_updates(updates, KEY))["a"]), [-127.0, 127.0, -0.5]
    )
    with pytest.raises(DpjaxError, match="may reach 200"):
        masked_updates([updates[0], updates[0]], KEY)
    wider = masked_updates([updates[0], updates[0]], KEY, fractional_bits=16)
    assert decode_sum(wider, fractional_bits=16)["a"].tolist() == [-200.0, 200.0, 0.0]


def test_aggregated_is_the_sum_of_clipped_updates():
    one, two = tree(0), tree(1)
    seen = flat(observe(one, "aggregated", KEY, l2_clip_norm=1.0, others=[two]))
    expected = flat(clip_update(one, 1.0)) + flat(clip_update(two, 1.0))
    np.testing.assert_allclose(seen, expected, atol=2e-7)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: observe(tree(0), "masked", KEY), "view is 'masked'"),  # pyright: ignore
        (lambda: observe(tree(0), "clipped", KEY), "l2_clip_norm is None"),
        (lambda: observe(tree(0), "noised", KEY, l2_clip_norm=1.0), "noise_multiplier is None"),
        (lambda: observe(tree(0), "aggregated", KEY), "others is empty"),
        (lambda: observe(tree(0), "plain", 3), "jax.random.key"),
        (lambda: clip_update(tree(0), 0.0), "l2_clip_norm is 0.0"),
        (lambda: clip_update({"a": jnp.array([jnp.nan])}, 1.0), "norm is nan"),
        (lambda: masked_updates([tree(0)], KEY), "at least 2"),
        (lambda: masked_updates([{"a": jnp.array([jnp.nan])}] * 2, KEY), "nan"),
        (lambda: masked_updates([tree(0), {"a": jnp.zeros(2)}], KEY), "update 1"),
        (lambda: decode_sum([]), "no message"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(DpjaxError, match=said):
        call()
