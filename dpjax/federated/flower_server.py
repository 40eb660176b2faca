"""The server on Flower's engine: rounds from a checkpoint, and a record of what happened."""

import dataclasses
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dpjax.checkpoint import Checkpointer, digest
from dpjax.errors import DpjaxError
from dpjax.federated.boundary import Rejections
from dpjax.federated.deployment import (
    Answer,
    DeployedState,
    Plan,
    close_round,
    init_deployed,
    outgoing,
    server_round,
)
from dpjax.federated.flower_messages import (
    ARRAYS,
    MESSAGE,
    REQUEST,
    bytes_record,
    checked_answers,
    client_on,
    flower,
    named,
    secure_bytes,
    to_record,
)
from dpjax.federated.flower_secure import (
    SecureOptions,
    SecureResult,
    Step,
    secure_round,
    vector_length,
)
from dpjax.federated.private import PrivateServer
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.types import PyTree, RandomKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server runs.

    Attributes:
      rounds: in all, those before a restart included.
      folder: checkpoints and the record of rounds; secret, as it may hold a noise key.
      timeout: seconds that a round waits for its slowest client.
      wait_for: clients that must have been reached before the first round after a start.
      min_clients: the same before every round; below it the run ends, to be started again.
      l2_bound, max_weight: larger updates and weights are refused; see `boundary.check_update`.
      mechanism: of a `private` algorithm: it draws the cohorts and is accounted for.
      ledger: file where every release is written before it is computed; needs ``mechanism``.
      sampling_key: of the cohorts; secret. Needs ``mechanism``.
      secure: updates come masked; `server_round` then sees their sum only.
      skip_failed_rounds: a secure round with fewer clients than the threshold is closed as one to
        which nobody came. Otherwise the run ends, and its restart asks the missing ones again.
    """

    rounds: int
    folder: str | os.PathLike
    timeout: float = 600.0
    wait_for: int = 1
    min_clients: int = 1
    l2_bound: float | None = None
    max_weight: float | None = None
    mechanism: DPSGD | None = None
    ledger: str | os.PathLike | None = None
    sampling_key: RandomKey | None = None
    secure: SecureOptions | None = None
    skip_failed_rounds: bool = False

    def __post_init__(self) -> None:
        if min(self.rounds, self.wait_for, self.min_clients) < 1 or not self.timeout > 0:
            raise DpjaxError(
                f"rounds is {self.rounds}, wait_for {self.wait_for}, min_clients "
                f"{self.min_clients}, timeout {self.timeout}; they must be at least 1, and the "
                "timeout above 0"
            )
        given = [x is not None for x in (self.mechanism, self.ledger, self.sampling_key)]
        if any(given) and not all(given):
            raise DpjaxError(
                "mechanism, ledger and sampling_key belong together: give all three to a private "
                "algorithm, none to another"
            )


def server_app(plan: Plan, options: Callable[[Any], ServerOptions]) -> Any:
    """A ``flwr.serverapp.ServerApp`` that runs all rounds, or those that are left.

    Args:
      plan: as the clients'.
      options: ``options(context) -> ServerOptions``; Flower's ``context.run_config`` holds what
        ``flwr run --run-config`` was given.

    Start it again with ``flwr run`` after any failure: it goes on with the round that was open.
    """
    app = flower("serverapp").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        serve(grid, plan, options(context))

    return app


def serve(grid: Any, plan: Plan, options: ServerOptions) -> DeployedState:
    """Runs the rounds that are left over Flower's ``grid``, from the newest checkpoint.

    Guarantee: parameters are on disk before any client is sent them, and a release is in the
      ledger before it is computed. A server that is killed repeats at most a round whose noisy
      result nobody has seen.

    Raises:
      DpjaxError: a folder of another plan, or an algorithm and a mechanism that do not fit.
    """
    with Checkpointer(options.folder) as checkpointer:
        state, federation = _resume(plan, checkpointer)
        _check_privacy(plan, state, options)
        ledger = None if options.ledger is None else Ledger.open(options.ledger)
        try:
            strategy = make_strategy(plan, state, federation, checkpointer, options, ledger)
            left = options.rounds - int(state.round)
            if left > 0:
                strategy.start(
                    grid,
                    initial_arrays=flower("app").ArrayRecord(),
                    num_rounds=left,
                    timeout=options.timeout,
                )
            if ledger is not None and int(strategy.state.round) >= options.rounds:
                ledger.end_run(strategy.ledger_run, "completed")
            return strategy.state
        finally:
            if ledger is not None:
                ledger.close()


def _resume(plan: Plan, checkpointer: Checkpointer) -> tuple[DeployedState, str]:
    start = init_deployed(plan)
    if checkpointer.latest() is None:
        facts = {"federation": secrets.token_hex(16), "plan": plan.fingerprint()}
        checkpointer.save(0, start, facts)
        return start, facts["federation"]
    state, facts = checkpointer.restore(start)
    if facts["plan"] != plan.fingerprint():
        raise DpjaxError(
            f"{checkpointer.folder} belongs to another plan; give the plan that it was begun with, "
            "or a new folder"
        )
    return state, facts["federation"]


def _check_privacy(plan: Plan, state: DeployedState, options: ServerOptions) -> None:
    mechanism, server = options.mechanism, state.server
    is_private = isinstance(server, PrivateServer)
    if is_private != (mechanism is not None):
        raise DpjaxError(
            f"{plan.algorithm.name} is {'' if is_private else 'not '}private and mechanism is "
            f"{'missing' if mechanism is None else 'given'}; what runs must be what is accounted"
        )
    if mechanism is None:
        return
    if mechanism.population != plan.num_clients or options.rounds > mechanism.iterations:
        raise DpjaxError(
            f"the mechanism accounts for {mechanism.iterations} rounds among "
            f"{mechanism.population} clients, and the plan has {options.rounds} among "
            f"{plan.num_clients}"
        )
    if int(server.noise.count) != int(state.round):
        raise DpjaxError(
            f"the state has run {int(state.round)} rounds with {int(server.noise.count)} draws of "
            "noise; it belongs to another run"
        )


def make_strategy(
    plan: Plan,
    state: DeployedState,
    federation: str,
    checkpointer: Checkpointer,
    options: ServerOptions,
    ledger: Ledger | None = None,
) -> Any:
    """A ``flwr.serverapp.strategy.Strategy`` whose aggregation is `server_round`.

    Its ``state`` is the newest `DeployedState`. Flower asks for a class; nothing is to be
    overridden here.
    """
    flwr = flower("app")
    base = flower("serverapp.strategy").Strategy
    close = server_round  # Flower calls a number so

    class DpjaxStrategy(base):
        """Rounds of one plan; `serve` makes and runs it."""

        def __init__(self) -> None:
            self.state = state
            self.nodes: dict[int, int | None] = {}  # node -> client, None if it is of no use
            self.asked: dict[int, tuple[int, bytes]] = {}  # client -> node and nonce
            self.summed: SecureResult | None = None
            self.ledger_run = -1
            if ledger is not None and options.mechanism is not None:
                self.ledger_run = _ledger_run(ledger, options.mechanism, plan, federation)

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            number = int(self.state.round)
            chosen = _choose(plan, options, number)
            mechanism, sampling_key = options.mechanism, options.sampling_key
            if ledger is not None and mechanism is not None and sampling_key is not None:
                sampler = mechanism.sampler(plan.num_clients, sampling_key)
                noise = mechanism.noise_multiplier or 0.0
                ledger.record_release(self.ledger_run, number, sampler, noise)
            reached = self._reach(grid, options.wait_for if server_round == 1 else 1)
            sent = to_record(outgoing(plan, self.state))
            self.asked = {c: (reached[c], secrets.token_bytes(16)) for c in chosen if c in reached}
            if options.secure is not None:
                self.summed = self._sum(grid, number, sent)
                return []
            return [self._message(number, c, "train", {ARRAYS: sent}, {}) for c in self.asked]

        def _message(
            self, number: int, client: int, kind: str, records: dict[str, Any], more: dict[str, Any]
        ) -> Any:
            node, nonce = self.asked[client]
            facts = {
                "federation": federation,
                "plan": plan.fingerprint(),
                "round": number,
                "accepted": int(self.state.accepted[client]),
                "nonce": nonce,
            }
            content = flwr.RecordDict({**records, REQUEST: flwr.ConfigRecord({**facts, **more})})
            return flwr.Message(content, node, kind, ttl=options.timeout, group_id=str(number))

        def _sum(self, grid: Any, number: int, sent: Any) -> SecureResult:
            """Secure aggregation of a round: its queries and their answers."""
            longest = max(4 * vector_length(plan), 1000 * plan.num_clients) + 4096

            def ask(queries: dict[int, Step]) -> Iterable[tuple[int, bytes]]:
                messages = []
                for c, step in queries.items():
                    if c not in self.asked:
                        continue
                    records = {MESSAGE: bytes_record(step.message)}
                    if step.step == "masked":
                        records[ARRAYS] = sent
                    facts = {
                        "session": step.session,
                        "clients": list(step.clients),
                        "step": step.step,
                    }
                    messages.append(self._message(number, c, "query.secure", records, facts))
                replies = grid.send_and_receive(messages, timeout=options.timeout)
                of_node = {node: c for c, (node, _) in self.asked.items()}
                for reply in replies:
                    c = of_node.get(reply.metadata.src_node_id)
                    found = secure_bytes(reply, longest)
                    if c is not None and found is not None:
                        yield c, found

            assert options.secure is not None
            path = pathlib.Path(options.folder) / "secure.jsonl"
            try:
                return secure_round(
                    options.secure,
                    plan,
                    path,
                    federation,
                    number,
                    self.asked,
                    ask,
                    lambda: secrets.token_bytes(16),
                )
            except DpjaxError:
                if not options.skip_failed_rounds:
                    raise
                nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.update_like)
                return SecureResult(nothing, (), Rejections())

        def _reach(self, grid: Any, enough: int) -> dict[int, int]:
            """Client -> node, of every node that is there; asks those it has not met."""
            enough = max(enough, options.min_clients)
            give_up = time.monotonic() + options.timeout
            while True:
                present = set(grid.get_node_ids())
                fresh = sorted(present - set(self.nodes))
                queries = [
                    flwr.Message(flwr.RecordDict(), node, "query.client", ttl=options.timeout)
                    for node in fresh
                ]
                replies = grid.send_and_receive(queries, timeout=options.timeout) if fresh else ()
                for reply in replies:
                    node = reply.metadata.src_node_id
                    self.nodes[node] = client_on(reply, plan) if node in fresh else None
                # A node that came back has a new number: the last one to register is the client.
                found = {c: n for n, c in self.nodes.items() if c is not None and n in present}
                if len(found) >= enough:
                    return found
                if time.monotonic() > give_up:
                    raise DpjaxError(
                        f"{len(found)} clients have been reached in {options.timeout:g} seconds of "
                        f"{enough} that were waited for; start more and run again"
                    )
                time.sleep(2.0)

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            number = int(self.state.round)
            answers: dict[int, Answer] = {}
            if self.summed is not None:
                total, present, rejections = self.summed
                self.state = close_round(plan, self.state, total, float(len(present)), present)
            else:
                answers, rejections = checked_answers(
                    plan, number, self.asked, replies, options.l2_bound, options.max_weight
                )
                present = sorted(answers)
                self.state = close(plan, self.state, answers)
            facts = {"federation": federation, "plan": plan.fingerprint()}
            checkpointer.save(number + 1, self.state, facts)
            line = _line(number, self.asked, present, answers, rejections, self.state.params)
            _append(options.folder, line)
            return to_record(named(self.state.params)), flwr.MetricRecord({"round": number + 1})

        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            return []

        def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> None:
            return None

        def summary(self) -> None:
            return None

    return DpjaxStrategy()


def _ledger_run(ledger: Ledger, mechanism: DPSGD, plan: Plan, federation: str) -> int:
    """This federation's run in the ledger, begun now if it is not there."""
    for record in ledger.records:
        if record["kind"] == "run" and record["config"].get("federation") == federation:
            return record["run"]
    config = {"federation": federation, "plan": plan.fingerprint()}
    return ledger.start_run(mechanism, plan.num_clients, config)


