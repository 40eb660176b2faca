"""Secure aggregation on Flower's messages: the server gets the sum of a round and no update.

The steps of `dpjax.federated.secure` are queries; the masked vector is the update of one client. A
client's secrets wait in its own file between messages, as Flower starts a process for each. What
the server was told is in a file as well, so that a restarted server goes on with the session: a
client masks one vector in a round, or two sums could differ by one client's update.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.boundary import Rejections
from dpjax.federated.deployment import Plan
from dpjax.types import PyTree

try:
    from dpjax.federated.secure import SecureClient, SecureServer, SecureSession, from_vector
except DpjaxError:  # the package cryptography is absent, which Flower would have brought
    raise DpjaxError(
        "Flower is not installed; install it with: pip install 'dpjax[flower]'"
    ) from None

try:
    import fcntl
except ImportError:  # not a POSIX system: a client then answers one message at a time
    fcntl = None


@dataclasses.dataclass(frozen=True)
class SecureOptions:
    """What clients and server agree on beforehand. A client takes none of it from the server.

    Attributes:
      threshold: as in `SecureSession`: more than half of all clients, or, signed, more than two
        thirds. Fewer than these at the end of a round and nothing is revealed.
      identities: Ed25519 public keys by client number, for sessions that need not trust the server.
    """

    threshold: int
    identities: Mapping[int, bytes] | None = None

    def session(self, id: bytes, clients: Iterable[int], length: int) -> SecureSession:
        """The session of some of the clients under these terms."""
        who = tuple(clients)
        known = self.identities
        if known is not None:
            if not {*who} <= {*known}:
                raise DpjaxError("a client in the session has no public key in identities")
            known = {c: known[c] for c in who}
        return SecureSession(bytes(id), who, self.threshold, length, known)


class Step(NamedTuple):
    """One query of the server."""

    federation: str
    round: int
    session: bytes
    clients: tuple[int, ...]
    step: str  # "keys", "shares", "masked", "confirm" or "reveal"
    message: bytes

    def digest(self) -> str:
        """SHA-256 of all of it."""
        facts = json.dumps([self.federation, self.round, self.clients, self.step]).encode()
        return hashlib.sha256(facts + self.session + self.message).hexdigest()


def vector_length(plan: Plan) -> int:
    """Numbers in the vector that a client masks.

    Raises:
      DpjaxError: an algorithm that does not send integers alone.
    """
    leaves = jax.tree.leaves(plan.update_like)
    if not leaves or any(x.dtype != np.uint32 for x in leaves):
        raise DpjaxError(
            f"{plan.algorithm.name} sends floats, which no mask hides; wrap it: "
            "with_aggregator(algorithm, fixed_point(...))"
        )
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in leaves)


@contextlib.contextmanager
def alone_with(folder: str | os.PathLike) -> Iterator[None]:
    """One process at a time: two that read the same secrets could be asked different things."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def answer_step(
    options: SecureOptions,
    path: pathlib.Path,
    asked: Step,
    *,
    number: int,
    identity: bytes | None,
    length: int,
    vector: Callable[[], np.ndarray],
) -> bytes:
    """A client's answer to one query; what it must remember is on disk before this returns.

    Args:
      path: the client's file.
      asked: from the server; only its session's id, and who takes part, are believed.
      vector: the update of this round, asked for at the step "masked".

    Guarantee: in each round the client masks one vector, in one session, whatever becomes of it;
      each step is answered once: asked again, the same bytes.

    Raises:
      DpjaxError: whatever does not follow from what was answered before.
    """
    kept = json.loads(path.read_text()) if path.exists() else None
    session = options.session(asked.session, asked.clients, length)
    party = None
    if kept is not None:
        if asked.federation != kept["federation"] or asked.round < kept["round"]:
            raise DpjaxError(
                f"this client has answered round {kept['round']} of federation "
                f"{kept['federation'][:8]}, and is asked for round {asked.round} of "
                f"{asked.federation[:8]}"
            )
        if asked.session.hex() == kept["session"]:
            if asked.digest() == kept["asked"]:
                return base64.b64decode(kept["answer"])
            if not kept["party"]:
                raise DpjaxError("the session has ended for this client: it answers a step once")
            party = SecureClient.from_bytes(kept["party"].encode(), session, number, identity)
        elif asked.round == kept["round"] and kept["masked"]:
            raise DpjaxError(
                f"this client has masked its vector of round {asked.round} in another session; two "
                "sums could differ by one client's update"
            )
    if party is None:
        if asked.step != "keys":
            raise DpjaxError(f"step {asked.step!r} of a session that this client did not begin")
        party = SecureClient(session, number, identity)
    if asked.step == "keys":
        answer = party.keys()
    elif asked.step == "shares":
        answer = party.share_keys(asked.message)
    elif asked.step == "masked":
        answer = party.mask(asked.message, vector())
    elif asked.step == "confirm":
        answer = party.confirm(asked.message)
    elif asked.step == "reveal":
        answer = party.reveal(asked.message)
    else:
        raise DpjaxError(f"step {asked.step!r} is none of secure aggregation")
    content = {
        "federation": asked.federation,
        "round": asked.round,
        "session": asked.session.hex(),
        "masked": asked.step not in ("keys", "shares"),
        "asked": asked.digest(),
        "answer": base64.b64encode(answer).decode(),
        # Nothing of them is needed after the end, and whoever finds them could unmask the vector.
        "party": "" if asked.step == "reveal" else party.to_bytes().decode(),
    }
    _write(path, json.dumps(content).encode())
    return answer


