"""Sums, combinations, shapes and memory of a round, with clients that only say what they hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax.federated.round as rounds
from dpjax.errors import DpjaxError
from dpjax.federated import (
    Algorithm,
    Clients,
    LocalResult,
    client_mesh,
    fed_avg,
    init_federated,
    run_round,
    tune_clients_per_step,
)

SIZES = (4, 1, 0, 6, 3, 5)
BIG = 0xC0000001


@pytest.fixture(scope="module")
def people():
    """The first client's numbers are not finite."""
    x = np.random.default_rng(0).normal(size=(sum(SIZES), 3)).astype(np.float32)
    rows = np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1])
    x[rows[0]] = np.nan
    return Clients({"x": x}, tuple(rows), tuple("abcdef"))


def sums_of(people, ids):
    return np.stack([people.examples["x"][people.rows[k]].astype(np.float64).sum(0) for k in ids])


def sending(normalize_by=None, combine=None, weight_of=lambda n: n):
    """Each client sends the sum of its examples, and a large number modulo 2^32."""

    def local_update(server, client, data, key):
        examples, is_real = data.batch(jnp.int32(0))
        total = jnp.sum(jnp.where(is_real[:, None], examples["x"], 0.0), axis=0)
        code = jnp.uint32(BIG) * data.num_examples.astype(jnp.uint32) + jnp.uint32(7)
        weight = weight_of(data.num_examples.astype(jnp.float32))
        return LocalResult({"x": total, "code": code}, weight, client + 1, {})

    def init(params):
        server = {
            "params": params,
            "got": {"x": jnp.zeros(3), "code": jnp.uint32(0)},
            "weight": jnp.float32(0),
            "rounds": jnp.int32(0),
        }
        return server, jnp.int32(0)

    def server_update(server, aggregate):
        return server | {
            "got": aggregate.update,
            "weight": aggregate.weight,
            "rounds": server["rounds"] + 1,
        }

    return Algorithm("sending", init, local_update, server_update, normalize_by, combine)


def weighted_mean(updates, weights):
    total = jnp.sum(weights)
    mean = jnp.sum(updates["x"] * weights[:, None], axis=0) / jnp.where(total > 0, total, 1.0)
    return {"x": mean, "code": jnp.sum(updates["code"], dtype=jnp.uint32)}


def median(updates, weights):
    there = jnp.where(weights[:, None] > 0, updates["x"], jnp.nan)
    return {"x": jnp.nanmedian(there, axis=0), "code": jnp.uint32(0)}


# Not made anew for each call: they are what compiled rounds are known by.
PLAIN = sending()
MEAN = sending(combine=weighted_mean)
MEDIAN = sending(combine=median)
PUBLIC = sending(normalize_by=8.0)
REFUSING = sending(normalize_by=8.0, weight_of=lambda n: jnp.where(n == 6, jnp.nan, n))


def after(algorithm, people, ids, shards=3, at_once=2):
    state = init_federated(algorithm, jnp.zeros(3), len(people))
    cohort = people.cohort(
        ids, jax.random.key(0), batch_size=None, num_shards=shards, cohort_size=len(people)
    )
    return run_round(
        algorithm, state, cohort, jax.random.key(1), engine="jit", clients_per_step=at_once
    )


