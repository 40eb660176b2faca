"""Correlated noise: the dense matrix's numbers and covariance, no draw twice, resumable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.correlated_noise import CorrelatedNoise, matrix_factorization_privatizer, num_kept
from dpjax.errors import DpjaxError
from dpjax.noise import gaussian_noise_like, gaussian_privatizer
from dpjax.strategies import BandedToeplitz, BufferedToeplitz, Dense, Tree, optimal_buffered

KEY = jax.random.key(3)
STEPS = 13
RNG = np.random.default_rng(0)
DENSE = np.tril(RNG.normal(size=(STEPS, STEPS)) / 4, -1) + np.eye(STEPS)
STRATEGIES = [
    BandedToeplitz((1.0, 0.6, 0.4, 0.3), STEPS),
    BandedToeplitz((2.0,), STEPS),
    BandedToeplitz(tuple(np.linspace(1.5, 0.1, STEPS)), STEPS),
    BufferedToeplitz((0.9, 0.5), (0.3, 0.25), STEPS),
    Tree(STEPS),
    Tree(1),
    Dense(tuple(map(tuple, DENSE))),
]
by_name = pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda s: f"{s.kind}{num_kept(s)}-{s.iterations}"
)
SHAPES = {"a": (3, 2), "b": (5,), "c": ()}


def zeros(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def run(privatizer, tree, count, state=None):
    """``count`` calls in one compiled loop."""
    state = privatizer.init(tree) if state is None else state

    def step(state, _):
        noisy, state = privatizer.update(tree, state)
        return state, noisy

    state, noisy = jax.jit(lambda state: jax.lax.scan(step, state, None, count))(state)
    steps = [flat(jax.tree.map(lambda x, t=t: x[t], noisy)) for t in range(count)]
    return np.stack(steps), state


def raw_draws(strategy, stddev, tree):
    """Z from the documented keys, in the order of the noising matrix's columns."""
    found = []
    for count in range(strategy.iterations):
        at = jax.random.fold_in(KEY, count)
        if not isinstance(strategy, Tree):
            found.append(gaussian_noise_like(tree, stddev, at))
            continue
        for level in range(strategy.num_levels):
            if (count + 1) % 2**level == 0:
                found.append(gaussian_noise_like(tree, stddev, jax.random.fold_in(at, level)))
    return np.stack([flat(draw) for draw in found])


@by_name
def test_noise_is_the_dense_matrix_times_the_draws(strategy):
    found, state = run(
        matrix_factorization_privatizer(strategy, 2.5, KEY), zeros(), strategy.iterations
    )
    expected = strategy.noising_matrix() @ raw_draws(strategy, 2.5, zeros())
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert int(state.count) == strategy.iterations
    for leaf, like in zip(jax.tree.leaves(state.buffers), jax.tree.leaves(zeros()), strict=True):
        assert leaf.shape == (num_kept(strategy), *like.shape) and leaf.dtype == jnp.float32


@pytest.mark.parametrize("strategy", [STRATEGIES[0], *STRATEGIES[3:5]], ids=lambda s: s.kind)
def test_covariance_is_that_of_the_strategy(strategy):
    """Whitened by the inverse of the strategy, many runs are independent and of the right size."""
    many, stddev = {"a": jnp.zeros((4000,)), "b": jnp.zeros((2000,))}, 1.7
    found, _ = run(matrix_factorization_privatizer(strategy, stddev, KEY), many, STEPS)
    noising = strategy.noising_matrix()
    if not isinstance(strategy, Tree):
        gram = strategy.strategy_matrix().T @ strategy.strategy_matrix()
        np.testing.assert_allclose(noising @ noising.T, np.linalg.inv(gram), atol=1e-9)
    whitened = np.linalg.solve(np.linalg.cholesky(noising @ noising.T), found)
    samples = found.shape[1]

    def plausible(scale):
        covariance = whitened @ whitened.T / samples / scale**2
        error = np.abs(covariance - np.eye(STEPS)) * np.sqrt(samples)
        np.fill_diagonal(error, np.diag(error) / np.sqrt(2))
        return error.max() < 5.5  # 91 normal numbers: once in 300,000

    assert plausible(stddev)
    assert not plausible(stddev * 2 / 3) and not plausible(stddev * 3 / 2)
    # And it is not the independent noise of the same total.
    apart = found @ found.T / samples / stddev**2
    assert np.abs(apart - np.diag(np.diag(apart))).max() > 0.1


