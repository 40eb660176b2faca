"""Secure aggregation against the plain sum: the server's CPU time, and bytes.

    python experiments/benchmarks/secure_aggregation.py                  # 1M parameters, 20 clients
    python experiments/benchmarks/secure_aggregation.py --degree 12      # masks with 12 neighbours
    python experiments/benchmarks/secure_aggregation.py --preset smoke   # seconds, in CI

"plain" is what a server without secure aggregation does with the same vectors of the same
survivors: it receives each over a loopback socket, as it comes, into a fresh buffer, reads it with
the checks of `dpjax.federated.check_update`, and adds it. "plain, sum only" adds vectors that are
in memory already, unchecked. "secure" receives over the same sockets, runs every step of the
protocol on the server (keys, shares, vectors, shares of dropouts' keys) and removes all masks.
Clients' own time is stated apart. Dropouts stop after they shared keys and before they send their
vector: the dearest moment for the server, which then expands one mask for each pair of a survivor
and a dropout. Another thread sends; only CPU time of the server's thread counts. Rounds alternate.
"""

import dataclasses
import socket
import statistics
import struct
import sys
import threading
import time
from typing import Any, Literal

import numpy as np
import tyro

from dpjax.errors import DpjaxError
from dpjax.federated import CheckedUpdate, UpdateMessage, check_update, pack_update, read_message
from dpjax.federated.secure import SecureClient, SecureServer, new_session

_LENGTH = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    preset: Literal["full", "smoke"] = "full"
    """smoke: 50,000 parameters, 6 clients, 1 round."""
    parameters: int = 1_000_000
    """Numbers in a vector."""
    clients: int = 20
    """At the start."""
    dropout: float = 0.3
    """Share of clients that send keys and then nothing."""
    degree: int | None = None
    """Neighbours with whom a client shares masks; None is all others."""
    rounds: int = 9
    """Alternating measurements; medians are printed."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over rounds; CPU milliseconds of the server's thread."""

    plain: float
    plain_float32: float
    sum_only: float
    secure: float
    ratio: float
    client: float
    bytes_per_parameter: float


