"""Pointers compute where the data lies; what leaves is what the owner's policy lets go."""

import contextlib
import json
import math
import pathlib
import pickle
import random
import secrets
import socket
import ssl
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.federated import worker as worker_module
from dpjax.federated import worker_policy, worker_rules
from dpjax.federated.worker import LOCAL, Worker
from dpjax.federated.worker_pointer import Pointer
from dpjax.federated.worker_policy import Cost, Policy, Total, noisy_answer, plan_release
from dpjax.federated.worker_server import connect, make_certificate
from dpjax.federated.worker_wire import pack_message, read_message_bytes
from dpjax.ledger import Ledger

SECRET = 1234.56  # looked for in everything that must not hold it
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


# What must need the value is refused, and nothing shows it.


def texts(x):
    """Everything that can be read off a pointer, and off the errors of using it."""
    yield from (repr(x), str(x), f"{x}", repr(x._session), repr(vars(x._session)))
    uses = [
        bool, float, int, complex, iter, list, np.asarray, jnp.asarray, pickle.dumps, hash,
        lambda x: x if x > 0 else 0, lambda x: 3 in x, lambda x: range(x), lambda x: x.get(),
        lambda x: x + "a", lambda x: x[x > 0], lambda x: x[[0, 1]], math.sqrt,
        lambda x: np.ones(2).tolist()[x], lambda x: x.sum().get(), lambda x: x @ np.ones(7),
        lambda x: x + float("nan"), lambda x: np.exp(x), lambda x: jnp.exp(x),
    ]  # fmt: skip
    for number, use in enumerate(uses):
        with pytest.raises((DpjaxError, TypeError)) as caught:
            use(x)
            raise AssertionError(number)
        error = caught.value
        while error is not None:
            yield f"{error!r} {error}"
            error = error.__context__


@pytest.mark.parametrize("shape", [(), (3,)])
def test_nothing_shows_a_value(shape):
    with Worker("alice") as alice:
        x = alice.put(np.full(shape, SECRET, np.float32))
        y = x * 1 + 0
        for text in (*texts(x), *texts(y), repr(alice), repr(alice._local)):
            assert "1234" not in text, text
        with refused("cannot be pickled"):
            pickle.dumps(alice)
        with refused("policy denies values computed from"):
            y.get()
        assert (x.shape, x.dtype) == (shape, "float32")


def test_an_operation_that_fails_tells_nothing(monkeypatch):
    real = jnp.exp

    def fails(x):
        if isinstance(x, jax.core.Tracer):
            return real(x)
        raise FloatingPointError(f"invalid value {x}")

    monkeypatch.setattr(jnp, "exp", fails)
    with Worker("alice") as alice:
        x = alice.put(np.float32([SECRET]))
        with refused("failed on the worker; the reason may depend on private") as caught:
            alice.apply("exp", x)
        assert caught.value.__context__ is None and caught.value.__cause__ is None
        # The owner's debugging flags would turn a private NaN into an error.
        with jax.debug_nans(True):
            assert alice.apply("log", x - 1e6).shape == (1,)


def test_what_is_put_is_copied_and_fits():
    with Worker("alice", Policy.allow()) as alice:
        mine = np.float32([1, 2])
        x = alice.put(mine)
        mine[:] = 7
        got = x.get()
        got[:] = 9
        assert x.get().tolist() == [1, 2]
        with refused("do not fit int32"):
            alice.put(np.array([2**40]))
        with refused("must hold real numbers"):
            alice.put(np.array(["a"]))


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


