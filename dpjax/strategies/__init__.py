"""Correlated noise as matrices: strategies, their sensitivity, and the best of a kind."""

from dpjax.strategies.matrices import (
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    Strategy,
    Tree,
    described,
    from_description,
    participations,
)
from dpjax.strategies.optimal import optimal_banded, optimal_buffered, prefix_error

__all__ = [
    "BandedToeplitz",
    "BufferedToeplitz",
    "Dense",
    "Strategy",
    "Tree",
    "described",
    "from_description",
    "optimal_banded",
    "optimal_buffered",
    "participations",
    "prefix_error",
]