def main(config: Config) -> Result:
    """Prints the table, and returns it."""
    if config.preset == "smoke":
        config = dataclasses.replace(config, parameters=50_000, clients=6, rounds=1)
    gone = round(config.dropout * config.clients)
    stay = config.clients - gone
    quorum = config.clients // 2 + 1
    if stay < quorum:
        raise DpjaxError(f"{stay} of {config.clients} clients stay; the threshold is {quorum}")
    rng = np.random.default_rng(0)
    vectors = [
        rng.integers(0, 2**32, config.parameters, dtype=np.uint32) for _ in range(config.clients)
    ]
    expected = np.sum(vectors[:stay], axis=0, dtype=np.uint32)
    floats = [(v >> 8).astype(np.float32) / np.float32(2**24) for v in vectors[:stay]]
    rows, per_client, sent = [], [], 0
    for number in range(config.rounds):
        found: dict[str, float] = {}
        ways = [
            ("plain", lambda: _plain(vectors[:stay], expected)),
            ("float32", lambda: _plain(floats, None)),
            ("sum", lambda: _sum_only(vectors[:stay], expected)),
            ("secure", lambda: _secure(vectors, stay, config.degree, expected)),
        ]
        for name, way in ways if number % 2 == 0 else ways[::-1]:
            measured = way()
            if name == "secure":
                measured, client, sent = measured
                per_client.append(client)
            found[name] = 1000 * measured
        rows.append(found)
    middle = {name: statistics.median(r[name] for r in rows) for name in rows[0]}
    ratios = [r["secure"] / r["plain"] for r in rows]
    result = Result(
        middle["plain"], middle["float32"], middle["sum"], middle["secure"],
        statistics.median(ratios), 1000 * statistics.median(per_client),
        sent / config.parameters,
    )  # fmt: skip
    print(
        f"{config.parameters:,} parameters, {config.clients} clients, {gone} drop out, {stay} sums"
    )
    print(f"plain, sum only          {result.sum_only:8.1f} ms")
    print(f"plain, float32           {result.plain_float32:8.1f} ms")
    print(f"plain, uint32            {result.plain:8.1f} ms")
    print(f"secure                   {result.secure:8.1f} ms")
    print(f"secure / plain, uint32   {result.ratio:8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"a client, all its steps  {result.client:8.1f} ms")
    print(f"a client sends           {result.bytes_per_parameter:8.3f} bytes per parameter")
    return result


def _send(address: Any, messages: list[bytes]) -> None:
    with socket.create_connection(address) as to:
        for message in messages:
            to.sendall(_LENGTH.pack(len(message)))
            to.sendall(message)


def _receive(connection: socket.socket) -> bytearray:
    # Not recv(size): the message must be whole, and is read into place without another copy.
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        view = view[connection.recv_into(view) :]
    return data


def _over_loopback(messages: list[bytes], work: Any) -> float:
    """CPU seconds of this thread to receive messages from another one and to work on each."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = threading.Thread(target=_send, args=(listening.getsockname(), messages))
        sender.start()
        connection, _ = listening.accept()
        began = time.thread_time()
        with connection:
            for _ in messages:
                work(_receive(connection))
        spent = time.thread_time() - began
        sender.join()
    return spent


def _plain(vectors: list[np.ndarray], expected: np.ndarray | None) -> float:
    like = {"update": np.empty(vectors[0].shape, vectors[0].dtype)}
    messages = [
        UpdateMessage(f"client {k}", 3, bytes(16), 1.0, pack_update({"update": v})).to_bytes()
        for k, v in enumerate(vectors)
    ]
    total = np.zeros(vectors[0].shape, vectors[0].dtype)
    seen = set()

    def work(data):
        message = read_message(data, max_bytes=len(data))
        if not isinstance(message, UpdateMessage):
            raise DpjaxError(message.detail)
        checked = check_update(message, like, round=3, seen=seen)
        if not isinstance(checked, CheckedUpdate):
            raise DpjaxError(checked.detail)
        seen.update(checked.identities)
        np.add(total, checked.update["update"], out=total)

    spent = _over_loopback(messages, work)
    if expected is not None and not np.array_equal(total, expected):
        raise DpjaxError("the plain sum is wrong")
    return spent


def _sum_only(vectors: list[np.ndarray], expected: np.ndarray) -> float:
    began = time.thread_time()
    total = np.zeros(vectors[0].shape, np.uint32)
    for v in vectors:
        np.add(total, v, out=total)
    spent = time.thread_time() - began
    if not np.array_equal(total, expected):
        raise DpjaxError("the plain sum is wrong")
    return spent


def _secure(
    vectors: list[np.ndarray], stay: int, degree: int | None, expected: np.ndarray
) -> tuple[float, float, int]:
    """CPU seconds of the server and of one client, and bytes that one client sends."""
    group = len(vectors) if degree is None else degree + 1
    session = new_session(range(len(vectors)), group // 2 + 1, len(vectors[0]), degree=degree)
    clients = {c: SecureClient(session, c) for c in session.clients}
    server = SecureServer(session)
    spent = by_clients = 0.0
    sent = 0

    def take(data):
        refused = server.receive(data)
        if refused is not None:
            raise DpjaxError(refused.detail)

    def step(answer, who):
        nonlocal spent, by_clients, sent
        began = time.thread_time()
        answers = [answer(c) for c in who]
        by_clients += time.thread_time() - began
        sent += len(answers[0])
        spent += _over_loopback(answers, take)
        began = time.thread_time()
        out = server.advance() if server.step != "reveal" else {}
        spent += time.thread_time() - began
        return out

    survivors = range(stay)
    inbox = step(lambda c: clients[c].keys(), session.clients)
    inbox = step(lambda c: clients[c].share_keys(inbox[c]), session.clients)
    inbox = step(lambda c: clients[c].mask(inbox[c], vectors[c]), survivors)
    step(lambda c: clients[c].reveal(inbox[c]), survivors)
    began = time.thread_time()
    total = server.total()
    spent += time.thread_time() - began
    if not np.array_equal(total, expected):
        raise DpjaxError("the secure sum is wrong")
    return spent, by_clients / stay, sent


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except DpjaxError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
