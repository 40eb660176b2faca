"""Strategy matrices: sensitivity by brute force and by jax_privacy, optima of jax_privacy."""

import contextlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy.matrix_factorization import buffered_toeplitz, sensitivity, toeplitz

from dpjax.errors import DpjaxError
from dpjax.strategies import (
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    Tree,
    described,
    from_description,
    optimal_banded,
    optimal_buffered,
    participations,
    prefix_error,
)

SMALL = [
    BandedToeplitz((1.0, 0.6, 0.3), 11),
    BandedToeplitz((2.0, 0.5, 0.4, 0.4, 0.1), 11),
    BufferedToeplitz((0.9, 0.4), (0.3, 0.2), 11),
    Tree(11),
    Tree(16),
    Tree(1),
    Dense(tuple(map(tuple, np.tril(np.random.default_rng(0).normal(size=(9, 9)) + 2 * np.eye(9))))),
]
PATTERNS = [(1, 3), (2, None), (3, 2), (4, None), (5, 1), (16, None)]


@contextlib.contextmanager
def their_arithmetic():
    """jax_privacy mixes dtypes, and needs float64."""
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def patterns(iterations, min_sep, most):
    """All sets of iterations in which one example may take part."""
    most = iterations if most is None else most
    for count in range(1, most + 1):
        found = False
        for places in itertools.combinations(range(iterations), count):
            if all(b - a >= min_sep for a, b in itertools.pairwise(places)):
                found = True
                yield list(places)
        if not found:
            return


def brute_force(matrix, sets):
    gram = np.abs(matrix.T @ matrix)
    return max(np.sqrt(gram[np.ix_(p, p)].sum()) for p in sets)


@pytest.mark.parametrize(("min_sep", "most"), PATTERNS)
@pytest.mark.parametrize("strategy", SMALL, ids=lambda s: f"{s.kind}{s.iterations}")
def test_sensitivity_covers_every_pattern(strategy, min_sep, most):
    matrix, size = strategy.strategy_matrix(), strategy.iterations
    exact = brute_force(matrix, patterns(size, min_sep, most))
    found = strategy.sensitivity(min_sep, most)
    assert found >= exact - 1e-9
    if isinstance(strategy, BandedToeplitz | BufferedToeplitz) or most == 1:
        assert found == pytest.approx(exact)
    orders = [list(range(first, size, min_sep)) for first in range(min(min_sep, size))]
    turns = strategy.sensitivity(min_sep, fixed_order=True)
    assert turns >= brute_force(matrix, orders) - 1e-9
    assert turns <= strategy.sensitivity(min_sep) + 1e-9
    if not isinstance(strategy, BandedToeplitz | BufferedToeplitz):
        assert turns == pytest.approx(brute_force(matrix, orders))


def test_no_gradients_of_norm_one_move_it_further():
    """Vectors of any direction, not only numbers: the bound is for them."""
    rng = np.random.default_rng(1)
    for strategy in SMALL:
        matrix, size = strategy.strategy_matrix(), strategy.iterations
        for places in itertools.islice(patterns(size, 3, None), 40):
            parts = np.zeros((size, 4))
            parts[places] = rng.normal(size=(len(places), 4))
            parts[places] /= np.linalg.norm(parts[places], axis=1, keepdims=True)
            assert np.linalg.norm(matrix @ parts) <= strategy.sensitivity(3) + 1e-9


def test_coefficients_that_rise_need_bands_that_do_not_meet():
    rising = BandedToeplitz((1.0, -0.5, 0.7), 10)
    exact = brute_force(rising.strategy_matrix(), patterns(10, 3, None))
    assert rising.sensitivity(3) == pytest.approx(exact)
    with pytest.raises(DpjaxError, match="use at most 2 bands"):
        rising.sensitivity(2)


@pytest.mark.parametrize(("min_sep", "most"), [(4, None), (6, 2), (2, 5)])
def test_sensitivity_is_that_of_jax_privacy(min_sep, most):
    with their_arithmetic():
        for strategy in SMALL[:3]:
            found = toeplitz.minsep_sensitivity_squared(
                jnp.asarray(strategy.column()), min_sep, most
            )
            assert strategy.sensitivity(min_sep, most) ** 2 == pytest.approx(float(found))
        dense = SMALL[-1]
        found = sensitivity.get_min_sep_sensitivity_upper_bound(
            jnp.asarray(dense.strategy_matrix()), min_sep, most
        )
        assert dense.sensitivity(min_sep, most) == pytest.approx(found)
        banded = SMALL[0]
        found = sensitivity.get_sensitivity_banded(jnp.asarray(banded.strategy_matrix()), 4, most)
        assert banded.sensitivity(4, most) == pytest.approx(found)
        dense = Dense(tuple(map(tuple, BandedToeplitz((1, 0.5, 0.4), 12).strategy_matrix())))
        found = sensitivity.fixed_epoch_sensitivity(jnp.asarray(dense.strategy_matrix()), 6)
        assert dense.sensitivity(2, fixed_order=True) == pytest.approx(found)


@pytest.mark.parametrize("levels", [1, 4, 7])
def test_a_tree_has_the_square_root_of_its_levels(levels):
    """Kairouz et al. (2021): one participation touches a node at each height."""
    tree = Tree(2 ** (levels - 1))
    assert tree.num_levels == levels
    assert tree.sensitivity(1, max_participations=1) == pytest.approx(np.sqrt(levels))


