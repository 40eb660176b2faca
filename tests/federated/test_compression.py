"""Compressed updates: unbiased, or with nothing lost over rounds, and as small as they say."""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import DPSGD
from dpjax.errors import DpjaxError
from dpjax.federated import (
    Algorithm,
    Clients,
    LocalResult,
    fed_avg,
    fixed_point,
    init_federated,
    private,
    quantised,
    quantised_bytes,
    run_round,
    scaffold,
    top_k,
    top_k_bytes,
    with_aggregator,
)
from dpjax.federated.compression import (
    dequantise,
    kept_coordinates,
    largest_only,
    pack_quantised,
    quantise,
    unpack_quantised,
)

PARAMS = {"a": jnp.zeros((2, 3), jnp.float32), "b": jnp.zeros(4, jnp.float32)}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantising_is_unbiased_and_within_a_step(bits):
    """20,000 roundings of each value: the mean is within 4.5 standard errors."""
    x = np.float32([1.7, -0.9, 0.3, 0.0, -1.7, 0.011])
    step = 2 * 1.7 / (2**bits - 2)
    draws = 20_000
    many = jnp.broadcast_to(jnp.asarray(x), (draws, 6))
    level, largest = quantise(many, bits, jax.random.key(bits))
    read = np.asarray(dequantise(level, largest, bits), np.float64)
    assert np.abs(read - x).max() < step * (1 + 1e-5)
    assert set(np.unique(level)) <= set(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))
    part = np.mod(x.astype(np.float64) / step, 1)
    error = np.sqrt(np.maximum(part * (1 - part), 1e-8) / draws) * step
    assert (np.abs(read.mean(axis=0) - x) < 4.5 * error + 1e-6).all()
    # With power: rounding to the nearest level is far outside.
    nearest = np.round(x / step) * step
    assert (np.abs(nearest - x) > 10 * error)[[1, 2, 5]].any()


