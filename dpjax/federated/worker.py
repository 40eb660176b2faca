"""A worker keeps its owner's data; others compute on it through pointers and get what it permits.

The same `Worker` answers in-process and over TLS (worker_server.py). In-process it is a rehearsal
of the real thing: code in the owner's process can read the owner's memory, whatever a policy says.
"""

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.federated import worker_rules
from dpjax.federated.worker_pointer import Header, Pointer, Session
from dpjax.federated.worker_policy import (
    Cost,
    Policy,
    Spent,
    check_noise_multiplier,
    noisy_answer,
    plan_release,
    spent_epsilon,
)
from dpjax.federated.worker_rules import Node
from dpjax.ledger import Ledger

LOCAL = "local"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_POINTERS = 10_000
_MAX_ANSWERS = 1024  # kept for the same question again


@dataclasses.dataclass(frozen=True)
class _Requester:
    """Who may connect; the token itself is not kept."""

    digest: bytes  # SHA-256 of the token
    target_epsilon: float
    target_delta: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Open:
    """A session: whose, and its values by pointer."""

    requester: str
    nodes: dict[str, Node]


class Worker:
    """The owner's side: arrays, policies, who may ask, and what each has been told.

    Args:
      name: shown to others.
      policy: of arrays that are put without one of their own. By default nothing leaves.
      target_epsilon, target_delta: budget of each requester, over all arrays of this worker.
        Delta 0 is pure DP, for Laplace only.
      epsilon_of_all: bound on what all requesters together are told, should they put it together.
        Without it k requesters together know what k budgets pay for.
      ledger: file in which answers are recorded; None keeps them in memory, where a budget ends
        with the process. One worker for each file.
      max_bytes: memory of a session's values.

    Guarantee:
      - A requester who sees any number of answers, each chosen after seeing those before, learns
        no more than (target_epsilon, target_delta)-DP permits about one record: one row of each
        array under `Policy.dp`, replaced by any other; who has m rows of an array is a group of m,
        at m times the epsilon and a larger delta. Shapes, and so the numbers of records, are
        public. `Policy.allow` protects nothing; under `Policy.deny` nothing leaves.
      - A value keeps the policies of all arrays that it was computed from; the strictest counts.
      - An answer is in the ledger, and on disk, before its noise is drawn. Budgets are checked and
        charged under one lock.
      - Noise is exact and from the operating system (`noisy_answer`). No key is involved.
      - The same question by the same requester gets the same answer while the process lives (of
        the last 1,024): asking again averages nothing and costs nothing.
      - Not covered: how long an operation takes, and memory beyond ``max_bytes``.

    Example:
      >>> alice = Worker("alice", Policy.dp(0, 10, noise_multiplier=4.0), target_epsilon=0.5)
      >>> x = alice.put(np.arange(1000.0) % 10)
      >>> y = x + 2
      >>> mean = float(y.mean().get())  # 6.5 with Laplace noise of scale 4 * 10 / 1000
      >>> 5.5 < mean < 7.5, float(y.mean().get()) == mean, alice.spent(LOCAL).epsilon
      (True, True, 0.25)
      >>> y.get()
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: alice: single records are not released; ask for a sum or mean over \
them: pointer.mean(axis=0).get()
      >>> alice.close()
    """

    def __init__(
        self,
        name: str,
        policy: Policy | None = None,
        *,
        target_epsilon: float | None = None,
        target_delta: float = 0.0,
        epsilon_of_all: float | None = None,
        ledger: str | os.PathLike | None = None,
        max_bytes: int = 2**28,
    ):
        self.name = _checked_name(name)
        self._policy = Policy.deny() if policy is None else policy
        self._target = _budget(0.0 if target_epsilon is None else target_epsilon, target_delta)
        self._epsilon_of_all = epsilon_of_all
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._named: dict[str, tuple[Node, str]] = {}  # with the policy in words
        self._own: set[str] = set()  # queries that are the owner's arrays themselves
        self._requesters: dict[str, _Requester] = {}
        self._sessions: dict[str, _Open] = {}
        self._answers: OrderedDict[tuple[str, str, float], np.ndarray] = OrderedDict()
        self._records: list[dict[str, Any]] = []
        self._ledger = None if ledger is None else Ledger.open(ledger)
        if self._ledger is not None:
            self._records += [r for r in self._ledger.records if r["kind"] == "answer"]
        self._requesters[LOCAL] = _Requester(secrets.token_bytes(32), *self._target)
        self._local = self._session(LOCAL)

    def __repr__(self) -> str:
        return f"<worker {self.name} with {len(self._own)} arrays>"

    def __reduce_ex__(self, protocol: Any):
        raise DpjaxError("a worker cannot be pickled or copied: it holds private data")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the ledger go. Pointers are void."""
        with self._lock:
            self._sessions.clear()
            if self._ledger is not None:
                self._ledger.close()

    def put(self, array: Any, *, name: str | None = None, policy: Policy | None = None) -> Pointer:
        """Takes an array in; for the owner. Axis 0 is the records.

        Args:
          array: real numbers; kept as JAX keeps them (float32 unless x64 is enabled).
          name: under which requesters find it; without one only the pointer leads to it.
          policy: instead of the worker's.

        Raises:
          DpjaxError: values that do not fit, a name that is taken; for `Policy.dp`, no records,
            NaN or infinity, or no budget.
        """
        policy = self._policy if policy is None else policy
        given = np.asarray(array)
        if given.dtype.kind in "OSUcMm":
            raise DpjaxError(f"the array holds {given.dtype}; it must hold real numbers")
        with np.errstate(over="ignore"):
            kept = np.asarray(jnp.array(given))
        if given.dtype.kind in "iub" and not np.array_equal(given, kept):
            raise DpjaxError(f"values do not fit {kept.dtype}; convert them, or enable x64")
        if policy.kind == "dp":
            self._check_private(kept, policy)
        with self._lock:
            own = f"array-{secrets.token_hex(8)}" if name is None else _checked_name(name)
            if own in self._named:
                raise DpjaxError(f"{own!r} is taken; what was told of it cannot be untold")
            node = worker_rules.root(kept, own, policy)
            self._own.add(node.query)
            if name is not None:
                self._named[name] = (node, repr(policy))
            return Pointer(self._local, _described(self._hold(self._local_id, node), node))

    def _check_private(self, array: np.ndarray, policy: Policy) -> None:
        if array.ndim == 0 or array.shape[0] == 0:
            raise DpjaxError(f"the array has shape {array.shape}; axis 0 must be the records")
        if not np.isfinite(array.astype(np.float64)).all():
            raise DpjaxError(
                "the array holds NaN or infinity; a sum over records needs numbers: replace them"
            )
        if self._target[0] == 0:
            raise DpjaxError("Policy.dp needs a budget; give the worker a target_epsilon")
        if policy.mechanism == "gaussian" and self._target[1] == 0:
            raise DpjaxError("Gaussian noise needs a delta; give the worker a target_delta")

    def enrol(
        self,
        requester: str,
        *,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        token: str | None = None,
    ) -> str:
        """Lets somebody in; for the owner. Returns the token, which is all that proves who asks.

        Enrolling a name again replaces its token and budget; what it has spent stays spent.

        Args:
          requester: a name for the ledger.
          target_epsilon, target_delta: instead of the worker's.
          token: one that was made by an earlier call; a new one by default.
        """
        if _checked_name(requester) == LOCAL:
            raise DpjaxError(f"{LOCAL!r} is the worker's own process; choose another name")
        token = secrets.token_urlsafe(32) if token is None else token
        if len(token) < 32:
            raise DpjaxError(f"the token has {len(token)} characters; let enrol make one")
        epsilon, delta = self._target
        target = _budget(
            epsilon if target_epsilon is None else target_epsilon,
            delta if target_delta is None else target_delta,
        )
        digest = _token_digest(token)
        with self._lock:
            if any(r.digest == digest for n, r in self._requesters.items() if n != requester):
                raise DpjaxError("another requester has this token; let enrol make one")
            self._requesters[requester] = _Requester(digest, *target)
            for key in [k for k, s in self._sessions.items() if s.requester == requester]:
                del self._sessions[key]
        return token

    def session(self, token: str) -> Session:
        """In-process: what `connect` is over the network.

        Raises:
          DpjaxError: nobody has this token.
        """
        return self._session(self.requester_of(token))

    def requester_of(self, token: object) -> str:
        """Whose token it is. Every digest is compared, in constant time."""
        digest = _token_digest(token)
        with self._lock:
            known = list(self._requesters.items())
        found = [name for name, r in known if hmac.compare_digest(r.digest, digest)]
        if not found or found == [LOCAL]:
            raise DpjaxError(f"{self.name} does not know this token; ask its owner for one")
        return found[0]

    def open_session(self, requester: str) -> str:
        """For transports: a new session's key, which never leaves the worker."""
        key = secrets.token_hex(16)
        with self._lock:
            self._sessions[key] = _Open(requester, {})
        return key

    def close_session(self, key: str) -> None:
        """For transports: forgets the session's values."""
        with self._lock:
            self._sessions.pop(key, None)

    def _session(self, requester: str) -> Session:
        key = self.open_session(requester)
        if requester == LOCAL:
            self._local_id = key

        def send(header: Header, arrays: Sequence[np.ndarray]):
            return self.handle(key, header, arrays)

        return Session(send, self.name, requester, lambda: self.close_session(key))

    def apply(self, function: str, *operands: Any, **options: Any) -> Pointer:
        """`Session.apply` with this worker's own pointers."""
        return self._local.apply(function, *operands, **options)

    def spent(self, requester: str | None = None) -> Spent:
        """What answers have cost: of one requester, or of all together; for the owner."""
        with self._lock:
            delta = self._target[1]
            if requester is not None and requester in self._requesters:
                delta = self._requesters[requester].target_delta
            costs = self._costs(requester)
        return Spent(spent_epsilon(costs, delta), delta, len(costs))

    def _costs(self, requester: str | None) -> list[Cost]:
        return [
            Cost(r["epsilon"], r["rho"])
            for r in self._records
            if requester is None or r["requester"] == requester
        ]

    def handle(
        self, key: str, header: Header, arrays: Sequence[np.ndarray]
    ) -> tuple[Header, list[np.ndarray]]:
        """For transports: one request of a session, from anybody who holds it. Never raises.

        Guarantee: what is returned holds private values only as `Policy` lets them go; an error is
          a line about public facts.
        """
        try:
            return self._handle(key, header, list(arrays))
        except DpjaxError as error:
            return {"error": str(error)}, []
        except (KeyError, TypeError, IndexError):
            return {"error": "malformed request"}, []
        except Exception:
            return {"error": "the worker failed; the reason is not told, it may be private"}, []

    def _handle(self, key: str, header: Header, arrays: list[np.ndarray]):
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                raise DpjaxError("the session is over; connect again")
            for pointer in header.get("released", ())[:_MAX_POINTERS]:
                session.nodes.pop(pointer, None)
        match header["do"]:
            case "list":
                with self._lock:
                    rows = [
                        [name, list(node.value.shape), node.value.dtype.name, policy]
                        for name, (node, policy) in self._named.items()
                    ]
                return {"arrays": rows}, []
            case "find":
                if header["name"] not in self._named:
                    raise DpjaxError(f"there is no array {str(header['name'])[:64]!r}")
                node = self._named[header["name"]][0]
                return _described(self._hold(key, node), node), []
            case "put":
                name = f"{session.requester}-{secrets.token_hex(8)}"
                node = worker_rules.root(arrays[0], name, Policy.allow())
                self._check_room(session, node.num_bytes)
                return _described(self._hold(key, node), node), []
            case "apply":
                operands = [self._operand(session, x, arrays) for x in header["operands"]]
                node = worker_rules.apply(
                    header["function"], operands, header["options"], self._max_bytes
                )
                self._check_room(session, node.num_bytes)
                return _described(self._hold(key, node), node), []
            case "get":
                node = self._node(session, header["pointer"])
                return {}, [self._released(session.requester, node, header["noise_multiplier"])]
            case "spent":
                epsilon, delta, answers = self.spent(session.requester)
                return {"spent": [str(epsilon), delta, answers]}, []  # JSON has no infinity
        raise DpjaxError("malformed request")

    def _hold(self, key: str, node: Node) -> str:
        pointer = secrets.token_hex(8)
        with self._lock:
            nodes = self._sessions[key].nodes
            if len(nodes) >= _MAX_POINTERS:
                raise DpjaxError(f"a session has at most {_MAX_POINTERS} pointers; drop some")
            nodes[pointer] = node
        return pointer

    def _check_room(self, session: _Open, more: int) -> None:
        with self._lock:
            nodes = session.nodes.values()
            used = sum(n.num_bytes for n in nodes if n.query not in self._own)
        if used + more > self._max_bytes:
            raise DpjaxError(
                f"the session's values would take {used + more} bytes, at most {self._max_bytes}; "
                "drop some pointers"
            )

    def _node(self, session: _Open, pointer: Any) -> Node:
        with self._lock:
            node = session.nodes.get(pointer)
        if node is None:
            raise DpjaxError("there is no such pointer in this session")
        return node

    def _operand(self, session: _Open, row: Any, arrays: list[np.ndarray]):
        match row:
            case {"pointer": pointer}:
                return self._node(session, pointer)
            case {"array": int(place)} if 0 <= place < len(arrays):
                return jnp.array(arrays[place])
            case {"number": bool() | int() | float() as number}:
                return number
        raise DpjaxError("malformed request")

    def _released(self, requester: str, node: Node, noise_multiplier: Any) -> np.ndarray:
        """The value as the policies of its sources let it go."""
        kinds = {name: policy.kind for name, policy in node.sources.items()}
        denied = sorted(name for name, kind in kinds.items() if kind == "deny")
        if denied:
            raise DpjaxError(
                f"the owner's policy denies values computed from {', '.join(map(repr, denied))}"
            )
        if not kinds:
            return np.array(node.value)
        if node.total is None:
            raise DpjaxError(
                f"no sensitivity is known: {node.why}"
                if node.records is None
                else "single records are not released; ask for a sum or mean over them: "
                "pointer.mean(axis=0).get()"
            )
        ((name, policy),) = node.sources.items()
        asked = policy.noise_multiplier
        if noise_multiplier is not None:
            if type(noise_multiplier) not in (int, float) or not noise_multiplier >= asked:
                raise DpjaxError(f"noise_multiplier must be a number of at least {asked}")
            asked = check_noise_multiplier(noise_multiplier)
        release = plan_release(node.total, policy.mechanism, asked)
        with self._lock:
            question = (requester, node.query, asked)
            answer = self._answers.get(question)
            if answer is None:
                self._charge(
                    requester,
                    {
                        "requester": requester,
                        "array": name,
                        "query": node.query,
                        "mechanism": release.mechanism,
                        "noise_multiplier": release.noise_multiplier,
                        "outputs": node.total.outputs,
                        "epsilon": release.epsilon,
                        "rho": release.rho,
                    },
                )
                answer = noisy_answer(node.total, release)
                self._answers[question] = answer
                if len(self._answers) > _MAX_ANSWERS:
                    self._answers.popitem(last=False)
            return answer.copy()

    def _charge(self, requester: str, record: dict[str, Any]) -> None:
        """Checks the budgets and writes the answer down; or raises, and nothing has happened."""
        new = Cost(record["epsilon"], record["rho"])
        budget = self._requesters[requester]
        limits: list[tuple[str | None, float, float, str]] = [
            (requester, budget.target_epsilon, budget.target_delta, "budget")
        ]
        if self._epsilon_of_all is not None:
            limits.append((None, self._epsilon_of_all, self._target[1], "budget of all together"))
        for who, target, delta, what in limits:
            after = spent_epsilon([*self._costs(who), new], delta)
            # Three times 0.1 is more than 0.3, in binary.
            if not after <= target * (1 + 1e-12):
                raise DpjaxError(
                    f"this answer would bring epsilon to {after:.4g} at delta {delta:g}, over the "
                    f"{what} of {target:g}; ask with a larger noise_multiplier, or the owner"
                )
        if self._ledger is not None:
            try:
                self._ledger.record_answer(record)
            except DpjaxError:
                raise DpjaxError("the answer could not be recorded, so it is not given") from None
        self._records.append(record)


def _described(pointer: str, node: Node) -> Header:
    return {
        "pointer": pointer,
        "shape": list(node.value.shape),
        "dtype": node.value.dtype.name,
    }


def _token_digest(token: Any) -> bytes:
    return hashlib.sha256(str(token).encode("utf-8", "surrogatepass")).digest()


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DpjaxError(
            f"a name is {str(name)[:70]!r}; use 1 to 64 letters, digits, dots, dashes, underscores"
        )
    return name


def _budget(epsilon: float, delta: float) -> tuple[float, float]:
    if epsilon != 0:
        accounting.check_epsilon(epsilon)
    return float(epsilon), 0.0 if delta == 0 else accounting.check_delta(delta)
