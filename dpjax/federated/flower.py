"""The same algorithms on Flower's engine: a ClientApp, a ServerApp, and a strategy between them.

Needs ``pip install 'dpjax[flower]'``. Flower carries messages and starts processes; what is in the
messages, and what is made of them, is `dpjax.federated.deployment`.

Run SuperLink and SuperNodes with TLS and node authentication: everything is clear text with
``--insecure``, and without ``--enable-supernode-auth`` any machine may say that it is client 3.
"""

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.clients import Clients
from dpjax.federated.deployment import (
    Answer,
    Plan,
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
    MESSAGE,
    METRICS,
    REQUEST,
    bytes_record,
    flower,
    from_record,
    named,
    record_bytes,
    to_record,
)
from dpjax.federated.flower_secure import (
    SecureOptions,
    Step,
    alone_with,
    answer_step,
    vector_length,
)
from dpjax.federated.flower_server import ServerOptions, make_strategy, serve, server_app
from dpjax.federated.secure import to_vector
from dpjax.types import RandomKey

__all__ = [
    "LocalSide",
    "SecureOptions",
    "ServerOptions",
    "client_app",
    "make_strategy",
    "serve",
    "server_app",
]


class LocalSide(NamedTuple):
    """What a machine with a client on it brings along.

    Attributes:
      clients: its data; one client, under the name that it has everywhere.
      number: its number in the federation, from 0.
      key: of what the client draws; its own secret wherever the client itself adds noise.
      data_key: of its batches.
      state_folder: where it keeps its state between rounds. Losing it makes it a new client.
      identity: Ed25519 private key, for signed secure aggregation; see `secure.new_identity`.
    """

    clients: Clients
    number: int
    key: RandomKey
    data_key: RandomKey
    state_folder: str | os.PathLike
    identity: bytes | None = None


def client_app(
    plan: Plan, local_side: Callable[[Any], LocalSide], secure: SecureOptions | None = None
) -> Any:
    """A ``flwr.clientapp.ClientApp`` that answers with the algorithm's local update.

    Args:
      plan: as the server's.
      local_side: ``local_side(context) -> LocalSide``, from Flower's context: its ``node_config``
        holds what ``flower-supernode --node-config`` was given.
      secure: with it the client sends masked updates only, whatever the server asks for.

    What the client keeps is on disk before the answer leaves: `deployment_client.answer_request`
    says what that guarantees when messages come twice, late, or from a server that was restarted.
    """
    flwr = flower("app")
    app = flower("clientapp").ClientApp()
    length = None if secure is None else vector_length(plan)

    @app.query("client")
    def who(message: Any, context: Any) -> Any:
        side = local_side(context)
        facts = flwr.ConfigRecord({"client": side.number, "plan": plan.fingerprint()})
        return flwr.Message(flwr.RecordDict({ANSWER: facts}), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        if secure is not None:
            raise DpjaxError(
                "this client sends masked updates only; give the server ServerOptions(secure=...)"
            )
        side = local_side(context)
        with alone_with(side.state_folder):
            answer = _local_answer(plan, side, message)
        asked = message.content[REQUEST]
        facts = {
            "client": side.number,
            "round": asked["round"],
            "nonce": asked["nonce"],
            "weight": answer.weight,
        }
        content = {
            ARRAYS: to_record(named(answer.update)),
            ANSWER: flwr.ConfigRecord(facts),
            METRICS: flwr.MetricRecord(answer.metrics),
        }
        return flwr.Message(flwr.RecordDict(content), reply_to=message)

    @app.query("secure")
    def masked(message: Any, context: Any) -> Any:
        if secure is None or length is None:
            raise DpjaxError("this client has no SecureOptions; give them to client_app")
        side = local_side(context)
        asked = message.content[REQUEST]
        longest = max(4 * length, 1000 * plan.num_clients) + 4096
        step = Step(
            str(asked["federation"]),
            int(asked["round"]),
            bytes(asked["session"]),
            tuple(int(c) for c in asked["clients"]),
            str(asked["step"]),
            record_bytes(message.content[MESSAGE], longest),
        )
        with alone_with(side.state_folder):
            answer = answer_step(
                secure,
                pathlib.Path(side.state_folder) / f"secure-{side.number}",
                step,
                number=side.number,
                identity=side.identity,
                length=length,
                vector=lambda: _finite_vector(_local_answer(plan, side, message)),
            )
        content = {
            ANSWER: flwr.ConfigRecord({"client": side.number}),
            MESSAGE: bytes_record(answer),
        }
        return flwr.Message(flwr.RecordDict(content), reply_to=message)

    return app


def _local_answer(plan: Plan, side: LocalSide, message: Any) -> Answer:
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
    return answer


def _finite_vector(answer: Answer) -> np.ndarray:
    # Behind a mask nobody can refuse it: the client itself stays away.
    if not (math.isfinite(answer.weight) and answer.weight == 1.0):
        raise DpjaxError("the update is not finite; this client leaves the round")
    return to_vector(answer.update)
