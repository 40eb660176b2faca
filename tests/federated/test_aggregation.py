"""Encodings whose sum is the plain sum: exactly, or within the tolerance that they state."""

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
    coordinate_median,
    fed_avg,
    fixed_point,
    init_federated,
    plain,
    private,
    robust,
    run_round,
    with_aggregator,
)

SIZES = (3, 1, 0, 5, 2)
KEY = jax.random.key(3)


def sends(scale=1.0, weights="examples"):
    """Each client sends ``scale`` times its first example's row, with its size as weight."""

    def local_update(server, client, data, key):
        examples, _ = data.batch(jnp.zeros((), jnp.int32))
        size = data.num_examples.astype(jnp.float32)
        row = examples["x"][0] * jnp.float32(scale)
        update = {"a": jnp.where(size > 0, row[:2], 0.0), "b": jnp.where(size > 0, row[2], 0.0)}
        weight = size if weights == "examples" else jnp.ones((), jnp.float32)
        return LocalResult(update, weight, client + 1, {"examples": size})

    def server_update(server, aggregate):
        return {"params": aggregate.update, "weight": aggregate.weight}

    def init(params):
        return {"params": params, "weight": jnp.zeros((), jnp.float32)}, jnp.zeros((), jnp.int32)

    return Algorithm("sends", init, local_update, server_update)


def start_of(algorithm, people):
    start = {"a": jnp.float32([9.0, 9.0]), "b": jnp.float32(9.0)}
    return init_federated(algorithm, start, len(people))


def clients(x):
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return Clients({"x": np.asarray(x, np.float32)}, tuple(rows), tuple("abcde"))


def one_round(algorithm, people, chosen, shards=1, at_once=1):
    # One batch of all a client has: its first example is its first row.
    cohort = people.cohort(chosen, KEY, batch_size=None, num_shards=shards)
    state = start_of(algorithm, people)
    rows = {}
    for s in range(shards):
        for c in range(cohort.client.shape[1]):
            if cohort.is_client[s, c] and cohort.num_steps[s, c]:
                first = cohort.batches[s, cohort.first_step[s, c], 0]
                rows[int(cohort.client[s, c])] = cohort.examples["x"][s, first]
    state, info = run_round(algorithm, state, cohort, KEY, engine="jit", clients_per_step=at_once)
    return state, info, rows


@pytest.fixture(scope="module")
def whole():
    return clients(np.random.default_rng(0).integers(-50, 51, (sum(SIZES), 3)))


@pytest.fixture(scope="module")
def real():
    return clients(np.random.default_rng(1).normal(size=(sum(SIZES), 3)))


@pytest.mark.parametrize("shards", [1, 3])
def test_whole_numbers_are_summed_exactly(whole, shards):
    """Whole updates with whole weights: the weighted sum has no error, however it is ordered."""
    code = fixed_point(64.0, max_clients=5)
    algorithm = with_aggregator(sends(), code, max_weight=7)
    state, info, rows = one_round(algorithm, whole, range(5), shards, at_once=2)
    total = sum(SIZES[k] * np.asarray(row, np.int64) for k, row in rows.items())
    expected = (total / np.float64(11)).astype(np.float32)
    # 8 * (sum / 8) / 11: one division, by the reciprocal, is all that is not exact.
    np.testing.assert_allclose(np.asarray(state.server["params"]["a"]), expected[:2], rtol=3e-7)
    np.testing.assert_allclose(float(state.server["params"]["b"]), expected[2], rtol=3e-7)
    assert float(state.server["weight"]) == 11.0 and int(info.sensitive_num_clients) == 5
    assert float(info.sensitive_metrics["clipped"]) == 0.0
    assert state.clients.tolist() == [1] * 5


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_real_numbers_are_summed_within_the_stated_tolerance(real, rounding):
    code = fixed_point(8.0, max_clients=6, bits=12, rounding=rounding)
    algorithm = with_aggregator(sends(), code, max_weight=8)
    state, _, rows = one_round(algorithm, real, range(5))
    total = sum(SIZES[k] * np.asarray(row, np.float64) for k, row in rows.items()) / 8
    found = np.append(state.server["params"]["a"], state.server["params"]["b"])
    error = np.abs(found * 11 / 8 - total)
    # Nobody is promised the last bit of float32; the tolerance is for 6 clients and 4 sent more
    # than zeros, so one that is 3 times too small would show.
    assert error.max() <= code.tolerance + 1e-6
    assert error.max() > code.tolerance / 50
    if rounding == "nearest":
        assert code.tolerance == 6 * 0.5 / 32  # (2^11 - 1) // 6 / 8 is 42.6: scale 32
        assert error.max() <= 4 * 0.5 / 32 + 1e-6