@pytest.mark.parametrize("ids", [[5, 3, 0, 1, 2], [4], []])
def test_a_combination_sees_the_clients_that_count(people, ids):
    """A weighted mean as a combination is the mean; a median is NumPy's of those who came."""
    plain, info = after(PLAIN, people, ids)
    mean, _ = after(MEAN, people, ids)
    middle, same = after(MEDIAN, people, ids)
    np.testing.assert_allclose(mean.server["got"]["x"], plain.server["got"]["x"], atol=1e-6)
    assert int(mean.server["got"]["code"]) == int(plain.server["got"]["code"])
    # The first is not finite, and the third has no examples, hence no weight.
    counted = [k for k in ids if k not in (0, 2)]
    for found in (info, same):
        assert int(found.sensitive_num_clients) == len(ids)
        assert int(found.sensitive_num_rejected) == (0 in ids)
    np.testing.assert_array_equal(plain.clients, [int(k in ids and k != 0) for k in range(6)])
    np.testing.assert_array_equal(middle.clients, plain.clients)
    if counted:
        sums, weights = sums_of(people, counted), np.array([SIZES[k] for k in counted])
        np.testing.assert_allclose(
            plain.server["got"]["x"], weights @ sums / weights.sum(), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            middle.server["got"]["x"], np.median(sums, axis=0), rtol=1e-5, atol=1e-6
        )
    else:
        assert int(plain.server["rounds"]) == int(middle.server["rounds"]) == 0


@pytest.mark.parametrize("at_once", [1, 4])
def test_codes_are_summed_modulo_two_to_the_32(people, at_once):
    ids = [5, 3, 0, 1, 2]
    # Neither times the weight, nor divided; an update refused for its other leaf adds nothing.
    expected = sum(BIG * SIZES[k] + 7 for k in ids if k != 0) % 2**32
    for algorithm in (PLAIN, PUBLIC):
        state, _ = after(algorithm, people, ids, at_once=at_once)
        assert int(state.server["got"]["code"]) == expected
        assert state.server["got"]["code"].dtype == jnp.uint32
    # Refused for its weight, as codes cannot say that they are not numbers.
    state, info = after(REFUSING, people, ids, at_once=at_once)
    expected = sum(BIG * SIZES[k] + 7 for k in ids if k not in (0, 3)) % 2**32
    assert int(state.server["got"]["code"]) == expected
    assert int(info.sensitive_num_rejected) == 2


def test_a_public_divisor_divides_whoever_came(people):
    ids = [3, 4, 5, 0]
    state, _ = after(PUBLIC, people, ids)
    weights = np.array([SIZES[k] for k in ids[:3]])
    np.testing.assert_allclose(
        state.server["got"]["x"], weights @ sums_of(people, ids[:3]) / 8.0, rtol=1e-5
    )
    # Who is not finite is as good as absent.
    without, _ = after(PUBLIC, people, ids[:3])
    jax.tree.map(np.testing.assert_array_equal, state.server, without.server)
    # The server adds its noise to an empty round too.
    empty, _ = after(PUBLIC, people, [])
    assert int(empty.server["rounds"]) == 1 and not np.any(empty.server["got"]["x"])
    nobody, _ = after(PLAIN, people, [])
    assert int(nobody.server["rounds"]) == 0 and int(nobody.round) == 1


def squared(params, example):
    return jnp.mean(jnp.square(jnp.dot(example["x"], params["w"])))


LINEAR = fed_avg(squared, optax.sgd(0.1))


class Compilations:
    """Counts what XLA compiles, and only what a round does."""

    def __init__(self):
        self.names = []
        self.listening = False
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event, duration, **what):
        if self.listening and event == "/jax/core/compile/backend_compile_duration":
            self.names.append(what)


