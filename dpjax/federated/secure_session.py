"""What the parties of secure aggregation agree on: a session, and how keys become masks."""

import dataclasses
import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import UInt32

from dpjax.errors import DpjaxError
from dpjax.federated.secure_messages import SERVER, SESSION_BYTES, Keys, Survivors

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.x25519 import (
        X25519PrivateKey,
        X25519PublicKey,
    )
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:  # pragma: no cover
    raise DpjaxError(
        "secure aggregation needs the package cryptography; install it with "
        "`pip install 'dpjax[federated]'`"
    ) from error

_BLOCK = 1 << 16  # words: masks, sum and zeros of one block stay in the cache together


@dataclasses.dataclass(frozen=True)
class SecureSession:
    """What all parties agree on beforehand, for one sum. A client must not take it from the server
    unchecked.

    Attributes:
      id: 16 bytes that were never used before.
      clients: who may take part, distinct numbers that increase.
      threshold: t. At least so many must stay to the end; fewer than t together with the server
        learn nothing. More than half of the clients, or, signed, more than two thirds.
      length: d, numbers in a vector.
      identities: Ed25519 public keys of all clients. Given, the session is signed: clients prove
        who they are, and that all were told the same survivors, so that even a server that lies
        learns nothing but sums of at least t less a third of the clients. None trusts the server to
        follow the protocol.
      degree: each client shares keys with so many others, k, an even number, in place of all: its
        work is k masks, and the server's k for each client that is missing. The threshold then
        counts within a client and its k neighbours: as long as fewer than t of each such group are
        on the server's side, and half of all clients stay. None is all others, which a signed
        session needs; small cohorts should not do without.
    """

    id: bytes
    clients: tuple[int, ...]
    threshold: int
    length: int
    identities: Mapping[int, bytes] | None = None
    degree: int | None = None

    def __post_init__(self) -> None:
        n = len(self.clients)
        if len(self.id) != SESSION_BYTES or self.length < 1:
            raise DpjaxError(
                f"id has {len(self.id)} bytes and length is {self.length}; use new_session, and "
                "vectors with at least one number"
            )
        if n < 2 or list(self.clients) != sorted({*self.clients}):
            raise DpjaxError("clients must be two or more distinct numbers, in order")
        if not 0 <= self.clients[0] <= self.clients[-1] < SERVER - 1:
            raise DpjaxError(f"clients are numbered from 0 to below {SERVER - 1}")
        signed = self.identities is not None
        if self.degree is not None and (signed or self.degree % 2 or not 2 <= self.degree < n - 1):
            raise DpjaxError(
                f"degree is {self.degree} of {n} clients; it must be even, at least 2 and below "
                f"{n - 1}, and the session not signed"
            )
        group = n if self.degree is None else self.degree + 1
        least = 2 * group // 3 + 1 if signed else group // 2 + 1
        if not least <= self.threshold <= group:
            raise DpjaxError(
                f"threshold is {self.threshold} of {group} clients; it must be {least} to {group}, "
                "so that nobody's two secrets can be asked of different clients"
            )
        if self.identities is not None and {*self.identities} != {*self.clients}:
            raise DpjaxError("identities must have one public key for each client")

    @property
    def quorum(self) -> int:
        """Clients that must stay in all."""
        return self.threshold if self.degree is None else len(self.clients) // 2 + 1

    def groups(self) -> dict[int, frozenset[int]]:
        """Each client with its neighbours: all clients, or the nearest on a ring in random order.

        Source: Bell et al. (2020), section 3: a Harary graph under a random permutation.
        """
        if self.degree is None:
            return dict.fromkeys(self.clients, frozenset(self.clients))

        def place(c):  # the id is random and newer than any client's number
            return hashlib.sha256(b"dpjax ring" + pair_label(self, c, c)).digest()

        ring, half = sorted(self.clients, key=place), self.degree // 2
        return {
            c: frozenset(ring[(at + d) % len(ring)] for d in range(-half, half + 1))
            for at, c in enumerate(ring)
        }


