"""The checks at the door: what comes from outside is refused with a reason, and counted.

Pure host-side numpy. An update travels as raw little-endian arrays after a short header, and is
read only into shapes and dtypes that the server expected: nothing in a message is ever executed,
and no size in it is trusted.
"""

import dataclasses
import json
import math
import struct
import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.types import PyTree

Reason = Literal[
    "unknown client",
    "malformed",
    "too large",
    "wrong structure",
    "wrong shape",
    "wrong dtype",
    "stale round",
    "future round",
    "duplicate",
    "replayed",
    "bad weight",
    "not finite",
    "norm too large",
    "wrong session",
    "wrong step",
    "bad signature",
]

_MAGIC = b"dpjU\x01"
_LENGTH = struct.Struct("<I")
_ENVELOPE = struct.Struct("<5sIQ16sdH")  # magic, length of all, round, nonce, weight, name length
_ENVELOPE_MAGIC = b"dpjM\x01"
_MAX_NAME = 1024  # bytes
_NOTHING = np.zeros(0, np.uint8)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why an update was refused: a reason from a short list, and one line of detail."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class Rejections:
    """How many updates were refused, for each reason.

    Example:
      >>> seen = Rejections().add(Rejection("stale round", "round 1, expected 2"))
      >>> dict(seen.counts), seen.total
      ({'stale round': 1}, 1)
    """

    counts: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def add(self, rejection: Rejection) -> "Rejections":
        """One more; the old counts stay as they were."""
        more = {**self.counts, rejection.reason: self.counts.get(rejection.reason, 0) + 1}
        return Rejections(MappingProxyType(more))

    @property
    def total(self) -> int:
        """Over all reasons."""
        return sum(self.counts.values())


@dataclasses.dataclass(frozen=True)
class UpdateMessage:
    """What a client sends in a round.

    Attributes:
      client: its name. Who may use it is the transport's matter.
      round: that the update was made for.
      nonce: 16 bytes that the client never used before.
      weight: of the update, e.g. its number of examples.
      payload: the update, from `pack_update`.
    """

    client: str
    round: int
    nonce: bytes
    weight: float
    payload: bytes | memoryview

    def to_bytes(self) -> bytes:
        """The message as bytes; `read_message` is the way back.

        Raises:
          DpjaxError: a nonce that is not 16 bytes, or a name or round that does not fit.
        """
        name = self.client.encode()
        if len(self.nonce) != 16 or len(name) > _MAX_NAME or not 0 <= self.round < 2**63:
            raise DpjaxError(
                f"nonce has {len(self.nonce)} bytes, client's name {len(name)}, round is "
                f"{self.round}; they must be 16, at most {_MAX_NAME}, and 0 to 2^63"
            )
        length = _ENVELOPE.size + len(name) + len(self.payload)
        head = _ENVELOPE.pack(
            _ENVELOPE_MAGIC, length, self.round, self.nonce, self.weight, len(name)
        )
        return b"".join((head, name, self.payload))


@dataclasses.dataclass(frozen=True)
class CheckedUpdate:
    """An update that passed every check.

    Attributes:
      update: numpy arrays in the structure that was expected.
      weight: finite, at least 0.
      identities: (round, client) and (client, nonce), for the caller's set ``seen``.
    """

    update: PyTree
    weight: float
    identities: tuple[tuple[int, str], tuple[str, bytes]]


def pack_update(tree: PyTree) -> bytes:
    """Arrays as bytes: a JSON header of paths, shapes and dtypes, then raw little-endian values.

    Example:
      >>> data = pack_update({"w": np.float32([1, 2])})
      >>> unpack_update(data, {"w": np.zeros(2, np.float32)})["w"].tolist()
      [1.0, 2.0]
    """
    header = _header(tree)
    parts = [_MAGIC, _LENGTH.pack(len(header)), header]
    parts += [_little_endian(np.asarray(x)) for x in jax.tree.leaves(tree)]
    return b"".join(parts)


