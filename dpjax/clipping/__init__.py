"""Per-example gradient clipping: the sum of clipped gradients and its sensitivity."""

from dpjax.clipping.api import ClippedGrad, Method, clipped_grad, microbatch_order
from dpjax.clipping.explain import LeafStrategy, explain
from dpjax.clipping.norms import clip_and_sum, per_example_l2_norms
from dpjax.clipping.rules import Groups

__all__ = [
    "ClippedGrad",
    "Groups",
    "LeafStrategy",
    "Method",
    "clip_and_sum",
    "clipped_grad",
    "explain",
    "microbatch_order",
    "per_example_l2_norms",
]