def test_policies_travel_and_the_strictest_counts():
    with Worker("alice", LAPLACE, target_epsilon=5.0) as alice:
        x, z = alice.put(ROWS), alice.put(ROWS, name="z")
        free, shut = (
            alice.put(ROWS, policy=Policy.allow()),
            alice.put(ROWS, name="shut", policy=Policy.deny()),
        )
        assert (x.clip(0, 1) * free).clip(0, 1).sum().get().shape == ()
        for mixed in (x + shut, free + shut, (x * 0 + shut * 0).sum(), shut.mean() / shut.mean()):
            with refused("denies values computed from 'shut'"):
                mixed.get()
        with refused("combines several private arrays"):
            (x + z).sum().get()
        with refused("single records are not released"):
            x.get()
        with refused("computed from a sum or mean over records: get"):
            (x.sum() / (x > 0).sum()).get()
        for unbounded in (x * x, x @ W, alice.apply("exp", x), 1 / x, x + W[0], x**-1):
            with refused("no public bounds.*clip them first"):
                unbounded.sum(axis=0).get()
        with refused("max over records has no bound"):
            x.max().get()
        assert alice.spent().answers == 1
        for bad in (np.nan, np.inf):
            with refused("holds NaN or infinity"):
                alice.put(np.float32([0, bad]))
        with refused("axis 0 must be the records"):
            alice.put(np.float32(1))
        with refused("'z' is taken"):
            alice.put(ROWS, name="z")
        with refused("needs a delta"):
            alice.put(ROWS, policy=Policy.dp(0, 1, noise_multiplier=1, mechanism="gaussian"))
    with Worker("alice") as alice:
        with refused("needs a budget"):
            alice.put(ROWS, policy=LAPLACE)


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


def test_a_refusal_never_depends_on_the_data():
    """Had log(x - t) been refused where it is NaN, t would be searched for, free of charge."""
    with Worker("alice", LAPLACE, target_epsilon=10.0) as alice:
        low, high = alice.put(np.float32([0.1] * 5)), alice.put(np.float32([0.9] * 5))
        for x in (low, high):
            assert np.isfinite(alice.apply("log", x - 0.5).clip(-1, 1).sum().get())
            assert np.isfinite((1 / (x * 0)).clip(-1, 1).sum().get())
        assert alice.spent(LOCAL).epsilon == pytest.approx(0.4)


# Budgets.


def test_a_budget_is_spent_and_no_more():
    with Worker("alice", LAPLACE, target_epsilon=0.5) as alice:
        x = alice.put(ROWS)
        first = x.sum().get()
        assert all(x.sum().get() == first for _ in range(20))  # averaging gains nothing
        for k in range(1, 5):
            (x * 1).clip(0, k).sum().get()
        assert alice.spent(LOCAL) == (pytest.approx(0.5), 0.0, 5)
        with refused("would bring epsilon to 0.6 at delta 0, over the budget of 0.5"):
            x.mean().get()
        with refused("over the budget"):
            x.mean().get(noise_multiplier=1e5)
        assert x.sum().get() == first  # what was told may be told again
        for bad in (1.0, float("nan"), True, "a", None.__class__):
            with pytest.raises((DpjaxError, TypeError)):
                x.mean().get(noise_multiplier=bad)
        assert alice.spent(LOCAL).answers == 5
    # The worker's own bound, when those who ask put their answers together.
    with Worker("alice", LAPLACE, target_epsilon=0.5, epsilon_of_all=0.7) as alice:
        alice.put(ROWS, name="x")
        told = 0
        with refused("over the budget of all together of 0.7"):
            for name in ("bob", "carol"):
                with alice.session(alice.enrol(name)) as session:
                    for k in range(5):
                        session["x"].clip(0, 1 + k).sum().get()
                        told += 1
        assert told == 7


def test_more_noise_costs_less_and_less_noise_is_refused():
    with Worker("alice", LAPLACE, target_epsilon=0.5) as alice:
        x = alice.put(ROWS)
        x.sum().get(noise_multiplier=40)
        assert alice.spent(LOCAL).epsilon == pytest.approx(1 / 40)
        with refused("at least 10"):
            x.mean().get(noise_multiplier=9.9)


@pytest.mark.parametrize("multiplier", [3.0, 20.0])
def test_gaussian_answers_compose_between_known_bounds(multiplier):
    """Above the exact epsilon of the composed Gaussians, below the classic bound of zCDP."""
    delta = 1e-6
    policy = Policy.dp(0, 1, noise_multiplier=multiplier, mechanism="gaussian")
    with Worker("alice", policy, target_epsilon=2.0, target_delta=delta) as alice:
        x, told = alice.put(ROWS), 0
        with refused("over the budget of 2"):
            while True:
                x.clip(0, 1 + told / 2).sum().get()
                told += 1
                rho = told / (2 * multiplier**2)
                spent = alice.spent(LOCAL).epsilon
                exact = accounting.gaussian_epsilon(math.sqrt(2 * rho), delta)
                assert exact <= spent <= rho + 2 * math.sqrt(rho * math.log(1 / delta))
        rho = (told + 1) / (2 * multiplier**2)
        assert rho + 2 * math.sqrt(rho * math.log(1 / delta)) > 2.0
        assert told >= 1


