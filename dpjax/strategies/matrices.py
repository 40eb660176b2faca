"""Strategy matrices of correlated noise: what they are, and how far one example moves them.

A strategy C (lower triangular, or more rows than iterations) and its noising matrix N with N C = 1
turn independent draws Z into the noise N Z. Sums G with that noise are N (C G + Z): a Gaussian
mechanism on C G. Everything here is NumPy in float64 on public numbers.
"""

import dataclasses
import math
from typing import Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy import linalg

from dpjax.errors import DpjaxError


@dataclasses.dataclass(frozen=True)
class BandedToeplitz:
    """Lower-triangular Toeplitz matrix with ``coefficients`` down its first column.

    Attributes:
      coefficients: the diagonal's first, above 0; rounded to float32, which training computes in.
      iterations: size of the matrix.

    Source: Choquette-Choo et al. (2023), "(Amplified) banded matrix factorization".

    Example:
      >>> print(BandedToeplitz((1.0, 0.5), 3).strategy_matrix())
      [[1.  0.  0. ]
       [0.5 1.  0. ]
       [0.  0.5 1. ]]
    """

    coefficients: tuple[float, ...]
    iterations: int
    kind: ClassVar[str] = "banded"

    def __post_init__(self):
        _check_iterations(self.iterations)
        _round(self, "coefficients")
        if not (1 <= len(self.coefficients) <= self.iterations and self.coefficients[0] > 0):
            raise DpjaxError(
                f"coefficients are {self.coefficients} for {self.iterations} iterations; use "
                "between one and as many, the first above 0"
            )

    @property
    def num_bands(self) -> int:
        """Diagonals that are not zero."""
        return len(self.coefficients)

    def column(self) -> Float[np.ndarray, " n"]:
        """First column of the matrix."""
        return np.pad(self.coefficients, (0, self.iterations - self.num_bands))

    def strategy_matrix(self) -> Float[np.ndarray, "n n"]:
        """C; for small runs and tests."""
        return _toeplitz(self.column())

    def noising_matrix(self) -> Float[np.ndarray, "n n"]:
        """C^-1; for small runs and tests."""
        return np.linalg.inv(self.strategy_matrix())

    def sensitivity(
        self, min_sep: int, max_participations: int | None = None, *, fixed_order: bool = False
    ) -> float:
        """Largest L2 norm of C G over one example's parts G of norm 1; see `participations`."""
        del fixed_order  # the worst case of min-separation is a fixed order
        column = self.column()
        count = participations(self.iterations, min_sep, max_participations)
        if _falls(column):
            return _sensitivity_of_falling(column, min_sep, count)
        if self.num_bands > min_sep:
            raise DpjaxError(
                f"coefficients of {self.num_bands} bands rise or are negative, and two "
                f"participations may lie {min_sep} iterations apart; use at most {min_sep} bands, "
                "or coefficients that fall"
            )
        # Columns that one example can meet are orthogonal, and later ones are cut short.
        squares = np.cumsum(column**2)
        return math.sqrt(sum(squares[self.iterations - 1 - a * min_sep] for a in range(count)))


