"""Secure aggregation: the server learns the sum of clients' vectors, and no vector.

Every pair of clients agrees on a mask that one adds and the other subtracts, so that masks vanish
from the sum of all; a second mask of its own protects a client whose message comes late, when its
pairwise masks were removed already. Shamir shares bring the sum back when clients drop out: of
the self mask of those whose vector arrived, of the pairwise key of those whose did not, never both.

Source: Bonawitz et al. (2017), *Practical secure aggregation for privacy-preserving machine
learning*, figure 4. One addition: each client commits to its self mask, so that a wrong share is
an error and not a wrong sum. For large cohorts, the sparse graph of pairs of Bell et al. (2020).

Keys and seeds come from the operating system. Vectors are uint32, as `fixed_point` encodes them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
from jaxtyping import UInt32

from dpjax.errors import DpjaxError
from dpjax.federated.secure_client import SecureClient
from dpjax.federated.secure_server import SecureServer
from dpjax.federated.secure_session import SecureSession, new_identity, new_session
from dpjax.types import PyTree

__all__ = [
    "SecureClient",
    "SecureServer",
    "SecureSession",
    "SecureSum",
    "Stage",
    "from_vector",
    "new_identity",
    "new_session",
    "secure_sum",
    "to_vector",
]

Stage = Literal["keys", "shares", "masked", "confirm", "reveal"]
_STAGES = ("keys", "shares", "masked", "confirm", "reveal")


@dataclasses.dataclass(frozen=True, eq=False)
class SecureSum:
    """What came out, and what it cost.

    Attributes:
      total: uint32[d], the sum of the survivors' vectors modulo 2^32.
      survivors: whose vectors are in it.
      sent: bytes that each client sent.
      received: bytes that each client got.
    """

    total: np.ndarray
    survivors: tuple[int, ...]
    sent: Mapping[int, int]
    received: Mapping[int, int]


def secure_sum(
    vectors: Mapping[int, UInt32[np.ndarray, " d"]],
    threshold: int,
    *,
    dropouts: Mapping[int, Stage] | None = None,
    signed: bool = False,
    degree: int | None = None,
) -> SecureSum:
    """All parties in this process, every message as bytes: for simulations and tests.

    Args:
      vectors: of each client, by number.
      threshold: see `SecureSession`.
      dropouts: clients that stop before they send the message of a stage: "keys", "shares",
        "masked" (the vector), "confirm" (signed sessions), "reveal". Who stops after "masked" is
        still in the sum.
      signed: with identities; see `SecureSession`.
      degree: of a sparse graph of pairs; see `SecureSession`.

    Raises:
      DpjaxError: fewer clients than the threshold are left.

    Example:
      >>> vectors = {c: np.uint32([c, 2**32 - 1]) for c in range(5)}
      >>> found = secure_sum(vectors, 3, dropouts={1: "masked", 4: "reveal"})
      >>> found.total.tolist(), found.survivors
      ([9, 4294967292], (0, 2, 3, 4))
    """
    gone = {c: _STAGES.index(stage) for c, stage in (dropouts or {}).items()}
    secret, public = {}, None
    if signed:
        made = {c: new_identity() for c in vectors}
        secret = {c: private for c, (private, _) in made.items()}
        public = {c: known for c, (_, known) in made.items()}
    length = len(next(iter(vectors.values())))
    session = new_session(vectors, threshold, length, public, degree)
    clients = {c: SecureClient(session, c, secret.get(c)) for c in session.clients}
    server = SecureServer(session)
    sent, received = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0)
    inbox = dict.fromkeys(clients, b"")
    while server.step != "reveal" or not server.arrived:
        stage = _STAGES.index(server.step)
        for c, message in inbox.items():
            received[c] += len(message)
            if gone.get(c, len(_STAGES)) <= stage:
                continue
            answer = _answer(clients[c], server.step, message, vectors[c])
            sent[c] += len(answer)
            refused = server.receive(answer, sender=c)
            if refused is not None:
                raise DpjaxError(f"client {c} was refused: {refused.detail}")
        if server.step == "reveal":
            break
        inbox = server.advance()
    return SecureSum(server.total(), server.survivors, sent, received)


def _answer(client: SecureClient, step: str, message: bytes, vector: np.ndarray) -> bytes:
    if step == "keys":
        return client.keys()
    if step == "shares":
        return client.share_keys(message)
    if step == "masked":
        return client.mask(message, vector)
    return client.confirm(message) if step == "confirm" else client.reveal(message)


def to_vector(tree: PyTree) -> UInt32[np.ndarray, " d"]:
    """All uint32 leaves one after another: what a client masks.

    Example:
      >>> to_vector({"b": np.uint32([3]), "a": np.uint32([[1], [2]])})
      array([1, 2, 3], dtype=uint32)
    """
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    if not leaves or any(x.dtype != np.uint32 for x in leaves):
        raise DpjaxError("secure aggregation adds integers; encode with fixed_point")
    return np.concatenate([x.ravel() for x in leaves])


def from_vector(vector: UInt32[np.ndarray, " d"], like: PyTree) -> PyTree:
    """The way back from `to_vector`, in the structure and shapes of ``like``.

    Example:
      >>> from_vector(np.uint32([1, 2, 3]), {"a": np.zeros((2, 1)), "b": np.zeros(1)})["a"].shape
      (2, 1)
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([int(np.prod(np.shape(x))) for x in leaves])
    if len(vector) != ends[-1]:
        raise DpjaxError(f"the vector has {len(vector)} numbers and the tree {ends[-1]}")
    parts = np.split(np.asarray(vector), ends[:-1])
    return structure.unflatten(
        [part.reshape(np.shape(x)) for part, x in zip(parts, leaves, strict=True)]
    )
