"""The operations that a worker runs for others, and what each does to the way back to records.

A value keeps the policies of every private array it was computed from. Beside them it keeps, for as
long as it is true, which record each row belongs to, and public bounds: without the first there is
no sensitivity, without the second it is infinite.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.worker_policy import Bounds, Policy, Total, usable_bounds

_COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
_LOGICAL = ("logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isfinite")
_ELEMENTWISE = {
    "negative": 1, "positive": 1, "abs": 1, "exp": 1, "expm1": 1, "log": 1, "log1p": 1, "sqrt": 1,
    "square": 1, "sign": 1, "sin": 1, "cos": 1, "tanh": 1, "floor": 1, "ceil": 1, "round": 1,
    "isnan": 1, "isfinite": 1, "logical_not": 1,
    "add": 2, "subtract": 2, "multiply": 2, "divide": 2, "floor_divide": 2, "remainder": 2,
    "power": 2, "minimum": 2, "maximum": 2, "logical_and": 2, "logical_or": 2, "logical_xor": 2,
    **dict.fromkeys(_COMPARISONS, 2),
    "clip": 3, "where": 3,
}  # fmt: skip
_REDUCTIONS = ("sum", "mean", "max", "min")
_OPTIONS = {
    **dict.fromkeys(_REDUCTIONS, ("axis", "keepdims")),
    "reshape": ("shape",),
    "getitem": ("index",),
}
FUNCTIONS: dict[str, int] = {
    **_ELEMENTWISE,
    **dict.fromkeys(_REDUCTIONS, 1),
    "matmul": 2,
    "transpose": 1,
    "reshape": 1,
    "getitem": 1,
}
"""Names that `apply` knows, with the number of their operands."""

MAX_RANK = 8


@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class Node:
    """A value on the worker. Never sent, shown or stored; no field but shape and dtype is public.

    Attributes:
      value: the array.
      query: what it is, as a digest: equal only for equal computations on equal arrays.
      sources: the private arrays it depends on, and their policies.
      records: row i belongs to record ``records[i]`` and to no other; None if there is no such map.
      bounds: public, that rows are clipped to.
      total: what a noisy answer is made of.
      why: if there is no total and no map, the reason.
    """

    value: jax.Array
    query: str
    sources: Mapping[str, Policy]
    records: range | None = None
    bounds: Bounds | None = None
    total: Total | None = None
    why: str = ""

    @property
    def num_bytes(self) -> int:
        """Memory that only this node keeps."""
        return int(self.value.nbytes) + (0 if self.total is None else int(self.total.rows.nbytes))


Operand: TypeAlias = Node | jax.Array | bool | int | float


def root(array: np.ndarray, name: str, policy: Policy) -> Node:
    """An owner's array, or (with the policy "allow") a requester's own."""
    value = jnp.array(array)
    digest = _digest("root", name)
    if policy.kind == "allow":
        return Node(value, digest, {})
    records = range(value.shape[0]) if value.ndim and value.shape[0] else None
    bounds = (policy.lower, policy.upper) if policy.kind == "dp" else None
    return Node(value, digest, {name: policy}, records, bounds)


def apply(
    function: str, operands: Sequence[Operand], options: Mapping[str, Any], max_bytes: int
) -> Node:
    """Runs one function of the list; everything but the nodes' values is public.

    Args:
      function: of `FUNCTIONS`; the function of this name in jax.numpy, or "getitem".
      operands: nodes, public arrays, numbers.
      options: "axis", "keepdims", "shape"; "index" as from `encode_index`.
      max_bytes: of the result.

    Raises:
      DpjaxError: from shapes and dtypes alone, before anything is computed; or a fixed line.

    Guarantee: no error depends on private values, and none holds a value or leads to one.

    Example:
      >>> node = root(np.float32([1, 2]), "x", Policy.deny())
      >>> more = apply("add", [node, 2], {}, 1000)
      >>> more.value.shape, dict(more.sources), more.records
      ((2,), {'x': Policy.deny()}, range(0, 2))
    """
    if function not in FUNCTIONS:
        raise DpjaxError(
            f"{str(function)[:40]!r} is not among the worker's functions: {', '.join(FUNCTIONS)}"
        )
    if len(operands) != FUNCTIONS[function]:
        raise DpjaxError(f"{function} has {len(operands)} operands; it takes {FUNCTIONS[function]}")
    if not set(options) <= set(_OPTIONS.get(function, ())):
        raise DpjaxError(f"{function} takes the options {_OPTIONS.get(function, ())} only")
    for operand in operands:
        if isinstance(operand, float) and not math.isfinite(operand):
            raise DpjaxError(f"a number is {operand}; it must be finite")
    call = _call(function, operands, options)
    values = [x.value for x in operands if isinstance(x, Node)]
    # In-process the caller's own settings hold; a worker's answer must not depend on them.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        like = _abstract(function, call, values)
        if like.ndim > MAX_RANK or like.size * like.dtype.itemsize > max_bytes:
            raise DpjaxError(
                f"the result of {function} has shape {like.shape}; it must have at most {MAX_RANK} "
                f"axes and {max_bytes} bytes"
            )
        value = _compute(call, values)
    if value is None:
        raise DpjaxError(
            f"{function} failed on the worker; the reason may depend on private values, so it is "
            "not told"
        )
    return _tracked(function, operands, options, value)


def _abstract(function: str, call, values) -> jax.ShapeDtypeStruct:
    reason = ""
    try:
        like = jax.eval_shape(call, *values)
    except Exception as error:  # of shapes, dtypes and public numbers: no value has been seen
        like, reason = None, " ".join(str(error).split())[:200]
    if like is None or jnp.issubdtype(like.dtype, jnp.complexfloating):
        raise DpjaxError(f"{function} does not fit its operands: {reason or 'complex result'}")
    return like


def _compute(call, values) -> jax.Array | None:
    """None where it failed: an exception would carry values, if only in its context."""
    try:
        return jax.block_until_ready(call(*values))
    except Exception:
        return None


def _call(function: str, operands: Sequence[Operand], options: Mapping[str, Any]):
    """The function of the nodes' values alone, the public operands in their places."""
    places = [n for n, x in enumerate(operands) if isinstance(x, Node)]
    run: Any
    if function == "getitem":
        index = decode_index(options.get("index"))
        run = lambda x: x[index]  # noqa: E731
    elif function == "reshape":
        shape = _integers(options.get("shape"), "shape")
        run = lambda x: jnp.reshape(x, shape)  # noqa: E731
    elif function in _REDUCTIONS:
        axis, keepdims = _axis(options), options.get("keepdims", False)
        if not isinstance(keepdims, bool):
            raise DpjaxError(f"keepdims is {str(keepdims)[:40]}; it must be true or false")
        run = functools.partial(getattr(jnp, function), axis=axis, keepdims=keepdims)
    else:
        run = getattr(jnp, function)

    def call(*values):
        filled = list(operands)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return run(*filled)

    return call


