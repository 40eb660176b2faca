"""What a requester holds: a session with a worker, and pointers to values that stay there."""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.worker_policy import Spent
from dpjax.federated.worker_rules import encode_index

Header: TypeAlias = dict[str, Any]
Send: TypeAlias = Callable[[Header, Sequence[np.ndarray]], tuple[Header, list[np.ndarray]]]


class Listing(NamedTuple):
    """What a worker tells of a named array: nothing in it is private."""

    shape: tuple[int, ...]
    dtype: str
    policy: str


class Pointer:
    """A value on a worker, by name only. Operators on it run there and give another pointer.

    ``+ - * / // % ** @``, comparisons, ``& | ^ ~``, ``-``, ``abs``, indexing by integers and
    slices, ``.T``, and the methods below; other functions through `Session.apply`. ``get`` asks
    the owner's policy for the value. Shapes and dtypes are public.

    Guarantee: a pointer holds no value, so neither its text, nor an exception, nor its attributes
      show one; whatever would have to read the value to answer is refused (``bool``, ``float``,
      iteration, numpy.asarray, pickling).

    Example:
      >>> from dpjax.federated.worker import Worker
      >>> from dpjax.federated.worker_policy import Policy
      >>> with Worker("alice") as alice:
      ...     x = alice.put(np.float32([1, 2, 3]), policy=Policy.allow())
      ...     y = (x + 2) * x
      ...     print(y, y.get())
      <pointer to float32[3] on alice> [ 3.  8. 15.]
    """

    __slots__ = ("__weakref__", "_id", "_session", "dtype", "shape")
    __array_ufunc__ = None  # numpy's operators leave the work to ours
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, session: "Session", header: Mapping[str, Any]):
        self._session = session
        self._id = str(header["pointer"])
        self.shape = tuple(int(n) for n in header["shape"])
        self.dtype = np.dtype(str(header["dtype"]))
        # The worker is told with the next request: this may run inside any line of any thread.
        weakref.finalize(self, session.released.append, self._id).atexit = False

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        sides = ",".join(map(str, self.shape))
        return f"<pointer to {self.dtype}[{sides}] on {self._session.worker}>"

    def get(self, *, noise_multiplier: float | None = None) -> np.ndarray:
        """The value, as the owner's policy lets it go: as it is, with noise, or not at all.

        Args:
          noise_multiplier: more noise than the policy demands, for a lower price.

        Returns:
          float64 for noisy answers. The same question again is given the same noisy answer, which
          costs nothing; an equal result written otherwise is another question.

        Raises:
          DpjaxError: refused, with the reason.
        """
        header = {"do": "get", "pointer": self._id, "noise_multiplier": noise_multiplier}
        return self._session.ask(header)[1][0]

    def sum(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False):
        """Sum over these axes. With axis 0 among them it is a sum over records."""
        return self._session.apply("sum", self, axis=axis, keepdims=keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False):
        """Mean over these axes. The number of records is public, as shapes are."""
        return self._session.apply("mean", self, axis=axis, keepdims=keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False):
        """Maximum over these axes."""
        return self._session.apply("max", self, axis=axis, keepdims=keepdims)

    def min(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False):
        """Minimum over these axes."""
        return self._session.apply("min", self, axis=axis, keepdims=keepdims)

    def clip(self, lower: float, upper: float) -> "Pointer":
        """Values moved into [lower, upper], which become their public bounds."""
        return self._session.apply("clip", self, lower, upper)

    def reshape(self, *shape: int) -> "Pointer":
        """Another shape."""
        return self._session.apply("reshape", self, shape=list(shape))

    @property
    def T(self) -> "Pointer":  # noqa: N802
        """Axes in reverse order."""
        return self._session.apply("transpose", self)

    def __getitem__(self, index: Any) -> "Pointer":
        if isinstance(index, Pointer):
            raise DpjaxError(
                "an index is a pointer; the shape of the result would tell its values: use "
                "apply('where', condition, pointer, 0)"
            )
        return self._session.apply("getitem", self, index=encode_index(index))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a pointer without axes has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        _refuse("a condition (if, while, and, or, not)")

    def __float__(self) -> float:
        _refuse("float()")

    def __int__(self) -> int:
        _refuse("int()")

    def __complex__(self) -> complex:
        _refuse("complex()")

    def __index__(self) -> int:
        _refuse("an index or a range")

    def __iter__(self):
        _refuse("iteration")

    def __contains__(self, item: Any) -> bool:
        _refuse("in")

    def __array__(self, *args: Any, **options: Any):
        _refuse("numpy.asarray")

    def __reduce_ex__(self, protocol: Any):
        _refuse("pickle or copy")


def _refuse(what: str) -> NoReturn:
    raise DpjaxError(
        f"{what} needs the value, which is on the worker; compute with the pointer, or ask for the "
        "value with get()"
    )


def _binary(function: str, swapped: bool):
    def operator(self: Pointer, other: Any) -> Pointer:
        operands = (other, self) if swapped else (self, other)
        return self._session.apply(function, *operands)

    return operator


