"""``clipped_grad``: from a one-example loss to a sum of clipped gradients with its sensitivity."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpjax.clipping import lazy
from dpjax.clipping.compat import is_traced
from dpjax.clipping.rules import ClipRule, Groups, clip_rule
from dpjax.errors import DpjaxError
from dpjax.types import ClipInfo, LossFn, NeighboringRelation, PyTree, as_neighboring_relation

Method = Literal["auto", "vmap", "lazy"]
METHODS = ("auto", "vmap", "lazy")


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """A function from ``(params, batch)`` to the sum of clipped gradients. Made by `clipped_grad`.

    Its fields are public configuration; private data and parameters enter at call time.
    """

    loss_fn: LossFn
    rule: ClipRule
    method: Method
    microbatch_size: int | None
    has_aux: bool
    normalize_by: float
    memory_budget: float | None

    def sensitivity(
        self, neighboring_relation: NeighboringRelation | str = "add_or_remove_one"
    ) -> float:
        """Largest L2 change of the returned sum between neighbouring batches.

        Example:
          >>> grad_fn = clipped_grad(lambda p, x: p * x, l2_clip_norm=2.0, normalize_by=4.0)
          >>> grad_fn.sensitivity("add_or_remove_one"), grad_fn.sensitivity("replace_one")
          (0.5, 1.0)
        """
        relation = as_neighboring_relation(neighboring_relation)
        changed = 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0
        return changed * self.rule.bound / self.normalize_by

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        is_padding_example: Bool[Array, " batch"] | None = None,
        relative_clip_norm: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, ClipInfo]:
        """Sum of clipped gradients over ``batch``; see `clipped_grad`.

        Args:
          params: pytree of arrays.
          batch: pytree whose leaves have a leading axis ``batch``.
          is_padding_example: True where a row is not an example.
          relative_clip_norm: a public float32 scalar r that may change from call to call: clips
            to r times the clip norm and divides the sum by r, so that the sensitivity stays what
            it is. Multiply the noisy sum by r afterwards.
        """
        _batch_size(batch, is_padding_example)
        if relative_clip_norm is not None and self.rule.stability_constant is not None:
            raise DpjaxError(
                "relative_clip_norm is given with a stability_constant; automatic clipping has "
                "no threshold to move: use one of the two"
            )
        arguments = (params, batch, is_padding_example, relative_clip_norm)
        if _is_hashable(self) and not any(map(is_traced, jax.tree.leaves(arguments))):
            # The arrays of a Partial are arguments too, not constants of the program.
            frozen = self.loss_fn if isinstance(self.loss_fn, jax.tree_util.Partial) else None
            static = self if frozen is None else dataclasses.replace(self, loss_fn=_in_arguments)
            return _compiled(static, frozen, *arguments)
        return self._sum(*arguments)

    def _sum(
        self, params, batch, is_padding_example, relative_clip_norm
    ) -> tuple[PyTree, ClipInfo]:
        size = _batch_size(batch, is_padding_example)
        if self.microbatch_size is None or self.microbatch_size >= size:
            total, info = self._one_pass(params, batch, is_padding_example, relative_clip_norm)
        else:
            total, info = self._scan_microbatches(
                params, batch, is_padding_example, relative_clip_norm, size
            )
        if self.normalize_by != 1.0:
            total = jax.tree.map(lambda x: x / self.normalize_by, total)
        return total, info

    def _one_pass(
        self, params, batch, is_padding_example, relative_clip_norm
    ) -> tuple[PyTree, ClipInfo]:
        total, value, norms = lazy.clip_and_sum(
            self.loss_fn,
            self.has_aux,
            params,
            batch,
            self.rule,
            is_padding_example,
            relative_clip_norm,
            self.method,
            self.memory_budget,
        )
        losses, aux = value if self.has_aux else (value, None)
        losses = losses.astype(jnp.float32)
        norms = norms.astype(jnp.float32)
        if is_padding_example is not None:
            losses = jnp.where(is_padding_example, 0.0, losses)
            norms = jnp.where(is_padding_example, 0.0, norms)
        return total, ClipInfo(norms, losses, aux)

    def _scan_microbatches(self, params, batch, is_padding_example, relative_clip_norm, size):
        """Loops over microbatches, so that memory does not grow with the batch."""
        assert self.microbatch_size is not None
        count = -(-size // self.microbatch_size)
        if is_padding_example is None:
            is_padding_example = jnp.zeros(size, bool)
        missing = count * self.microbatch_size - size
        if missing:
            batch = jax.tree.map(
                lambda x: jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)]), batch
            )
            is_padding_example = jnp.concatenate([is_padding_example, jnp.ones(missing, bool)])

        # Microbatch k takes rows k, k + count, k + 2 count, ...: a batch axis that is sharded over
        # devices then stays sharded within every microbatch, without moving a row.
        def split(x):
            return jnp.moveaxis(x.reshape(self.microbatch_size, count, *x.shape[1:]), 1, 0)

        def join(x):
            return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:size]

        def one_pass(chunk):
            rows, is_padding = chunk
            return self._one_pass(params, rows, is_padding, relative_clip_norm)

        chunks = jax.tree.map(split, (batch, is_padding_example))
        shapes = jax.eval_shape(one_pass, _first(chunks))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(total, chunk):
            # A microbatch of padding alone is skipped at run time: Poisson sampling leaves many.
            partial, info = jax.lax.cond(jnp.all(chunk[1]), lambda _: zeros, one_pass, chunk)
            return jax.tree.map(jnp.add, total, partial), info

        total, infos = jax.lax.scan(body, zeros[0], chunks)
        return total, jax.tree.map(join, infos)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # such as a module that holds arrays, as loss_fn
        return False
    return True


@functools.partial(jax.jit, static_argnums=0)
def _compiled(grad_fn: ClippedGrad, loss_fn: Any, *arguments: Any) -> tuple[PyTree, ClipInfo]:
    """For calls outside of jit: operation by operation, every branch would be compiled anew."""
    if loss_fn is not None:
        grad_fn = dataclasses.replace(grad_fn, loss_fn=loss_fn)
    return grad_fn._sum(*arguments)


def _in_arguments(params: PyTree, example: PyTree) -> Any:
    """Stands for a loss that is passed as a pytree."""
    raise NotImplementedError


def clipped_grad(
    loss_fn: LossFn,
    l2_clip_norm: float | Mapping[str, float],
    method: Method = "auto",
    microbatch_size: int | None = None,
    has_aux: bool = False,
    normalize_by: float = 1.0,
    *,
    groups: Groups = None,
    stability_constant: float | None = None,
    memory_budget: float | None = None,
) -> ClippedGrad:
    """Turns a one-example loss into a function that returns the sum of clipped gradients.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example (no batch axis); with
        ``has_aux`` it returns ``(scalar, aux)``.
      l2_clip_norm: largest L2 norm of one example's gradient, over all leaves together; ``inf``
        gives plain summed gradients and infinite sensitivity. With ``groups`` it may be one norm
        for each group by name.
      method: how the same numbers are found. "vmap" holds one gradient per example of a
        microbatch. "lazy" holds the operands of the products that gradients are made of, where
        they take less room. "auto" decides for each leaf by time and ``memory_budget``. See
        `dpjax.clipping.explain`.
      microbatch_size: examples differentiated at once; memory follows this, not the batch. None
        means the whole batch. A batch that is not a multiple is padded internally.
      has_aux: whether ``loss_fn`` returns auxiliary output, found in ``info.sensitive_aux``.
      normalize_by: a public constant that divides the sum and the sensitivity. Never the realised
        batch size, which is private under Poisson sampling.
      groups: which leaves are clipped together: None (all), "per_leaf", "per_layer" (leaves with
        one parent), or a function from a leaf's path ("blocks/0/attention/kernel") to a name. A
        single ``l2_clip_norm`` is shared out as ``l2_clip_norm / sqrt(number of groups)``.
      stability_constant: None clips by min(1, l2_clip_norm / norm). A positive number normalises
        instead, by l2_clip_norm / (norm + stability_constant): automatic clipping.
      memory_budget: bytes that "auto" may spend beyond "lazy" to save time; None is a share of
        what the step needs anyway.

    Returns:
      ``grad_fn(params, batch, is_padding_example=None) -> (sum_of_clipped_grads, info)``, with
      ``grad_fn.sensitivity(neighboring_relation)``. Leaves of the sum have the parameters' shapes
      in float32 (or wider). ``info.sensitive_norms`` (of the whole gradient, before clipping) and
      ``info.sensitive_losses`` are float32[batch], in the batch's order, 0 on padding.

    Raises:
      DpjaxError: a bad clip norm, group, method, microbatch size, normaliser or batch shape.

    Guarantee:
      For batches that differ by adding or removing one example, the two sums differ by at most
      ``l2_clip_norm / normalize_by`` in L2 (with a norm for each group: the root of the sum of
      their squares); by replacing one, at most twice that; up to float32 rounding. Examples
      cannot influence each other's terms. A NaN or infinity in one example equals that example's
      removal. Padding rows add exactly zero, whatever they hold. An empty batch gives zeros.
      Norms and the sum are computed in float32 even for bfloat16 parameters.

    Source: Abadi et al. (2016), Algorithm 1, without its division by the batch size; groups as in
    McMahan et al. (2018), section 3.2; automatic clipping by Bu et al. (2023).

    Example:
      >>> import jax.numpy as jnp
      >>> grad_fn = clipped_grad(lambda w, x: jnp.dot(w, x), l2_clip_norm=5.0)
      >>> total, info = grad_fn(jnp.zeros(2), jnp.array([[6.0, 8.0], [0.0, 0.5]]))
      >>> print(total, info.sensitive_norms)
      [3.  4.5] [10.   0.5]
    """
    if method not in METHODS:
        raise DpjaxError(f"method is {method!r}; use one of: {', '.join(METHODS)}")
    if microbatch_size is not None and microbatch_size < 1:
        raise DpjaxError(
            f"microbatch_size is {microbatch_size}; use a positive integer, or None for one pass"
        )
    if not (normalize_by > 0 and math.isfinite(normalize_by)):
        raise DpjaxError(
            f"normalize_by is {normalize_by}; use a positive public constant, "
            "e.g. the expected batch size"
        )
    if memory_budget is not None and not memory_budget >= 0:
        raise DpjaxError(f"memory_budget is {memory_budget}; use bytes, e.g. 2e9, or None")
    return ClippedGrad(
        loss_fn,
        clip_rule(l2_clip_norm, groups, stability_constant),
        method,
        microbatch_size,
        has_aux,
        float(normalize_by),
        memory_budget,
    )


def microbatch_order(size: int, microbatch_size: int) -> np.ndarray:
    """Permutation of a batch after which microbatch k holds rows k*m to (k+1)*m of the original.

    Microbatches are strided (see `ClippedGrad`), so rows that belong together, such as padding at
    the end of a batch, are put together with ``batch[microbatch_order(size, m)]``.

    Example:
      >>> microbatch_order(6, 2).tolist()  # three microbatches: rows 0 and 3, 1 and 4, 2 and 5
      [0, 2, 4, 1, 3, 5]
    """
    count = size // microbatch_size
    if count * microbatch_size != size:
        raise DpjaxError(f"batch of {size} is not a multiple of microbatch_size {microbatch_size}")
    place = np.arange(size)
    return (place % count) * microbatch_size + place // count


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def _batch_size(batch: Any, is_padding_example: Any) -> int:
    leaves = jax.tree.leaves(batch)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        shapes = [tuple(jnp.shape(leaf)) for leaf in leaves]
        raise DpjaxError(
            f"batch leaves have shapes {shapes}; every leaf needs the same leading batch axis"
        )
    (size,) = sizes.pop()
    if is_padding_example is not None and jnp.shape(is_padding_example) != (size,):
        raise DpjaxError(
            f"is_padding_example has shape {tuple(jnp.shape(is_padding_example))}; "
            f"it must be ({size},), one flag per example"
        )
    return size