def test_plain_is_the_weighted_mean_itself(real):
    """The same numbers as the algorithm without an aggregator, whatever the weights."""
    ours, _, _ = one_round(with_aggregator(sends(), plain()), real, range(5))
    theirs, _, _ = one_round(sends(), real, range(5))
    for a, b in zip(jax.tree.leaves(ours.server), jax.tree.leaves(theirs.server), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_nobody_and_nobody_with_examples_move_nothing(whole):
    algorithm = with_aggregator(sends(), fixed_point(64.0, max_clients=5), max_weight=8)
    for chosen in ([], [2]):
        state, info, _ = one_round(algorithm, whole, chosen)
        assert state.server["params"]["a"].tolist() == [9.0, 9.0]
        assert int(info.sensitive_num_clients) == len(chosen)


def test_weights_above_the_public_bound_count_as_the_bound(whole):
    algorithm = with_aggregator(sends(), fixed_point(64.0, max_clients=5), max_weight=2)
    state, _, rows = one_round(algorithm, whole, range(5))
    weights = {k: min(SIZES[k], 2) for k in rows}
    expected = sum(weights[k] * np.asarray(r, np.float64) for k, r in rows.items()) / 7
    np.testing.assert_allclose(state.server["params"]["a"], expected[:2], rtol=3e-7)
    assert float(state.server["weight"]) == 7.0


def test_values_outside_the_range_are_cut_and_counted(whole):
    algorithm = with_aggregator(sends(), fixed_point(4.0, max_clients=5), max_weight=1)
    state, info, rows = one_round(algorithm, whole, range(5))
    cut = [np.clip(np.asarray(r, np.float64), -4, 4) for r in rows.values()]
    np.testing.assert_allclose(state.server["params"]["a"], np.mean(cut, axis=0)[:2], rtol=3e-7)
    outside = {k: np.mean(np.abs(r) > 4) for k, r in rows.items()}
    expected = sum(SIZES[k] * x for k, x in outside.items()) / 11
    assert expected > 0.5
    np.testing.assert_allclose(info.sensitive_metrics["clipped"], expected, rtol=1e-6)


def test_a_client_that_is_not_finite_is_rejected_before_encoding(whole):
    """An integer cannot say that it was NaN: the round counts the client as rejected."""
    algorithm = with_aggregator(sends(), fixed_point(64.0, max_clients=5), max_weight=8)
    without, _, _ = one_round(algorithm, whole, [0, 4])
    for bad in (np.nan, np.inf, -np.inf):
        broken = np.array(whole.examples["x"])
        broken[whole.rows[3]] = bad
        with_it, info, _ = one_round(algorithm, clients(broken), [0, 3, 4])
        assert int(info.sensitive_num_clients) == 3 and int(info.sensitive_num_rejected) == 1
        jax.tree.map(np.testing.assert_array_equal, with_it.server, without.server)
        assert with_it.clients.tolist() == [1, 0, 0, 0, 1]


def test_more_clients_than_the_range_allows_are_loud(whole):
    algorithm = with_aggregator(sends(), fixed_point(64.0, max_clients=2), max_weight=8)
    state, _, _ = one_round(algorithm, whole, [0, 1, 3])
    assert np.isnan(state.server["params"]["a"]).all()


@pytest.mark.parametrize("bits", [2, 3, 8, 16, 31, 32])
@pytest.mark.parametrize("most", [1, 3, 20, 1000])
def test_sums_of_the_largest_values_do_not_wrap(bits, most):
    """All clients at one end, against exact integers; or the constructor says that it cannot."""
    clip = 0.7
    if (2 ** (bits - 1) - 1) // most < 1:
        with pytest.raises(DpjaxError, match="wraps"):
            fixed_point(clip, max_clients=most, bits=bits)
        return
    code = fixed_point(clip, max_clients=most, bits=bits)
    for sign in (1, -1):
        one = int(code.encode(jnp.float32(sign * 1e9), KEY))
        assert 0 <= one < 2**bits
        total = jnp.uint32(most * one % 2**32)
        found = float(code.decode(total, jnp.int32(most)))
        assert abs(found - sign * most * clip) <= code.tolerance + 1e-6 * most
        # Any multiple of 2^bits more is the same number.
        if bits < 32:
            assert float(code.decode(total + jnp.uint32(2**bits), jnp.int32(most))) == found


def test_the_largest_range_does_not_overflow_an_int32():
    for clip in (2.0**31 - 1, 2.0**31 - 129, 1.0, np.nextafter(2.0, 3.0)):
        code = fixed_point(clip, max_clients=1)
        for sign in (1, -1):
            found = float(code.decode(code.encode(jnp.float32(sign * clip), KEY), jnp.int32(1)))
            assert abs(found - sign * clip) <= code.tolerance + 1e-6 * clip


def test_stochastic_rounding_is_unbiased():
    """Mean of 20,000 roundings of 0.3 of a step: standard error 0.0032 steps."""
    code = fixed_point(1.0, max_clients=1, bits=4, rounding="stochastic")
    step = code.tolerance
    for fraction in (0.3, -0.3):
        x = jnp.full(20_000, fraction * step, jnp.float32)
        found = np.asarray(code.decode(code.encode(x, KEY), jnp.int32(1))) / step
        assert set(np.unique(found)) == ({0.0, 1.0} if fraction > 0 else {-1.0, 0.0})
        assert abs(found.mean() - fraction) < 4 * 0.0032  # rounding to nearest is off by 0.3
    again = code.encode(jnp.full(20_000, 0.3 * step, jnp.float32), jax.random.key(4))
    first = code.encode(jnp.full(20_000, 0.3 * step, jnp.float32), KEY)
    assert np.mean(np.asarray(again) != np.asarray(first)) > 0.3


def test_rounding_toward_zero_never_grows_a_norm():
    """And the others do, which is why `private` refuses them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=5000), jnp.float32)
    x = x / jnp.linalg.norm(x)
    grown = {}
    for rounding in ("nearest", "stochastic", "toward_zero"):
        code = fixed_point(1.0, max_clients=100, bits=16, rounding=rounding)
        found = np.asarray(code.decode(code.encode(x, KEY), jnp.int32(1)), np.float64)
        grown[rounding] = np.linalg.norm(found)
        if rounding == "toward_zero":
            assert (np.abs(found) <= np.abs(np.asarray(x, np.float64))).all()
    assert grown["toward_zero"] <= 1.0 < grown["stochastic"]


def test_private_sum_is_decoded_before_noise(real):
    """The private algorithm inside: the same public normaliser, the same noise."""
    mechanism = DPSGD(
        1.0, 0.5, 10, noise_multiplier=0.8, population=len(real), normalize_by=2.5
    )  # fmt: skip
    inner = private(
        fed_avg(lambda w, e: jnp.sum((w - e["x"]) ** 2), optax.sgd(0.1)), mechanism, KEY
    )
    code = fixed_point(1.0, max_clients=8, rounding="toward_zero")
    cohort = real.cohort([0, 1, 3], KEY, batch_size=None)
    found = []
    for algorithm in (inner, with_aggregator(inner, code)):
        for some in (cohort, real.cohort([], KEY, batch_size=None)):
            state = init_federated(algorithm, jnp.zeros(3), len(real))
            found.append(run_round(algorithm, state, some, KEY, engine="jit")[0].params)
    tolerance = code.tolerance / 2.5 + 1e-6
    np.testing.assert_allclose(found[0], found[2], atol=tolerance, rtol=0)
    np.testing.assert_allclose(found[1], found[3], atol=tolerance, rtol=0)
    assert np.abs(found[3]).min() > 1e-3  # a round without clients has its noise all the same


def test_refusals(whole):
    alone = sends()
    with pytest.raises(DpjaxError, match="max_weight is missing"):
        with_aggregator(alone, fixed_point(1.0, max_clients=3))
    with pytest.raises(DpjaxError, match="above 0"):
        with_aggregator(alone, plain(), max_weight=0.0)
    with pytest.raises(DpjaxError, match="combines single updates"):
        with_aggregator(robust(alone, coordinate_median()), plain())
    public = alone._replace(normalize_by=3.0)
    with pytest.raises(DpjaxError, match="toward_zero"):
        with_aggregator(public, fixed_point(1.0, max_clients=3))
    with pytest.raises(DpjaxError, match="raise sensitivity"):
        with_aggregator(public, plain(), max_weight=2.0)
    twice = with_aggregator(alone, fixed_point(1.0, max_clients=3), max_weight=2)
    twice = with_aggregator(twice, plain())
    with pytest.raises(DpjaxError, match="integers already"):
        one_round(twice, whole, [0])
    for wrong in (
        {"clip_value": 0.0, "max_clients": 1},
        {"clip_value": np.nan, "max_clients": 1},
        {"clip_value": 1.0, "max_clients": 0},
        {"clip_value": 1.0, "max_clients": 1, "bits": 33},
        {"clip_value": 1.0, "max_clients": 1, "rounding": "up"},
    ):
        with pytest.raises(DpjaxError):
            fixed_point(**wrong)
