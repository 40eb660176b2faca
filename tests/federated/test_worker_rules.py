"""Operations on pointers: their values, which record a row is, and the sensitivity of sums."""

import math
import random
import secrets

import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.federated import worker_policy, worker_rules
from dpjax.federated.worker import Worker
from dpjax.federated.worker_policy import Policy, Total, noisy_answer, plan_release

ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
LAPLACE = Policy.dp(0, 1, noise_multiplier=10.0)  # epsilon 0.1 an answer


@pytest.fixture
def coins(monkeypatch):
    """Noise from a fixed seed, by the same exact algorithms."""
    monkeypatch.setattr(secrets, "randbelow", random.Random(0).randrange)


def refused(match):
    return pytest.raises(DpjaxError, match=match)


# What pointers compute.


@pytest.fixture(scope="module")
def public():
    alice = Worker("alice", Policy.allow())
    yield alice
    alice.close()


W = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
EXPRESSIONS = [
    lambda x, a: x + 2,
    lambda x, a: 2 - x * x / 3,
    lambda x, a: x @ W + 1,
    lambda x, a: W @ x.T,
    lambda x, a: (x**2 % 0.5) // 0.2,
    lambda x, a: -abs(x) + W[0],
    lambda x, a: W[0] + x,
    lambda x, a: ((x > 0) & ~(x >= 1)) | (x == 2) ^ (x != x),
    lambda x, a: (x < 0) | (x <= -1),
    lambda x, a: x.sum(),
    lambda x, a: x.mean(axis=0),
    lambda x, a: x.max(axis=1, keepdims=True) - x.min(axis=(0, 1)),
    lambda x, a: x[1:, ::2][..., None] * x[0, 0],
    lambda x, a: x.reshape(2, 6).T,
    lambda x, a: x.clip(-0.5, 0.5),
    lambda x, a: a("where", x > 0, a("tanh", x), 0.0),
    lambda x, a: a("sqrt", abs(x)),
]


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)))
def test_pointers_compute_as_numpy(public, number):
    expression = EXPRESSIONS[number]
    found = expression(public.put(ROWS), public.apply).get()
    right = expression(ROWS.astype(np.float64), lambda name, *x: getattr(np, name)(*x))
    assert found.shape == right.shape
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-6)


def test_two_pointers_of_one_worker_and_of_two(public):
    x, z = public.put(ROWS), public.put(2 * ROWS)
    np.testing.assert_allclose((x + z).get(), 3 * ROWS, rtol=1e-6)
    with Worker("carol") as carol:
        far = carol.put(ROWS)
        with refused("one pointer is on alice, the other on carol.*put"):
            x + far
    with refused("add does not fit its operands"):
        x + np.ones(5)
    with refused("not among the worker's functions"):
        public.apply("linalg", x)
    with refused("takes 2"):
        public.apply("add", x)
    with refused("axis is a; it must be"):
        x.sum(axis="a")
    with refused("must have at most 8 axes and"):
        public.put(np.ones((2**15, 1), np.float32)) + np.ones(2**15, np.float32)


def test_functions_are_those_of_jax():
    assert all(hasattr(jnp, name) for name in worker_rules.FUNCTIONS if name != "getitem")


# Which record a row belongs to.

CHAINS = {
    "shift": lambda x: x + 2,
    "square": lambda x: x * x,
    "columns": lambda x: x[:, 0] - x[:, 1],
    "matrix": lambda x: x @ W,
    "outer": lambda x: x[:, :, None] * x[:, None, :],
    "reversed": lambda x: x[::-1] + 1,
    "some": lambda x: x[1:3] * x[1:3],
    "rows": lambda x: x.mean(axis=1, keepdims=True) * x,
    "per row": lambda x: x + np.arange(4, dtype=np.float32)[:, None],
    "cell": lambda x: x.reshape(4, 1, 3).max(axis=2),
    "above": lambda x: (x > 0) & (x < 1),
    "last": lambda x: x[..., 1],
    "neighbours": lambda x: x[1:] + x[:-1],
    "turned": lambda x: x.T,
    "turned twice": lambda x: x.T.T,
    "square of columns": lambda x: x[:, 0] + x[:, 1:2],
    "backwards": lambda x: x[::-1] + x,
    "centred": lambda x: x - x.mean(axis=0),
    "gram": lambda x: x.T @ x,
    "similar": lambda x: x @ x.T,
    "first": lambda x: x[0],
    "flat": lambda x: x.reshape(12),
    "regrouped": lambda x: x.reshape(2, 2, 3)[1],
    "new axis": lambda x: x[None],
    "weighted": lambda x: np.ones((2, 4), np.float32) @ x,
    "best": lambda x: x.max(axis=0),
}
KEPT = list(CHAINS)[: list(CHAINS).index("neighbours")]


