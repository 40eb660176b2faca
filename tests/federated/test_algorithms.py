"""Every algorithm against a float64 loop, over several rounds of ragged and empty clients."""

import federated_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import DPSGD, CorrelatedNoise, DpjaxError
from dpjax.federated import (
    Clients,
    dp_ftrl,
    fed_avg,
    fed_nova,
    fed_prox,
    fixed_point,
    init_federated,
    mime_lite,
    personal_params,
    personalised,
    plain,
    private,
    quantised,
    run_round,
    scaffold,
    top_k,
    with_aggregator,
)

SIZES = (7, 1, 0, 12, 4, 5)
RATE = 0.3


def loss_fn(params, example):
    return (jnp.tanh(jnp.dot(params["a"], example["x"]) + params["b"]) - example["y"]) ** 2


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    size = sum(SIZES)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    y = np.tanh(x @ [1.0, -1.0, 0.5] + rng.normal(size=size) / 3).astype(np.float32)
    order = rng.permutation(size)
    rows = np.split(order, np.cumsum(SIZES)[:-1])
    return Clients({"x": x, "y": y}, tuple(rows), tuple(f"c{n}" for n in range(len(SIZES))))


@pytest.fixture(scope="module")
def start():
    return {"a": jnp.array([0.3, 0.1, -0.2], jnp.float32), "b": jnp.float32(0.05)}


def as_float64(tree):
    return {k: np.asarray(v, np.float64) for k, v in tree.items()}


def batches_of(cohort, people, ids):
    """What each client trains on, read from the cohort's own tables: for the reference."""
    found = {}
    for s in range(cohort.client.shape[0]):
        for c in range(cohort.client.shape[1]):
            if not cohort.is_client[s, c]:
                continue
            first, count = cohort.first_step[s, c], cohort.num_steps[s, c]
            batches = []
            for rows in cohort.batches[s, first : first + count]:
                rows = rows[rows >= 0]
                batches.append(
                    [
                        (
                            np.asarray(cohort.examples["x"][s, r], np.float64),
                            float(cohort.examples["y"][s, r]),
                        )
                        for r in rows
                    ]
                )
            found[int(cohort.client[s, c])] = (batches, int(cohort.num_examples[s, c]))
    return [found[k] for k in ids]


def rounds(people, shards=1, epochs=1):
    """Three cohorts of different clients."""
    for number, ids in enumerate(([0, 1, 2, 3, 4, 5], [3, 1], [2, 5, 0])):
        key = jax.random.key(number)
        cohort = people.cohort(
            ids, key, batch_size=3, epochs=epochs, num_shards=shards, cohort_size=6
        )
        yield ids, cohort