@by_name
def test_a_resumed_state_goes_on_bitwise(strategy):
    total = strategy.iterations
    privatizer = matrix_factorization_privatizer(strategy, 1.0, KEY)
    step = jax.jit(privatizer.update)
    whole, state = [], privatizer.init(zeros())
    for _ in range(total):
        noisy, state = step(zeros(), state)
        whole.append(flat(noisy))
    state = privatizer.init(zeros())
    for number in range(total):
        if number == total // 2:  # through the host, to another object with another key
            state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
            step = jax.jit(
                matrix_factorization_privatizer(strategy, 1.0, jax.random.key(99)).update
            )
        noisy, state = step(zeros(), state)
        np.testing.assert_array_equal(flat(noisy), whole[number])


def test_one_band_is_independent_noise_to_the_bit():
    one = matrix_factorization_privatizer(BandedToeplitz((1.0,), STEPS), 1.3, KEY)
    np.testing.assert_array_equal(
        run(one, zeros(), STEPS)[0], run(gaussian_privatizer(1.3, KEY), zeros(), STEPS)[0]
    )


@by_name
def test_beyond_the_plan_nothing_is_released(strategy):
    privatizer = matrix_factorization_privatizer(strategy, 1.0, KEY)
    state = privatizer.init(zeros())._replace(count=jnp.int32(strategy.iterations))
    with pytest.raises(DpjaxError, match=f"planned for {strategy.iterations} iterations"):
        privatizer.update(zeros(), state)
    noisy, _ = jax.jit(privatizer.update)(zeros(), state)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(noisy))


@pytest.mark.parametrize("strategy", [STRATEGIES[0], *STRATEGIES[3:5]], ids=lambda s: s.kind)
def test_bfloat16_sums_get_float32_noise(strategy):
    privatizer = matrix_factorization_privatizer(strategy, 1.0, KEY)
    state = privatizer.init(zeros(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(state.buffers)} == {jnp.dtype("float32")}
    noisy, after = privatizer.update(zeros(jnp.bfloat16), state)
    assert {x.dtype for x in jax.tree.leaves(noisy)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_no_key_is_that_of_another_stream():
    """What leaves are drawn with, for each iteration and height, and `AdaptiveClipping`'s counts.

    split(key)[i] and fold_in(key, i) may be one function: what counts is the whole way to a leaf.
    """
    counts = jnp.arange(40)
    at = jax.vmap(lambda count: jax.random.fold_in(KEY, count))(counts)
    levels = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(jnp.arange(6)))(at)
    by_height = jax.vmap(jax.vmap(lambda k: jax.random.split(k, 3)))(levels)
    by_leaf = jax.vmap(lambda k: jax.random.split(k, 3))(at)
    stream = jax.random.fold_in(KEY, 2**31 - 1)
    adaptive = jax.vmap(lambda release: jax.random.fold_in(stream, release))(counts)
    for own in (by_height, by_leaf):
        keys = [np.asarray(jax.random.key_data(k)).reshape(-1, 2) for k in (own, adaptive)]
        together = np.concatenate(keys)
        assert len(np.unique(together, axis=0)) == len(together)


def test_without_noise_the_sum_passes():
    privatizer = matrix_factorization_privatizer(Tree(4), 0.0, KEY)
    noisy, state = privatizer.update(zeros(), privatizer.init(zeros()))
    assert flat(noisy).sum() == 0 and int(state.count) == 1 and state.buffers == ()


@pytest.mark.parametrize("stddev", [-1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(stddev):
    with pytest.raises(DpjaxError, match="stddev is"):
        matrix_factorization_privatizer(Tree(4), stddev, KEY)


def test_a_key_is_required():
    with pytest.raises(DpjaxError, match=r"key is .*jax\.random\.key"):
        matrix_factorization_privatizer(Tree(4), 1.0, 0)


def test_a_configuration_finds_its_strategy():
    assert CorrelatedNoise("tree").strategy(20, 5, 4) == Tree(20)
    assert CorrelatedNoise("blt", num_buffers=2).strategy(20, 5, 4) == optimal_buffered(20, 5, 4, 2)
    assert CorrelatedNoise().strategy(20, 5, 4).num_bands == 5
    assert CorrelatedNoise().strategy(40, 20, 2).num_bands == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CorrelatedNoise("pink"), "kind is 'pink'"),
        (lambda: CorrelatedNoise("tree", num_bands=3), "belongs to 'banded'"),
        (lambda: CorrelatedNoise("banded", num_buffers=3), "belongs to 'blt'"),
        (lambda: CorrelatedNoise("banded", num_bands=0), "at least 1"),
        (lambda: CorrelatedNoise(num_bands=9).strategy(40, 8, 5), "use at most 8"),
        (lambda: CorrelatedNoise(num_bands=9).strategy(6, 8, 1), "use at most 6"),
    ],
)
def test_contradictions_are_refused(make, words):
    with pytest.raises(DpjaxError, match=words):
        make()