@pytest.fixture(scope="module")
def chains():
    """The node of every chain, for the data and for data with record 2 replaced."""
    other = ROWS.copy()
    other[2] = [5, -7, 40]
    found = {}
    with Worker("alice") as alice:
        pointers = [alice.put(ROWS), alice.put(other)]
        for name, chain in CHAINS.items():
            ends = [chain(x) for x in pointers]
            nodes = [alice._sessions[alice._local_id].nodes[end._id] for end in ends]
            found[name] = nodes
    return found


@pytest.mark.parametrize("name", CHAINS)
def test_rows_are_their_records_alone(chains, name):
    one, other = chains[name]
    assert (one.records is not None) == (name in KEPT), name
    changed = np.asarray(one.value != other.value)
    assert changed.any() == (name != "first")  # the test could fail
    if one.records is None:
        assert one.why
        return
    assert one.records == other.records and one.value.shape[0] == len(one.records)
    changed = changed.reshape(changed.shape[0], -1).any(axis=1)
    assert [one.records[i] for i in np.flatnonzero(changed)] == [2]


def test_one_record_is_not_spread_over_rows():
    """With one record, broadcasting could make many rows of it."""
    with Worker("alice", LAPLACE, target_epsilon=1.0) as alice:
        x = alice.put(np.float32([[0.2, 0.5]]))
        with refused("no sensitivity is known: add moved the records' axis"):
            (x + np.zeros((5, 2), np.float32)).sum().get()


# Noise and sensitivity.

QUERIES = {
    "sum": lambda x: x.sum(),
    "columns": lambda x: x.sum(axis=0),
    "mean": lambda x: x.mean(axis=(0, 1)),
    "shifted": lambda x: (-x * 3 + 2).sum(axis=0),
    "count": lambda x: (x > 0.5).sum(axis=0),
    "log": lambda x: x._session.apply("log", x - 0.5).clip(-2, 2).sum(),
    "inverse": lambda x: (1 / x).clip(-1, 4).mean(axis=0, keepdims=True),
    "kept": lambda x: x[1:, :2].mean(axis=0),
}


@pytest.fixture(scope="module")
def totals():
    """Sums of every query on neighbouring data; records that differ as much as they can."""
    records = [[0.0] * 3, [1.0] * 3, [1e9] * 3, [-1e-3] * 3, [-1e30, 1e30, 0.5]]
    found = {}
    with Worker("alice", Policy.dp(0, 1, noise_multiplier=1), target_epsilon=1) as alice:
        for name, query in QUERIES.items():
            found[name] = []
            for record in records:
                data = ROWS.copy()
                data[2] = record
                end = query(alice.put(data))
                node = alice._sessions[alice._local_id].nodes[end._id]
                found[name].append(node.total)
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_sensitivity_covers_every_neighbour(monkeypatch, totals, name):
    monkeypatch.setattr(
        worker_policy, "exact_discrete_laplace", lambda scale, size: np.zeros(size, np.int64)
    )
    release = plan_release(totals[name][0], "laplace", 1.0)
    answers = [noisy_answer(total, release) for total in totals[name]]
    total = totals[name][0]
    unit = (total.bounds[1] - total.bounds[0]) / worker_policy.GRID
    unit /= total.summed if total.is_mean else 1
    distances = [np.abs(a - b).sum() / unit for a in answers for b in answers]
    assert all(np.isfinite(distances))
    assert max(distances) <= release.scale * (1 + 1e-6)  # the noise multiplier is 1
    assert max(distances) >= 0.99 * release.scale  # it is reached: less noise would be too little


def test_the_answer_without_noise_is_the_clipped_sum(monkeypatch):
    monkeypatch.setattr(
        worker_policy, "exact_discrete_gaussian", lambda variance, size: np.zeros(size, np.int64)
    )
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(50, 4, 2)) * 3
    rows[0, 0, 0], rows[1, 0, 0], rows[2, 0, 0] = np.nan, np.inf, -np.inf
    right = np.clip(np.where(np.isnan(rows), -1, rows), -1, 2.5)
    for axes in ((0,), (0, 2), (0, 1, 2)):
        for is_mean in (False, True):
            shape = np.sum(rows, axis=axes).shape
            total = Total(rows, axes, (-1.0, 2.5), is_mean, shape)
            found = noisy_answer(total, plan_release(total, "gaussian", 1.0))
            wanted = (np.mean if is_mean else np.sum)(right, axis=axes)
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_noise_has_its_size(coins, mechanism):
    """Against the mechanism's definition: scale or stddev = multiplier * sensitivity."""
    outputs, per_record, width, multiplier = 1500, 2, 3.0, 0.7
    rows = np.zeros((1, outputs, per_record))
    total = Total(rows, (0, 2), (-1.0, 2.0), False, (outputs,))
    noise = noisy_answer(total, plan_release(total, mechanism, multiplier))
    if mechanism == "laplace":
        found, right = np.mean(np.abs(noise)), multiplier * outputs * per_record * width
    else:
        right = multiplier * math.sqrt(outputs) * per_record * width
        found = np.std(noise)
    assert 0.9 < found / right < 1.1  # 4 standard errors of the first; 2/3 and 3/2 are far off
