"""A client of secure aggregation."""

import dataclasses
import json
import secrets
from typing import Any

import numpy as np
from jaxtyping import UInt32

from dpjax.errors import DpjaxError
from dpjax.federated.secure_messages import (
    SERVER,
    Confirmation,
    Confirmations,
    Keys,
    Masked,
    Reveal,
    Roster,
    Shares,
    Survivors,
    read_secure_message,
)
from dpjax.federated.secure_session import (
    SecureSession,
    add_masks,
    commitment_to,
    derive,
    exchanger,
    is_signed,
    new_private_key,
    pair_label,
    pairwise_mask,
    public_key,
    seal,
    self_mask_key,
    sign,
    signed_keys,
    signed_survivors,
    unseal,
)
from dpjax.federated.shamir import SHARE_BYTES, split_secret


class SecureClient:
    """One client in one session. It answers every step once, and in order.

    An object that changes, not a value: an old copy could be asked twice, and two answers reveal
    what one hides. A message that is refused raises DpjaxError and changes nothing.

    Guarantee: with an honest client, whoever sees all that it sends and fewer than ``threshold``
      clients' secrets learns only sums over ``threshold`` clients or more; see `SecureSession` for
      servers that lie. Its masked vector alone is uniform bits to the server.

    Args:
      session: from a source that the client trusts.
      number: which client this is.
      identity: Ed25519 private key (32 bytes), in signed sessions.
    """

    def __init__(self, session: SecureSession, number: int, identity: bytes | None = None):
        if number not in session.clients:
            raise DpjaxError(f"client {number} is not in the session")
        if (identity is None) != (session.identities is None):
            raise DpjaxError("identity is for signed sessions, where it is needed")
        self._session, self._number = session, number
        self._identity = identity
        self._step = 0
        self._encryption_key, self._mask_key = new_private_key(), new_private_key()
        self._exchange = exchanger(self._encryption_key)
        self._seed = secrets.token_bytes(32)
        self._peers: dict[int, Keys] = {}
        self._roster = b""
        self._own_share = (0, 0)
        self._sealed: dict[int, bytes] = {}
        self._told: Survivors | None = None

    def keys(self) -> bytes:
        """Step 0: public keys, for the server."""
        self._begin(0)
        public = [public_key(k) for k in (self._encryption_key, self._mask_key)]
        commitment = commitment_to(self._session, self._number, self._seed)
        mine = Keys(self._session.id, self._number, public[0], public[1], commitment)
        if self._identity is not None:
            mine = dataclasses.replace(mine, signature=sign(self._identity, signed_keys(mine)))
        self._peers[self._number] = mine
        self._step = 1
        return mine.to_bytes()

    def share_keys(self, roster: bytes) -> bytes:
        """Step 1: everybody's keys in; shares of both secrets, sealed for each peer, out."""
        self._begin(1)
        session, me = self._session, self._number
        told = self._read(Roster, roster)
        peers = {k.sender: k for k in told.keys}
        self._check(len(peers) >= session.threshold, "fewer clients than the threshold")
        self._check({*peers} <= session.groups()[me], "clients that are not this one's peers")
        self._check(peers.get(me) == self._peers[me], "other keys for this client than its own")
        public = [x for k in told.keys for x in (k.encryption_key, k.mask_key)]
        self._check(len(set(public)) == len(public), "a key that is used twice")
        if session.identities is not None:
            for k in told.keys:
                valid = is_signed(session.identities[k.sender], k.signature, signed_keys(k))
                self._check(valid, f"keys that client {k.sender} did not sign")
        points = [c + 1 for c in peers]
        split = [
            split_secret(int.from_bytes(secret), points, session.threshold)
            for secret in (self._mask_key, self._seed)
        ]
        sealed = []
        for c in sorted(peers):
            mine = split[0][c + 1], split[1][c + 1]
            if c == me:
                self._own_share = mine
                continue
            body = b"".join(x.to_bytes(SHARE_BYTES) for x in mine)
            key = self._sealing_key(peers[c], me, c)
            sealed.append((c, seal(key, body, pair_label(session, me, c))))
        self._peers, self._roster, self._step = peers, roster, 2
        return Shares(session.id, me, tuple(sealed)).to_bytes()

    def mask(self, inbox: bytes, vector: UInt32[np.ndarray, " d"]) -> bytes:
        """Step 2: peers' sealed shares and this client's vector in; the masked vector out."""
        self._begin(2)
        session, me = self._session, self._number
        told = self._read(Shares, inbox)
        self._check(told.sender == SERVER, "shares that did not come through the server")
        sealed = dict(told.sealed)
        self._check({*sealed} <= {*self._peers} - {me}, "shares of clients without keys")
        self._check(len(sealed) + 1 >= session.threshold, "fewer clients than the threshold")
        vector = np.asarray(vector)
        if vector.dtype != np.uint32 or vector.shape != (session.length,):
            raise DpjaxError(
                f"vector is {vector.dtype}{list(vector.shape)}; the session sums "
                f"uint32[{session.length}]: encode updates with fixed_point and to_vector"
            )
        masks = [(self_mask_key(session, self._seed), 1)]
        exchange = exchanger(self._mask_key)
        masks += [pairwise_mask(session, exchange, me, self._peers[c]) for c in sealed]
        masked = vector.copy()
        add_masks(masked, masks)
        self._sealed, self._step = sealed, 3
        return Masked(session.id, me, masked).to_bytes()

    def confirm(self, survivors: bytes) -> bytes:
        """Step 3, signed sessions only: who is in the sum comes in; a signature of it goes out."""
        self._begin(3)
        if self._identity is None:
            raise DpjaxError("the session is not signed: reveal comes after mask")
        told = self._checked_survivors(survivors)
        self._told, self._step = told, 4
        signature = sign(self._identity, signed_survivors(told, self._roster))
        return Confirmation(self._session.id, self._number, signature).to_bytes()

    def reveal(self, request: bytes) -> bytes:
        """Last step: the survivors, or, in signed sessions, their confirmations come in; a share of
        one secret of each client goes out. Never asked for both, and never answered twice."""
        session = self._session
        if session.identities is None:
            self._begin(3)
            told = self._checked_survivors(request)
        else:
            self._begin(4)
            told = self._told
            if told is None:
                raise DpjaxError("reveal comes after confirm")
            signatures = dict(self._read(Confirmations, request).signatures)
            enough = len(signatures) >= session.threshold
            self._check(enough, "fewer confirmations than the threshold")
            self._check({*signatures} <= {*told.survivors}, "confirmations of missing clients")
            content = signed_survivors(told, self._roster)
            for c, signature in signatures.items():
                valid = is_signed(session.identities[c], signature, content)
                self._check(valid, f"other survivors than those that client {c} was told")
        self._step = 5
        shares = {c: self._open(c) for c in (*told.survivors, *told.dropped)}
        self_masks = tuple((c, shares[c][SHARE_BYTES:]) for c in told.survivors if shares[c])
        mask_keys = tuple((c, shares[c][:SHARE_BYTES]) for c in told.dropped if shares[c])
        return Reveal(session.id, self._number, self_masks, mask_keys).to_bytes()

    def to_bytes(self) -> bytes:
        """Its secrets between two steps, for the client's own disk: keep them as keys are kept, and
        replace the old ones before an answer leaves."""
        content = {
            "step": self._step,
            "secrets": [x.hex() for x in (self._encryption_key, self._mask_key, self._seed)],
            "peers": [k.to_bytes().hex() for k in self._peers.values()],
            "roster": self._roster.hex(),
            "own_share": [str(x) for x in self._own_share],
            "sealed": [[c, x.hex()] for c, x in self._sealed.items()],
            "told": None if self._told is None else self._told.to_bytes().hex(),
        }
        return json.dumps(content).encode()

    @classmethod
    def from_bytes(
        cls, data: bytes, session: SecureSession, number: int, identity: bytes | None = None
    ) -> "SecureClient":
        """The way back, for the same session; an older copy must not be used again."""
        content = json.loads(data)
        client = cls(session, number, identity)
        secrets = [bytes.fromhex(x) for x in content["secrets"]]
        client._encryption_key, client._mask_key, client._seed = secrets
        client._exchange = exchanger(client._encryption_key)
        peers = [Keys.from_bytes(bytes.fromhex(x)) for x in content["peers"]]
        client._peers = {k.sender: k for k in peers}
        client._roster = bytes.fromhex(content["roster"])
        mine = [int(x) for x in content["own_share"]]
        client._own_share = (mine[0], mine[1])
        client._sealed = {c: bytes.fromhex(x) for c, x in content["sealed"]}
        if content["told"] is not None:
            client._told = Survivors.from_bytes(bytes.fromhex(content["told"]))
        client._step = content["step"]
        return client

    def _begin(self, step: int) -> None:
        if self._step != step:
            raise DpjaxError(
                f"client {self._number} is at step {self._step}, not {step}; it answers each once"
            )

    def _read(self, kind: Any, data: bytes) -> Any:
        message = read_secure_message(data)
        self._check(isinstance(message, kind), f"a {type(message).__name__}")
        self._check(message.session == self._session.id, "a message of another session")
        return message

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise DpjaxError(f"client {self._number} refuses: the server sent {what}")

    def _checked_survivors(self, data: bytes) -> Survivors:
        told = self._read(Survivors, data)
        survivors, dropped = {*told.survivors}, {*told.dropped}
        self._check(not survivors & dropped, "a client as survivor and as missing")
        # All of them: a client left out would keep its masks in the sum.
        known = {*self._sealed, self._number}
        self._check(survivors | dropped == known, "other clients than those that shared keys")
        self._check(self._number in survivors, "this client as missing")
        self._check(len(survivors) >= self._session.threshold, "fewer survivors than the threshold")
        return told

    def _sealing_key(self, peer: Keys, sender: int, receiver: int) -> bytes:
        return derive(
            self._exchange(peer.encryption_key),
            b"seal" + pair_label(self._session, sender, receiver),
            32,
        )

    def _open(self, sender: int) -> bytes:
        """A peer's two shares, or nothing where its message is broken: others have theirs."""
        if sender == self._number:
            return b"".join(x.to_bytes(SHARE_BYTES) for x in self._own_share)
        sealed, me = self._sealed[sender], self._number
        key = self._sealing_key(self._peers[sender], sender, me)
        found = unseal(key, sealed, pair_label(self._session, sender, me))
        return found if found is not None and len(found) == 2 * SHARE_BYTES else b""