def test_epsilons_add_until_zcdp_is_less():
    cost = Cost(0.1, 0.005)
    assert worker_policy.spent_epsilon([cost] * 3, 1e-6) == pytest.approx(0.3)
    many = worker_policy.spent_epsilon([cost] * 1000, 1e-6)
    assert many < 5 + 2 * math.sqrt(5 * math.log(1e6)) < 100
    assert worker_policy.spent_epsilon([cost, Cost(None, 0.1)], 0.0) == math.inf


def test_differencing_is_hidden_by_noise(coins):
    """With and without one record: the difference is that record, and noise of its size."""
    errors = []
    for seed in range(40):
        data = np.zeros(30, np.float32)
        data[0] = seed % 2
        with Worker("alice", Policy.dp(0, 1, noise_multiplier=2), target_epsilon=1.0) as alice:
            x = alice.put(data)
            guess = float(x.sum().get()) - float(x[1:].sum().get())
            errors.append(guess - data[0])
            with refused("over the budget"):
                x[2:].sum().get()
    # A difference of two Laplace variables of scale 2: stddev 4, mean absolute value 3.
    assert 2 < np.mean(np.abs(errors)) < 4.5


def test_requests_at_once_do_not_overdraw():
    with Worker("alice", LAPLACE, target_epsilon=0.55) as alice:
        token = alice.enrol("bob")
        alice.put(ROWS, name="x")
        sessions = [alice.session(token) for _ in range(12)]
        ends = [s["x"].clip(0, 1 + n).sum() for n, s in enumerate(sessions)]
        barrier, outcomes = threading.Barrier(12), []

        def ask(end):
            barrier.wait()
            try:
                outcomes.append(float(end.get()))
            except DpjaxError:
                outcomes.append(None)

        threads = [threading.Thread(target=ask, args=(end,)) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(x is not None for x in outcomes) == 5 == alice.spent("bob").answers


def test_answers_are_on_disk_before_they_are_given(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    with Worker("alice", LAPLACE, target_epsilon=0.25, ledger=path) as alice:
        x = alice.put(np.full(3, SECRET, np.float32))
        x.sum().get()

        def dies(total, release):
            raise RuntimeError(f"lost {total.rows}")

        monkeypatch.setattr(worker_module, "noisy_answer", dies)
        with refused("the worker failed; the reason is not told"):
            x.mean().get()
        monkeypatch.undo()
    assert "1234" not in path.read_text()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["requester"] for r in records] == [LOCAL, LOCAL]
    assert [r["epsilon"] for r in records] == [0.1, 0.1]
    # A new process knows what was spent; the answer itself is gone.
    with Worker("alice", LAPLACE, target_epsilon=0.25, ledger=path) as alice:
        x = alice.put(ROWS)
        with refused("over the budget"):
            x.sum().get()
        with refused("in use by another process"):
            Worker("alice", ledger=path)
    with Ledger.open(path) as ledger:
        with refused("answers of a worker"):
            ledger.epsilon(1e-6)

    # Where nothing can be written, nothing is told.
    with Worker("alice", LAPLACE, target_epsilon=5.0, ledger=path) as alice:
        x = alice.put(ROWS)
        monkeypatch.setattr(worker_module, "noisy_answer", dies)
        alice._ledger.close()
        with pytest.raises(DpjaxError) as caught:
            x.sum().get()
        assert str(tmp_path) not in str(caught.value)
        assert len(path.read_text().splitlines()) == 2 == alice.spent().answers
    path.write_text(path.read_text().replace('"epsilon":0.1', '"epsilon":0.01', 1))
    with refused("corrupt at line 1"):
        Worker("alice", ledger=path)


# Who asks.


def test_a_token_is_the_identity():
    with Worker("alice", LAPLACE, target_epsilon=0.1) as alice:
        alice.put(ROWS, name="x")
        tokens = {name: alice.enrol(name) for name in ("bob", "carol")}
        bob, carol = (alice.session(tokens[name]) for name in ("bob", "carol"))
        assert (bob.requester, carol.requester) == ("bob", "carol")
        listing = bob.listing()
        assert list(listing) == ["x"] and listing["x"].shape == (4, 3)
        mine = bob["x"].sum()
        mine.get()
        # A name in a request means nothing; another's pointer does not exist.
        reply, _ = carol.send({"do": "get", "pointer": mine._id, "noise_multiplier": None}, [])
        assert reply == {"error": "there is no such pointer in this session"}
        with refused("another session"):
            carol["x"] + bob["x"]
        with refused("over the budget"):
            bob.send({"do": "spent", "requester": "carol"}, [])
            Pointer(bob, bob.ask({"do": "find", "name": "x", "requester": "carol"})[0]).mean().get()
        assert bob.spent().answers == 1 and carol.spent().answers == 0
        carol["x"].sum().get()
        # Enrolled again: the old token and its sessions are over, what was spent is not.
        again = alice.session(alice.enrol("bob"))
        assert again.spent().answers == 1
        with refused("the session is over"):
            bob.listing()
        for wrong in (tokens["bob"], "", "bob", "local", None, "\ud800", 7):
            with refused("does not know this token"):
                alice.session(wrong)
        with refused("another requester has this token"):
            alice.enrol("dave", token=tokens["carol"])
        for name in ("local", "", "a b", "x" * 65, None):
            with pytest.raises(DpjaxError):
                alice.enrol(name)
        own = again.put(np.float32([1, 2]))
        assert (own * 2).get().tolist() == [2, 4]


def test_a_session_has_limits():
    with Worker("alice", Policy.allow(), max_bytes=4000) as alice:
        x = alice.put(np.ones(500, np.float32))
        kept = [x + 1, x + 2]
        with refused("the session's values would take 6000 bytes, at most 4000"):
            x + 3
        del kept
        assert (x + 5).get()[0] == 6  # room again
        session = alice.session(alice.enrol("bob"))
        with refused("would take 8000 bytes"):
            session.put(np.ones(2000, np.float32))


def test_no_request_breaks_the_worker():
    rng = random.Random(0)
    with Worker("alice") as alice:
        x = alice.put(np.full(3, SECRET, np.float32))
        parts = [
            "apply", "get", "find", "put", "list", "spent", "add", "getitem", "sum", None, -1,
            2**70, [], {}, [[]], [["slice", 1, 2]], {"pointer": x._id}, {"number": 1}, {"array": 0},
            x._id, True, 1.5, {"axis": [0, 0]}, {"index": [["int", 2**40]]}, {"shape": [-1, -1]},
        ]  # fmt: skip
        names = ["do", "pointer", "noise_multiplier", "function", "operands", "options", "name"]
        for _ in range(400):
            header = {name: rng.choice(parts) for name in rng.sample(names, rng.randrange(8))}
            if rng.random() < 0.7:
                header["do"] = rng.choice(parts[:6])
            if rng.random() < 0.5:
                header["operands"] = [rng.choice(parts) for _ in range(rng.randrange(3))]
            reply, arrays = alice.handle(alice._local_id, header, [])
            assert "1234" not in json.dumps(reply) and not arrays
        assert x.shape == (3,) and (x + 1).shape == (3,)


# The wire.


def test_messages_come_back_and_broken_ones_do_not():
    arrays = [
        np.float32([[1, 2]]), np.array(True), np.zeros((0, 3), np.int64), np.float64([np.nan]),
        np.asarray(jnp.bfloat16([1.5])),
    ]  # fmt: skip
    data = pack_message({"do": "x", "n": [1, None]}, arrays)
    header, found = read_message_bytes(data, max_bytes=1000)
    assert header == {"do": "x", "n": [1, None]}
    for one, other in zip(arrays, found, strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        assert one.shape == other.shape
    for n in range(len(data)):
        with pytest.raises(DpjaxError):
            read_message_bytes(data[:n], max_bytes=1000)
    rng = random.Random(1)
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(DpjaxError):
            read_message_bytes(bytes(broken), max_bytes=1000)
    with refused("bytes; at most"):
        read_message_bytes(data, max_bytes=10)
    for text in (b'{"arrays_sent": [["float32", [1099511627775, 2]]]}', b"[" * 9999, b"[1]",
                 b'{"arrays_sent": [["object", [1]]]}', b'{"arrays_sent": [], "n": NaN}',
                 b'{"arrays_sent": [["float32", [-1]]]}', b"\xff"):  # fmt: skip
        head = b"dpW\x01" + len(text).to_bytes(4, "little") + (4).to_bytes(8, "little")
        with refused("malformed message"):
            read_message_bytes(head + text + bytes(4), max_bytes=1000)
    with refused("must be finite"):
        pack_message({"number": math.inf}, [])


def test_a_real_process_over_tls(tmp_path):
    rows = np.full((200, 2), 0.25, np.float32)
    np.save(tmp_path / "x.npy", rows)
    folder = tmp_path / "alice"
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "dpjax.federated.worker_cli", "--name", "alice", "--folder",
        str(folder), "--data", f"x={tmp_path / 'x.npy'}", "--requesters", "bob", "--policy",
        "laplace", "--target-epsilon", "0.25",
    ]  # fmt: skip
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    try:
        port = json.loads(process.stdout.readline())["port"]
        token = (folder / "bob.token").read_text()
        cafile = folder / "certificate.pem"
        for secret in ("bob.token", "private_key.pem", "answers.jsonl"):
            assert (folder / secret).stat().st_mode & 0o077 == 0

        # Strangers: one line each, and the worker goes on.
        with refused("does not know this token; ask its owner"):
            connect("127.0.0.1", port, token="x" * 43, cafile=cafile)
        other = make_certificate(tmp_path / "other").certificate
        with refused("is not the worker of .*; the token was not sent"):
            connect("127.0.0.1", port, token=token, cafile=other)
        for sent in (b"GET / HTTP/1.0\r\n\r\n", bytes(1000), pack_message({"token": token}, [])):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
                plain.sendall(sent)
                with pytest.raises((ConnectionError, StopIteration)):
                    while got := plain.recv(100):
                        assert got[0] == 21  # an alert of TLS, and the end
                    raise StopIteration
        context = ssl.create_default_context(cafile=cafile)
        for sent in (b"x" * 100, b"dpW\x01" + b"\xff" * 12):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
                    tls.sendall(sent)
                    assert b"error" in tls.recv(1000)
                    assert tls.recv(1000) == b""
        context = ssl.create_default_context(cafile=cafile)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(raw, server_hostname="127.0.0.1")

        with connect("127.0.0.1", port, token=token, cafile=cafile) as session:
            assert session.listing()["x"].shape == (200, 2)
            y = session["x"] * 2 + 1
            assert repr(y) == "<pointer to float32[200,2] on alice>"
            mean = y.mean(axis=0).get()
            # Bounds 1 to 3: scale 10 * 2 * 2 / 200 = 0.2 for each of the two.
            assert mean.shape == (2,) and np.all(np.abs(mean - 1.5) < 0.2 * 30)
            assert np.array_equal(y.mean(axis=0).get(), mean)
            with refused("alice: single records are not released"):
                y.get()
            own = session.put(np.float32([1, 2]))
            assert (own + np.float32([1, 1])).get().tolist() == [2, 3]
            y.sum().get()
            with refused("over the budget"):
                y.mean().get()
            assert session.spent() == (pytest.approx(0.2), 0.0, 2)
            with refused("the worker takes 67108864 at once"):
                session.put(np.zeros(2**24, np.float32))
        with refused("the connection to .* is lost"):
            y.mean().get()
        with connect("127.0.0.1", port, token=token, cafile=cafile) as session:
            with refused("over the budget"):  # a new connection is no new budget
                session["x"].mean().get()
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()
    lines = log.read_text().splitlines()
    assert len(lines) == 8, lines
    assert all(x.startswith(("refused 127.0.0.1:", "lost 127.0.0.1:")) for x in lines), lines
    assert token not in log.read_text()
    with refused("cannot reach"):
        connect("127.0.0.1", port, token=token, cafile=cafile)


def test_functions_are_those_of_jax():
    assert all(hasattr(jnp, name) for name in worker_rules.FUNCTIONS if name != "getitem")
    assert pathlib.Path(worker_rules.__file__).name == "worker_rules.py"