def _integers(value: Any, what: str) -> tuple[int, ...]:
    found = value if isinstance(value, (list, tuple)) else [value]
    if len(found) > MAX_RANK or not all(type(x) is int and abs(x) < 2**31 for x in found):
        raise DpjaxError(f"{what} is {str(value)[:60]}; it must be at most {MAX_RANK} integers")
    return tuple(found)


def _axis(options: Mapping[str, Any]) -> tuple[int, ...] | None:
    axis = options.get("axis")
    return None if axis is None else _integers(axis, "axis")


def encode_index(index: Any) -> list[list[Any]]:
    """A static index as JSON. Anything that depends on data is refused.

    Example:
      >>> encode_index((slice(None), 0, None, ...))
      [['slice', None, None, None], ['int', 0], ['new'], ['rest']]
    """
    encoded: list[list[Any]] = []
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            ends = (item.start, item.stop, item.step)
            if all(x is None or isinstance(x, (int, np.integer)) for x in ends):
                encoded.append(["slice", *(None if x is None else int(x) for x in ends)])
                continue
        elif item is None:
            encoded.append(["new"])
            continue
        elif item is Ellipsis:
            encoded.append(["rest"])
            continue
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            encoded.append(["int", int(item)])
            continue
        raise DpjaxError(
            f"an index is a {type(item).__name__}; pointers take integers, slices, None and ... : "
            "to select by value use where, so that the shape does not depend on the data"
        )
    return encoded


def decode_index(encoded: Any) -> tuple[Any, ...]:
    """The way back, from anybody."""
    items: list[Any] = []
    rows = encoded if isinstance(encoded, (list, tuple)) else [encoded]
    for row in rows[: 2 * MAX_RANK + 1]:
        match row:
            case ["slice", *ends] if len(ends) == 3:
                items.append(slice(*(x if x is None else _integers(x, "index")[0] for x in ends)))
            case ["int", place]:
                items.append(_integers(place, "index")[0])
            case ["new"]:
                items.append(None)
            case ["rest"]:
                items.append(Ellipsis)
            case _:
                raise DpjaxError("an index is not made of integers, slices, None and ...")
    if len(rows) > 2 * MAX_RANK or sum(x is Ellipsis for x in items) > 1:
        raise DpjaxError("an index is too long, or has several ...")
    return tuple(items)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def _identity(operand: Operand) -> list[Any]:
    if isinstance(operand, Node):
        return ["node", operand.query]
    if isinstance(operand, jax.Array):
        content = np.asarray(operand)
        digest = hashlib.sha256(content.tobytes()).hexdigest()
        return ["array", content.dtype.name, list(content.shape), digest]
    return ["number", type(operand).__name__, repr(operand)]