def new_session(
    clients: Iterable[int],
    threshold: int,
    length: int,
    identities: Mapping[int, bytes] | None = None,
    degree: int | None = None,
) -> SecureSession:
    """A session with a fresh id; see `SecureSession`.

    Example:
      >>> new_session(range(5), threshold=3, length=10).clients
      (0, 1, 2, 3, 4)
    """
    who = tuple(sorted(clients))
    fresh = secrets.token_bytes(SESSION_BYTES)
    return SecureSession(fresh, who, threshold, length, identities, degree)


def new_identity() -> tuple[bytes, bytes]:
    """An Ed25519 key pair, private and public: what a client of signed sessions keeps for good.

    Example:
      >>> [len(key) for key in new_identity()]
      [32, 32]
    """
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def sign(identity: bytes, content: bytes) -> bytes:
    """Ed25519's signature by a private key."""
    return Ed25519PrivateKey.from_private_bytes(identity).sign(content)


def seal(key: bytes, content: bytes, label: bytes) -> bytes:
    """AES-GCM under a fresh nonce, which comes first; bound to ``label``."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, content, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes | None:
    """What was sealed, or None where key, content or label are not what they were."""
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], label)
    except InvalidTag:
        return None


def add_masks(total: UInt32[np.ndarray, " d"], masks: Iterable[tuple[bytes, int]]) -> None:
    """Adds or subtracts (sign 1 or -1) the expansion of each key, in place, modulo 2^32.

    The expansion is AES-128's counter mode from 0: a key must serve for one vector only.
    """
    streams = [
        (
            Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update_into,
            np.add if sign > 0 else np.subtract,
        )
        for key, sign in masks
    ]
    zeros, buffer = memoryview(bytes(4 * _BLOCK)), bytearray(4 * _BLOCK + 16)
    words = np.frombuffer(buffer, "<u4")
    # All keys on one block, then the next: the block of the sum does not leave the cache.
    for begin in range(0, len(total), _BLOCK):
        part = total[begin : begin + _BLOCK]
        empty, mask = zeros[: 4 * len(part)], words[: len(part)]
        for expand, combine in streams:
            expand(empty, buffer)
            combine(part, mask, out=part)


def new_private_key() -> bytes:
    """An X25519 private key, from the operating system."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Of an X25519 private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchanger(private: bytes) -> Callable[[bytes], bytes]:
    """From a public key to the secret that both key pairs share; an error for a key of low order,
    which gives anybody the same."""
    own = X25519PrivateKey.from_private_bytes(private)  # slow: once for all peers

    def exchange(public: bytes) -> bytes:
        try:
            return own.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise DpjaxError("a public key is weak: its owner is not honest") from error

    return exchange


def derive(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF with SHA-256: one key for each purpose."""
    return HKDF(SHA256(), length, salt=None, info=b"dpjax " + info).derive(secret)


def pair_label(session: SecureSession, first: int, second: int) -> bytes:
    """The session and two of its clients, in order."""
    return session.id + struct.pack("<II", first, second)


def self_mask_key(session: SecureSession, seed: bytes) -> bytes:
    """The key that a client's self mask expands from."""
    return derive(seed, b"self" + session.id, 16)


def pairwise_mask(
    session: SecureSession, exchange: Callable[[bytes], bytes], owner: int, peer: Keys
) -> tuple[bytes, int]:
    """The key of a pair, and whether its ``owner`` adds it: the smaller number does."""
    low, high = sorted((owner, peer.sender))
    shared = exchange(peer.mask_key)
    return derive(shared, b"pair" + pair_label(session, low, high), 16), 1 if owner == low else -1


def commitment_to(session: SecureSession, client: int, seed: bytes) -> bytes:
    """A hash of a self mask's seed: it hides 256 random bits, and fits no other seed."""
    return hashlib.sha256(b"dpjax commit" + pair_label(session, client, client) + seed).digest()


def signed_keys(keys: Keys) -> bytes:
    """What a client signs of its keys."""
    return b"dpjax keys" + dataclasses.replace(keys, signature=b"").to_bytes()


def signed_survivors(told: Survivors, roster: bytes) -> bytes:
    """What a client signs of the survivors: with the roster's hash, so that no signature of another
    session serves, not even of one that had the same id."""
    return b"dpjax survivors" + hashlib.sha256(roster).digest() + told.to_bytes()


def is_signed(identity: bytes, signature: bytes, content: bytes) -> bool:
    """Whether the owner of an Ed25519 public key signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True
