"""What a client does with a request, and what it remembers: one answer in a round."""

import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from dpjax.checkpoint import digest
from dpjax.errors import DpjaxError
from dpjax.federated.boundary import pack_update, unpack_update
from dpjax.federated.clients import Clients
from dpjax.federated.deployment import Answer, Plan, fresh_client, local_round
from dpjax.types import PyTree, RandomKey, require_key


class Request(NamedTuple):
    """What a client is sent in a round."""

    federation: str  # hex, drawn when the server's folder was made
    plan: str  # `Plan.fingerprint`
    round: int
    accepted: int  # the last round in which the client's update counted, or -1
    nonce: bytes  # 16 bytes, sent back
    arrays: dict[str, np.ndarray]  # from `outgoing`

    def digest(self) -> str:
        """SHA-256 of what is asked: parameters and round."""
        facts = f"{self.federation} {self.plan} {self.round} ".encode()
        return hashlib.sha256(facts + digest(self.arrays).encode()).hexdigest()


class ClientMemory(NamedTuple):
    """What a client keeps between rounds. Its file stays on the client's machine."""

    federation: str
    round: int  # last one that was answered
    request: str  # its digest
    before: PyTree  # the client's state before that answer
    after: PyTree  # and after it; counts only once the server has accepted the answer
    answer: Answer


def answer_request(
    plan: Plan,
    memory: ClientMemory | None,
    request: Request,
    clients: Clients,
    client: int,
    *,
    number: int,
    key: RandomKey,
    data_key: RandomKey,
) -> tuple[Answer, ClientMemory]:
    """What a client says to a request, and what it must remember before it says so.

    A request that comes again (the server was restarted in the middle of a round) gets the same
    answer again. The client's state moves on only when the server says that the answer counted: a
    client that was too slow is then as if it had not taken part.

    Args:
      memory: from the time before; None the first time.
      data_key: batches of round r are drawn with ``fold_in(data_key, r)``.

    Guarantee: in each round at most one update leaves the machine, whatever is asked. Noise that
      the client adds is never drawn twice from one key for different parameters.

    Raises:
      DpjaxError: another plan, another federation, a round that has passed, or a round that was
        answered for other parameters.
    """
    if request.plan != plan.fingerprint():
        raise DpjaxError(
            "the server's plan is not this client's; give both the same algorithm, shapes, number "
            "of clients, batch_size and epochs"
        )
    state = fresh_client(plan)
    if memory is not None:
        if request.federation != memory.federation:
            raise DpjaxError(
                f"this client has answered federation {memory.federation[:8]} and is asked by "
                f"{request.federation[:8]}; give it a new state folder, and a new key"
            )
        if request.round < memory.round:
            raise DpjaxError(
                f"round {request.round} has passed: this client has answered round {memory.round}"
            )
        if request.round == memory.round:
            if request.digest() != memory.request:
                raise DpjaxError(
                    f"round {request.round} was answered for other parameters; a client answers "
                    "once in a round"
                )
            return memory.answer, memory
        state = memory.after if request.accepted == memory.round else memory.before
    answer, after = local_round(
        plan,
        request.arrays,
        state,
        clients,
        client,
        number=number,
        round=request.round,
        key=key,
        cohort_key=jax.random.fold_in(require_key(data_key), request.round),
    )
    kept = ClientMemory(request.federation, request.round, request.digest(), state, after, answer)
    return answer, kept


def save_memory(path: str | os.PathLike, memory: ClientMemory) -> None:
    """Writes what a client remembers, whole or not at all; readable by its owner only."""
    path = pathlib.Path(path)
    update, weight, metrics = memory.answer
    facts = [memory.federation, memory.round, memory.request, weight, metrics]
    content = json.dumps(facts).encode() + b"\n"
    content += pack_update((memory.before, memory.after, update))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_memory(path: str | os.PathLike, plan: Plan) -> ClientMemory | None:
    """What `save_memory` wrote; None if there is nothing yet.

    Raises:
      DpjaxError: a file that is not such a memory, or of another plan.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return None
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        federation, number, request, weight, metrics = json.loads(head)
        like = (plan.client_like, plan.client_like, plan.update_like)
        before, after, update = unpack_update(body, like)
    except (ValueError, DpjaxError) as error:
        raise DpjaxError(
            f"{path} is not the memory of a client of this plan ({error}); restore it, or move it "
            "away to begin again as a new client"
        ) from error
    return ClientMemory(federation, number, request, before, after, Answer(update, weight, metrics))