@pytest.mark.parametrize("engine", ["shard_map", "jit"])
def test_any_stream_of_cohorts_compiles_four_times(engine):
    rng = np.random.default_rng(1)
    sizes = np.round(rng.lognormal(1.0, 1.2, 300)).astype(int)
    x = rng.normal(size=(sizes.sum(), 3)).astype(np.float32)
    rows = np.split(np.arange(len(x)), np.cumsum(sizes)[:-1])
    many = Clients({"x": x}, tuple(rows), tuple(str(n) for n in range(300)))
    state = init_federated(LINEAR, {"w": jnp.ones(3)}, len(many))
    counter, shapes = Compilations(), set()
    key = jax.random.key(0)
    for number in range(40):
        # From nobody to everybody.
        chosen = rng.permutation(300)[: int(300 * rng.random() ** 4) if number else 300]
        cohort = many.cohort(chosen, jax.random.key(number), batch_size=4, epochs=2)
        shapes.add(cohort.batches.shape)
        counter.listening = True
        state, _ = jax.block_until_ready(run_round(LINEAR, state, cohort, key, engine=engine))
        counter.listening = False
    assert len(shapes) == 4
    # The least of what this counts is one for each shape: a listener that heard nothing fails.
    assert len(counter.names) == 4, counter.names
    counter.listening = True
    again = many.cohort([1], jax.random.key(0), batch_size=5)
    run_round(LINEAR, state, again, key, engine=engine)
    counter.listening = False
    assert len(counter.names) > 4
    unregister = getattr(jax.monitoring, "unregister_event_duration_listener", None)
    if unregister:
        unregister(counter)


def temporary_bytes(algorithm, clients, at_once):
    """Of the compiled round of so many clients with one example and 40,000 parameters each."""
    width = 40_000
    data = Clients(
        {"x": np.zeros((clients, 2), np.float32)},
        tuple(np.array([n]) for n in range(clients)),
        tuple(str(n) for n in range(clients)),
    )
    state = init_federated(algorithm, {"w": jnp.zeros((2, width))}, clients)
    cohort = data.cohort(range(clients), jax.random.key(0), batch_size=1)
    compiled = rounds._compiled(algorithm, "jit", None, at_once, None)
    analysis = compiled.lower(state, cohort, jax.random.key(0)).compile().memory_analysis()
    return analysis.temp_size_in_bytes, 2 * width * 4


def test_memory_is_of_a_chunk_not_of_a_cohort():
    few, model = temporary_bytes(LINEAR, 8, 2)
    many, _ = temporary_bytes(LINEAR, 256, 2)
    assert many - few < model / 2
    # Side by side costs memory, and so does a combination, which needs every update.
    assert temporary_bytes(LINEAR, 8, 8)[0] > few + 4 * model
    collecting = LINEAR._replace(
        combine=lambda updates, weights: jax.tree.map(lambda x: jnp.max(x, axis=0), updates)
    )
    assert temporary_bytes(collecting, 256, 2)[0] > few + 200 * model


def test_the_number_side_by_side_is_tuned_or_fixed_by_platform(people):
    assert rounds._at_once("auto", 64, "cpu") == 1
    assert rounds._at_once("auto", 64, "gpu") == 16
    assert rounds._at_once("auto", 3, "gpu") == 3
    state = init_federated(PLAIN, jnp.zeros(3), len(people))
    cohort = people.cohort([1, 3, 4], jax.random.key(0), batch_size=None, cohort_size=3)
    tune = functools.partial(tune_clients_per_step, PLAIN, state, cohort, jax.random.key(0))
    assert tune(candidates=(1, 64)) in (1, 3)
    assert tune(candidates=(2,), repeats=1) == 2


def test_refusals(people):
    state = init_federated(PLAIN, jnp.zeros(3), len(people))
    cohort = people.cohort([1], jax.random.key(0), batch_size=1, num_shards=2)
    key = jax.random.key(0)
    for options, message in (
        ({"engine": "xmap"}, "engine is 'xmap'"),
        ({}, "shards"),
        ({"mesh": client_mesh(1)}, "2 shards and the mesh"),
        ({"engine": "jit", "clients_per_step": 0}, "clients_per_step is 0"),
        ({"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))}, "named 'clients'"),
    ):
        with pytest.raises(DpjaxError, match=message):
            run_round(PLAIN, state, cohort, key, **options)
    with pytest.raises(DpjaxError, match="both combine and normalize_by"):
        run_round(MEAN._replace(normalize_by=2.0), state, cohort, key)
    with pytest.raises(DpjaxError, match="model_devices is 2"):
        client_mesh(1, model_devices=2)
