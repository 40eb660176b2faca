"""Flower's own SuperLink and SuperNodes over loopback, killed in the middle; checks at the door."""

import importlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import flower_in_memory as in_memory
import flower_processes as processes
import jax
import numpy as np
import optax
import pytest

import dpjax
from dpjax.checkpoint import Checkpointer, digest
from dpjax.errors import DpjaxError
from dpjax.federated import fed_avg, init_federated, private, run_round
from dpjax.federated.deployment import Plan, init_deployed
from dpjax.federated.flower import ServerOptions, client_app
from dpjax.federated.flower_messages import checked_answers
from dpjax.federated.flower_secure import (
    SecureOptions,
    Step,
    answer_step,
    secure_round,
    vector_length,
)
from dpjax.federated.flower_server import _check_privacy
from dpjax.federated.secure import to_vector

APP = pathlib.Path(__file__).parents[2] / "experiments" / "flower_deployment"
LAYER = pathlib.Path(sys.prefix) / "flower" / "bin" / "python"  # from `make test`


def flower_python():
    if importlib.util.find_spec("flwr") is not None:
        return sys.executable
    if LAYER.exists():
        return str(LAYER)
    pytest.skip("Flower is absent: run `make test`, or pip install 'dpjax[flower]'")


@pytest.fixture(scope="module")
def task():
    """The example's model and plan, as its apps import them."""
    sys.path.insert(0, str(APP))
    yield importlib.import_module("hospitals.task")
    sys.path.remove(str(APP))


def free_ports(count):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def until(condition, seconds, what, logs):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    tails = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in sorted(logs)]
    raise AssertionError(f"no {what} in {seconds} s\n" + "\n".join(tails))


