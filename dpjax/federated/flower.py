"""The same algorithms on Flower's engine: a ClientApp, a ServerApp, and a strategy between them.

Needs ``pip install 'dpjax[flower]'``. Flower carries messages and starts processes; what is in the
messages, and what is made of them, is `dpjax.federated.deployment`.

Run SuperLink and SuperNodes with TLS and node authentication: everything is clear text with
``--insecure``, and without ``--enable-supernode-auth`` any machine may say that it is client 3.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dpjax.checkpoint import Checkpointer, digest
from dpjax.errors import DpjaxError
from dpjax.federated.boundary import Rejections
from dpjax.federated.clients import Clients
from dpjax.federated.deployment import (
    Answer,
    DeployedState,
    Plan,
    init_deployed,
    outgoing,
    server_round,
)
from dpjax.federated.deployment_client import (
    Request,
    answer_request,
    load_memory,
    save_memory,
)
from dpjax.federated.flower_messages import (
    ANSWER,
    ARRAYS,
    METRICS,
    REQUEST,
    checked_answers,
    client_on,
    flower,
    from_record,
    named,
    to_record,
)
from dpjax.federated.private import PrivateServer
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.types import PyTree, RandomKey


class LocalSide(NamedTuple):
    """What a machine with a client on it brings along.

    Attributes:
      clients: its data; one client, under the name that it has everywhere.
      number: its number in the federation, from 0.
      key: of what the client draws; its own secret wherever the client itself adds noise.
      data_key: of its batches.
      state_folder: where it keeps its state between rounds. Losing it makes it a new client.
    """

    clients: Clients
    number: int
    key: RandomKey
    data_key: RandomKey
    state_folder: str | os.PathLike


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


def client_app(plan: Plan, local_side: Callable[[Any], LocalSide]) -> Any:
    """A ``flwr.clientapp.ClientApp`` that answers with the algorithm's local update.

    Args:
      plan: as the server's.
      local_side: ``local_side(context) -> LocalSide``, from Flower's context: its ``node_config``
        holds what ``flower-supernode --node-config`` was given.

    What the client keeps is on disk before the answer leaves: `deployment_client.answer_request`
    says what that guarantees when messages come twice, late, or from a server that was restarted.
    """
    flwr = flower("app")
    app = flower("clientapp").ClientApp()

    @app.query("client")
    def who(message: Any, context: Any) -> Any:
        side = local_side(context)
        facts = flwr.ConfigRecord({"client": side.number, "plan": plan.fingerprint()})
        return flwr.Message(flwr.RecordDict({ANSWER: facts}), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        side = local_side(context)
        asked = message.content[REQUEST]
        request = Request(
            str(asked["federation"]),
            str(asked["plan"]),
            int(asked["round"]),
            int(asked["accepted"]),
            bytes(asked["nonce"]),
            from_record(message.content[ARRAYS], plan.sent_like),
        )
        path = pathlib.Path(side.state_folder) / f"client-{side.number}"
        before = load_memory(path, plan)
        answer, memory = answer_request(
            plan,
            before,
            request,
            side.clients,
            0,
            number=side.number,
            key=side.key,
            data_key=side.data_key,
        )
        if memory is not before:
            save_memory(path, memory)
        facts = {
            "client": side.number,
            "round": request.round,
            "nonce": request.nonce,
            "weight": answer.weight,
        }
        content = {
            ARRAYS: to_record(named(answer.update)),
            ANSWER: flwr.ConfigRecord(facts),
            METRICS: flwr.MetricRecord(answer.metrics),
        }
        return flwr.Message(flwr.RecordDict(content), reply_to=message)

    return app


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
            self.asked = {}
            messages = []
            for client in chosen:
                if client not in reached:
                    continue
                nonce = secrets.token_bytes(16)
                self.asked[client] = (reached[client], nonce)
                facts = {
                    "federation": federation,
                    "plan": plan.fingerprint(),
                    "round": number,
                    "accepted": int(self.state.accepted[client]),
                    "nonce": nonce,
                }
                content = flwr.RecordDict({ARRAYS: sent, REQUEST: flwr.ConfigRecord(facts)})
                messages.append(
                    flwr.Message(
                        content,
                        reached[client],
                        "train",
                        ttl=options.timeout,
                        group_id=str(number),
                    )
                )
            return messages

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
            answers, rejections = checked_answers(
                plan, number, self.asked, replies, options.l2_bound, options.max_weight
            )
            self.state = close(plan, self.state, answers)
            facts = {"federation": federation, "plan": plan.fingerprint()}
            checkpointer.save(number + 1, self.state, facts)
            _record(options.folder, number, self.asked, answers, rejections, self.state.params)
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


def _record(
    folder: str | os.PathLike,
    number: int,
    asked: Mapping[int, Any],
    answers: Mapping[int, Answer],
    rejections: Rejections,
    params: PyTree,
) -> None:
    """One line about a round. It is the server's own: fields say what is private."""
    seen = sum(a.metrics.get("examples", 1.0) for a in answers.values())
    names = {n for a in answers.values() for n in a.metrics}
    total = {n: sum(a.metrics.get(n, 0.0) for a in answers.values()) for n in sorted(names)}
    line = {
        "round": number,
        "sensitive_asked": sorted(asked),
        "sensitive_answered": sorted(answers),
        "rejected": dict(rejections.counts),
        "sensitive_metrics": {
            n: x if n == "examples" else x / max(seen, 1.0) for n, x in total.items()
        },
        "params_sha256": digest(params),
    }
    path = pathlib.Path(folder) / "rounds.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(line) + "\n")