@dataclasses.dataclass(frozen=True)
class BufferedToeplitz:
    """Lower-triangular Toeplitz matrix 1, t_1, t_2, ... with t_i = sum_j scale_j decay_j^(i-1).

    Its noise needs one buffer for each decay, however many iterations it looks back.

    Attributes:
      buffer_decay: in [0, 1).
      output_scale: at least 0, with a sum of at most 1, so that the coefficients fall.
      iterations: size of the matrix.

    Source: Dvijotham et al. (2024); McMahan et al. (2024), "A hassle-free algorithm for strong
    differential privacy in federated learning systems" (BLT).

    Example:
      >>> print(BufferedToeplitz((0.5,), (0.5,), 3).strategy_matrix())
      [[1.   0.   0.  ]
       [0.5  1.   0.  ]
       [0.25 0.5  1.  ]]
    """

    buffer_decay: tuple[float, ...]
    output_scale: tuple[float, ...]
    iterations: int
    kind: ClassVar[str] = "blt"

    def __post_init__(self):
        _check_iterations(self.iterations)
        _round(self, "buffer_decay")
        _round(self, "output_scale")
        decay, scale = self.buffer_decay, self.output_scale
        fits = len(decay) == len(scale) >= 1 and all(0 <= d < 1 for d in decay)
        if not (fits and all(s >= 0 for s in scale) and sum(scale) <= 1):
            raise DpjaxError(
                f"buffer_decay is {decay} and output_scale {scale}; they must be as many, decays "
                "in [0, 1), scales at least 0 with a sum of at most 1"
            )

    def column(self) -> Float[np.ndarray, " n"]:
        """First column of the matrix."""
        powers = np.array(self.buffer_decay) ** np.arange(self.iterations - 1)[:, None]
        return np.concatenate([[1.0], powers @ np.array(self.output_scale)])

    def strategy_matrix(self) -> Float[np.ndarray, "n n"]:
        """C; for small runs and tests."""
        return _toeplitz(self.column())

    def noising_matrix(self) -> Float[np.ndarray, "n n"]:
        """C^-1; for small runs and tests."""
        return np.linalg.inv(self.strategy_matrix())

    def sensitivity(
        self, min_sep: int, max_participations: int | None = None, *, fixed_order: bool = False
    ) -> float:
        """Largest L2 norm of C G over one example's parts G of norm 1; see `participations`."""
        del fixed_order  # the worst case of min-separation is a fixed order
        count = participations(self.iterations, min_sep, max_participations)
        return _sensitivity_of_falling(self.column(), min_sep, count)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Sums over the complete nodes of a binary tree whose leaves are the iterations.

    A node's estimate is the best mean of its own noisy sum and those of its children, as far as
    they are complete (the online estimator of Honaker).

    Source: Dwork et al. (2010); Honaker (2015); Kairouz et al. (2021), "Practical and private
    (deep) learning without sampling or shuffling", algorithm 1 and appendix.

    Example:
      >>> print(Tree(3).strategy_matrix())  # leaf, leaf, both, leaf: in the order of completion
      [[1. 0. 0.]
       [0. 1. 0.]
       [1. 1. 0.]
       [0. 0. 1.]]
      >>> print(f"{Tree(1024).sensitivity(min_sep=1024)**2:.0f}")  # a leaf and ten above it
      11
    """

    iterations: int
    kind: ClassVar[str] = "tree"

    def __post_init__(self):
        _check_iterations(self.iterations)

    @property
    def num_levels(self) -> int:
        """Heights at which there is a complete node."""
        return self.iterations.bit_length()

    def weights(self) -> Float[np.ndarray, " levels"]:
        """Share of a node's own draw in its estimate, by height; also the estimate's variance."""
        found = [1.0]
        while len(found) < self.num_levels:
            found.append(2 * found[-1] / (2 * found[-1] + 1))
        return np.array(found)

    def strategy_matrix(self) -> Float[np.ndarray, "nodes n"]:
        """C, a row for each complete node in the order of completion; for small runs and tests."""
        rows = []
        for end in range(1, self.iterations + 1):
            for level in range(self.num_levels):
                size = 1 << level
                if end % size == 0:
                    row = np.zeros(self.iterations)
                    row[end - size : end] = 1
                    rows.append(row)
        return np.stack(rows)

    def noising_matrix(self) -> Float[np.ndarray, "n nodes"]:
        """N with N C = 1; for small runs and tests."""
        total, weights = len(self.strategy_matrix()), self.weights()
        draws = np.eye(total)
        kept, rows, drawn, before = {}, [], 0, np.zeros(total)
        for _ in range(self.iterations):
            estimate, level = draws[drawn], 0
            drawn += 1
            while level in kept:
                own = weights[level + 1] * draws[drawn]
                estimate = own + (1 - weights[level + 1]) * (kept.pop(level) + estimate)
                drawn, level = drawn + 1, level + 1
            kept[level] = estimate
            prefix = sum(kept.values(), np.zeros(total))
            rows.append(prefix - before)
            before = prefix
        return np.stack(rows)

    def sensitivity(
        self, min_sep: int, max_participations: int | None = None, *, fixed_order: bool = False
    ) -> float:
        """Largest L2 norm of C G over one example's parts G of norm 1; see `participations`.

        Exact for a fixed order and for one participation; else an upper bound: a node of s leaves
        meets at most ceil(s / min_sep) of an example's k parts, so its level adds at most k times
        that to the square.
        """
        count = participations(self.iterations, min_sep, max_participations)
        sizes = [1 << level for level in range(self.num_levels)]
        square = count * sum(min(count, -(-size // min_sep)) for size in sizes)
        if fixed_order:
            exact = 0
            for first in range(min(min_sep, self.iterations)):
                places = np.arange(first, self.iterations, min_sep)
                met = 0
                for size in sizes:
                    within = places[places < self.iterations // size * size] // size
                    met += int(np.sum(np.bincount(within) ** 2))
                exact = max(exact, met)
            square = min(square, exact)
        return math.sqrt(square)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Any invertible lower-triangular matrix, row by row. Each step draws all earlier noise again.

    For strategies found elsewhere (``jax_privacy.matrix_factorization.dense``) and runs of at most
    some hundred iterations.

    Example:
      >>> print(f"{Dense(((1.0, 0.0), (0.5, 2.0))).sensitivity(min_sep=2):.2f}")
      2.00
    """

    rows: tuple[tuple[float, ...], ...]
    kind: ClassVar[str] = "dense"

    def __post_init__(self):
        rows = tuple(tuple(float(x) for x in row) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        size = len(rows)
        square = size > 0 and all(len(row) == size for row in rows)
        matrix = np.array(rows) if square else np.zeros((1, 1))
        if not (np.all(np.isfinite(matrix)) and np.all(np.triu(matrix, 1) == 0)) or np.any(
            np.diag(matrix) == 0
        ):
            raise DpjaxError(
                f"a matrix of {size} rows is no strategy; it must be square, finite, lower "
                "triangular and without a zero on its diagonal"
            )

    @property
    def iterations(self) -> int:
        """Size of the matrix."""
        return len(self.rows)

    def strategy_matrix(self) -> Float[np.ndarray, "n n"]:
        """C."""
        return np.array(self.rows)

    def noising_matrix(self) -> Float[np.ndarray, "n n"]:
        """C^-1."""
        return linalg.solve_triangular(self.strategy_matrix(), np.eye(self.iterations), lower=True)

    def sensitivity(
        self, min_sep: int, max_participations: int | None = None, *, fixed_order: bool = False
    ) -> float:
        """Upper bound on the L2 norm of C G over one example's parts G; see `participations`.

        Source: Choquette-Choo et al. (2023), equation 5 (fixed order) and algorithm 4.
        """
        size = self.iterations
        count = participations(size, min_sep, max_participations)
        gram = np.abs(self.strategy_matrix().T @ self.strategy_matrix())
        each = np.array([_most(row, min_sep, count) for row in gram])
        square = _most(each, min_sep, count)
        if fixed_order:
            orders = (np.arange(first, size, min_sep) for first in range(min(min_sep, size)))
            square = min(square, max(gram[np.ix_(places, places)].sum() for places in orders))
        return math.sqrt(square)


Strategy: TypeAlias = BandedToeplitz | BufferedToeplitz | Tree | Dense
"""What `dpjax.matrix_factorization_privatizer` can draw from."""


KINDS: dict[str, type[Strategy]] = {
    kind.kind: kind for kind in (BandedToeplitz, BufferedToeplitz, Tree, Dense)
}
"""Every strategy by its name, for ledgers."""


def described(strategy: Strategy) -> dict[str, Any]:
    """A strategy as JSON-compatible values; `from_description` reads it back.

    Example:
      >>> described(BandedToeplitz((1.0, 0.5), 9))
      {'kind': 'banded', 'coefficients': [1.0, 0.5], 'iterations': 9}
    """
    values = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)}
    return {
        "kind": strategy.kind,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
    }