def close(params, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(params[name]), value, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(("at_once", "shards"), [(1, 1), (2, 3), (4, 1)])
def test_fed_avg(people, start, at_once, shards):
    algorithm = fed_avg(loss_fn, optax.sgd(RATE))
    state, expected = init_federated(algorithm, start, len(people)), as_float64(start)
    for ids, cohort in rounds(people, shards, epochs=2):
        state, info = run_round(
            algorithm, state, cohort, jax.random.key(9), engine="jit", clients_per_step=at_once
        )
        expected = reference.fed_avg(expected, batches_of(cohort, people, ids), RATE)
        close(state.params, expected)
        assert int(info.sensitive_num_clients) == len(ids) and int(info.sensitive_num_rejected) == 0
        assert float(info.sensitive_metrics["examples"]) == 2 * sum(SIZES[k] for k in ids)


def test_fed_prox(people, start):
    algorithm = fed_prox(loss_fn, optax.sgd(RATE), proximal=0.7)
    state, expected = init_federated(algorithm, start, len(people)), as_float64(start)
    for ids, cohort in rounds(people):
        state, _ = run_round(algorithm, state, cohort, jax.random.key(9), engine="jit")
        expected = reference.fed_avg(expected, batches_of(cohort, people, ids), RATE, 0.7)
        close(state.params, expected)


def test_fed_opt_is_the_servers_optimizer_on_the_mean_change(people, start):
    optimizer = optax.adam(0.1)
    algorithm = fed_avg(loss_fn, optax.sgd(RATE), optimizer)
    plain = fed_avg(loss_fn, optax.sgd(RATE))
    state = init_federated(algorithm, start, len(people))
    params, kept = start, optimizer.init(start)
    for _, cohort in rounds(people):
        state, _ = run_round(algorithm, state, cohort, jax.random.key(9), engine="jit")
        before = init_federated(plain, params, len(people))
        moved, _ = run_round(plain, before, cohort, jax.random.key(9), engine="jit")
        gradient = jax.tree.map(lambda p, m: p - m, params, moved.params)
        with jax.numpy_dtype_promotion("standard"):
            change, kept = optimizer.update(gradient, kept, params)
        params = optax.apply_updates(params, change)
        close(state.params, as_float64(params))


@pytest.mark.parametrize("at_once", [2])
def test_scaffold_keeps_a_variate_for_each_client(people, start, at_once):
    algorithm = scaffold(loss_fn, RATE, len(people))
    state, w = init_federated(algorithm, start, len(people)), as_float64(start)
    control, variates = reference.zeros(w), [reference.zeros(w) for _ in SIZES]
    for ids, cohort in rounds(people, shards=2):
        state, _ = run_round(
            algorithm, state, cohort, jax.random.key(9), engine="jit", clients_per_step=at_once
        )
        w, control, variates = reference.scaffold(
            w, control, variates, batches_of(cohort, people, ids), ids, RATE, len(people)
        )
        close(state.params, w)
        close(state.server.control, control)
        for k in range(len(people)):
            close(jax.tree.map(lambda x, k=k: x[k], state.clients), variates[k])


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fed_nova(people, start, momentum):
    algorithm = fed_nova(loss_fn, RATE, momentum=momentum)
    state, expected = init_federated(algorithm, start, len(people)), as_float64(start)
    for ids, cohort in rounds(people, epochs=2):
        state, _ = run_round(algorithm, state, cohort, jax.random.key(9), engine="jit")
        some = batches_of(cohort, people, ids)
        expected = reference.fed_nova(expected, some, RATE, momentum)
        close(state.params, expected)


def test_mime_lite(people, start):
    algorithm = mime_lite(loss_fn, optax.sgd(RATE, momentum=0.8))
    state, w = init_federated(algorithm, start, len(people)), as_float64(start)
    trace = reference.zeros(w)
    for ids, cohort in rounds(people):
        state, _ = run_round(algorithm, state, cohort, jax.random.key(9), engine="jit")
        w, trace = reference.mime_lite(w, trace, batches_of(cohort, people, ids), RATE, 0.8)
        close(state.params, w)
        close(state.server.optimizer[0].trace, trace)


def test_personal_leaves_stay_with_their_client(people, start):
    algorithm = personalised(loss_fn, optax.sgd(RATE), is_personal=lambda path: path == "b")
    state, shared = init_federated(algorithm, start, len(people)), as_float64(start)
    own = [shared["b"]] * len(people)
    for ids, cohort in rounds(people):
        state, _ = run_round(algorithm, state, cohort, jax.random.key(9), engine="jit")
        moved, weights = [], []
        for k, (batches, size) in zip(ids, batches_of(cohort, people, ids), strict=True):
            whole = reference.sgd({"a": shared["a"], "b": own[k]}, batches, RATE)
            own[k] = whole["b"]
            moved.append({"a": whole["a"] - shared["a"], "b": 0.0})
            weights.append(size)
        shared = reference.plus(shared, reference.weighted(moved, weights))
        close(state.params, shared)
        np.testing.assert_allclose(np.asarray(state.clients["b"]), own, rtol=2e-4, atol=2e-6)
    mine = personal_params(state.params, jax.tree.map(lambda x: x[3], state.clients))
    np.testing.assert_allclose(mine["b"], own[3], rtol=2e-4)
    assert float(state.params["b"]) == float(start["b"])  # the server never saw any of it


ALGORITHMS = {
    "fed_avg": lambda n: fed_avg(loss_fn, optax.sgd(RATE)),
    "fed_adam": lambda n: fed_avg(loss_fn, optax.sgd(RATE), optax.adam(0.05)),
    "fed_yogi": lambda n: fed_avg(loss_fn, optax.sgd(RATE), optax.yogi(0.05)),
    "fed_adagrad": lambda n: fed_avg(loss_fn, optax.sgd(RATE), optax.adagrad(0.05)),
    "fed_avg_m": lambda n: fed_avg(loss_fn, optax.sgd(RATE), optax.sgd(0.5, momentum=0.9)),
    "fed_prox": lambda n: fed_prox(loss_fn, optax.sgd(RATE), proximal=0.1),
    "scaffold": lambda n: scaffold(loss_fn, RATE, n),
    "fed_nova": lambda n: fed_nova(loss_fn, RATE),
    "mime_lite": lambda n: mime_lite(loss_fn, optax.sgd(RATE, momentum=0.9)),
    "personalised": lambda n: personalised(
        loss_fn, optax.sgd(RATE), is_personal=lambda path: path == "b"
    ),
    "private fed_avg": lambda n: private(
        fed_avg(loss_fn, optax.sgd(RATE)), without_noise(n), jax.random.key(0)
    ),
    "private scaffold": lambda n: private(
        scaffold(loss_fn, RATE, n), without_noise(n), jax.random.key(0)
    ),
    "dp_ftrl": lambda n: dp_ftrl(
        loss_fn, optax.sgd(RATE), without_noise(n, CorrelatedNoise("tree")), jax.random.key(0)
    ),
    "plain": lambda n: with_aggregator(fed_avg(loss_fn, optax.sgd(RATE)), plain()),
    "quantised": lambda n: quantised(fed_avg(loss_fn, optax.sgd(RATE)), bits=8),
    "top_k": lambda n: top_k(fed_avg(loss_fn, optax.sgd(RATE)), share=0.5),
    "fixed_point": lambda n: with_aggregator(
        scaffold(loss_fn, RATE, n), fixed_point(8.0, max_clients=n), max_weight=1
    ),
}


def without_noise(population, correlated_noise=None):
    return DPSGD(
        0.1, 0.5, 9, noise_multiplier=0.0, population=population, normalize_by=3.0,
        sampling="poisson" if correlated_noise is None else "cyclic",
        correlated_noise=correlated_noise,
    )  # fmt: skip


def numbers(state):
    """Keys as the numbers that they are."""
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, people):
    return ALGORITHMS[request.param](len(people))


