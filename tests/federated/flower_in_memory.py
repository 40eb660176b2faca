"""Flower's own messages and apps without processes: private rounds under secure aggregation.

python flower_in_memory.py FOLDER    (with Flower; prints what happened as JSON)
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpjax
from dpjax.errors import DpjaxError
from dpjax.federated import Clients, fed_avg, private
from dpjax.federated.aggregation import fixed_point, with_aggregator
from dpjax.federated.deployment import Plan
from dpjax.federated.flower import LocalSide, SecureOptions, ServerOptions, client_app, serve

CLIENTS, ROUNDS = 4, 3
KEYS = {"key": jax.random.key(1), "data_key": jax.random.key(2)}


def loss_fn(params, example):
    return (jnp.dot(params["w"], example["x"]) - example["y"]) ** 2


def people():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(24, 3)).astype(np.float32)
    y = (x @ np.float32([1, -2, 0.5])).astype(np.float32)
    rows = tuple(np.split(np.arange(24), CLIENTS))
    return Clients({"x": x, "y": y}, rows, tuple("abcd"))


@functools.cache
def mechanism():
    return dpjax.DPSGD(0.5, 1.0, ROUNDS, noise_multiplier=0.7, population=CLIENTS)


@functools.cache
def plan():
    inner = private(fed_avg(loss_fn, optax.sgd(0.1)), mechanism(), jax.random.key(4))
    code = fixed_point(0.5, max_clients=CLIENTS, rounding="toward_zero")
    start, example = {"w": jnp.zeros(3, jnp.float32)}, {"x": np.zeros(3, np.float32)}
    example["y"] = np.zeros((), np.float32)
    return Plan(with_aggregator(inner, code), start, example, CLIENTS, batch_size=4)


class Grid:
    """Delivers messages to the apps; ``lose`` says whose answer, at which step, gets lost."""

    def __init__(self, app, contexts):
        self.app, self.contexts = app, contexts
        self.lose, self.steps, self.masked = (lambda *facts: False), [], {}

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout):
        from flwr.app import Error, Message

        replies, crash = [], False
        for message in messages:
            node = message.metadata.dst_node_id
            asked = dict(message.content.config_records.get("request", {}))
            try:
                reply = self.app(message, self.contexts[node])
            except DpjaxError as error:
                replies.append(Message(Error(code=2, reason=str(error)), reply_to=message))
                continue
            step = asked.get("step")
            if step is not None:
                self.steps.append((asked["round"], node - 100, step))
            if step == "masked":
                sent = reply.content["message"]["message"].numpy().tobytes()
                self.masked[asked["round"], node - 100] = sent
            lost = self.lose(asked.get("round"), node - 100, step)
            crash |= lost == "crash"
            if not lost:
                replies.append(reply)
        if crash:
            raise KeyboardInterrupt  # after the clients have answered
        return replies


def main(folder):
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from dpjax.federated.secure import new_identity, to_vector

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = {c: new_identity() for c in range(CLIENTS)}
    secure = SecureOptions(3, {c: public for c, (_, public) in made.items()})
    everybody = people()

    def local_side(context):
        c = context.node_config["partition-id"]
        rows = everybody.rows[c]
        own = {name: values[rows] for name, values in everybody.examples.items()}
        mine = Clients(own, (np.arange(len(rows)),), (everybody.names[c],))
        return LocalSide(mine, c, **KEYS, state_folder=f"{folder}/c{c}", identity=made[c][0])

    contexts = {
        100 + c: Context(1, 100 + c, {"partition-id": c}, RecordDict(), {}) for c in range(CLIENTS)
    }
    grid = Grid(client_app(plan(), local_side, secure), contexts)
    options = ServerOptions(
        rounds=ROUNDS,
        folder=f"{folder}/server",
        timeout=5.0,
        wait_for=CLIENTS,
        secure=secure,
        mechanism=mechanism(),
        ledger=f"{folder}/ledger.jsonl",
        sampling_key=jax.random.key(5),
    )
    found = {}
    # Client 3 is lost in round 1 before its masked vector arrives; in round 2 the server dies when
    # all clients have revealed their shares and no answer has been read.
    crashes = {"reveal": True}

    def lose(number, client, step):
        if (number, client, step) == (1, 3, "masked"):
            return "answer"
        if (number, step) == (2, "reveal") and crashes["reveal"]:
            return "crash"
        return None

    grid.lose = lose
    try:
        serve(grid, plan(), options)
    except KeyboardInterrupt:
        found["crashed"] = True
    crashes["reveal"] = False
    state = serve(grid, plan(), options)
    found["params"] = np.asarray(state.params["w"]).tolist()
    found["accepted"] = state.accepted.tolist()
    found["round"] = int(state.round)
    found["steps"] = grid.steps
    ledger = dpjax.Ledger.open(options.ledger)
    found["epsilon"] = ledger.epsilon(1e-5)
    found["releases"] = sum(count for _, count in ledger.releases())
    ledger.close()
    # What the server saw of client 0 in round 0 is not what it encoded.
    from dpjax.federated.deployment_client import load_memory

    kept = load_memory(pathlib.Path(folder, "c0", "client-0"), plan())
    vector = to_vector(kept.answer.update)
    seen = np.frombuffer(grid.masked[2, 0][-4 * len(vector) :], "<u4")
    found["equal_words"], found["words"] = int((seen == vector).sum()), len(vector)
    # A server that asks for the update itself, or for another session of a round, gets none.
    facts = {"federation": kept.federation, "round": 2, "session": bytes(range(16))}
    facts |= {"clients": list(range(CLIENTS)), "step": "keys", "plan": "", "accepted": 0}
    for kind in ("train", "query.secure"):
        from dpjax.federated.flower_messages import bytes_record

        content = {"request": ConfigRecord(facts), "message": bytes_record(b"")}
        try:
            grid.app(Message(RecordDict(content), 100, kind), contexts[100])
        except DpjaxError as error:
            found[kind] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
