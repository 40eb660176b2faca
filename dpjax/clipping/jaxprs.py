"""Runs a jaxpr for chosen values only, some of them inside the bodies of its loops.

`flatten` puts the bodies of nested jit calls in place of the calls. `evaluate` then computes a
list of wanted values, each a place: a variable of the jaxpr itself (`Here`), or a value inside the
body of a scan or a checkpointed region (`Inside`), which comes out with the axes that the loops
around it add in front. Nothing that is not needed for them is computed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from dpjax.clipping.compat import (
    REMAT,
    SCAN,
    Literal,
    Scope,
    can_inline,
    inner_scope,
    make_scope,
    run_eqn,
    run_remat,
    run_scan,
    scan_arity,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A value that is computed from others of the same scope, e.g. a norm from its operands."""

    inputs: tuple["Place", ...]
    function: Callable  # function(inputs: list, extra) -> array


@dataclasses.dataclass(frozen=True)
class Here:
    """A variable (or literal) of the scope at hand, or a value computed from such."""

    var: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """A place in the body of ``eqn``, a scan or a checkpointed region of the scope at hand."""

    eqn: Any
    place: "Place"

    def __eq__(self, other):
        return isinstance(other, Inside) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self):
        return id(self.eqn), self.place


Place: TypeAlias = Here | Inside | Computed


def flatten(scope: Scope, avals: Sequence[Any]) -> Scope:
    """The same computation with nested jit calls inlined, here and in the bodies of loops."""

    def run(*args):
        env = dict(zip(scope.jaxpr.constvars, scope.consts, strict=True))
        env.update(zip(scope.jaxpr.invars, args, strict=True))
        _inline(scope.jaxpr, env)
        return [_read(env, v) for v in scope.jaxpr.outvars]

    return make_scope(run, *avals)[0]


def _inline(jaxpr: Any, env: dict) -> None:
    for eqn in jaxpr.eqns:
        args = [_read(env, v) for v in eqn.invars]
        if can_inline(eqn):
            body = inner_scope(eqn)
            inner = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
            inner.update(zip(body.jaxpr.invars, args, strict=True))
            _inline(body.jaxpr, inner)
            out = [_read(inner, v) for v in body.jaxpr.outvars]
        elif eqn.primitive.name in (SCAN, REMAT):
            out = _inline_body(eqn, args)
        else:
            out = run_eqn(eqn, args)
        env.update(zip(eqn.outvars, out, strict=True))


