"""The few places where JAX 0.10 and 0.11 differ in how a jaxpr is taken apart and run again."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

Literal = core.Literal
INLINED = ("jit", "pjit", "closed_call", "core_call")
REMAT = primitives.remat_p.name
SCAN = primitives.scan_p.name


def is_traced(value: Any) -> bool:
    """Whether a value is known by shape only, as in jit."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


class Scope(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Any
    consts: tuple


def make_scope(fn: Callable, *args: Any) -> tuple[Scope, Any]:
    """Traces ``fn``; returns its scope and the pytree of its output shapes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return Scope(closed.jaxpr, tuple(closed.consts)), shapes


def scope_of(jaxpr: Any) -> Scope:
    """The scope of a jaxpr found among an equation's parameters, closed or not."""
    return Scope(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def inner_scope(eqn: Any) -> Scope:
    """The body of a jit, call, scan or remat equation."""
    key = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    return scope_of(eqn.params[key])


def can_inline(eqn: Any) -> bool:
    """Whether running the body in place of the call loses nothing, such as a sharding."""
    if eqn.primitive.name not in INLINED:
        return False
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return all(type(s).__name__ == "UnspecifiedValue" for s in shardings)


def run_eqn(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Applies one equation to new arguments."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_arity(eqn: Any) -> tuple[int, int]:
    """How many leading arguments of a scan are constants, and how many after them are carried."""
    if "ft_in" in eqn.params:
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def run_scan(
    eqn: Any, body: Callable, carry: Sequence[Any], xs: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """A scan like ``eqn`` with another body, ``body(carry, xs) -> (carry, ys)`` over lists."""
    p = eqn.params
    return jax.lax.scan(
        body, list(carry), list(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )


def run_remat(eqn: Any, body: Callable, args: Sequence[Any]) -> list[Any]:
    """A checkpointed region like ``eqn`` with another body, ``body(*args) -> list``.

    Bound as it stands after differentiation: wrapping anew in `jax.checkpoint` would drop the
    barrier that keeps the compiler from merging the recomputation with the first computation.
    """
    scope, shapes = make_scope(body, *[jax.typeof(a) for a in args])
    jaxpr = scope.jaxpr
    if scope.consts:
        jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    out = eqn.primitive.bind(*scope.consts, *args, **{**eqn.params, "jaxpr": jaxpr})
    return jax.tree.unflatten(jax.tree.structure(shapes), out)
