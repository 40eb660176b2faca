"""Pointers compute where the data lies; what leaves is what the owner's policy lets go."""

import json
import math
import pickle
import random
import secrets
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.federated import worker as worker_module
from dpjax.federated import worker_policy
from dpjax.federated.worker import LOCAL, Worker
from dpjax.federated.worker_pointer import Pointer
from dpjax.federated.worker_policy import Cost, Policy
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
    real, shapes = jnp.exp, []

    def fails(x):
        if not shapes:  # the first call sees shapes only
            shapes.append(x.shape)
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
        for unbounded in (x * x, x @ ROWS.T, alice.apply("exp", x), 1 / x, x + ROWS[0], x**-1):
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
    for seed in range(24):
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
