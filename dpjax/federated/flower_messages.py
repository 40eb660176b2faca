"""What travels in Flower's messages: arrays and numbers out, and checks on what comes in."""

import importlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.boundary import (
    Rejection,
    Rejections,
    UpdateMessage,
    check_update,
    pack_update,
)
from dpjax.federated.deployment import Answer, Plan
from dpjax.types import PyTree

ARRAYS, REQUEST, ANSWER, METRICS = "arrays", "request", "answer", "metrics"
MESSAGE = "message"
# Flower's ErrorCode for a message or a node that is not there: an absence, and no answer to refuse.
_ABSENT = (3, 4, 5)


def flower(module: str) -> Any:
    """A module of Flower.

    Raises:
      DpjaxError: the extra is absent.
    """
    # By name: the extra may be absent, and it takes a second to import.
    try:
        return importlib.import_module(f"flwr.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise DpjaxError(
            "Flower is not installed; install it with: pip install 'dpjax[flower]'"
        ) from None


def client_on(reply: Any, plan: Plan) -> int | None:
    """The client on a node, or None if it is of no use, which is logged."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        reason = reply.error.reason
    else:
        facts = dict(reply.content.config_records.get(ANSWER, {}))
        client = facts.get("client")
        if facts.get("plan") != plan.fingerprint():
            reason = "its plan is another"
        elif not isinstance(client, int) or not 0 <= client < plan.num_clients:
            reason = f"it says that it is client {str(client)[:40]} of {plan.num_clients}"
        else:
            return client
    logging.getLogger("flwr").warning("node %d takes no part: %s", node, str(reason)[:300])
    return None


def is_absent(reply: Any) -> bool:
    """Whether nothing came, and Flower says so."""
    return reply.has_error() and reply.error.code in _ABSENT


def checked_answers(
    plan: Plan,
    number: int,
    asked: Mapping[int, tuple[int, bytes]],
    replies: Iterable[Any],
    l2_bound: float | None,
    max_weight: float | None,
) -> tuple[dict[int, Answer], Rejections]:
    """The answers that pass every check, and how many did not, by reason.

    Args:
      number: the open round.
      asked: client -> node and nonce.
    """
    answers: dict[int, Answer] = {}
    rejections = Rejections()
    seen: set[tuple[int, str] | tuple[str, bytes]] = set()
    for reply in replies:
        if is_absent(reply):
            continue
        found = _check(plan, number, asked, reply, seen, l2_bound, max_weight)
        if isinstance(found, Rejection):
            rejections = rejections.add(found)
            node = reply.metadata.src_node_id
            logging.getLogger("flwr").warning(
                "node %d: %s: %s", node, found.reason, found.detail[:300]
            )
        else:
            client, answer, identities = found
            seen.update(identities)
            answers[client] = answer
    return answers, rejections


def _check(
    plan: Plan,
    number: int,
    asked: Mapping[int, tuple[int, bytes]],
    reply: Any,
    seen: set[tuple[int, str] | tuple[str, bytes]],
    l2_bound: float | None,
    max_weight: float | None,
) -> Rejection | tuple[int, Answer, Any]:
    if reply.has_error():
        return Rejection("malformed", f"no update but an error: {reply.error.reason}")
    try:
        facts = reply.content[ANSWER]
        client, told = int(facts["client"]), int(facts["round"])
        nonce, weight = bytes(facts["nonce"]), float(facts["weight"])
        metrics = {str(n): float(x) for n, x in reply.content[METRICS].items()}
        update = _tree(reply.content[ARRAYS], plan.update_like)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return Rejection("malformed", repr(error)[:200])
    node, expected = asked.get(client, (None, b""))
    if node != reply.metadata.src_node_id:
        return Rejection("unknown client", f"client {client} was not asked on this node")
    if isinstance(update, Rejection):
        return update
    if told == number and not secrets.compare_digest(nonce, expected):
        return Rejection("replayed", f"client {client} answers another request")
    checked = check_update(
        UpdateMessage(str(client), told, nonce, weight, pack_update(update)),
        plan.update_like,
        round=number,
        seen=seen,
        l2_bound=l2_bound,
        max_weight=max_weight,
    )
    if isinstance(checked, Rejection):
        return checked
    return client, Answer(checked.update, checked.weight, metrics), checked.identities


def named(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in leaves}


def to_record(arrays: Mapping[str, np.ndarray]) -> Any:
    """Flower's ArrayRecord. Types that numpy does not know (bfloat16) travel as their bits."""
    flwr = flower("app")
    bits = {
        name: x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" else x
        for name, x in ((n, np.asarray(x)) for n, x in arrays.items())
    }
    return flwr.ArrayRecord({name: flwr.Array(x) for name, x in bits.items()})