def _unary(function: str):
    return lambda self: self._session.apply(function, self)


for _name, _function in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide",
    "floordiv": "floor_divide", "mod": "remainder", "pow": "power", "matmul": "matmul",
    "and": "logical_and", "or": "logical_or", "xor": "logical_xor",
}.items():  # fmt: skip
    setattr(Pointer, f"__{_name}__", _binary(_function, False))
    setattr(Pointer, f"__r{_name}__", _binary(_function, True))
for _name, _function in {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal",
    "gt": "greater", "ge": "greater_equal",
}.items():  # fmt: skip
    setattr(Pointer, f"__{_name}__", _binary(_function, False))
for _name, _function in {
    "neg": "negative", "pos": "positive", "abs": "abs", "invert": "logical_not",
}.items():  # fmt: skip
    setattr(Pointer, f"__{_name}__", _unary(_function))


@dataclasses.dataclass(eq=False, repr=False)
class Session:
    """One requester's line to one worker. From `Worker.session` (in-process) or `connect`.

    Attributes:
      send: carries a request there and the reply back.
      worker: its name.
      requester: as which the worker knows the token.
      released: pointers that are gone here, for the next request.
    """

    send: Send
    worker: str
    requester: str
    on_close: Callable[[], object]
    released: list[str] = dataclasses.field(default_factory=list)
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def __repr__(self) -> str:
        return f"<session of {self.requester} with {self.worker}>"

    def ask(self, header: Header, arrays: Sequence[np.ndarray] = ()) -> tuple[Header, list]:
        """One request. The worker's refusals become errors here."""
        with self._lock:
            gone = self.released[:]
            del self.released[: len(gone)]
            reply, values = self.send({**header, "released": gone}, arrays)
        if "error" in reply:
            raise DpjaxError(f"{self.worker}: {reply['error']}")
        return reply, values

    def listing(self) -> dict[str, Listing]:
        """The arrays that the owner published, by name."""
        rows = self.ask({"do": "list"})[0]["arrays"]
        return {name: Listing(tuple(shape), dtype, policy) for name, shape, dtype, policy in rows}

    def __getitem__(self, name: str) -> Pointer:
        """Pointer to a published array."""
        return Pointer(self, self.ask({"do": "find", "name": name})[0])

    def put(self, array: Any) -> Pointer:
        """Sends an array of the requester's own. It is not private to its requester."""
        return Pointer(self, self.ask({"do": "put"}, [_plain(array)])[0])

    def apply(self, function: str, *operands: Any, **options: Any) -> Pointer:
        """Runs a function of jax.numpy on pointers, arrays and numbers, where the pointers are.

        Args:
          function: of the worker's list (`dpjax.federated.worker_rules.FUNCTIONS`).
          operands: pointers of this session, numbers, arrays (which are sent).
          options: axis, keepdims, shape.

        Example:
          >>> from dpjax.federated.worker import Worker
          >>> with Worker("alice") as alice:
          ...     x = alice.put(np.ones((2, 3), np.float32))
          ...     print(alice.apply("where", x > 0, x, 0).mean(axis=1))
          <pointer to float32[2] on alice>
        """
        sent: list[Any] = []
        arrays: list[np.ndarray] = []
        for operand in operands:
            if isinstance(operand, Pointer):
                sent.append({"pointer": self._own(operand)})
            elif isinstance(operand, (bool, int, float)) and not isinstance(operand, np.generic):
                sent.append({"number": operand})
            else:
                sent.append({"array": len(arrays)})
                arrays.append(_plain(operand))
        options = {name: value for name, value in options.items() if value is not None}
        header = {"do": "apply", "function": function, "operands": sent, "options": options}
        return Pointer(self, self.ask(header, arrays)[0])

    def spent(self) -> Spent:
        """What this requester's noisy answers have cost so far."""
        epsilon, delta, answers = self.ask({"do": "spent"})[0]["spent"]
        return Spent(float(epsilon), delta, answers)

    def close(self) -> None:
        """Ends the session; its pointers are void."""
        self.on_close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any):
        raise DpjaxError("a session cannot be pickled or copied; connect again")

    def _own(self, pointer: Pointer) -> str:
        other = pointer._session
        if other is not self:
            where = other.worker if other.worker != self.worker else f"another session ({other!r})"
            raise DpjaxError(
                f"one pointer is on {self.worker}, the other on {where}; workers do not see each "
                "other's values: get() one where its owner allows it, and put() it on the other"
            )
        return pointer._id


def _plain(array: Any) -> np.ndarray:
    """A numpy array of numbers, or an error that shows only the type."""
    found = None
    if isinstance(array, (np.ndarray, np.generic, jax.Array, list, tuple)):
        try:
            found = np.array(array)
        except (TypeError, ValueError):  # ragged, or with pointers in it
            found = None
    if found is None or found.dtype.kind in "OSUcMm":
        raise DpjaxError(
            f"an operand is a {type(array).__name__}; pass a pointer, a number or an array of real "
            "numbers"
        )
    return found