class Federation:
    """One SuperLink and three SuperNodes; every process dies with `close`."""

    def __init__(self, folder):
        self.folder, (self.port, *self.ports) = folder, free_ports(4)
        commands = folder / "commands"
        commands.mkdir()
        home = folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "test"\n[superlink.test]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.environ = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.path = f"{folder}/s"
        self.parent = subprocess.Popen(
            [flower_python(), processes.__file__, self.path, str(commands)],
            stdin=subprocess.PIPE,
            env=self.environ,
        )
        self.connections = []

    def start_all(self):
        self.wait(lambda: os.path.exists(self.path), 300, "Flower")
        self.superlink = self.start_superlink()
        self.nodes = [self.start_node(n) for n in range(3)]

    def wait(self, condition, seconds, what):
        return until(condition, seconds, what, self.folder.glob("*.log"))

    def start(self, *argv):
        log = self.folder / f"{argv[0]}-{len(self.connections)}.log"
        connection, child = processes.start(
            self.path, list(argv), self.environ, str(self.folder), log
        )
        self.connections.append(connection)
        return child

    def start_superlink(self):
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--insecure"]
        # Without it a restarted SuperLink knows no SuperNode, and they all leave.
        database = ["--database", str(self.folder / "superlink.db")]
        child = self.start("flower-superlink", *options, *database)
        self.wait(self.is_listening, 120, "SuperLink")
        return child

    def is_listening(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start_node(self, number):
        link = ["--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        own = ["--host", "127.0.0.1", "--port", str(self.ports[number])]
        facts = f'partition-id={number} state-folder="{self.folder}/client{number}"'
        return self.start("flower-supernode", *link, *own, "--node-config", facts)

    def run(self, wait_for):
        config = f'folder="{self.folder}/server" wait-for={wait_for} timeout=180.0'
        self.start("flwr", "run", str(APP), "test", "--stream", "--run-config", config)

    def rounds(self):
        path = self.folder / "server" / "rounds.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def answered(self, number):
        """The last round that a client has answered."""
        path = self.folder / f"client{number}" / f"client-{number}"
        return json.loads(path.read_bytes().partition(b"\n")[0])[1]

    def server_processes(self):
        """Of the ServerApp, by its command's name among the children of ours."""
        return processes.children(self.path, "flwr-serverapp")

    def close(self):
        self.parent.stdin.close()
        self.parent.wait(60)
        for connection in self.connections:
            connection.close()


def simulate(task, cohorts):
    plan, people = task.plan(), task.patients()
    state = init_federated(plan.algorithm, plan.params, len(people))
    for number, chosen in enumerate(cohorts):
        key = jax.random.fold_in(jax.random.key(2), number)
        cohort = people.cohort(chosen, key, batch_size=plan.batch_size)
        state, _ = run_round(plan.algorithm, state, cohort, jax.random.key(1), engine="jit")
    return state


@pytest.mark.slow  # waits a minute for Flower to notice a dead node, minutes on a busy machine
@pytest.mark.timeout(900)
def test_a_federation_of_processes_equals_the_simulation_whatever_is_killed(task, tmp_path):
    """SCAFFOLD, whose clients keep state: a lost or repeated update shows in all that follows.

    A SuperNode dies by SIGKILL in the second of three rounds; SuperLink and ServerApp die by
    SIGKILL in the third, when one client has answered already, and are started again.
    """
    federation = Federation(tmp_path)
    try:
        federation.start_all()
        federation.run(wait_for=3)
        federation.wait(lambda: len(federation.rounds()) == 1, 240, "first round")
        os.kill(federation.nodes[2], signal.SIGKILL)
        federation.wait(lambda: len(federation.rounds()) == 2, 240, "second round")
        federation.wait(lambda: federation.answered(0) == 2, 240, "answer of the first hospital")
        for child in (federation.superlink, *federation.server_processes()):
            os.kill(child, signal.SIGKILL)
        federation.wait(lambda: not federation.is_listening(), 30, "end of the SuperLink")
        assert len(federation.rounds()) == 2
        federation.superlink = federation.start_superlink()
        federation.run(wait_for=2)
        federation.wait(lambda: len(federation.rounds()) == 3, 240, "third round")
        records = federation.rounds()
    finally:
        federation.close()
    assert [r["round"] for r in records] == [0, 1, 2]
    assert [r["sensitive_answered"] for r in records] == [[0, 1, 2], [0, 1], [0, 1]]
    assert all(not r["rejected"] for r in records)
    expected = simulate(task, ([0, 1, 2], [0, 1], [0, 1]))
    with Checkpointer(tmp_path / "server") as checkpointer:
        state, facts = checkpointer.restore(init_deployed(task.plan()))
    assert int(state.round) == 3 and state.accepted.tolist() == [2, 2, 0]
    for found, wanted in zip(
        jax.tree.leaves((state.params, state.server.control)),
        jax.tree.leaves((expected.params, expected.server.control)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=1e-6)
    assert records[2]["params_sha256"] == digest(state.params)
    # The simulation with the third hospital to the end is another model: the test can tell.
    other = simulate(task, ([0, 1, 2], [0, 1, 2], [0, 1, 2]))
    assert np.abs(np.asarray(other.params["weights"] - state.params["weights"])).max() > 1e-3


def test_without_flower_one_line_says_what_to_install(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(DpjaxError, match=r"pip install 'dpjax\[flower\]'"):
        client_app(task.plan(), lambda context: None)


def test_private_rounds_under_secure_aggregation_equal_the_simulation(tmp_path):
    """Signed sessions; a vector that is lost, and a server that dies after the reveal."""
    done = subprocess.run(
        [flower_python(), in_memory.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    plan, people = in_memory.plan(), in_memory.people()
    state = init_federated(plan.algorithm, plan.params, len(people))
    for number, chosen in enumerate(([0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3])):
        key = jax.random.fold_in(in_memory.KEYS["data_key"], number)
        cohort = people.cohort(chosen, key, batch_size=plan.batch_size)
        state, _ = run_round(plan.algorithm, state, cohort, in_memory.KEYS["key"], engine="jit")
    np.testing.assert_allclose(found["params"], np.asarray(state.params["w"]), rtol=0, atol=1e-6)
    assert found["crashed"] and found["round"] == 3 and found["accepted"] == [2, 2, 2, 1 + 1]
    # The restarted server went on with the session: nobody masked a second vector.
    masked = [tuple(x) for x in found["steps"] if x[2] == "masked"]
    assert len(masked) == len(set(masked)) == 12
    assert sum(x[0] == 2 and x[2] == "reveal" for x in found["steps"]) == 8
    assert found["equal_words"] <= 1 < found["words"]
    assert found["releases"] == 3
    assert found["epsilon"] == pytest.approx(in_memory.mechanism().epsilon(1e-5))
    assert "masked updates only" in found["train"]
    assert "in another session" in found["query.secure"]


def test_a_session_below_the_threshold_waits_and_no_client_masks_twice(tmp_path):
    plan, options = in_memory.plan(), SecureOptions(3)
    length = vector_length(plan)
    vectors = {c: np.arange(length, dtype=np.uint32) * (c + 1) + 2**31 for c in range(4)}
    gone, asked = {("masked", 2), ("masked", 3)}, []

    def at(client, step):
        return answer_step(
            options,
            tmp_path / f"c{client}",
            step,
            number=client,
            identity=None,
            length=length,
            vector=lambda: vectors[client],
        )

    def ask(queries):
        for c, step in queries.items():
            asked.append((step.step, c))
            if (step.step, c) not in gone:
                yield c, at(c, step)

    def close(clients, fresh):
        path = tmp_path / "secure.jsonl"
        return secure_round(options, plan, path, "ab", 0, clients, ask, lambda: fresh)

    with pytest.raises(DpjaxError, match="threshold"):
        close([0, 1], b"a" * 16)  # too few to begin: nothing is kept of it
    with pytest.raises(DpjaxError, match="2 clients are left at step 'masked'"):
        close(range(4), b"b" * 16)
    gone.remove(("masked", 2))
    asked.clear()
    result = close(range(4), b"c" * 16)  # the session goes on: only the missing are asked
    assert [x for x in asked if x[0] in ("keys", "shares", "masked")] == [
        ("masked", 2),
        ("masked", 3),
    ]
    assert result.survivors == (0, 1, 2)
    expected = vectors[0] + vectors[1] + vectors[2]
    assert np.array_equal(to_vector(result.total), expected)
    again = close(range(4), b"d" * 16)  # killed before its checkpoint: from the file, the same
    assert np.array_equal(to_vector(again.total), expected)
    other = Step("ab", 0, b"e" * 16, (0, 1, 2, 3), "keys", b"")
    with pytest.raises(DpjaxError, match="in another session"):
        at(0, other)
    with pytest.raises(DpjaxError, match="and is asked for round -1"):
        at(0, other._replace(round=-1))
    at(0, other._replace(round=1))
    with pytest.raises(DpjaxError, match="did not begin"):
        at(0, other._replace(round=2, session=b"f" * 16, step="reveal"))
    assert (tmp_path / "c0").stat().st_mode & 0o077 == 0


class FakeArray:
    def __init__(self, value):
        self.value, self.data = value, value.tobytes()

    def numpy(self):
        return self.value


def reply(plan, node=7, update=None, drop=(), error=None, code=None, **facts):
    """What a Flower message looks like from here."""
    told = {"client": 1, "round": 4, "nonce": b"n" * 16, "weight": 1.0} | facts
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.ones(x.shape, x.dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(plan.update_like)
    } | (update or {})
    records = {
        "arrays": {n: FakeArray(x) for n, x in arrays.items() if n not in drop},
        "answer": told,
        "metrics": {"loss": 1.0, "examples": 2.0},
    }
    return SimpleNamespace(
        has_error=lambda: error is not None,
        error=SimpleNamespace(reason=error, code=2 if code is None else code),
        metadata=SimpleNamespace(src_node_id=node),
        content=records,
    )


def test_answers_are_checked_before_they_count(task):
    plan = task.plan()
    asked = {1: (7, b"n" * 16), 2: (8, b"m" * 16)}
    name = "params.weights"
    refused = {
        "replayed": reply(plan, nonce=b"o" * 16),
        "stale round": reply(plan, round=3),
        "future round": reply(plan, round=5),
        "unknown client": reply(plan, node=8),  # another node's name
        "bad weight": reply(plan, weight=float("nan")),
        "not finite": reply(plan, update={name: np.full(5, np.inf, np.float32)}),
        "wrong shape": reply(plan, update={name: np.ones(6, np.float32)}),
        "wrong dtype": reply(plan, update={name: np.ones(5, np.int32)}),
        "too large": reply(plan, update={name: np.ones(100_000, np.float32)}),
        "wrong structure": reply(plan, drop=[name]),
        "malformed": reply(plan, error="ClientApp raised an exception"),
        "norm too large": reply(plan, update={name: np.full(5, 1e3, np.float32)}),
    }
    for reason, bad in refused.items():
        answers, rejections = checked_answers(plan, 4, asked, [bad], 100.0, 10.0)
        assert not answers and dict(rejections.counts) == {reason: 1}
    gone = reply(plan, error="Node is offline", code=5)
    assert checked_answers(plan, 4, asked, [gone], None, None)[1].total == 0
    twice = [reply(plan), reply(plan), reply(plan, node=8, client=2, nonce=b"m" * 16)]
    answers, rejections = checked_answers(plan, 4, asked, twice, 100.0, 10.0)
    assert sorted(answers) == [1, 2] and rejections.total == 1
    assert answers[1].metrics == {"loss": 1.0, "examples": 2.0}


def test_what_runs_is_what_is_accounted(task):
    plain = fed_avg(task.loss_fn, optax.sgd(0.1))
    start, example = task.plan().params, task.plan().example
    mechanism = dpjax.DPSGD(1.0, 0.5, 5, noise_multiplier=1.0, population=3)
    hidden = Plan(private(plain, mechanism, jax.random.key(0)), start, example, 3, batch_size=8)
    open_ = Plan(plain, start, example, 3, batch_size=8)
    given = {"mechanism": mechanism, "ledger": "l", "sampling_key": jax.random.key(1)}
    _check_privacy(hidden, init_deployed(hidden), ServerOptions(rounds=5, folder="f", **given))
    for plan, rounds, more, match in (
        (hidden, 5, {}, "is private and mechanism is missing"),
        (open_, 5, given, "is not private and mechanism is given"),
        (hidden, 6, given, "accounts for 5 rounds"),
    ):
        with pytest.raises(DpjaxError, match=match):
            _check_privacy(
                plan, init_deployed(plan), ServerOptions(rounds=rounds, folder="f", **more)
            )
    with pytest.raises(DpjaxError, match="belong together"):
        ServerOptions(rounds=1, folder="f", mechanism=mechanism)