def bytes_record(data: bytes) -> Any:
    """Flower's ArrayRecord of some bytes, which it cuts into pieces."""
    return to_record({MESSAGE: np.frombuffer(data, np.uint8)})


def record_bytes(record: Any, max_bytes: int) -> bytes:
    """The way back.

    Raises:
      DpjaxError: anything else, or more.
    """
    array = record.get(MESSAGE)
    if array is None or len(array.data) > max_bytes + 4096:
        raise DpjaxError(f"a message is missing, or longer than {max_bytes} bytes")
    try:
        value = array.numpy()
    except (TypeError, ValueError, OSError, EOFError) as error:
        raise DpjaxError(f"a message that is none: {str(error)[:100]}") from None
    if value.dtype != np.uint8 or value.ndim != 1:
        raise DpjaxError(f"a message is {value.dtype}{list(value.shape)}, not bytes")
    return value.tobytes()


def secure_bytes(reply: Any, max_bytes: int) -> bytes | None:
    """What a client answered to a query of secure aggregation, or None, which is logged."""
    if is_absent(reply):
        return None
    node = reply.metadata.src_node_id
    if reply.has_error():
        reason = reply.error.reason
    else:
        try:
            return record_bytes(reply.content.array_records.get(MESSAGE, {}), max_bytes)
        except DpjaxError as error:
            reason = str(error)
    logging.getLogger("flwr").warning("node %d leaves the round: %s", node, str(reason)[:300])
    return None


def from_record(record: Any, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a request; what does not fit is an error."""
    found = _arrays(record, like)
    if isinstance(found, Rejection):
        raise DpjaxError(f"request refused: {found.reason}: {found.detail}")
    return found


def _tree(record: Any, like: PyTree) -> PyTree | Rejection:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves]
    found = _arrays(record, dict(zip(names, (x for _, x in leaves), strict=True)))
    if isinstance(found, Rejection):
        return found
    return structure.unflatten([found[n] for n in names])


def _arrays(record: Any, like: Mapping[str, Any]) -> dict[str, np.ndarray] | Rejection:
    """Arrays of exactly these names, shapes and dtypes; nothing else is read."""
    if set(record) != set(like):
        return Rejection("wrong structure", f"other arrays than the {len(like)} expected")
    found = {}
    for name, expected in like.items():
        array, dtype = record[name], np.dtype(expected.dtype)
        size = int(np.prod(expected.shape, dtype=np.int64)) * dtype.itemsize
        # The header of numpy's format is short; a longer body is not read.
        if len(array.data) > size + 4096:
            return Rejection("too large", f"{name} has {len(array.data)} bytes, expected {size}")
        try:
            value = array.numpy()
        except (TypeError, ValueError, OSError, EOFError) as error:
            return Rejection("malformed", f"{name}: {str(error)[:100]}")
        if value.shape != tuple(expected.shape):
            return Rejection("wrong shape", f"{name} is {value.shape}, not {expected.shape}")
        if value.dtype != (np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype):
            return Rejection("wrong dtype", f"{name} is {value.dtype}, not {dtype}")
        found[name] = value.view(dtype)
    return found
