"""Exposure: closed forms, brute force over tiny spaces, tails beyond float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from dpjax.auditing.exposure import (
    exposure_by_rank,
    exposure_by_sampling,
    exposure_by_skew_normal,
    rank_space,
    secret_losses,
    skew_normal_log_cdf,
    unseen_exposure,
)
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply, init_params

CONFIG = DecoderConfig(12, 1, 8, 2, 1, 8)


@jax.jit
def forward(params, tokens):
    return apply(CONFIG, params, tokens)


@pytest.fixture(scope="module")
def params():
    sharp = jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))
    # Large weights, so that logits differ: a fresh model ranks by rounding errors.
    return jax.tree.map(lambda x: x * 20.0 if x.ndim == 2 else x, sharp)


def slow_loss(params, tokens, start):
    """Summed loss of tokens[start:], a whole sequence by itself, float64 sums."""
    logits = np.asarray(forward(params, jnp.asarray(tokens, jnp.int32)), np.float64)
    total = 0.0
    for place in range(start, len(tokens)):
        row = logits[place - 1]
        total -= row[tokens[place]] - np.log(np.sum(np.exp(row)))
    return total


class TestRank:
    def test_whole_space(self):
        """In a space of 2^k values the k-bit answer belongs to the best one."""
        losses = np.random.default_rng(0).permutation(1024).astype(float)
        found = exposure_by_rank(losses, losses)
        np.testing.assert_allclose(found.bits, 10 - np.log2(losses + 1), rtol=1e-12)
        assert found.maximum == 10 and found.is_censored.sum() == 1

    def test_closed_form_of_a_uniform_rank(self):
        losses = np.arange(2.0**16)
        bits = exposure_by_rank(losses, losses).bits
        assert abs(bits.mean() - 1 / math.log(2)) < 1e-3
        for x in (0.5, 1.0, 3.0, 7.0):
            assert abs(np.mean(bits >= x) - 2.0**-x) < 1e-4

    def test_ties_count_against_the_canary(self):
        """A constant model exposes nothing; the easy version (losses strictly below) says all."""
        assert exposure_by_rank([2.0], np.full(256, 2.0)).bits == [0.0]
        assert exposure_by_rank([1.0], [1.0, 1.0, 2.0, 3.0]).bits == [1.0]

    def test_any_shape_and_infinite_losses(self):
        space = np.array([[1.0, np.inf], [2.0, np.inf]])
        np.testing.assert_allclose(exposure_by_rank([1.0, np.inf], space).bits, [2.0, 0.0])

    @pytest.mark.parametrize("losses, space", [([np.nan], [1.0]), ([], [1.0]), ([1.0], [])])
    def test_bad_input(self, losses, space):
        for method in (exposure_by_rank, exposure_by_sampling, exposure_by_skew_normal):
            with pytest.raises(DpjaxError, match="NaN|empty"):
                method(losses, space)


class TestSampling:
    def test_unseen_canaries(self):
        rng = np.random.default_rng(1)
        bits = exposure_by_sampling(rng.normal(size=20_000), rng.normal(size=20_000)).bits
        assert abs(bits.mean() - 1 / math.log(2)) < 0.03
        for x in (1.0, 3.0, 6.0):
            assert 2 / 3 < np.mean(bits >= x) * 2.0**x < 3 / 2
        assert stats.kstest(2.0**-bits, "uniform").pvalue > 0.01

    def test_unseen_exposure_is_that_of_a_uniform_rank(self):
        references = np.arange(1.0, 8.0)
        every_rank = exposure_by_sampling(references - 0.5, references).bits
        every_rank = np.append(every_rank, exposure_by_sampling([9.0], references).bits)
        mean, deviation = unseen_exposure(7)
        assert mean == pytest.approx(every_rank.mean())
        assert deviation == pytest.approx(every_rank.std())
        assert unseen_exposure(10**6)[0] == pytest.approx(1 / math.log(2), abs=1e-4)
        with pytest.raises(DpjaxError, match="at least 1"):
            unseen_exposure(0)

    def test_censored_at_what_the_references_can_show(self):
        found = exposure_by_sampling([-1.0, 1.5], np.arange(1023.0))
        assert found.maximum == 10 and found.bits[0] == 10
        assert found.is_censored.tolist() == [True, False]
        # A space of 2^6 values has no 10 bits to lose.
        assert exposure_by_sampling([-1.0], np.arange(1023.0), space_bits=6).bits == [6.0]

    def test_agrees_with_the_rank_in_a_space_that_is_sampled(self):
        rng = np.random.default_rng(2)
        space = rng.gamma(4.0, size=2**16)
        canaries = np.quantile(space, [0.4, 0.1, 0.01])
        exact = exposure_by_rank(canaries, space).bits
        sampled = exposure_by_sampling(canaries, rng.choice(space, 8000)).bits
        np.testing.assert_allclose(sampled, exact, atol=0.3)

    def test_ties_count_against_the_canary(self):
        assert exposure_by_sampling([2.0], np.full(255, 2.0)).bits == [0.0]


class TestSkewNormal:
    def test_log_cdf_of_a_normal(self):
        points = np.array([-200.0, -38.0, -10.0, -3.0, 0.0, 2.0])
        expected = stats.norm.logcdf(points)
        np.testing.assert_allclose(skew_normal_log_cdf(points, 0.0), expected, rtol=1e-9)

    @pytest.mark.parametrize("shape", [-5.0, -0.7, 0.7, 5.0])
    def test_log_cdf_against_an_integral_of_the_density(self, shape):
        """Shifted into range, so that the reference does not underflow either."""
        for point in (-12.0, -5.0, -3.0, -1.0, 0.5):

            def log_density(x):
                return (
                    math.log(2)
                    - x * x / 2
                    - math.log(2 * math.pi) / 2
                    + special.log_ndtr(shape * x)
                )

            top = max(log_density(x) for x in np.linspace(point - 2, point, 201))

            def density(x, top=top):
                return math.exp(log_density(x) - top)

            edges = point - np.array([40.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.1, 0.0])
            parts = itertools.pairwise(edges)
            integral = sum(integrate.quad(density, a, b, epsrel=1e-11)[0] for a, b in parts)
            found = float(skew_normal_log_cdf(point, shape))
            assert found == pytest.approx(top + math.log(integral), rel=1e-7, abs=1e-9)

    def test_known_normal(self):
        references = np.random.default_rng(3).normal(30.0, 3.0, 20_000)
        points = np.array([33.0, 30.0, 27.0, 24.0, 20.0])
        found = exposure_by_skew_normal(points, references)
        expected = -stats.norm.logcdf(points, 30.0, 3.0) / math.log(2)
        np.testing.assert_allclose(found.bits, expected, rtol=0.12, atol=0.05)
        assert found.ks_p_value > 0.05 and found.maximum == math.inf

    def test_known_skew_normal_beyond_float64(self):
        references = stats.skewnorm.rvs(3.0, loc=5.0, size=20_000, random_state=4)
        found = exposure_by_skew_normal([4.0, -20.0], references)
        expected = -skew_normal_log_cdf(np.array([-1.0, -25.0]), 3.0) / math.log(2)
        assert expected[1] > 2000 and np.isfinite(found.bits).all()
        np.testing.assert_allclose(found.bits, expected, rtol=0.2)

    def test_a_bad_fit_says_so(self):
        rng = np.random.default_rng(5)
        two_hills = np.concatenate([rng.normal(-6, 1, 500), rng.normal(6, 1, 500)])
        assert exposure_by_skew_normal([0.0], two_hills).ks_p_value < 1e-6

    def test_the_space_is_the_maximum(self):
        references = np.random.default_rng(6).normal(size=100)
        found = exposure_by_skew_normal([-50.0, 0.0], references, space_bits=20.0)
        assert found.bits[0] == 20.0 and found.is_censored.tolist() == [True, False]

    @pytest.mark.parametrize("references", [[1.0, 2.0], np.ones(10), [np.inf, *range(10)]])
    def test_what_cannot_be_fitted(self, references):
        with pytest.raises(DpjaxError, match="cannot be fitted"):
            exposure_by_skew_normal([0.0], references)


class TestRankSpace:
    def test_brute_force(self, params):
        alphabet, prefix = [3, 7, 11], [1, 2]
        found = rank_space(CONFIG, params, prefix, alphabet, 3, batch_size=5)
        assert found.shape == (3, 3, 3)
        for code in itertools.product(range(3), repeat=3):
            tokens = [*prefix, *(alphabet[digit] for digit in code)]
            assert found[code] == pytest.approx(slow_loss(params, tokens, 2), abs=1e-4)
        assert np.ptp(found) > 0.5  # the test would not see an error in a flat model

    def test_agrees_with_the_loss_of_a_single_canary(self, params):
        found = rank_space(CONFIG, params, [1], range(12), 2)
        rows = np.array([[1, 4, 9], [1, 9, 4]])
        counted = np.array([[False, True, True]] * 2)
        one_by_one = secret_losses(CONFIG, params, rows, counted)
        np.testing.assert_allclose(one_by_one, [found[4, 9], found[9, 4]], atol=1e-4)
        total = np.exp(-found).sum()  # all sequences over the whole vocabulary: a distribution
        assert total == pytest.approx(1.0, abs=1e-5)

    @pytest.mark.parametrize(
        "prefix, alphabet, length",
        [
            ([], [1], 1),
            ([1], [], 1),
            ([1], [12], 1),
            ([1], [2, 2], 1),
            ([1], [2], 0),
            ([1], range(12), 9),
        ],
    )
    def test_bad_input(self, params, prefix, alphabet, length):
        with pytest.raises(DpjaxError):
            rank_space(CONFIG, params, prefix, alphabet, length)


class TestSecretLosses:
    def test_only_counted_tokens(self, params):
        rows = np.array([[1, 2, 3, 4], [1, 5, 6, 0], [1, 2, 3, 4]])
        counted = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
        found = secret_losses(CONFIG, params, rows, counted, batch_size=2)
        expected = [slow_loss(params, [1, 2, 3, 4], 2), slow_loss(params, [1, 5, 6], 2), 0.0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.dtype == np.float64

    def test_no_rows(self, params):
        assert secret_losses(CONFIG, params, np.zeros((0, 4), int), np.zeros((0, 4))).shape == (0,)

    @pytest.mark.parametrize("tokens", [[[1, 12]], [[-1, 2]], [[1]], [1, 2]])
    def test_bad_input(self, params, tokens):
        with pytest.raises(DpjaxError, match="vocabulary|shape"):
            secret_losses(CONFIG, params, np.array(tokens), np.ones_like(tokens))
