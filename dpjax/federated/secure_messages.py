"""What the parties of secure aggregation send, as bytes: fixed fields, no pickle, sizes checked.

Every message: magic, kind, session, sender; the length of each field; the fields. Tables are rows
of a client's number and as many bytes as the field has, with numbers that increase.
"""

import dataclasses
import itertools
import struct
from typing import TypeAlias

import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.shamir import SHARE_BYTES

SERVER = 2**32 - 1  # the sender that is no client
SEALED_BYTES = 12 + 2 * SHARE_BYTES + 16  # nonce, two shares, tag
SESSION_BYTES = 16

_MAGIC = b"dpS\x01"
_HEAD = struct.Struct("<4sB3x16sI")
_NUMBER = struct.Struct("<I")

Table: TypeAlias = tuple[tuple[int, bytes], ...]


@dataclasses.dataclass(frozen=True)
class Keys:
    """A client's public keys (X25519), and a commitment to its self mask's seed (SHA-256)."""

    session: bytes
    sender: int
    encryption_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes = b""  # Ed25519, in signed sessions

    def to_bytes(self) -> bytes:
        """For the wire."""
        fields = self.encryption_key, self.mask_key, self.commitment, self.signature
        return _pack(1, self.session, self.sender, fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Keys":
        """From the wire, or an error."""
        session, sender, fields = _unpack(1, data, 4)
        _require([len(x) for x in fields[:3]] == [32] * 3, "keys of other sizes")
        _require(len(fields[3]) in (0, 64), "a signature of another size")
        return cls(session, sender, *map(bytes, fields))


@dataclasses.dataclass(frozen=True)
class Roster:
    """Everybody's keys, as they sent them."""

    session: bytes
    keys: tuple[Keys, ...]

    def to_bytes(self) -> bytes:
        """For the wire."""
        return _pack(2, self.session, SERVER, [k.to_bytes() for k in self.keys])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Roster":
        """From the wire, or an error."""
        session, _, fields = _unpack(2, data, None)
        keys = tuple(Keys.from_bytes(bytes(x)) for x in fields)
        _require(all(k.session == session for k in keys), "keys of another session")
        _require_increasing([k.sender for k in keys])
        return cls(session, keys)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Sealed shares: from one client to its peers, or, from the server, to one from its peers."""

    session: bytes
    sender: int
    sealed: Table  # peer, SEALED_BYTES

    def to_bytes(self) -> bytes:
        """For the wire."""
        return _pack(3, self.session, self.sender, [_rows(self.sealed)])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Shares":
        """From the wire, or an error."""
        session, sender, (table,) = _unpack(3, data, 1)
        return cls(session, sender, _table(table, SEALED_BYTES))


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """A client's vector behind its masks: uniform to whoever lacks one of them."""

    session: bytes
    sender: int
    vector: np.ndarray  # uint32[d]

    def to_bytes(self) -> bytes:
        """For the wire."""
        return _pack(4, self.session, self.sender, [self.vector.astype("<u4", copy=False).data])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Masked":
        """From the wire, without a copy, or an error."""
        session, sender, (raw,) = _unpack(4, data, 1)
        _require(len(raw) % 4 == 0, "a vector that ends within a number")
        return cls(session, sender, np.frombuffer(raw, "<u4"))


@dataclasses.dataclass(frozen=True)
class Survivors:
    """Whose vectors are in the sum (their self masks are asked for), and who is missing (their
    pairwise keys are)."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """For the wire."""
        fields = [_rows([(c, b"") for c in some]) for some in (self.survivors, self.dropped)]
        return _pack(5, self.session, SERVER, fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Survivors":
        """From the wire, or an error."""
        session, _, fields = _unpack(5, data, 2)
        survivors, dropped = (tuple(c for c, _ in _table(x, 0)) for x in fields)
        return cls(session, survivors, dropped)


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """A client's signature of the survivors that it was told."""

    session: bytes
    sender: int
    signature: bytes

    def to_bytes(self) -> bytes:
        """For the wire."""
        return _pack(6, self.session, self.sender, [self.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Confirmation":
        """From the wire, or an error."""
        session, sender, (signature,) = _unpack(6, data, 1)
        _require(len(signature) == 64, "a signature of another size")
        return cls(session, sender, bytes(signature))


@dataclasses.dataclass(frozen=True)
class Confirmations:
    """All signatures of the survivors."""

    session: bytes
    signatures: Table

    def to_bytes(self) -> bytes:
        """For the wire."""
        return _pack(7, self.session, SERVER, [_rows(self.signatures)])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Confirmations":
        """From the wire, or an error."""
        session, _, (table,) = _unpack(7, data, 1)
        return cls(session, _table(table, 64))


@dataclasses.dataclass(frozen=True)
class Reveal:
    """A client's shares: of survivors' self masks, and of missing clients' mask keys."""

    session: bytes
    sender: int
    self_masks: Table  # client, SHARE_BYTES
    mask_keys: Table

    def to_bytes(self) -> bytes:
        """For the wire."""
        fields = _rows(self.self_masks), _rows(self.mask_keys)
        return _pack(8, self.session, self.sender, fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reveal":
        """From the wire, or an error."""
        session, sender, fields = _unpack(8, data, 2)
        return cls(session, sender, *(_table(x, SHARE_BYTES) for x in fields))


Message: TypeAlias = (
    Keys | Roster | Shares | Masked | Survivors | Confirmation | Confirmations | Reveal
)
_KINDS = {
    1: Keys, 2: Roster, 3: Shares, 4: Masked,
    5: Survivors, 6: Confirmation, 7: Confirmations, 8: Reveal,
}  # fmt: skip


def read_secure_message(data: bytes) -> Message:
    """Any of the messages above, from bytes of anyone.

    Raises:
      DpjaxError: bytes that are no such message.

    Example:
      >>> sent = Confirmation(bytes(16), 3, bytes(64))
      >>> read_secure_message(sent.to_bytes()) == sent
      True
    """
    _require(len(data) >= _HEAD.size and bytes(data[:4]) == _MAGIC, "bytes of something else")
    _require(data[4] in _KINDS, f"kind {data[4]}")
    return _KINDS[data[4]].from_bytes(data)


def _pack(kind: int, session: bytes, sender: int, fields) -> bytes:
    # The head is 28 bytes, so that a vector, after its length, begins at a multiple of 4.
    lengths = [_NUMBER.pack(memoryview(x).nbytes) for x in fields]
    return b"".join([_HEAD.pack(_MAGIC, kind, session, sender), *lengths, *fields])


def _unpack(kind: int, data: bytes, count: int | None) -> tuple[bytes, int, list[memoryview]]:
    """Session, sender and fields; a ``count`` of None is as many as the first length tells."""
    _require(len(data) >= _HEAD.size, f"{len(data)} bytes")
    magic, found, session, sender = _HEAD.unpack_from(data)
    _require(magic == _MAGIC and found == kind, "another kind of message")
    # Padding that may hold anything would let two different messages be the same one.
    _require(bytes(data[5:8]) == bytes(3), "bytes that must be zero")
    # Shares go both ways: from clients, and to them.
    _require(kind == 3 or (sender == SERVER) == (kind in (2, 5, 7)), "another sender")
    at = _HEAD.size
    if count is None:
        # Equal lengths, one for each field: their number follows from the whole.
        _require(len(data) >= at + 4, "no keys")
        (first,) = _NUMBER.unpack_from(data, at)
        number = (len(data) - at) // (first + 4)
    else:
        number = count
    _require(len(data) >= at + 4 * number, "missing lengths")
    lengths = [_NUMBER.unpack_from(data, at + 4 * k)[0] for k in range(number)]
    at += 4 * number
    _require(sum(lengths) == len(data) - at, "lengths that do not fit")
    view, fields = memoryview(data), []
    for length in lengths:
        fields.append(view[at : at + length])
        at += length
    return session, sender, fields


def _rows(table) -> bytes:
    return b"".join(_NUMBER.pack(client) + value for client, value in table)


def _table(raw: memoryview, width: int) -> Table:
    _require(len(raw) % (4 + width) == 0, "a table that ends within a row")
    rows = []
    for at in range(0, len(raw), 4 + width):
        rows.append((_NUMBER.unpack_from(raw, at)[0], bytes(raw[at + 4 : at + 4 + width])))
    _require_increasing([client for client, _ in rows])
    return tuple(rows)


def _require_increasing(numbers: list[int]) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(numbers))
    _require(increasing and SERVER not in numbers, "clients that repeat or are out of order")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise DpjaxError(f"malformed message of secure aggregation: {what}")