@pytest.mark.parametrize("size", [1, 2, 7, 16, 21])
def test_noise_of_a_tree_undoes_it_and_has_the_known_variance(size):
    tree = Tree(size)
    product = tree.noising_matrix() @ tree.strategy_matrix()
    np.testing.assert_allclose(product, np.eye(size), atol=1e-12)
    running = np.cumsum(tree.noising_matrix(), axis=0)
    for end in range(1, size + 1):
        # Honaker (2015): a subtree of height h has variance 1 / (2 (1 - 2^-(h+1))).
        heights = [h for h in range(8) if end >> h & 1]
        expected = sum(1 / (2 * (1 - 2.0 ** -(h + 1))) for h in heights)
        assert np.sum(running[end - 1] ** 2) == pytest.approx(expected)


@pytest.mark.parametrize("strategy", [*SMALL[:3], SMALL[-1]], ids=lambda s: s.kind)
def test_error_of_running_sums_is_the_dense_matrices(strategy):
    size = strategy.iterations
    dense = np.tril(np.ones((size, size))) @ np.linalg.inv(strategy.strategy_matrix())
    assert prefix_error(strategy) == pytest.approx(np.mean(np.sum(dense**2, axis=1)))
    if isinstance(strategy, BandedToeplitz | BufferedToeplitz):
        with their_arithmetic():
            theirs = toeplitz.per_query_error(strategy_coef=jnp.asarray(strategy.column()))
            assert prefix_error(strategy) == pytest.approx(float(theirs.mean()))


# What jax_privacy 2.0.0 finds: toeplitz.optimize_banded_toeplitz(n, bands), in 5 to 18 seconds, and
# buffered_toeplitz.optimize(n=n, min_sep=m, max_participations=k, error="mean"), in 37 to 105.
BANDED = {
    (64, 4): (0.70806077, 0.47455281, 0.39774488, 0.33948282),
    (1000, 16): (
        0.4745836, 0.31633072, 0.2786148, 0.25959405, 0.24717646, 0.23787844, 0.23028623,
        0.22369593, 0.21769799, 0.21201598, 0.20642939, 0.20072463, 0.19464661, 0.18782052,
        0.17956184, 0.16817572,
    ),
}  # fmt: skip
BUFFERED = {
    (64, 8, 8): ((0.78507423,), (0.6276752,)),
    (1000, 100, 10): ((0.98166349, 0.57776827), (0.25023504, 0.25734546)),
}


@pytest.mark.parametrize("plan", BANDED)
def test_banded_optimum_is_that_of_jax_privacy(plan):
    ours = optimal_banded(*plan)
    theirs = np.array(BANDED[plan]) / BANDED[plan][0]
    np.testing.assert_allclose(ours.coefficients, theirs, rtol=1e-4)
    assert ours.num_bands == plan[1] and ours.iterations == plan[0]


@pytest.mark.parametrize("plan", BUFFERED)
def test_buffered_optimum_is_that_of_jax_privacy(plan):
    decay, scale = BUFFERED[plan]
    ours, theirs = optimal_buffered(*plan, len(decay)), BufferedToeplitz(decay, scale, plan[0])

    def loss(strategy):
        return prefix_error(strategy) * strategy.sensitivity(*plan[1:]) ** 2

    assert loss(ours) <= loss(theirs) * (1 + 1e-7)
    np.testing.assert_allclose(sorted(ours.buffer_decay), sorted(decay), rtol=1e-4)
    if plan[0] > 64:
        return
    with their_arithmetic():
        objective = buffered_toeplitz.LossFn.build_min_sep(
            n=plan[0], error="mean", min_sep=plan[1], max_participations=plan[2]
        )
        blt = buffered_toeplitz.BufferedToeplitz.build(ours.buffer_decay, ours.output_scale)
        assert loss(ours) == pytest.approx(float(objective.loss(blt, skip_checks=True)), rel=1e-6)


def test_more_memory_is_no_worse_and_one_participation_has_the_published_root():
    errors = [
        prefix_error(s) * s.sensitivity(50, 4) ** 2
        for s in [optimal_banded(200, b) for b in (1, 4, 16, 50)]
    ]
    assert errors[0] == pytest.approx(4 * 201 / 2)  # independent noise, four participations
    assert all(a > b for a, b in itertools.pairwise(errors))
    # Fichtenberger et al. (2023): 1 / sqrt(1 - x) has error times sensitivity^2 within a constant
    # of (1 + ln(n) / pi)^2 at the last sum; the optimum of the mean is below.
    full = optimal_banded(200, 200)
    assert prefix_error(full) * full.sensitivity(1, 1) ** 2 < (1 + np.log(200) / np.pi) ** 2


@pytest.mark.parametrize("strategy", SMALL, ids=lambda s: f"{s.kind}{s.iterations}")
def test_a_description_is_json_and_is_read_back(strategy):
    assert from_description(json.loads(json.dumps(described(strategy)))) == strategy


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BandedToeplitz((), 3), "coefficients are"),
        (lambda: BandedToeplitz((0.0, 1.0), 3), "the first above 0"),
        (lambda: BandedToeplitz((1.0, 0.5), 1), "for 1 iterations"),
        (lambda: BandedToeplitz((1.0, float("nan")), 4), "must be finite"),
        (lambda: BufferedToeplitz((1.0,), (0.5,), 3), "decays in"),
        (lambda: BufferedToeplitz((0.5, 0.2), (0.7, 0.7), 3), "a sum of at most 1"),
        (lambda: Tree(0), "iterations is 0"),
        (lambda: Dense(((1.0, 1.0), (0.0, 1.0))), "lower triangular"),
        (lambda: Dense(((0.0,),)), "without a zero"),
        (lambda: participations(3, 0), "min_sep is 0"),
        (lambda: participations(3, 1, 0), "max_participations 0"),
    ],
)
def test_impossible_strategies_are_refused(make, words):
    with pytest.raises(DpjaxError, match=words):
        make()