def test_quantised_codes_come_back_and_are_as_long_as_stated():
    rng = np.random.default_rng(0)
    for bits in (2, 3, 5, 8, 16):
        tree = {"a": rng.normal(size=(7, 3)).astype(np.float32), "b": np.float32(rng.normal())}
        total = 0
        for x in jax.tree.leaves(tree):
            level, largest = quantise(jnp.asarray(x), bits, jax.random.key(0))
            data = pack_quantised(level, float(largest), bits)
            total += len(data)
            levels, value = unpack_quantised(data, np.shape(x), bits)
            np.testing.assert_array_equal(levels, level)
            assert value == float(largest)
            with pytest.raises(DpjaxError, match="are not"):
                unpack_quantised(data + b"\0", np.shape(x), bits)
        assert total == quantised_bytes(tree, bits) == 8 + -(-21 * bits // 8) + -(-bits // 8)
    assert top_k_bytes(tree, 0.5) == 11 * len(struct.pack("<If", 1, 1.0))


def test_the_largest_coordinates_over_all_leaves_are_kept():
    rng = np.random.default_rng(1)
    for share, k in ((0.1, 1), (0.3, 3), (0.31, 4), (1.0, 10), (1e-9, 1)):
        tree = {"a": rng.normal(size=(2, 3)).astype(np.float32),
                "b": 3 * rng.normal(size=4).astype(np.float32)}  # fmt: skip
        flat = np.concatenate([tree["a"].ravel(), tree["b"]])
        at = np.argsort(-np.abs(flat))[:k]
        expected = np.zeros(10, np.float32)
        expected[at] = flat[at]
        assert kept_coordinates(tree, share) == k
        found = largest_only(jax.tree.map(jnp.asarray, tree), share)
        np.testing.assert_array_equal(np.append(found["a"].ravel(), found["b"]), expected)
    for size in (30, 70, 1000):  # 0.1 * 30 and 0.7 * 10 are not whole in binary
        assert kept_coordinates(np.zeros(size), 0.1) == size // 10


class Server(NamedTuple):
    params: Any


def sends():
    """Each client sends its own row times the number of rounds it took part in, plus one."""

    def local_update(server, client, data, key):
        examples, _ = data.batch(jnp.zeros((), jnp.int32))
        size = data.num_examples.astype(jnp.float32)
        row = jnp.where(size > 0, examples["x"][0] * (client + 1.0), 0.0)
        update = {"a": row[:6].reshape(2, 3), "b": row[6:]}
        return LocalResult(update, size, client + 1.0, {"examples": size})

    def server_update(server, aggregate):
        return Server(jax.tree.map(jnp.add, server.params, aggregate.update))

    return Algorithm(
        "sends", lambda params: (Server(params), jnp.float32(0)), local_update, server_update
    )


def test_what_was_sent_and_what_is_kept_add_up_to_all_updates():
    """Error feedback over six rounds of one client at a time; whole numbers, so exactly."""
    rng = np.random.default_rng(2)
    rows = rng.integers(-40, 41, size=(2, 10)).astype(np.float32)
    people = Clients({"x": np.concatenate([rows, rows[1:]])}, ([0], [1, 2], []), tuple("abc"))
    algorithm = top_k(sends(), 0.2)
    state = init_federated(algorithm, PARAMS, 3)
    sent, updates, times = np.zeros((3, 10)), np.zeros((3, 10)), [0, 0, 0]
    for who in (0, 1, 0, 2, 1, 0):
        before = np.append(state.params["a"].ravel(), state.params["b"])
        cohort = people.cohort([who], jax.random.key(0), batch_size=None)
        state, _ = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
        moved = np.append(state.params["a"].ravel(), state.params["b"]) - before
        assert np.count_nonzero(moved) <= 2
        sent[who] += moved
        times[who] += 1
        updates[who] += 0 if who == 2 else rows[who] * times[who]
        kept = state.clients.residual
        kept = np.concatenate([np.asarray(kept["a"]).reshape(3, 6), np.asarray(kept["b"])], axis=1)
        np.testing.assert_array_equal(sent + kept, updates)
    # Without feedback the same two coordinates would be sent in every round.
    for _ in range(12):
        cohort = people.cohort([0], jax.random.key(0), batch_size=None)
        before = state.params
        state, _ = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
        moved = jax.tree.map(jnp.subtract, state.params, before)
        sent[0] += np.append(moved["a"].ravel(), moved["b"])
    assert np.count_nonzero(sent[0]) > 6
    assert state.clients.inner.tolist() == [15.0, 2.0, 1.0]


def test_a_client_of_no_weight_keeps_what_it_held_back():
    rows = np.arange(10, dtype=np.float32)[None]
    algorithm = top_k(sends(), 0.2)
    people = Clients({"x": rows}, ([0], []), ("a", "b"))
    state = init_federated(algorithm, PARAMS, 2)
    held = jax.tree.map(lambda x: x + 7.0, state.clients.residual)
    state = state._replace(clients=state.clients._replace(residual=held))
    cohort = people.cohort([1], jax.random.key(0), batch_size=None)
    after, _ = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
    jax.tree.map(np.testing.assert_array_equal, after.clients.residual, held)
    jax.tree.map(np.testing.assert_array_equal, after.params, PARAMS)


def test_an_update_that_is_not_finite_is_still_found_and_rejected():
    rows = np.ones((2, 10), np.float32)
    for bad in (np.nan, np.inf):
        rows[1, 3] = bad
        people = Clients({"x": rows}, ([0], [1]), ("a", "b"))
        for algorithm in (quantised(sends(), 4), top_k(sends(), 0.2)):
            state = init_federated(algorithm, PARAMS, 2)
            cohort = people.cohort([0, 1], jax.random.key(0), batch_size=None)
            after, info = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
            assert int(info.sensitive_num_rejected) == 1
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_refusals():
    plain = fed_avg(lambda w, e: jnp.sum((w["b"] - e["x"][6:]) ** 2), optax.sgd(0.1))
    mechanism = DPSGD(1.0, 0.5, 10, noise_multiplier=1.0, population=4)
    secret = private(plain, mechanism, jax.random.key(0))
    for wrap in (lambda a: quantised(a, 4), lambda a: top_k(a, 0.1)):
        with pytest.raises(DpjaxError, match="compress first"):
            wrap(secret)
        with pytest.raises(DpjaxError, match="compress first"):
            wrap(with_aggregator(plain, fixed_point(1.0, max_clients=3), max_weight=1))
        private(wrap(plain), mechanism, jax.random.key(0))  # the right order
    for wrong in (lambda: quantised(plain, 1), lambda: quantised(plain, 17),
                  lambda: top_k(plain, 0.0), lambda: top_k(plain, 1.5)):  # fmt: skip
        with pytest.raises(DpjaxError):
            wrong()
    both = top_k(scaffold(lambda w, e: jnp.sum(w["b"]) * e["x"][0], 0.1, 2), 0.5)
    people = Clients({"x": np.ones((2, 10), np.float32)}, ([0], [1]), ("a", "b"))
    cohort = people.cohort([0], jax.random.key(0), batch_size=None)
    with pytest.raises(DpjaxError, match="more than a change"):
        run_round(both, init_federated(both, PARAMS, 2), cohort, jax.random.key(0), engine="jit")