def test_contract(algorithm, people, start):
    """One row for each algorithm above: what every one must keep."""
    state = init_federated(algorithm, start, len(people))
    cohort = people.cohort([0, 2, 3], jax.random.key(0), batch_size=4, cohort_size=6)
    key = jax.random.key(1)
    one, info = run_round(algorithm, state, cohort, key, engine="jit")
    # The state's structure and types do not change: it can be saved, and run again.
    shapes = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), (state, one))
    assert shapes[0] == shapes[1]
    # The same again gives the same bits; other shards and chunks the same numbers.
    again, _ = run_round(algorithm, state, cohort, key, engine="jit")
    one, again = numbers(one), numbers(again)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    other = people.cohort([3, 0, 2], jax.random.key(0), batch_size=4, cohort_size=6, num_shards=2)
    dealt, _ = run_round(algorithm, state, other, key, engine="jit", clients_per_step=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, numbers(dealt)
    )
    # Nobody, or only people without examples, move nothing but the round.
    for nobody in ([], [2]):
        empty = people.cohort(nobody, jax.random.key(0), batch_size=4, cohort_size=6)
        still, seen = run_round(algorithm, state, empty, key, engine="jit")
        close(still.params, as_float64(start))
        assert int(seen.sensitive_num_clients) == len(nobody) and int(still.round) == 1
    # Clients that do not take part keep what they had.
    for before, after in zip(
        jax.tree.leaves(state.clients), jax.tree.leaves(one.clients), strict=True
    ):
        np.testing.assert_array_equal(before[jnp.array([1, 4, 5])], after[jnp.array([1, 4, 5])])
    # Of integers there is no norm: nobody but the decoding server can know it.
    assert (float(info.sensitive_update_norm) > 0) != algorithm.name.endswith("fixed_point32")


def test_a_client_that_diverges_is_left_out_and_counted(algorithm, people, start):
    broken = jax.tree.map(np.array, people.examples)
    broken["x"][people.rows[3]] = np.nan
    some = Clients(broken, people.rows, people.names)
    state = init_federated(algorithm, start, len(people))
    with_it, info = run_round(
        algorithm, state, some.cohort([0, 3, 4], jax.random.key(0), batch_size=4, cohort_size=6),
        jax.random.key(1), engine="jit",
    )  # fmt: skip
    without, _ = run_round(
        algorithm, state, some.cohort([0, 4], jax.random.key(0), batch_size=4, cohort_size=6),
        jax.random.key(1), engine="jit",
    )  # fmt: skip
    assert int(info.sensitive_num_clients) == 3 and int(info.sensitive_num_rejected) == 1
    jax.tree.map(np.testing.assert_array_equal, numbers(with_it), numbers(without))


def test_refusals(start):
    with pytest.raises(DpjaxError, match="proximal is 0"):
        fed_prox(loss_fn, optax.sgd(RATE), proximal=0)
    with pytest.raises(DpjaxError, match="2 of 2 leaves are personal"):
        personalised(loss_fn, optax.sgd(RATE), is_personal=lambda path: True).init(start)
    with pytest.raises(DpjaxError, match="num_clients is 0"):
        init_federated(fed_avg(loss_fn, optax.sgd(RATE)), start, 0)
