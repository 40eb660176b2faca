"""Messages between a requester and a worker: a JSON header, then raw arrays. Nothing is executed.

Lengths come first and are checked before anything is read or allocated; shapes and dtypes are
checked before a value is looked at; a message must arrive whole within a time.
"""

import json
import math
import struct
import time
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.boundary import pack_update, unpack_update
from dpjax.federated.worker_pointer import Header
from dpjax.federated.worker_rules import MAX_RANK

MAX_HEADER = 2**20  # bytes
_MAGIC = b"dpW\x01"
_LENGTHS = struct.Struct("<4sIQ")  # magic, header, arrays
_PART = 2**20
_SLOWEST = 2**20  # bytes a second that a long message must at least make
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)


class Connection(Protocol):
    """What is asked of a TLS socket."""

    def recv_into(self, buffer: Any, /) -> int: ...
    def sendall(self, data: Any, /) -> None: ...
    def settimeout(self, value: float | None, /) -> None: ...


class Closed(Exception):  # noqa: N818
    """The other side ended the connection between two messages."""


def pack_message(header: Header, arrays: Sequence[np.ndarray]) -> bytes:
    """A message as bytes.

    Example:
      >>> sent = pack_message({"do": "put"}, [np.float32([1, 2])])
      >>> read_message_bytes(sent, max_bytes=1000)
      ({'do': 'put'}, [array([1., 2.], dtype=float32)])
    """
    arrays = [np.asarray(x) for x in arrays]
    shapes = [[x.dtype.name, list(x.shape)] for x in arrays]
    body = pack_update(arrays) if arrays else b""
    try:
        text = json.dumps({**header, "arrays_sent": shapes}, allow_nan=False).encode()
    except ValueError:
        raise DpjaxError("a number is NaN or infinite; numbers must be finite") from None
    if len(text) > MAX_HEADER:
        raise DpjaxError(f"the header has {len(text)} bytes; at most {MAX_HEADER} are taken")
    return b"".join((_LENGTHS.pack(_MAGIC, len(text), len(body)), text, body))


def read_message_bytes(data: bytes, *, max_bytes: int) -> tuple[Header, list[np.ndarray]]:
    """`pack_message` undone, for whole messages in memory."""
    header_length, body_length = _lengths(data[: _LENGTHS.size], max_bytes)
    if len(data) != _LENGTHS.size + header_length + body_length:
        _malformed("its lengths do not fit")
    text = data[_LENGTHS.size : _LENGTHS.size + header_length]
    return _parsed(text, data[_LENGTHS.size + header_length :])


def send_message(
    connection: Connection, header: Header, arrays: Sequence[np.ndarray], *, timeout_s: float
) -> None:
    """Sends one message, or raises `TimeoutError`."""
    data = pack_message(header, arrays)
    connection.settimeout(timeout_s + len(data) / _SLOWEST)
    connection.sendall(data)


def receive_message(
    connection: Connection,
    *,
    max_bytes: int,
    idle_s: float,
    timeout_s: float,
    max_header: int = MAX_HEADER,
) -> tuple[Header, list[np.ndarray]]:
    """Reads one message.

    Args:
      max_bytes, max_header: of the arrays, and of the header.
      idle_s: to wait for its first byte.
      timeout_s: for the rest of a short message; a long one has a second more for each MiB.

    Raises:
      Closed: nothing more comes.
      DpjaxError: it is no such message.
      TimeoutError, OSError: from the socket.
    """
    first = _exactly(connection, 1, time.monotonic() + idle_s, at_start=True)
    deadline = time.monotonic() + timeout_s
    head = first + _exactly(connection, _LENGTHS.size - 1, deadline)
    header_length, body_length = _lengths(head, max_bytes, max_header)
    deadline += (header_length + body_length) / _SLOWEST
    text = _exactly(connection, header_length, deadline)
    return _parsed(text, _exactly(connection, body_length, deadline))


def _exactly(connection: Connection, count: int, deadline: float, at_start: bool = False) -> bytes:
    # Memory grows with what has come, not with what was announced.
    parts: list[bytes] = []
    missing = count
    while missing:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("a message came too slowly")
        connection.settimeout(remaining)
        buffer = bytearray(min(missing, _PART))
        got = connection.recv_into(buffer)
        if got == 0:
            if at_start:
                raise Closed
            _malformed("it ends within")
        parts.append(bytes(buffer[:got]))
        missing -= got
    return b"".join(parts)


def _lengths(head: bytes, max_bytes: int, max_header: int = MAX_HEADER) -> tuple[int, int]:
    if len(head) != _LENGTHS.size or head[:4] != _MAGIC:
        _malformed("it does not begin like one")
    _, header_length, body_length = _LENGTHS.unpack(head)
    if header_length > max_header or body_length > max_bytes:
        raise DpjaxError(
            f"the message has {header_length} and {body_length} bytes; at most {max_header} and "
            f"{max_bytes} are taken"
        )
    return header_length, body_length


def _parsed(text: bytes, body: bytes) -> tuple[Header, list[np.ndarray]]:
    try:
        header = json.loads(text, parse_constant=_malformed)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DpjaxError):
            raise
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("arrays_sent"), list):
        _malformed("its header is not an object with arrays_sent")
    like: list[jax.ShapeDtypeStruct] = []
    for row in header.pop("arrays_sent"):
        match row:
            case [str(dtype), [*shape]] if dtype in _DTYPES and len(shape) <= MAX_RANK:
                if not all(type(n) is int and 0 <= n < 2**40 for n in shape):
                    _malformed("a shape is no shape")
                # The values must be there: nothing is allocated for what is only announced.
                if math.prod(shape) * np.dtype(dtype).itemsize > len(body):
                    _malformed("an array is larger than what was sent")
                like.append(jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)))
            case _:
                _malformed("an array is not a known dtype and a shape")
    if not like:
        if body:
            _malformed("there are bytes of no array")
        return header, []
    return header, unpack_update(body, like)


def _malformed(why: str) -> NoReturn:
    raise DpjaxError(f"malformed message: {why[:80]}")