def _choose(plan: Plan, options: ServerOptions, number: int) -> list[int]:
    """Clients of a round: all, or as the accountant assumes. Who is away just does not answer."""
    if options.mechanism is None or options.sampling_key is None:
        return list(range(plan.num_clients))
    batch = options.mechanism.sampler(plan.num_clients, options.sampling_key).batch(number)
    return [int(c) for c in batch.indices[~batch.is_padding_example]]


def _line(
    number: int,
    asked: Iterable[int],
    present: Iterable[int],
    answers: Mapping[int, Answer],
    rejections: Rejections,
    params: PyTree,
) -> dict[str, Any]:
    """What is recorded about a round. It is the server's own: fields say what is private."""
    seen = sum(a.metrics.get("examples", 1.0) for a in answers.values())
    names = {n for a in answers.values() for n in a.metrics}
    total = {n: sum(a.metrics.get(n, 0.0) for a in answers.values()) for n in sorted(names)}
    return {
        "round": number,
        "sensitive_asked": sorted(asked),
        "sensitive_answered": sorted(present),
        "rejected": dict(rejections.counts),
        "sensitive_metrics": {
            n: x if n == "examples" else x / max(seen, 1.0) for n, x in total.items()
        },
        "params_sha256": digest(params),
    }


def _append(folder: str | os.PathLike, line: dict[str, Any]) -> None:
    path = pathlib.Path(folder) / "rounds.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(line) + "\n")