def _inline_body(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Runs a scan or checkpointed region with everything in its body inlined."""
    body = inner_scope(eqn)

    def run(*values):
        env = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        env.update(zip(body.jaxpr.invars, values, strict=True))
        _inline(body.jaxpr, env)
        return [_read(env, v) for v in body.jaxpr.outvars]

    if eqn.primitive.name == REMAT:
        return run_remat(eqn, run, args)
    consts, carried = scan_arity(eqn)

    def step(carry, xs):
        out = run(*args[:consts], *carry, *xs)
        return out[:carried], out[carried:]

    carry, ys = run_scan(eqn, step, args[consts : consts + carried], args[consts + carried :])
    return [*carry, *ys]


def _read(env: dict, atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def evaluate(
    scope: Scope, args: Sequence[Any], places: Sequence[Place], extra: tuple = ()
) -> list[Any]:
    """The values at ``places``, for arguments ``args`` of the scope.

    Args:
      scope: a flattened scope.
      args: one value for each of its input variables.
      places: what to compute.
      extra: values handed to every `Computed` place, wherever it lies.
    """
    env = dict(zip(scope.jaxpr.constvars, scope.consts, strict=True))
    env.update(zip(scope.jaxpr.invars, args, strict=True))
    return evaluate_from(scope, env, places, extra)


def evaluate_from(scope: Scope, env: dict, places: Sequence[Place], extra: tuple = ()) -> list:
    """`evaluate`, given the values of some variables, which are then not computed again."""
    inside: dict[int, list[Place]] = {}
    _collect(places, inside)
    needed = _needed(scope, places, inside, set(env))
    found: dict[tuple[int, Place], Any] = {}
    env = dict(env)
    for eqn in scope.jaxpr.eqns:
        wanted = [i for i, v in enumerate(eqn.outvars) if v in needed and v not in env]
        requests = inside.get(id(eqn), [])
        if not (wanted or requests or eqn.effects):
            continue
        values = [v.val if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
        if eqn.primitive.name == SCAN:
            out, got = _scan(eqn, values, wanted, requests, extra)
        elif eqn.primitive.name == REMAT:
            out, got = _remat(eqn, values, wanted, requests, extra)
        else:
            out, got = run_eqn(eqn, values), []
            wanted = range(len(out))
        env.update({eqn.outvars[i]: x for i, x in zip(wanted, out, strict=True)})
        found.update({(id(eqn), r): x for r, x in zip(requests, got, strict=True)})

    def value(place: Place) -> Any:
        if isinstance(place, Here):
            return _read(env, place.var)
        if isinstance(place, Inside):
            return found[id(place.eqn), place.place]
        return place.function([value(p) for p in place.inputs], extra)

    return [value(p) for p in places]


def _collect(places: Sequence[Place], inside: dict[int, list[Place]]) -> None:
    """Sorts the places that lie inside an equation by that equation."""
    for place in places:
        if isinstance(place, Computed):
            _collect(place.inputs, inside)
        elif isinstance(place, Inside):
            requests = inside.setdefault(id(place.eqn), [])
            if place.place not in requests:
                requests.append(place.place)


def _variables(places: Sequence[Place]) -> set:
    found = set()
    for place in places:
        if isinstance(place, Computed):
            found |= _variables(place.inputs)
        elif isinstance(place, Here) and not isinstance(place.var, Literal):
            found.add(place.var)
    return found


def _needed(scope: Scope, places: Sequence[Place], inside: dict, known: set) -> set:
    """Variables of the scope that must have a value."""
    needed = _variables(places)
    for eqn in reversed(scope.jaxpr.eqns):
        outputs = [i for i, v in enumerate(eqn.outvars) if v in needed and v not in known]
        requests = inside.get(id(eqn), [])
        if not (outputs or requests or eqn.effects):
            continue
        used = eqn.invars
        if eqn.primitive.name in (SCAN, REMAT):
            body = inner_scope(eqn)
            if eqn.primitive.name == SCAN:
                indices = _scan_plan(eqn, body, outputs, requests)[1]
            else:
                indices = _used_inputs(body, [body.jaxpr.outvars[i] for i in outputs], requests)
            used = [eqn.invars[i] for i in indices]
        needed |= {v for v in used if not isinstance(v, Literal)}
    return needed


def _used_inputs(body: Scope, outvars: Sequence[Any], requests: Sequence[Place]) -> list[int]:
    inside: dict[int, list[Place]] = {}
    _collect(requests, inside)
    needed = _needed(body, [*(Here(v) for v in outvars), *requests], inside, set())
    return [i for i, v in enumerate(body.jaxpr.invars) if v in needed]


def _scan_plan(eqn: Any, body: Scope, wanted: Sequence[int], requests: Sequence[Place]):
    """Which carried values and which inputs a scan needs for some outputs and inner places."""
    consts, carried = scan_arity(eqn)
    carry = {i for i in wanted if i < carried}
    while True:
        outputs = sorted(carry | set(wanted))
        used = _used_inputs(body, [body.jaxpr.outvars[i] for i in outputs], requests)
        more = {i - consts for i in used if consts <= i < consts + carried}
        if more <= carry:
            break
        carry |= more
    inputs = sorted(set(used) | {consts + i for i in carry})
    return sorted(carry), inputs


def _scan(eqn, values, wanted, requests, extra):
    body = inner_scope(eqn)
    consts, carried = scan_arity(eqn)
    carry, inputs = _scan_plan(eqn, body, wanted, requests)
    xs = [i for i in inputs if i >= consts + carried]
    ys = [i for i in wanted if i >= carried]
    places = [Here(body.jaxpr.outvars[i]) for i in (*carry, *ys)] + list(requests)

    def step(carry_values, x_values):
        args: list[Any] = [None] * len(values)
        for i in inputs:
            if i < consts:
                args[i] = values[i]
        for i, v in zip(carry, carry_values, strict=True):
            args[consts + i] = v
        for i, v in zip(xs, x_values, strict=True):
            args[i] = v
        out = evaluate(body, args, places, extra)
        return out[: len(carry)], out[len(carry) :]

    last, stacked = run_scan(
        eqn, step, [values[consts + i] for i in carry], [values[i] for i in xs]
    )
    by_output = dict(zip(carry, last, strict=True)) | dict(zip(ys, stacked, strict=False))
    return [by_output[i] for i in wanted], stacked[len(ys) :]


def _remat(eqn, values, wanted, requests, extra):
    body = inner_scope(eqn)
    outvars = [body.jaxpr.outvars[i] for i in wanted]
    used = _used_inputs(body, outvars, requests)
    flat_extra, structure = jax.tree.flatten(extra)

    def run(*given):
        args: list[Any] = [None] * len(values)
        for i, v in zip(used, given, strict=False):
            args[i] = v
        rest = jax.tree.unflatten(structure, given[len(used) :])
        return evaluate(body, args, [*(Here(v) for v in outvars), *requests], rest)

    out = run_remat(eqn, run, [*(values[i] for i in used), *flat_extra])
    return out[: len(wanted)], out[len(wanted) :]
