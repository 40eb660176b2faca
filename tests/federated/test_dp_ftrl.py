"""DP-FTRL against the paper's own form: first parameters plus noisy running sums, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import DPSGD, CorrelatedNoise, DpjaxError, Ledger
from dpjax.federated import (
    Clients,
    dp_ftrl,
    fit,
    init_federated,
    init_training,
    run_round,
    sample_cohort,
)
from dpjax.noise import gaussian_noise_like

POPULATION, COHORT, ROUNDS, CLIP = 9, 3, 7, 0.8
POINTS = np.random.default_rng(0).normal(size=(POPULATION, 4)).astype(np.float32)
PEOPLE = Clients(
    {"x": POINTS},
    tuple(np.arange(POPULATION)[:, None]),
    tuple(f"c{n}" for n in range(POPULATION)),
)
SAMPLING = jax.random.key(7)


def towards(params, example):
    """One step at rate 1/2 reaches the client's point."""
    return jnp.sum((params - example["x"]) ** 2)


def plan(noise, **changes):
    given = {
        "noise_multiplier": 0.7, "sampling": "cyclic", "population": POPULATION,
        "normalize_by": float(COHORT), "correlated_noise": noise, **changes,
    }  # fmt: skip
    return DPSGD(CLIP, COHORT / POPULATION, ROUNDS, **given)


def algorithm_of(mechanism, **rates):
    return dp_ftrl(towards, optax.sgd(0.5), mechanism, jax.random.key(1), **rates)


def rounds(algorithm, mechanism, state, stop=ROUNDS):
    for number in range(int(state.round), stop):
        chosen = sample_cohort(mechanism, PEOPLE, number, SAMPLING)
        cohort = PEOPLE.cohort(chosen, jax.random.key(2), batch_size=None)
        state, _ = run_round(algorithm, state, cohort, jax.random.key(3), engine="jit")
        yield chosen, state


def tree_sums(key, stddev):
    """Noise of the running sums by Kairouz et al. (2021), node by node, from the raw draws."""
    nodes, found = {}, []
    for count in range(ROUNDS):
        at = jax.random.fold_in(key, count)
        for height in range(3):
            if (count + 1) % 2**height == 0:
                own = gaussian_noise_like(jnp.zeros(4), stddev, jax.random.fold_in(at, height))
                place = (count + 1) // 2**height - 1
                estimate, variance = np.asarray(own, np.float64), 1.0
                if height:  # the best mean of a node's own draw and its children's sum
                    (a, v), (b, w) = (nodes[height - 1, 2 * place + i] for i in (0, 1))
                    estimate = (estimate / 1.0 + (a + b) / (v + w)) / (1 + 1 / (v + w))
                    variance = 1 / (1 + 1 / (v + w))
                nodes[height, place] = estimate, variance
        total, begin = np.zeros(4), 0
        for height in (2, 1, 0):
            if count + 1 - begin >= 2**height:
                total = total + nodes[height, begin // 2**height][0]
                begin += 2**height
        found.append(total)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_it_is_the_papers_algorithm(momentum):
    mechanism = plan(CorrelatedNoise("tree"))
    algorithm = algorithm_of(mechanism, server_learning_rate=0.5, server_momentum=momentum)
    first = np.array([0.2, -0.1, 0.0, 0.4])
    state = init_federated(algorithm, jnp.asarray(first, jnp.float32), POPULATION)
    noise = tree_sums(state.server.noise.key, mechanism.stddev)
    params, summed, velocity = first, np.zeros(4), np.zeros(4)
    for number, (chosen, state) in enumerate(rounds(algorithm, mechanism, state)):
        moves = POINTS[chosen].astype(np.float64) - params
        moves /= np.maximum(1, np.linalg.norm(moves, axis=1, keepdims=True) / CLIP)
        summed = summed + moves.sum(axis=0) / COHORT
        # Algorithm 2: v <- momentum v + noisy sum; parameters: the first ones plus rate times v.
        velocity = momentum * velocity + (summed + noise[number])
        params = first + 0.5 * velocity
        np.testing.assert_allclose(state.params, params, rtol=1e-4, atol=1e-5)
    assert int(state.server.noise.count) == ROUNDS


@pytest.mark.parametrize("noise", [CorrelatedNoise(num_bands=2), CorrelatedNoise("tree")])
def test_it_goes_on_bitwise_and_ends_with_its_plan(noise):
    mechanism = plan(noise)
    algorithm = algorithm_of(mechanism, server_momentum=0.9)
    fresh = init_federated(algorithm, jnp.zeros(4), POPULATION)
    *_, (_, whole) = rounds(algorithm, mechanism, fresh)
    *_, (_, half) = rounds(algorithm, mechanism, fresh, stop=3)
    again = algorithm_of(mechanism, server_momentum=0.9)
    *_, (_, resumed) = rounds(again, mechanism, jax.tree.map(jnp.copy, half))
    np.testing.assert_array_equal(whole.params, resumed.params)
    with pytest.raises(DpjaxError, match="rounds 0 to 6"):
        next(rounds(algorithm, mechanism, whole, stop=ROUNDS + 1))
    # Somebody who goes on all the same is told nothing.
    cohort = PEOPLE.cohort([0, 1, 2], jax.random.key(2), batch_size=None)
    beyond, _ = run_round(algorithm, whole, cohort, jax.random.key(3), engine="jit")
    assert np.all(np.isnan(beyond.params))


def test_the_federated_loop_records_one_event(tmp_path):
    mechanism = plan(CorrelatedNoise("tree"))
    algorithm = algorithm_of(mechanism)
    start = init_training(algorithm, jnp.zeros(4), POPULATION, jax.random.key(5))
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run = ledger.start_run(mechanism, POPULATION, {})
        for state, _ in fit(start, algorithm, mechanism, PEOPLE, ledger=ledger, run=run):
            assert ledger.dp_event() == mechanism.dp_event
        assert int(state.iteration) == ROUNDS and len(ledger.releases(run)) == 1
        assert ledger.epsilon(1e-3) == pytest.approx(mechanism.epsilon(1e-3))


def test_impossible_settings_are_refused():
    with pytest.raises(DpjaxError, match="noise is independent"):
        algorithm_of(plan(None))
    for rates in ({"server_momentum": 1.0}, {"server_learning_rate": 0.0}):
        with pytest.raises(DpjaxError, match="the rate must be above 0"):
            algorithm_of(plan(CorrelatedNoise("tree")), **rates)
