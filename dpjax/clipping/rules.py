"""By what factor each example's gradient is cut, and what sensitivity that leaves."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpjax.errors import DpjaxError

Groups: TypeAlias = Literal["per_leaf", "per_layer"] | Callable[[str], str] | None
"""Which leaves share a clip norm; a function maps a leaf's path, "blocks/0/kernel", to a name."""


@dataclasses.dataclass(frozen=True)
class ClipRule:
    """How gradients are bounded; see `clipped_grad` for the meaning of the fields."""

    l2_clip_norm: float | tuple[tuple[str, float], ...]
    groups: Groups = None
    stability_constant: float | None = None

    @property
    def bound(self) -> float:
        """Largest L2 norm that one example's gradient can have afterwards."""
        if isinstance(self.l2_clip_norm, tuple):
            return math.sqrt(sum(norm**2 for _, norm in self.l2_clip_norm))
        return self.l2_clip_norm

    def group_names(self, paths: Sequence[str]) -> list[str]:
        """The group of each leaf."""
        if self.groups is None:
            return ["all"] * len(paths)
        if self.groups == "per_leaf":
            return list(paths)
        if self.groups == "per_layer":
            return [path.rpartition("/")[0] for path in paths]
        assert callable(self.groups)
        return [str(self.groups(path)) for path in paths]

    def group_norms(self, paths: Sequence[str]) -> dict[str, float]:
        """The clip norm of each group that occurs among ``paths``.

        One number is shared out evenly in the square: k groups get ``l2_clip_norm / sqrt(k)``
        each, so that the whole gradient keeps the norm that was asked for.
        """
        names = list(dict.fromkeys(self.group_names(paths)))
        if not isinstance(self.l2_clip_norm, tuple):
            return dict.fromkeys(names, self.l2_clip_norm / math.sqrt(max(len(names), 1)))
        given = dict(self.l2_clip_norm)
        if set(given) != set(names):
            raise DpjaxError(
                f"l2_clip_norm names the groups {sorted(given)}, but the parameters have "
                f"{sorted(names)}; give one norm for each"
            )
        return given

    def factors(
        self,
        squared_norms: Sequence[Float[Array, " batch"]],
        paths: Sequence[str],
        is_padding_example: Bool[Array, " batch"] | None = None,
        relative_clip_norm: Float[Array, ""] | None = None,
    ) -> tuple[list[Array], Float[Array, " batch"], Bool[Array, " batch"]]:
        """Each leaf's factor for each example, the norms before clipping, and who is unclean.

        Padding and examples whose norm is not finite get factor 0. The latter are unclean: their
        rows must be replaced by zeros, because 0 * NaN is NaN.
        """
        names = self.group_names(paths)
        bounds = self.group_norms(paths)
        squares: dict[str, Array] = {}
        for name, square in zip(names, squared_norms, strict=True):
            squares[name] = square if name not in squares else squares[name] + square
        norms = jnp.sqrt(sum(squares.values()))
        is_unclean = ~jnp.isfinite(norms)
        takes_part = ~is_unclean
        if is_padding_example is not None:
            takes_part &= ~is_padding_example
        scale = jnp.ones((), norms.dtype)
        if relative_clip_norm is not None:
            scale = relative_clip_norm.astype(norms.dtype)
        by_group = {}
        for name, square in squares.items():
            norm, bound = jnp.sqrt(square), bounds[name]
            if self.stability_constant is not None:
                factor = bound / (norm + self.stability_constant)
            else:
                # norm = 0 gives 0 / 0 only where the other is smaller; max keeps it defined.
                tiny = jnp.finfo(norm.dtype).tiny
                factor = jnp.minimum(1.0 / scale, bound / jnp.maximum(norm, tiny))
            by_group[name] = jnp.where(takes_part, factor.astype(norms.dtype), 0.0)
        return [by_group[name] for name in names], norms, is_unclean


def clip_rule(
    l2_clip_norm: float | Mapping[str, float],
    groups: Groups = None,
    stability_constant: float | None = None,
) -> ClipRule:
    """Checks the fields of a `ClipRule`."""
    named = isinstance(l2_clip_norm, Mapping)
    for norm in l2_clip_norm.values() if named else (l2_clip_norm,):
        if not norm > 0:
            raise DpjaxError(f"l2_clip_norm is {norm}; it must be positive, e.g. 1.0")
    if named and groups is None:
        raise DpjaxError(
            f"l2_clip_norm names the groups {sorted(l2_clip_norm)}, but groups is None; "
            "say which leaf belongs to which, e.g. groups=lambda path: path.split('/')[0]"
        )
    if not (groups is None or callable(groups) or groups in ("per_leaf", "per_layer")):
        raise DpjaxError(
            f"groups is {groups!r}; use per_leaf, per_layer, a function of the leaf's path, or None"
        )
    if stability_constant is not None and not (
        stability_constant > 0 and math.isfinite(stability_constant)
    ):
        raise DpjaxError(
            f"stability_constant is {stability_constant}; use a small positive number, e.g. 0.01, "
            "or None to clip"
        )
    if named:
        pairs = tuple(sorted((str(k), float(v)) for k, v in l2_clip_norm.items()))
        return ClipRule(pairs, groups, stability_constant)
    return ClipRule(float(l2_clip_norm), groups, stability_constant)
