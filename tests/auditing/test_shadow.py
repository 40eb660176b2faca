"""Shadow models: those trained at once are those trained one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.auditing.shadow import balanced_inclusion, score_shadow_models, train_shadow_models
from dpjax.data import ArrayDataset
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.training import fit, init_state

N, FEATURES = 24, 3


def data(changes=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, FEATURES)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5], np.float32) + 0.1).astype(np.float32)
    for row in changes:
        x[row], y[row] = 1e3, -1e3
    return ArrayDataset({"x": x, "y": y})


def loss_fn(params, example):
    return (jnp.tanh(example["x"] @ params["w"]) + params["b"] - example["y"]) ** 2


def init_params(key):
    return {"w": 0.1 * jax.random.normal(key, (FEATURES,)), "b": jnp.zeros(())}


OPTIMIZER = optax.sgd(0.1)
PLAIN = DPSGD(
    float("inf"), 0.25, 12, noise_multiplier=0.0, sampling="shuffled", population=N // 2,
    normalize_by=3.0,
)  # fmt: skip
PRIVATE = DPSGD(1.0, 0.25, 12, noise_multiplier=0.8, normalize_by=3.0, microbatch_size=2)


def trained(mechanism=PLAIN, dataset=None, **options):
    options = {"num_models": 4, "key": jax.random.key(0)} | options
    return train_shadow_models(
        mechanism,
        init_params,
        loss_fn,
        OPTIMIZER,
        data() if dataset is None else dataset,
        **options,
    )


def model(shadow, k):
    return jax.tree.map(lambda x: np.asarray(x[k]), shadow.params)


@pytest.mark.parametrize("mechanism", [PLAIN, PRIVATE], ids=["plain", "private"])
def test_each_model_is_what_fit_makes_of_its_half(mechanism):
    shadow, examples = trained(mechanism), data().take(np.arange(N))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 4)
    for k in range(4):
        params_key, training_key = jax.random.split(keys[k])
        own = ArrayDataset({name: x[shadow.included[k]] for name, x in examples.items()})
        state = init_state(mechanism, init_params(params_key), OPTIMIZER, training_key)
        for state, _ in fit(state, mechanism, loss_fn, OPTIMIZER, own):
            pass
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
            model(shadow, k),
            jax.tree.map(np.asarray, state.params),
        )
    # Different halves and noise, so different models.
    assert len({tuple(model(shadow, k)["w"].tolist()) for k in range(4)}) == 4


def test_a_model_is_blind_to_examples_that_it_excludes():
    before, after = trained(), trained(dataset=data(changes=[5]))
    for k in range(4):
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(model(before, k)), jax.tree.leaves(model(after, k)), strict=True
            )
        )
        assert same == (not before.included[k, 5])
    assert before.included[:, 5].sum() == 2


def test_repeats_count_as_often_as_they_say():
    # Full batches and one step: the gradient is the weighted sum.
    mechanism = DPSGD(float("inf"), 1.0, 1, noise_multiplier=0.0, normalize_by=3.0)
    repeats = np.where(np.arange(N) == 3, 5, 1)
    shadow = trained(mechanism, repeats=repeats)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 4)
    examples = data().take(np.arange(N))
    for k in range(4):
        start = init_params(jax.random.split(keys[k])[0])
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(start, examples)
        weights = jnp.asarray(shadow.included[k] * repeats, jnp.float32)
        total = jax.tree.map(lambda g, w=weights: jnp.tensordot(w, g, 1) / 3, gradients)
        wanted = jax.tree.map(lambda p, g: p - 0.1 * g, start, total)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            model(shadow, k),
            wanted,
        )


@pytest.mark.parametrize("models_at_once", [1, 3, None])
def test_models_at_once_change_nothing(models_at_once):
    few, many = trained(PRIVATE, models_at_once=models_at_once), trained(PRIVATE, num_models=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), few.params, many.params
    )


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(iteration, params):
        if iteration == 8:
            raise StoppedError

    whole = trained(PRIVATE, iterations_per_chunk=4)
    with pytest.raises(StoppedError):
        trained(PRIVATE, iterations_per_chunk=4, checkpoint=tmp_path / "s", on_chunk=stop)
    seen = []
    resumed = trained(
        PRIVATE,
        iterations_per_chunk=4,
        checkpoint=tmp_path / "s",
        on_chunk=lambda iteration, _: seen.append(iteration),
    )
    assert seen == [12]  # eight of the twelve were not computed again
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    with pytest.raises(DpjaxError, match="another data"):
        trained(PRIVATE, data([1]), iterations_per_chunk=4, checkpoint=tmp_path / "s")


def test_scores_are_those_of_each_model():
    shadow = trained()
    found = score_shadow_models(loss_fn, shadow.params, data(), batch_size=7)
    examples = data().take(np.arange(N))
    for k in range(4):
        wanted = -np.asarray(jax.vmap(loss_fn, (None, 0))(model(shadow, k), examples))
        np.testing.assert_allclose(found[k], wanted, rtol=1e-5)
    assert found.dtype == np.float64


def test_halves_are_balanced_and_differ():
    included = balanced_inclusion(10, 101, jax.random.key(1))
    assert (included.sum(axis=0) == 5).all() and set(included.sum(axis=1)) == {50, 51}
    # Two models that are no pair agree on about half of the examples.
    agree = np.mean(included[::2][:, None] == included[::2][None], axis=2)[np.triu_indices(5, 1)]
    assert ((agree > 0.3) & (agree < 0.7)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_models": 3}, "num_models is 3; use an even number"),
        ({"included": np.zeros((4, 5), bool)}, r"included has shape \(4, 5\)"),
        ({"included": np.zeros((4, N), bool)}, "model 0 includes no example"),
        ({"repeats": np.zeros(N, int)}, "least value 0"),
        ({"iterations_per_chunk": 5}, "does not divide the 12 iterations"),
        ({"dataset": ArrayDataset({"x": np.zeros((0, 3))})}, "data set is empty"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(DpjaxError, match=message):
        trained(**changes)


def test_a_population_that_was_not_accounted_for_is_refused():
    mechanism = DPSGD(
        1.0, 0.25, 12, noise_multiplier=0.8, normalize_by=3.0, sampling="fixed_size", population=12
    )
    trained(mechanism)
    with pytest.raises(DpjaxError, match="accounted for population 12"):
        trained(mechanism, repeats=np.full(N, 2))
