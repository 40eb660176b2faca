"""Convolutions inside loops, in the form that XLA's CPU compiler knows.

XLA rewrites convolutions to its fast CPU routine only outside of loops. Inside, where local steps
are, those of gradients run ten times slower. So they are written in that form before XLA sees them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpjax.clipping import compat
from dpjax.types import PyTree

_NAME = "conv_general_dilated"


def canonical_convolutions(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function, of which convolutions run fast inside loops on CPUs.

    Every convolution gets the batch axis first and features last; one whose kernel is larger than
    its result, as in a gradient by a kernel, becomes a sum of matrix products on CPUs. Those inside
    of a `jax.lax.cond` or a loop of the function's own with ``while`` stay as they are.

    Source: XLA, ``ConvCanonicalization``, which treats a module's entry computation only.

    Example:
      >>> image, kernel = jnp.ones((1, 1, 5, 5)), jnp.ones((2, 1, 3, 3))
      >>> convolve = lambda x: jnp.sum(jax.lax.conv(x, kernel, (1, 1), "VALID"))
      >>> canonical_convolutions(jax.grad(convolve))(image).shape
      (1, 1, 5, 5)
    """

    def wrapped(*args):
        scope, shapes = compat.make_scope(function, *args)
        if not _has_convolution(scope):
            return function(*args)
        found = _run(scope, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return wrapped


def _has_convolution(scope: compat.Scope) -> bool:
    return any(
        eqn.primitive.name == _NAME or (_is_entered(eqn) and _has_convolution(_inner(eqn)))
        for eqn in scope.jaxpr.eqns
    )


def _is_entered(eqn: Any) -> bool:
    return compat.can_inline(eqn) or eqn.primitive.name in (compat.SCAN, compat.REMAT)


def _inner(eqn: Any) -> compat.Scope:
    return compat.inner_scope(eqn)


def _run(scope: compat.Scope, args: Sequence[Any]) -> list[Any]:
    env = dict(
        zip((*scope.jaxpr.constvars, *scope.jaxpr.invars), (*scope.consts, *args), strict=True)
    )

    def read(atom):
        return atom.val if isinstance(atom, compat.Literal) else env[atom]

    for eqn in scope.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        env.update(zip(eqn.outvars, _apply(eqn, values), strict=True))
    return [read(atom) for atom in scope.jaxpr.outvars]


def _apply(eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.primitive.name == _NAME:
        with eqn.ctx.manager:
            return [_convolution(eqn.primitive, eqn.params, *values)]
    if not _is_entered(eqn) or not _has_convolution(_inner(eqn)):
        return compat.run_eqn(eqn, values)
    body = _inner(eqn)
    if eqn.primitive.name == compat.REMAT:
        return compat.run_remat(eqn, lambda *args: _run(body, args), values)
    if eqn.primitive.name == compat.SCAN:
        consts, carried = compat.scan_arity(eqn)

        def step(carry, xs):
            out = _run(body, [*values[:consts], *carry, *xs])
            return out[:carried], out[carried:]

        carry, ys = compat.run_scan(
            eqn, step, values[consts : consts + carried], values[consts + carried :]
        )
        return [*carry, *ys]
    return _run(body, values)


def _convolution(primitive: Any, params: dict[str, Any], lhs: Array, rhs: Array) -> Array:
    """In canonical form: [batch, space, features] and [space, features, output features]."""
    numbers = params["dimension_numbers"]
    last = lhs.ndim - 1
    # A spec names axes in the order: batch (or output features), features, space.
    lhs = jnp.transpose(lhs, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    rhs = jnp.transpose(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    image, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    params = params | {"dimension_numbers": type(numbers)(image, kernel, image)}

    def by_library(lhs, rhs):
        return primitive.bind(lhs, rhs, **params)

    if _is_kernel_gradient(params, lhs, rhs):

        def by_products(lhs, rhs):
            return _kernel_gradient(lhs, rhs, params["precision"])

        out = jax.lax.platform_dependent(lhs, rhs, cpu=by_products, default=by_library)
    else:
        out = by_library(lhs, rhs)
    places = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return jnp.transpose(out, [places.index(axis) for axis in range(last + 1)])


def _is_kernel_gradient(params: dict[str, Any], lhs: Array, rhs: Array) -> bool:
    """Plain, in float32, of two axes of space, with a kernel that is larger than the result."""
    ones = ("window_strides", "lhs_dilation", "rhs_dilation")
    groups = params["batch_group_count"], params["feature_group_count"]
    if lhs.ndim != 4 or any(n != 1 for name in ones for n in params[name]) or groups != (1, 1):
        return False
    if any(n != 0 for pair in params["padding"] for n in pair):
        return False
    if not lhs.dtype == rhs.dtype == (params["preferred_element_type"] or lhs.dtype) == jnp.float32:
        return False
    result = [n - k + 1 for n, k in zip(lhs.shape[1:3], rhs.shape[:2], strict=True)]
    return math.prod(result) < math.prod(rhs.shape[:2])


def _kernel_gradient(lhs: Array, rhs: Array, precision: Any) -> Array:
    """``lhs`` is [channels, H, W, images], ``rhs`` [h, w, images, features]: one product an image.

    A matrix of one image's patches stays in the cache, where all images' would not.
    """
    channels, height, width, images = lhs.shape
    h, w, _, features = rhs.shape
    places = [(i, j) for i in range(height - h + 1) for j in range(width - w + 1)]
    inputs = jnp.transpose(lhs, (3, 1, 2, 0))
    slopes = jnp.transpose(rhs, (2, 0, 1, 3)).reshape(images, h * w, features)

    def add(number, total):
        x = inputs[number]
        patches = jnp.concatenate([x[i : i + h, j : j + w] for i, j in places], axis=2)
        patches = patches.reshape(h * w, len(places) * channels)
        return total + jnp.matmul(slopes[number].T, patches, precision=precision)

    zeros = jnp.zeros((features, len(places) * channels), lhs.dtype)
    total = jax.lax.fori_loop(0, images, add, zeros)
    rows, columns = height - h + 1, width - w + 1
    return jnp.transpose(total.reshape(features, rows, columns, channels), (3, 1, 2, 0))