def _tracked(
    function: str, operands: Sequence[Operand], options: Mapping[str, Any], value: jax.Array
) -> Node:
    """The result with what is still known about records."""
    nodes = [x for x in operands if isinstance(x, Node)]
    sources = {name: policy for node in nodes for name, policy in node.sources.items()}
    query = _digest(function, [_identity(x) for x in operands], dict(options))
    private = [node for node in nodes if node.sources]
    if not private:
        return Node(value, query, sources)
    first = private[0]
    if any(node.total is not None for node in private):
        why = "it is computed from a sum or mean over records: get() that, then go on with it"
        return Node(value, query, sources, why=why)
    if len(sources) > 1:
        why = f"it combines several private arrays ({', '.join(sorted(sources))}), whose rows need "
        return Node(value, query, sources, why=why + "not belong to the same records")
    if any(node.records is None or node.records != first.records for node in private):
        why = first.why or "its rows belong to different records"
        return Node(value, query, sources, why=why)
    records, why = _records(function, operands, options, private, value)
    if function in ("sum", "mean") and records is None and not why:
        axes = _axes(options, first.value.ndim)
        rows = np.asarray(first.value)
        total = Total(rows, axes, first.bounds, function == "mean", value.shape)
        return Node(value, query, sources, total=total)
    bounds = None if records is None else _bounds(function, operands, options)
    return Node(value, query, sources, records, bounds, why=why)


def _axes(options: Mapping[str, Any], rank: int) -> tuple[int, ...]:
    axis = _axis(options)
    return tuple(range(rank)) if axis is None else tuple(sorted(a % rank for a in axis))


def _records(
    function: str,
    operands: Sequence[Operand],
    options: Mapping[str, Any],
    private: Sequence[Node],
    value: jax.Array,
) -> tuple[range | None, str]:
    """Whose record each row of the result is, or why that is not known.

    Guarantee: an answer other than None means that row i is a function of record ``records[i]`` and
      of public facts alone.
    """
    first = private[0]
    records, rank = first.records, first.value.ndim
    assert records is not None
    moved = f"{function} moved the records' axis, or mixed records"
    if function in _ELEMENTWISE:
        # Broadcasting aligns last axes: only among equal ranks is axis 0 the records' for all.
        same = all(node.value.ndim == value.ndim for node in private)
        return (records, "") if same and value.shape[0] == len(records) else (None, moved)
    if function in _REDUCTIONS:
        if 0 not in _axes(options, rank):
            return records, ""
        return None, "" if function in ("sum", "mean") else f"{function} over records has no bound"
    if function == "getitem":
        index = decode_index(options["index"])
        head = index[0] if index else slice(None)
        if head is Ellipsis:
            taken = sum(x is not None and x is not Ellipsis for x in index)
            head = slice(None) if taken < rank else None
        kept = records[head] if isinstance(head, slice) else None
        return (kept, "") if kept else (None, moved)
    if function == "reshape":
        kept = value.ndim > 0 and value.shape[0] == len(records)
        return (records, "") if kept else (None, moved)
    if function == "transpose":
        return (records, "") if rank == 1 else (None, moved)
    # matmul: rows of the left operand by public columns.
    left, right = operands
    right_rank = jnp.ndim(right.value if isinstance(right, Node) else right)
    by_rows = left is first and len(private) == 1 and rank >= 2 and right_rank <= 2
    return (records, "") if by_rows else (None, moved)


def _bounds(
    function: str, operands: Sequence[Operand], options: Mapping[str, Any]
) -> Bounds | None:
    """Public bounds of the result where they are plain.

    They are no part of the guarantee: a noisy answer clips to whatever they are.
    """
    if function == "clip":
        lower, upper = operands[1:]
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)):
            return usable_bounds(lower, upper)
        return None
    if function in _COMPARISONS or function in _LOGICAL:
        return (0.0, 1.0)
    node = next(x for x in operands if isinstance(x, Node) and x.sources)
    if node.bounds is None:
        return None
    low, high = node.bounds
    if function in ("getitem", "reshape", "transpose", "positive", "mean", "max", "min"):
        return node.bounds
    if function == "negative":
        return (-high, -low)
    if function == "sum":
        terms = math.prod(node.value.shape[a] for a in _axes(options, node.value.ndim))
        return usable_bounds(low * terms, high * terms)
    if function in ("add", "subtract", "multiply", "divide"):
        left, right = operands
        other = right if left is node else left
        if isinstance(other, (int, float)) and not (function == "divide" and left is not node):
            return _shifted(function, (low, high), float(other), left is node)
    return None


def _shifted(function: str, bounds: Bounds, by: float, is_left: bool) -> Bounds | None:
    if function == "divide" and by == 0:
        return None
    ends = {
        "add": lambda x: x + by,
        "subtract": lambda x: x - by if is_left else by - x,
        "multiply": lambda x: x * by,
        "divide": lambda x: x / by,
    }[function]
    low, high = sorted(ends(x) for x in bounds)
    return usable_bounds(low, high)
