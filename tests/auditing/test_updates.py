"""Views of a client's update: scaling, noise of the right size, the sum and nothing but the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpjax.auditing.updates import observe_update
from dpjax.errors import DpjaxError

KEY = jax.random.key(3)


def tree(seed, scale=1.0):
    drawn = np.random.default_rng(seed).normal(0, scale, 4000).astype(np.float32)
    return {"a": jnp.asarray(drawn[:3000].reshape(60, 50)), "b": [jnp.asarray(drawn[3000:])]}


def flat(update):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(update)])


def clipped(update, norm):
    return flat(update) * min(1.0, norm / np.linalg.norm(flat(update)))


def test_plain_is_the_update():
    np.testing.assert_array_equal(flat(observe_update([tree(0)], "plain")), flat(tree(0)))


def test_clipping_is_over_all_leaves_and_keeps_the_direction():
    for norm in (2.0, 1e6):
        seen = observe_update([tree(0)], "clipped", l2_clip_norm=norm)
        np.testing.assert_allclose(flat(seen), clipped(tree(0), norm), rtol=1e-5)
    assert observe_update([{"a": jnp.zeros(2)}], "clipped")["a"].tolist() == [0, 0]


def test_noise_has_the_stated_scale():
    def noised(seed):
        return flat(
            observe_update(
                [tree(1)],
                "noised",
                l2_clip_norm=2.0,
                noise_multiplier=1.5,
                key=jax.random.key(seed),
            )
        )

    noise = noised(3) - clipped(tree(1), 2.0)
    # 4000 draws: the stddev is known to 1.1%; 2/3 and 3/2 are far away.
    assert abs(noise.std() / 3.0 - 1) < 0.05
    assert stats.kstest(noise / 3.0, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noised(4), noised(3))[0, 1]) < 0.06


def test_aggregated_is_the_sum_of_clipped_updates():
    updates = [tree(seed) for seed in range(3)]
    seen = flat(observe_update(updates, "aggregated", l2_clip_norm=1.0))
    expected = np.sum([clipped(u, 1.0) for u in updates], axis=0)
    # Each of the three is rounded once, by at most half a step.
    np.testing.assert_allclose(seen, expected, atol=2e-6)
    shuffled = flat(observe_update(updates[::-1], "aggregated", l2_clip_norm=1.0))
    np.testing.assert_array_equal(seen, shuffled)  # the order of clients leaves no trace


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: observe_update([tree(0)], "masked"), "'masked' is unknown"),  # pyright: ignore
        (lambda: observe_update([], "plain"), "no updates"),
        (lambda: observe_update([tree(0)], "clipped", l2_clip_norm=0.0), "l2_clip_norm is 0.0"),
        (lambda: observe_update([tree(0)], "noised"), "jax.random.key"),
        (lambda: observe_update([tree(0)], "aggregated"), "at least 2"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(DpjaxError, match=said):
        call()