def from_description(description: dict[str, Any]) -> Strategy:
    """The strategy that `described` wrote down.

    Example:
      >>> from_description({"kind": "tree", "iterations": 7})
      Tree(iterations=7)
    """
    values = dict(description)
    kind: Any = KINDS[values.pop("kind")]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def participations(iterations: int, min_sep: int, max_participations: int | None = None) -> int:
    """How often one example takes part at most, at least ``min_sep`` iterations apart.

    In a fixed order it takes part in exactly every ``min_sep``-th iteration.

    Example:
      >>> participations(10, 4), participations(10, 4, max_participations=2)
      (3, 2)
    """
    if min_sep < 1 or (max_participations is not None and max_participations < 1):
        raise DpjaxError(
            f"min_sep is {min_sep} and max_participations {max_participations}; use at least 1"
        )
    most = -(-iterations // min_sep)
    return most if max_participations is None else min(most, max_participations)


def _check_iterations(iterations: int) -> None:
    # The draws of an iteration have keys folded with its number, an int32; the largest is taken.
    if not 1 <= iterations < 2**31 - 1:
        raise DpjaxError(f"iterations is {iterations}; it must be at least 1 and fit an int32")


def _round(strategy: object, name: str) -> None:
    """To float32, so that the matrix accounted for is the one that training multiplies with."""
    values = tuple(float(np.float32(x)) for x in getattr(strategy, name))
    if not all(math.isfinite(x) for x in values):
        raise DpjaxError(f"{name} is {values}; all must be finite")
    object.__setattr__(strategy, name, values)


def _toeplitz(column: np.ndarray) -> np.ndarray:
    return linalg.toeplitz(column, np.zeros_like(column))


def _falls(column: np.ndarray) -> bool:
    return bool(np.all(column >= 0) and np.all(np.diff(column) <= 0))


def overlaid(column: np.ndarray, min_sep: int, count: int) -> np.ndarray:
    """A Toeplitz matrix's first column and those ``min_sep`` further on, added up."""
    total = column.copy()
    for a in range(1, count):
        total[a * min_sep :] += column[: -a * min_sep]
    return total


def _sensitivity_of_falling(column: np.ndarray, min_sep: int, count: int) -> float:
    """Falling coefficients: taking part first at 0, then every ``min_sep``, is the worst.

    Source: McMahan et al. (2024), theorem 2 of arXiv 2405.13763.
    """
    return float(np.linalg.norm(overlaid(column, min_sep, count)))


def _most(values: np.ndarray, min_sep: int, count: int) -> float:
    """Largest sum of at most ``count`` non-negative values, ``min_sep`` apart."""
    best = np.zeros(len(values) + min_sep)
    for _ in range(count):
        taken = np.zeros_like(best)
        taken[:-min_sep] = values + best[min_sep:]
        best = np.maximum.accumulate(taken[::-1])[::-1]
    return float(best[0])