def unpack_update(data: bytes | memoryview, like: PyTree) -> PyTree:
    """Arrays from bytes, in exactly the structure, shapes and dtypes of ``like``.

    Args:
      data: from `pack_update`; may come from anyone. It is never larger than ``like`` needs: other
        lengths are refused before anything is read.
      like: pytree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      Read-only numpy arrays over ``data``. They may hold NaN: `check_update` looks.

    Raises:
      DpjaxError: bytes that are not such an update, with the reason.
    """
    found = _unpack(data, like)
    if isinstance(found, Rejection):
        raise DpjaxError(f"update refused: {found.reason}: {found.detail}")
    return found


def read_message(data: bytes, *, max_bytes: int) -> UpdateMessage | Rejection:
    """The message in these bytes, its payload not looked at yet.

    Args:
      data: from anyone.
      max_bytes: longer messages are refused.

    Example:
      >>> read_message(b"hello", max_bytes=1000).reason
      'malformed'
    """
    if len(data) > max_bytes:
        return Rejection("too large", f"{len(data)} bytes, at most {max_bytes}")
    if len(data) < _ENVELOPE.size:
        return Rejection("malformed", f"{len(data)} bytes are no message")
    magic, length, number, nonce, weight, name_length = _ENVELOPE.unpack_from(data)
    if magic != _ENVELOPE_MAGIC or length != len(data) or number >= 2**63:
        return Rejection("malformed", f"no message of {len(data)} bytes begins like this")
    begin = _ENVELOPE.size + name_length
    if name_length > _MAX_NAME or begin > len(data):
        return Rejection("malformed", f"a name of {name_length} bytes")
    try:
        client = bytes(data[_ENVELOPE.size : begin]).decode()
    except UnicodeDecodeError:
        return Rejection("malformed", "the client's name is not UTF-8")
    # A view: updates are large, and are copied at most once, by whoever keeps them.
    return UpdateMessage(client, number, nonce, weight, memoryview(data)[begin:])


