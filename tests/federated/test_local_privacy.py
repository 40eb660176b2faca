"""Local privacy: clipped and noisy before it leaves the client, whatever the data."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax import DpjaxError
from dpjax.federated import (
    Clients,
    fed_avg,
    init_federated,
    local_dp_event,
    locally_private,
    locally_private_laplace,
    run_round,
)

SIZE = 4000


def loss_fn(params, example):
    """One step of SGD with rate 1 moves every parameter by the example."""
    return -jnp.sum(params) * example["x"]


INNER = fed_avg(loss_fn, optax.sgd(1.0))


def people_of(values):
    return Clients({"x": np.float32(values)}, ([0], [1, 2]), ("ann", "bob"))


@pytest.fixture(scope="module")
def sent():
    """``sent(algorithm, chosen, values, key, start)``: what the server's parameters become."""

    def run(algorithm, chosen, values=(1.0, 3.0, 3.0), key=0, rounds=1):
        people = people_of(values)
        state = init_federated(algorithm, jnp.zeros(SIZE), 2)
        cohort = people.cohort(chosen, jax.random.key(0), batch_size=2)
        states = []
        for _ in range(rounds):
            state, info = run_round(algorithm, state, cohort, jax.random.key(key), engine="jit")
            states.append(np.asarray(state.params, np.float64))
        return states, info

    return run


GAUSSIAN = locally_private(INNER, 2.0, 0.5)
LAPLACE = locally_private_laplace(INNER, 2.0, 0.5)


@pytest.mark.parametrize("algorithm", [GAUSSIAN, LAPLACE], ids=["gaussian", "laplace"])
def test_each_client_adds_noise_of_twice_the_clip_norm(sent, algorithm):
    """Rejects two thirds and three halves; the mean of two has their noise over sqrt(2)."""
    stddev = 0.5 * 2 * 2.0 * (math.sqrt(2) if algorithm is LAPLACE else 1.0)
    (alone, again), _ = sent(algorithm, [0], rounds=2)
    assert abs(alone.std() / stddev - 1) < 0.06
    # Every round draws anew, and the second client adds noise of its own.
    other = again - alone
    assert abs(np.corrcoef(alone, other)[0, 1]) < 0.06 and abs(other.std() / stddev - 1) < 0.06
    (both,), info = sent(algorithm, [0, 1])
    assert abs(both.std() / (stddev / math.sqrt(2)) - 1) < 0.06
    # Weights are even though one has twice the examples, and the clipped updates are in the mean.
    norm = 2.0 / SIZE if algorithm is LAPLACE else 2.0 / math.sqrt(SIZE)
    assert abs(both.mean() - norm) < 5 * stddev / math.sqrt(2 * SIZE)
    # No loss or number of examples left a client.
    assert info.sensitive_metrics == {}
    kurtosis = ((alone - alone.mean()) ** 4).mean() / alone.var() ** 2
    assert (4.5 < kurtosis < 8) if algorithm is LAPLACE else (2.7 < kurtosis < 3.3)


@pytest.mark.parametrize("algorithm", [GAUSSIAN, LAPLACE], ids=["gaussian", "laplace"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_client_that_is_not_finite_sends_noise(sent, algorithm, bad):
    """Being left out would tell the server about its data. The noise is what it always is."""
    (broken,), info = sent(algorithm, [0], (bad, 3.0, 3.0))
    (zero,), _ = sent(algorithm, [0], (0.0, 3.0, 3.0))
    assert int(info.sensitive_num_rejected) == 0
    np.testing.assert_array_equal(broken, zero)
    assert np.unique(broken).size > SIZE // 2


def test_any_two_updates_differ_by_at_most_the_sensitivity(sent):
    """With the same key the noise is the same: the difference is that of the clipped updates."""
    found = [sent(GAUSSIAN, [0], (v, 0.0, 0.0))[0][0] for v in (1e6, -1e6, 1e-3, 0.0)]
    gaps = [np.linalg.norm(a - b) for a in found for b in found]
    assert max(gaps) <= 4.0 * (1 + 1e-3) and max(gaps) > 3.99
    found = [sent(LAPLACE, [0], (v, 0.0, 0.0))[0][0] for v in (1e6, -1e6)]
    np.testing.assert_allclose(np.abs(found[0] - found[1]).sum(), 4.0, rtol=1e-3)


def test_epsilon_of_a_client_by_its_participations():
    """Gaussian: Balle and Wang (2018) at mu = sqrt(T) / z. Laplace: T / z, and less with delta."""
    from scipy.stats import norm

    for rounds in (1, 9):
        mu = math.sqrt(rounds) / 4.0
        epsilon = dpjax.epsilon(local_dp_event(4.0, rounds), 1e-5, "pld", "replace_one")
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        np.testing.assert_allclose(delta, 1e-5, rtol=2e-3)
    event = local_dp_event(4.0, 3, "laplace")
    assert 0.7 < dpjax.epsilon(event, 1e-9, "pld", "replace_one") <= 0.75 + 1e-3
    assert local_dp_event(4.0, 0) == dp_accounting.NoOpDpEvent()


def test_what_is_refused():
    with pytest.raises(DpjaxError, match="clip norm is inf"):
        locally_private(INNER, math.inf, 1.0)
    with pytest.raises(DpjaxError, match="noise_multiplier 0"):
        locally_private(INNER, 1.0, 0)
    with pytest.raises(DpjaxError, match="own normalize_by or combine"):
        locally_private(INNER._replace(normalize_by=2.0), 1.0, 1.0)
    with pytest.raises(DpjaxError, match="participations is -1"):
        local_dp_event(1.0, -1)
    with pytest.raises(DpjaxError, match="noise is 'gauss'"):
        local_dp_event(1.0, 1, "gauss")