def _write(path: pathlib.Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


class SecureResult(NamedTuple):
    """The sum of a round."""

    total: PyTree  # uint32, modulo 2^32
    survivors: tuple[int, ...]
    rejections: Rejections


def secure_round(
    options: SecureOptions,
    plan: Plan,
    path: pathlib.Path,
    federation: str,
    number: int,
    clients: Iterable[int],
    ask: Callable[[dict[int, Step]], Iterable[tuple[int, bytes]]],
    new_id: Callable[[], bytes],
) -> SecureResult:
    """The server's side of one round, from where it was left.

    Args:
      path: where all that comes in is written before it is used.
      clients: who is asked, where no session of this round has begun.
      ask: sends queries and gives the answers that come in time.
      new_id: 16 fresh bytes.

    Raises:
      DpjaxError: fewer clients than the threshold. Nothing is revealed, and the next call asks
        those who are missing again.
    """
    length = vector_length(plan)
    entries = _entries(path, federation, number)
    if not entries:
        who = sorted(clients)
        begun = {"federation": federation, "round": number, "session": new_id().hex()}
        session = options.session(bytes.fromhex(begun["session"]), who, length)
        entries = [{**begun, "clients": who}]
        path.unlink(missing_ok=True)
        _append(path, entries[0])
    else:
        begun = entries[0]
        session = options.session(bytes.fromhex(begun["session"]), begun["clients"], length)
    server, rejections = SecureServer(session), Rejections()
    inbox = dict.fromkeys(session.clients, b"")
    for entry in entries[1:]:
        if "advance" in entry:
            inbox = server.advance()
        else:
            server.receive(base64.b64decode(entry["data"]), sender=entry["from"])
    while True:
        queries = {
            c: Step(federation, number, session.id, session.clients, server.step, message)
            for c, message in inbox.items()
            if c not in server.arrived
        }
        for c, data in ask(queries) if queries else ():
            refused = server.receive(data, sender=c)
            if refused is None:
                _append(path, {"from": c, "data": base64.b64encode(data).decode()})
            else:
                rejections = rejections.add(refused)
        if server.step == "reveal":
            # Too few here is no end: who has not revealed yet is asked again after a restart.
            total = server.total()
            return SecureResult(from_vector(total, plan.update_like), server.survivors, rejections)
        step = server.step
        try:
            inbox = server.advance()
        except DpjaxError:
            if step in ("keys", "shares"):
                path.unlink()  # nobody has masked anything: another session may begin
            raise
        _append(path, {"advance": step})


def _entries(path: pathlib.Path, federation: str, number: int) -> list[dict[str, Any]]:
    """What was written about the open round; a line that was not finished is not there."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines]
    is_open = entries and (entries[0]["federation"], entries[0]["round"]) == (federation, number)
    return entries if is_open else []


def _append(path: pathlib.Path, entry: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