def check_update(
    message: UpdateMessage,
    like: PyTree,
    *,
    round: int,
    seen: Collection[tuple[int, str] | tuple[str, bytes]] = frozenset(),
    clients: Collection[str] | None = None,
    l2_bound: float | None = None,
    max_weight: float | None = None,
) -> CheckedUpdate | Rejection:
    """Everything that can be said about one update without another.

    Args:
      message: from `read_message`.
      like: pytree of arrays or `jax.ShapeDtypeStruct` that the update must match exactly.
      round: that is open.
      seen: a set of the identities that were accepted already. A client speaks once in a round,
        and uses a nonce once.
      clients: who was asked; None is anybody.
      l2_bound: largest L2 norm of the whole update, in float64; integer leaves are not counted.
      max_weight: largest weight.

    Returns:
      The update, or why not. It never raises on what ``message`` holds.

    Example:
      >>> like = {"w": np.zeros(2, np.float32)}
      >>> sent = pack_update({"w": np.float32([3, np.nan])})
      >>> message = UpdateMessage("ann", 4, bytes(16), 1.0, sent)
      >>> check_update(message, like, round=4)
      Rejection(reason='not finite', detail="['w'] holds NaN or infinity")
      >>> check_update(message, like, round=5).reason
      'stale round'
    """
    if clients is not None and message.client not in clients:
        return Rejection("unknown client", f"{message.client!r} was not asked")
    if message.round != round:
        reason = "stale round" if message.round < round else "future round"
        return Rejection(reason, f"round {message.round}, expected {round}")
    in_round = (message.round, message.client)
    once = (message.client, bytes(message.nonce))
    if once in seen:
        return Rejection("replayed", f"{message.client!r} used this nonce before")
    if in_round in seen:
        return Rejection("duplicate", f"{message.client!r} has sent an update in this round")
    weight = message.weight
    if not math.isfinite(weight) or weight < 0:
        return Rejection("bad weight", f"{weight}; it must be finite and at least 0")
    if max_weight is not None and weight > max_weight:
        return Rejection("bad weight", f"{weight}, at most {max_weight}")
    update = _unpack(message.payload, like)
    if isinstance(update, Rejection):
        return update
    norm = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        if not _is_float(leaf.dtype):
            continue
        if not np.isfinite(leaf).all():
            return Rejection("not finite", f"{jax.tree_util.keystr(path)} holds NaN or infinity")
        if l2_bound is not None:
            # In float64 and units of the largest: neither float16 nor any square may overflow.
            sizes = np.abs(leaf.ravel().astype(np.float64))
            largest = float(np.max(sizes, initial=0.0)) or 1.0
            sizes /= largest
            norm = math.hypot(norm, largest * math.sqrt(float(sizes @ sizes)))
    if l2_bound is not None and norm > l2_bound:
        return Rejection("norm too large", f"L2 norm {norm:.6g}, at most {l2_bound:.6g}")
    return CheckedUpdate(update, weight, (in_round, once))


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _header(like: PyTree) -> bytes:
    rows = [
        [jax.tree_util.keystr(path), np.dtype(x.dtype).name, list(np.shape(x))]
        for path, x in jax.tree_util.tree_leaves_with_path(like)
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def _little_endian(x: np.ndarray) -> bytes:
    if sys.byteorder == "big" and x.dtype.itemsize > 1:
        x = x.view(f"u{x.dtype.itemsize}").byteswap()
    return x.tobytes()


def _unpack(data: bytes | memoryview, like: PyTree) -> PyTree | Rejection:
    expected = _header(like)
    leaves, structure = jax.tree.flatten(like)
    sizes = [math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves]
    begin = len(_MAGIC) + _LENGTH.size
    if len(data) < begin or bytes(data[: len(_MAGIC)]) != _MAGIC:
        return Rejection("malformed", f"{len(data)} bytes do not begin like an update")
    (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
    if length > len(data) - begin:
        return Rejection("malformed", f"a header of {length} bytes in {len(data)}")
    header = bytes(data[begin : begin + length])
    if header != expected:
        return _difference(header, expected)
    begin += length
    if len(data) - begin != sum(sizes):
        reason = "too large" if len(data) - begin > sum(sizes) else "malformed"
        return Rejection(reason, f"{len(data) - begin} bytes of values, expected {sum(sizes)}")
    arrays = []
    for leaf, size in zip(leaves, sizes, strict=True):
        dtype = np.dtype(leaf.dtype)
        part = np.frombuffer(data, np.uint8, count=size, offset=begin) if size else _NOTHING
        # A boolean that is neither 0 nor 1 is undefined behaviour in whatever reads it.
        if dtype.kind == "b" and size and part.max() > 1:
            return Rejection("malformed", "a boolean that is neither 0 nor 1")
        if part.ctypes.data % dtype.itemsize:
            part = part.copy()  # numpy is slow on numbers that lie across words
        values = part.view(dtype)
        if sys.byteorder == "big" and dtype.itemsize > 1:
            values = values.view(f"u{dtype.itemsize}").byteswap().view(dtype)
        values.flags.writeable = False
        arrays.append(values.reshape(leaf.shape))
        begin += size
    return structure.unflatten(arrays)


def _difference(header: bytes, expected: bytes) -> Rejection:
    """What is wrong with a header that is not the expected one."""
    if len(header) > 4 * len(expected) + 1024:
        return Rejection("wrong structure", f"a header of {len(header)} bytes")
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return Rejection("malformed", "the header is not JSON")
    wanted = json.loads(expected)
    found = found if isinstance(found, list) else [found]
    rows = [x for x in found if isinstance(x, list) and len(x) == 3]
    if len(rows) != len(found) or [x[0] for x in rows] != [x[0] for x in wanted]:
        return Rejection("wrong structure", f"other arrays than the {len(wanted)} expected")
    for (_, dtype, shape), (path, right_dtype, right_shape) in zip(rows, wanted, strict=True):
        if dtype != right_dtype:
            return Rejection("wrong dtype", f"{path} is {str(dtype)[:40]!r}, not {right_dtype}")
        if shape != right_shape:
            return Rejection("wrong shape", f"{path} is {str(shape)[:80]}, not {right_shape}")
    return Rejection("malformed", "the header is not written as expected")
