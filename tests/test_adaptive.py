"""Adaptive, grouped and automatic clipping, from the mechanism down."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import accounting
from dpjax.adaptive import LARGEST, AdaptiveClipping, next_relative_clip_norm
from dpjax.clipping import clipped_grad
from dpjax.data import ArrayDataset
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.report.card import _kind_of_clipping
from dpjax.runs.config import TrainConfig, make_mechanism
from dpjax.training import fit, init_state, train_step

ADD, REPLACE = (
    dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    (dp_accounting.NeighboringRelation.REPLACE_ONE),
)


def linear(params, example):
    """Gradient = the example, whatever the parameters."""
    return jnp.dot(params, example["x"])


def mechanism_of(**changes):
    settings = {
        "noise_multiplier": 1.0,
        "population": 1000,
        "adaptive_clipping": AdaptiveClipping(),
    }
    return DPSGD(1.0, 0.1, 50, **{**settings, **changes})


def moved(norms, padding=None, **changes):
    settings = {
        "adaptive": AdaptiveClipping(0.5, 0.2),
        "relative_clip_norm": jnp.float32(1.0),
        "clip_norm": 2.0,
        "norms": jnp.asarray(norms, jnp.float32),
        "is_padding_example": jnp.zeros(len(norms), bool) if padding is None else padding,
        "expected_batch_size": float(len(norms)),
        "stddev": 0.0,
        "key": jax.random.key(0),
        "release": jnp.int32(0),
    }
    return next_relative_clip_norm(**{**settings, **changes})


def test_the_two_releases_together_are_one_gaussian_mechanism():
    """RDP of (gradient, count) composed on one batch equals that of the stated noise multiplier."""
    for share in (0.01, 0.3):
        adaptive = AdaptiveClipping(budget_share=share)
        gradient = adaptive.gradient_noise_multiplier(1.3)
        count = adaptive.count_stddev(1.3, ADD) / 0.5
        whole = dp_accounting.rdp.RdpAccountant().compose(dp_accounting.GaussianDpEvent(1.3), 10)
        parts = dp_accounting.rdp.RdpAccountant()
        parts.compose(dp_accounting.GaussianDpEvent(gradient), 10)
        parts.compose(dp_accounting.GaussianDpEvent(count), 10)
        np.testing.assert_allclose(parts.get_epsilon(1e-5), whole.get_epsilon(1e-5), rtol=1e-9)


def test_the_event_is_that_of_the_combined_release():
    plain, adaptive = mechanism_of(adaptive_clipping=None), mechanism_of()
    assert plain.dp_event == adaptive.dp_event
    assert adaptive.epsilon(1e-5) == accounting.epsilon(plain.dp_event, 1e-5)
    np.testing.assert_allclose(adaptive.stddev, plain.stddev / math.sqrt(0.99))
    np.testing.assert_allclose(adaptive.count_stddev, 0.5 / math.sqrt(0.01))
    replaced = mechanism_of(sampling="fixed_size", neighboring_relation="replace_one")
    np.testing.assert_allclose(replaced.count_stddev, 2 * adaptive.count_stddev)
    np.testing.assert_allclose(replaced.stddev, 2 * adaptive.stddev)


@pytest.mark.parametrize("norms, share", [([1, 1, 3, 3], 0.5), ([1, 2, 2, 3], 0.75), ([9], 0.0)])
def test_the_clip_norm_moves_by_the_share_that_was_not_cut(norms, share):
    np.testing.assert_allclose(moved(norms), math.exp(-0.2 * (share - 0.5)), rtol=1e-6)


def test_one_example_moves_the_count_by_at_most_its_sensitivity():
    """Padding and examples that are not finite count nothing, as if removed."""

    def count(norms, padding=None):
        settings = {"expected_batch_size": 100.0, "padding": padding}
        share = 0.5 - math.log(float(moved(norms, **settings))) / 0.2
        return (share - 0.5) * 100.0

    base = [1.0, 3.0, 1.0]
    for other in (0.5, 2.0, 2.1, math.inf, math.nan):
        assert abs(count([*base, other]) - count(base)) <= 0.5 + 1e-3
        for another in (0.5, 2.1, math.nan):
            assert abs(count([*base, other]) - count([*base, another])) <= 1.0 + 1e-3
    np.testing.assert_allclose(count([*base, math.nan]), count(base), atol=1e-3)
    np.testing.assert_allclose(
        count([*base, 0.0], jnp.array([False, False, False, True])), count(base), atol=1e-3
    )


def test_noise_of_the_count_has_its_stddev():
    """Rejects two thirds and three halves of it."""
    releases = jnp.arange(4000, dtype=jnp.int32)
    norms = jnp.asarray([1.0, 3.0])
    relative = jax.vmap(lambda r: moved(norms, release=r, stddev=5.0, expected_batch_size=100.0))(
        releases
    )
    shares = 0.5 - np.log(np.asarray(relative, np.float64)) / 0.2
    found = shares.std() * 100.0
    assert abs(found / 5.0 - 1) < 0.05
    assert abs(shares.mean() - 0.5) < 0.005
    assert len(np.unique(relative)) > 3900  # every release draws anew


def test_the_count_does_not_reuse_the_gradients_noise():
    key = jax.random.key(3)
    count = [
        jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), i)).tolist()
        for i in range(50)
    ]
    gradient = [
        jax.random.key_data(k).tolist()
        for i in range(50)
        for k in jax.random.split(jax.random.fold_in(key, i), 3)
    ]
    assert not {tuple(k) for k in count} & {tuple(k) for k in gradient}


def test_noise_of_the_gradient_has_its_stddev():
    """In units of the clip norm of that iteration; rejects two thirds and three halves."""
    mechanism = mechanism_of(adaptive_clipping=AdaptiveClipping(budget_share=0.5))
    optimizer = optax.sgd(1.0)
    state = init_state(mechanism, jnp.zeros(20_000), optimizer, jax.random.key(0))
    state = state._replace(relative_clip_norm=jnp.float32(4.0))
    batch = {"x": jnp.zeros((2, 20_000))}
    after, info = train_step(
        state, batch, jnp.ones(2, bool), mechanism=mechanism, loss_fn=linear, optimizer=optimizer
    )
    expected = 4.0 * math.sqrt(2.0)
    assert abs(float(jnp.std(after.params)) / expected - 1) < 0.03
    np.testing.assert_allclose(info.noisy_grad_norm, jnp.linalg.norm(after.params), rtol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 16])
def test_the_clip_norm_finds_the_quantile(microbatch_size):
    rng = np.random.default_rng(0)
    norms = rng.uniform(1.0, 9.0, size=2000).astype(np.float32)
    data = ArrayDataset(
        {"x": norms[:, None] * np.eye(3, dtype=np.float32)[rng.integers(0, 3, 2000)]}
    )
    for quantile in (0.25, 0.5):
        mechanism = DPSGD(
            0.5, 0.1, 80, noise_multiplier=1.0, population=2000, microbatch_size=microbatch_size,
            adaptive_clipping=AdaptiveClipping(quantile, 0.3),
        )  # fmt: skip
        optimizer = optax.sgd(0.0)
        state = init_state(mechanism, jnp.zeros(3), optimizer, jax.random.key(1))
        for state, _ in fit(state, mechanism, linear, optimizer, data):
            pass
        found = 0.5 * float(state.relative_clip_norm)
        assert abs(found / np.quantile(norms, quantile) - 1) < 0.1


def test_a_resumed_run_adapts_alike():
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    data = ArrayDataset({"x": x})
    mechanism = mechanism_of(population=200)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = init_state(mechanism, jnp.zeros(3), optimizer, jax.random.key(1))
    states = [s for s, _ in fit(state, mechanism, linear, optimizer, data, max_iterations=8)]
    again = [s for s, _ in fit(states[3], mechanism, linear, optimizer, data, max_iterations=8)]
    assert len({float(s.relative_clip_norm) for s in states}) == 8
    for one, other in zip(states[4:], again, strict=True):
        np.testing.assert_array_equal(one.params, other.params)
        np.testing.assert_array_equal(one.relative_clip_norm, other.relative_clip_norm)


def test_the_clip_norm_stays_in_a_public_range():
    np.testing.assert_array_equal(
        moved([9e9], relative_clip_norm=jnp.float32(LARGEST), clip_norm=1.0), np.float32(LARGEST)
    )


@pytest.mark.parametrize("method", ["vmap", "lazy", "auto"])
def test_a_relative_clip_norm_keeps_the_sensitivity(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5)) * 3
    grad_fn = clipped_grad(linear, 2.0, method=method)
    for relative in (0.25, 1.0, 3.0):
        total, info = grad_fn(
            jnp.zeros(5), {"x": jnp.asarray(x, jnp.float32)}, None, jnp.float32(relative)
        )
        norms = np.linalg.norm(x, axis=1)
        expected = (x * np.minimum(1, 2.0 * relative / norms)[:, None]).sum(0) / relative
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        np.testing.assert_allclose(info.sensitive_norms, norms, rtol=1e-6)


def two_layers(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.sum((hidden @ params["second"]["kernel"]) ** 2)


def layers(rng):
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {
        "first": {"kernel": draw(12, 14), "bias": draw(14)},
        "second": {"kernel": draw(14, 13)},
    }
    return params, draw(5, 3, 12)


@pytest.mark.parametrize("method", ["vmap", "lazy", "auto"])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("groups", ["per_leaf", "per_layer", "named", None])
@pytest.mark.parametrize("stability_constant", [None, 0.1])
def test_groups_match_a_float64_loop(method, microbatch_size, groups, stability_constant):
    rng = np.random.default_rng(0)
    params, x = layers(rng)
    clip, names, bounds = 0.7, {}, {}
    for path in ("first/bias", "first/kernel", "second/kernel"):
        names[path] = {
            "per_leaf": path,
            "per_layer": path.split("/")[0],
            "named": path.split("/")[1],
            None: "all",
        }[groups]
    count = len(set(names.values()))
    bounds = dict.fromkeys(names.values(), clip / math.sqrt(count))
    argument = clip
    if groups == "named":
        bounds = argument = {"kernel": 0.5, "bias": 0.2}
    grad_fn = clipped_grad(
        two_layers,
        argument,
        method,
        microbatch_size,
        groups=(lambda path: path.split("/")[1]) if groups == "named" else groups,
        stability_constant=stability_constant,
    )
    total, info = grad_fn(params, x)
    expected = jax.tree.map(lambda p: np.zeros(p.shape), params)
    flat = lambda tree: {  # noqa: E731
        "first/bias": tree["first"]["bias"],
        "first/kernel": tree["first"]["kernel"],
        "second/kernel": tree["second"]["kernel"],
    }
    expected, norms = flat(expected), []
    for row in x:
        grads = {
            k: np.asarray(v, np.float64) for k, v in flat(jax.grad(two_layers)(params, row)).items()
        }
        norms.append(math.sqrt(sum((g**2).sum() for g in grads.values())))
        for path, grad in grads.items():
            group = [g for p, g in grads.items() if names[p] == names[path]]
            norm = math.sqrt(sum((g**2).sum() for g in group))
            if stability_constant is None:
                factor = min(1.0, bounds[names[path]] / norm)
            else:
                factor = bounds[names[path]] / (norm + stability_constant)
            expected[path] = expected[path] + factor * grad
    for path, found in flat(total).items():
        np.testing.assert_allclose(found, expected[path], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(info.sensitive_norms, norms, rtol=1e-5)
    np.testing.assert_allclose(
        grad_fn.sensitivity(), math.sqrt(sum(b**2 for b in bounds.values())), rtol=1e-12
    )


def test_a_mechanism_clips_in_groups():
    mechanism = DPSGD(
        1.0, 0.1, 5, noise_multiplier=2.0, clip_groups="per_layer", stability_constant=0.01
    )
    grad_fn = mechanism.clipped_grad(two_layers)
    params, x = layers(np.random.default_rng(0))
    for i in range(len(x)):
        total, _ = grad_fn(params, x[i : i + 1])
        for layer in total.values():
            norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in layer.values()))
            assert 0.9 / math.sqrt(2) < norm < 1 / math.sqrt(2)
    assert mechanism.stddev == 2.0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: AdaptiveClipping(target_quantile=1.0), "target_quantile is 1.0"),
        (lambda: AdaptiveClipping(budget_share=0.0), "budget_share is 0.0"),
        (lambda: AdaptiveClipping(learning_rate=-1.0), "learning_rate is -1.0"),
        (lambda: mechanism_of(population=None), "population is None"),
        (lambda: mechanism_of(stability_constant=0.1), "no threshold to move"),
        (lambda: DPSGD(
            math.inf, 0.1, 5, noise_multiplier=0.0, population=9,
            adaptive_clipping=AdaptiveClipping()), "adaptive_clipping starts there"),
        (lambda: clipped_grad(linear, {"a": 1.0}), "groups is None"),
        (lambda: clipped_grad(linear, 1.0, groups="per_block"), "groups is 'per_block'"),  # pyright: ignore
        (lambda: clipped_grad(linear, 1.0, stability_constant=0.0), "stability_constant is 0.0"),
        (lambda: clipped_grad(linear, 1.0, memory_budget=-1.0), "memory_budget is -1.0"),
        (lambda: clipped_grad(two_layers, {"kernel": 1.0}, groups=lambda p: p.split("/")[1])(
            *layers(np.random.default_rng(0))), "the parameters have"),
        (lambda: clipped_grad(linear, 1.0, stability_constant=0.1)(
            jnp.zeros(2), {"x": jnp.ones((2, 2))}, None, jnp.float32(1)), "no threshold to move"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_line(make, words):
    with pytest.raises(DpjaxError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_command_line_and_the_card_know_it():
    config = TrainConfig(data="notes.jsonl", adaptive_quantile=0.4, clip_groups="per_layer")
    mechanism = make_mechanism(config, population=5000)
    assert mechanism.adaptive_clipping == AdaptiveClipping(0.4)
    assert mechanism.clip_groups == "per_layer"
    words = _kind_of_clipping(mechanism)
    gradient, count = mechanism.gradient_noise_multiplier, 10 * (mechanism.noise_multiplier or 0.0)
    assert "per_layer" in words and "0.4 quantile" in words
    assert f"{gradient:.4g}" in words and f"{count:.3g}" in words
    plain = make_mechanism(TrainConfig(data="notes.jsonl"), population=5000)
    assert _kind_of_clipping(plain) == "L2 norm of each example's whole gradient"
