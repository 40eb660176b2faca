"""The server of secure aggregation."""

import numpy as np
from jaxtyping import UInt32

from dpjax.errors import DpjaxError
from dpjax.federated.boundary import Rejection, Rejections
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
    exchanger,
    is_signed,
    new_private_key,
    pairwise_mask,
    public_key,
    self_mask_key,
    signed_keys,
    signed_survivors,
)
from dpjax.federated.shamir import join_shares


class SecureServer:
    """The server of one session: passes messages on, and removes masks from the sum.

    It holds no client's secret before the end; then the self masks of survivors and the mask keys
    of missing clients, and the sum.

    Use: `receive` every client's message, `advance` when enough came or time is up, send what that
    returns, and so on; `total` at the end.

    Attributes:
      rejections: messages that were refused, counted by reason.
      step: "keys", "shares", "masked", "confirm" (signed), "reveal" or "done": what is awaited.
    """

    def __init__(self, session: SecureSession):
        self.session, self.step, self.rejections = session, "keys", Rejections()
        self._probe = exchanger(new_private_key())  # finds weak keys, and is good for nothing else
        self._keys: dict[int, Keys] = {}
        self._inboxes: dict[int, dict[int, bytes]] = {}
        self._groups = session.groups()
        self._awaited = {*session.clients}  # who may speak in this step
        self._roster = b""
        self._shared: set[int] = set()
        self._sum = np.zeros(session.length, np.uint32)
        self._survivors: set[int] = set()
        self._signatures: dict[int, bytes] = {}
        self._reveals: dict[int, Reveal] = {}

    @property
    def arrived(self) -> tuple[int, ...]:
        """Clients whose message of this step is here."""
        at = {"keys": self._keys, "shares": self._shared, "masked": self._survivors,
              "confirm": self._signatures, "reveal": self._reveals}  # fmt: skip
        return tuple(sorted(at.get(self.step, ())))

    @property
    def survivors(self) -> tuple[int, ...]:
        """Clients whose vectors are in the sum."""
        return tuple(sorted(self._survivors))

    def receive(self, data: bytes, *, sender: int | None = None) -> Rejection | None:
        """Takes a client's message of this step, or says why not; a refused one changes nothing.

        Args:
          data: from anyone.
          sender: whom the transport knows the message to be from; None trusts its own word.
        """
        found = self._receive(data, sender)
        if found is not None:
            self.rejections = self.rejections.add(found)
        return found

    def _receive(self, data: bytes, sender: int | None) -> Rejection | None:
        session = self.session
        # Nothing that a client sends is longer than its vector or its table.
        longest = max(4 * session.length, 200 * len(session.clients)) + 1024
        if len(data) > longest:
            return Rejection("too large", f"{len(data)} bytes, at most {longest}")
        try:
            message = read_secure_message(data)
        except DpjaxError as error:
            return Rejection("malformed", str(error))
        if message.session != session.id:
            return Rejection("wrong session", "a message of another session")
        wanted = {"keys": Keys, "shares": Shares, "masked": Masked,
                  "confirm": Confirmation, "reveal": Reveal}  # fmt: skip
        if not isinstance(message, Keys | Shares | Masked | Confirmation | Reveal) or (
            not isinstance(message, wanted.get(self.step, ()))
        ):
            return Rejection(
                "wrong step", f"{type(message).__name__} while waiting for {self.step}"
            )
        who = message.sender
        if sender not in (None, who):
            return Rejection("unknown client", f"client {sender} sent it as client {who}")
        if who not in self._awaited:
            return Rejection("unknown client", f"client {who} is not in this step")
        if who in self.arrived:
            return Rejection("duplicate", f"client {who} has sent its {self.step} already")
        if isinstance(message, Keys):
            return self._receive_keys(message)
        if isinstance(message, Shares):
            if {c for c, _ in message.sealed} != (self._groups[who] & self._awaited) - {who}:
                return Rejection("wrong structure", f"client {who} shared with other clients")
            self._shared.add(who)
            for peer, sealed in message.sealed:
                self._inboxes.setdefault(peer, {})[who] = sealed
        elif isinstance(message, Masked):
            if message.vector.shape != (session.length,):
                size = message.vector.size
                return Rejection("wrong shape", f"{size} numbers, expected {session.length}")
            np.add(self._sum, message.vector, out=self._sum)
            self._survivors.add(who)
        elif isinstance(message, Confirmation):
            if not is_signed(
                self._identity(who),
                message.signature,
                signed_survivors(self._told(who), self._roster),
            ):
                return Rejection("bad signature", f"client {who} confirmed something else")
            self._signatures[who] = message.signature
        else:
            told = self._told(who)
            parts = {c for c, _ in message.self_masks}, {c for c, _ in message.mask_keys}
            if not (parts[0] <= {*told.survivors} and parts[1] <= {*told.dropped}):
                return Rejection("wrong structure", f"client {who} revealed what none asked for")
            self._reveals[who] = message
        return None

    def _receive_keys(self, message: Keys) -> Rejection | None:
        who = message.sender
        if self.session.identities is not None and not is_signed(
            self._identity(who), message.signature, signed_keys(message)
        ):
            return Rejection("bad signature", f"keys that client {who} did not sign")
        used = {x for k in self._keys.values() for x in (k.encryption_key, k.mask_key)}
        if message.encryption_key == message.mask_key or used & {
            message.encryption_key, message.mask_key
        }:  # fmt: skip
            return Rejection("duplicate", f"client {who} sent a key that is in use")
        try:
            # A point of low order gives every peer the same known secret; peers would stop.
            for key in (message.encryption_key, message.mask_key):
                self._probe(key)
        except DpjaxError:
            return Rejection("malformed", f"client {who} sent a weak key")
        self._keys[who] = message
        return None

    def advance(self) -> dict[int, bytes]:
        """Closes the step: what to send to whom.

        Raises:
          DpjaxError: fewer clients than the threshold. The session is over, nothing is unmasked.
        """
        step, session, here = self.step, self.session, {*self.arrived}
        if step in ("done", "failed"):
            raise DpjaxError(f"the session is {step}; begin another with new_session")
        if step in ("keys", "shares"):
            here = self._with_enough_peers(here)
        if len(here) < session.quorum:
            raise self._failed(f"{len(here)} clients are left at step {step!r}", session.quorum)
        if step in ("masked", "reveal"):
            # Everybody's secret, also that of who is missing, lies with its group.
            for c in self._shared:
                left = len(self._groups[c] & here)
                if left < session.threshold:
                    raise self._failed(f"{left} of client {c}'s group are left", session.threshold)
        self._awaited, who = here, sorted(here)
        if step == "keys":
            self.step = "shares"
            rosters = {c: Roster(session.id, self._of_group(c, here)).to_bytes() for c in who}
            self._roster = rosters[who[0]]
            return rosters
        if step == "shares":
            self.step, self._shared = "masked", here
            return {c: Shares(session.id, SERVER, self._inbox(c)).to_bytes() for c in who}
        if step == "masked":
            self.step = "reveal" if session.identities is None else "confirm"
            return {c: self._told(c).to_bytes() for c in who}
        if step == "confirm":
            self.step = "reveal"
            signatures = tuple(sorted(self._signatures.items()))
            return dict.fromkeys(who, Confirmations(session.id, signatures).to_bytes())
        self.step = "done"
        return {}

    def _with_enough_peers(self, here: set[int]) -> set[int]:
        """Without those whose group is below the threshold, again and again: they would refuse."""
        while True:
            enough = {c for c in here if len(self._groups[c] & here) >= self.session.threshold}
            if enough == here or self.session.degree is None:
                return here
            here = enough

    def _failed(self, what: str, needed: int) -> DpjaxError:
        self.step = "failed"
        return DpjaxError(
            f"{what} and the threshold is {needed}; nothing was unmasked: begin another session"
        )

    def _of_group(self, client: int, here: set[int]) -> tuple[Keys, ...]:
        return tuple(self._keys[c] for c in sorted(self._groups[client] & here))

    def _inbox(self, client: int) -> tuple[tuple[int, bytes], ...]:
        box = self._inboxes.get(client, {})
        return tuple((c, box[c]) for c in sorted(box) if c in self._shared)

    def _told(self, client: int) -> Survivors:
        """What a client is told: who of its group is in the sum, and who is missing."""
        group = self._groups[client] & self._shared
        return Survivors(
            self.session.id,
            tuple(sorted(group & self._survivors)),
            tuple(sorted(group - self._survivors)),
        )

    def total(self) -> UInt32[np.ndarray, " d"]:
        """The sum of the survivors' vectors, modulo 2^32. Closes the last step.

        Raises:
          DpjaxError: too few shares, or shares that give no right secret. Nothing is unmasked.
        """
        if self.step != "reveal":
            raise DpjaxError(f"total comes after everybody's reveal; the step is {self.step!r}")
        self.advance()
        session, masks = self.session, []
        seeds = {c + 1: dict(r.self_masks) for c, r in self._reveals.items()}
        secrets = {c + 1: dict(r.mask_keys) for c, r in self._reveals.items()}
        for c in sorted(self._survivors):
            seed = self._joined(c, seeds)
            if commitment_to(session, c, seed) != self._keys[c].commitment:
                raise DpjaxError(
                    f"shares of client {c}'s self mask are wrong; begin another session"
                )
            masks.append((self_mask_key(session, seed), -1))
        for c in sorted(self._shared - self._survivors):
            secret = self._joined(c, secrets)
            if public_key(secret) != self._keys[c].mask_key:
                raise DpjaxError(
                    f"shares of client {c}'s mask key are wrong; begin another session"
                )
            # What each survivor added for the missing one: the mirror image of its own.
            exchange = exchanger(secret)
            peers = sorted(self._groups[c] & self._survivors)
            masks += [pairwise_mask(session, exchange, c, self._keys[v]) for v in peers]
        # In place: masked vectors have served, and nobody gets to see a sum that is half masked.
        add_masks(self._sum, masks)
        return self._sum

    def _joined(self, client: int, tables: dict[int, dict[int, bytes]]) -> bytes:
        shares = {
            x: int.from_bytes(table[client]) for x, table in tables.items() if client in table
        }
        secret = join_shares(shares, self.session.threshold)
        # A wrong share may give a number that no 32 bytes hold; what it gives is checked anyway.
        return (secret % 2**256).to_bytes(32)

    def _identity(self, client: int) -> bytes:
        return (self.session.identities or {}).get(client, b"")
