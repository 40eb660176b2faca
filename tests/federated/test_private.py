"""User-level privacy of rounds: clipping, noise, keys, and what the server may see."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import DPSGD, AdaptiveClipping, DpjaxError
from dpjax.clipping.rules import ClipRule
from dpjax.federated import (
    Aggregate,
    Clients,
    PrivateServer,
    check_private_state,
    fed_avg,
    init_federated,
    personalised,
    private,
    run_round,
    sample_cohort,
    scaffold,
    scaled_to_cohort,
)
from dpjax.federated.private import SentUpdate, clip_update

CLIP, DIVISOR, SIZES = 0.5, 3.0, (2, 1, 0, 3, 1, 1)


def sends_its_mean(params, example):
    """One whole step of SGD with rate 1 moves the parameters by the mean of a client's examples."""
    return -jnp.dot(params["w"], example["x"]) - params["b"] * example["y"]


def people_of(x, y, sizes=SIZES):
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return Clients({"x": x, "y": y}, tuple(rows), tuple(f"c{n}" for n in range(len(sizes))))


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32) * 0.3
    x[3] *= 100  # the client with one row that is far beyond the clip norm
    return people_of(x, rng.normal(size=sum(SIZES)).astype(np.float32) * 0.3)


START = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def mechanism_of(**changes):
    settings = {"noise_multiplier": 0.0, "population": len(SIZES), "normalize_by": DIVISOR}
    return DPSGD(CLIP, 0.5, 20, **{**settings, **changes})


INNER = fed_avg(sends_its_mean, optax.sgd(1.0))
# Compiled once: the cohorts below have shapes in common.
NOISELESS = private(INNER, mechanism_of(), jax.random.key(0))
ADAPTIVE = AdaptiveClipping(target_quantile=0.3, learning_rate=0.8)
ADAPTING = private(INNER, mechanism_of(adaptive_clipping=ADAPTIVE), jax.random.key(0))


def round_of(algorithm, people, chosen, state=None, start=START, shards=1, **options):
    state = init_federated(algorithm, start, len(people)) if state is None else state
    cohort = people.cohort(chosen, jax.random.key(0), batch_size=None, num_shards=shards)
    return run_round(algorithm, state, cohort, jax.random.key(5), engine="jit", **options)


def means(people):
    """float64[K, 4]: what each client sends before clipping."""
    x = np.concatenate([people.examples["x"], people.examples["y"][:, None]], 1).astype(np.float64)
    return np.stack([x[r].mean(0) if len(r) else np.zeros(4) for r in people.rows])


def clipped(rows, clip=CLIP):
    return np.stack([r * min(1.0, clip / max(np.linalg.norm(r), 1e-300)) for r in rows])


def flat(params):
    return np.append(np.asarray(params["w"], np.float64), np.asarray(params["b"], np.float64))


def test_the_mean_of_clipped_updates_against_a_loop(people):
    """Every client weighs 1, and the divisor is the public constant, whoever came."""
    for chosen, shards in (([0, 1, 2, 3], 1), ([5, 1, 3], 1), ([4, 3, 2, 0], 2)):
        state, info = round_of(NOISELESS, people, chosen, shards=shards, clients_per_step=shards)
        expected = clipped(means(people)[chosen]).sum(0) / DIVISOR
        np.testing.assert_allclose(flat(state.params), expected, rtol=2e-6, atol=1e-7)
        assert int(info.sensitive_num_rejected) == 0
    assert np.linalg.norm(means(people), axis=1).max() > 10 * CLIP


@pytest.mark.parametrize("replaced", [False, True])
def test_noise_has_the_mechanisms_stddev_once(replaced):
    """Rejects two thirds and three halves; the same draw whether one or two devices summed."""
    size = 20_000
    some = Clients({"x": np.zeros((4, 1), np.float32)}, tuple(np.arange(4)[:, None]), tuple("abcd"))
    settings = {"sampling": "fixed_size"} if replaced else {}
    mechanism = mechanism_of(noise_multiplier=1.5, population=4, **settings)
    inner = fed_avg(lambda w, e: jnp.sum(w) * e["x"][0], optax.sgd(1.0))
    algorithm = private(inner, mechanism, jax.random.key(3))
    start = jnp.zeros(size)
    expected = 1.5 * CLIP / DIVISOR * (2.0 if replaced else 1.0)
    one, _ = round_of(algorithm, some, [0, 1, 2, 3], start=start)
    assert abs(float(jnp.std(one.params)) / expected - 1) < 0.05
    assert abs(float(jnp.mean(one.params))) < 5 * expected / math.sqrt(size)
    if replaced:
        return
    two, _ = round_of(algorithm, some, [0, 1, 2, 3], start=start, shards=2)
    np.testing.assert_array_equal(one.params, two.params)
    # A cohort of nobody is a round like any other, and so is one of padding only.
    empty, _ = round_of(algorithm, some, [], start=start)
    np.testing.assert_array_equal(one.params, empty.params)


def test_no_draw_repeats_and_a_resumed_run_goes_on_alike(people):
    adaptive = AdaptiveClipping(budget_share=0.9)  # little noise: the share stays within [0, 1]
    mechanism = mechanism_of(noise_multiplier=1.0, adaptive_clipping=adaptive)
    algorithm = private(INNER, mechanism, jax.random.key(3))
    states = [init_federated(algorithm, START, len(people))]
    for _ in range(6):
        states.append(round_of(algorithm, people, [], states[-1])[0])
    moves = np.diff([flat(s.params) for s in states], axis=0)
    assert len(np.unique(moves)) == moves.size
    relatives = [float(s.server.relative_clip_norm) for s in states]
    assert len(set(relatives)) == len(relatives)
    # Saved as plain arrays, as a checkpoint does, and in a fresh algorithm with another key.
    saved = states[3]._replace(
        server=states[3].server._replace(
            noise=states[3].server.noise._replace(
                key=jax.random.wrap_key_data(jax.random.key_data(states[3].server.noise.key))
            )
        )
    )
    again = private(INNER, mechanism, jax.random.key(99))
    for number in range(3, 6):
        saved, _ = round_of(again, people, [], saved)
        jax.tree.map(np.testing.assert_array_equal, saved.params, states[number + 1].params)
        assert float(saved.server.relative_clip_norm) == relatives[number + 1]


def test_noise_shares_no_key_with_rounds_clients_or_sampling():
    """Even where a user gives one key for everything."""
    key = jax.random.key(7)
    algorithm = private(INNER, mechanism_of(noise_multiplier=1.0), key)
    noise = algorithm.init(START)[0].noise.key

    def data(k):
        return tuple(jax.random.key_data(k).tolist())

    used = {data(noise)}
    for count in range(20):
        release = jax.random.fold_in(noise, count)
        used |= {data(release), *(data(k) for k in jax.random.split(release, 4))}
    others = {data(key)}
    for number in range(20):
        own = jax.random.fold_in(key, number)  # of a round, and of a sampler's step
        others |= {data(own), *(data(jax.random.fold_in(own, k)) for k in range(20))}
    assert not used & others


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_client_sends_at_most_the_clip_norm(dtype):
    """Huge, tiny and ordinary updates, of 3,000 numbers: a bfloat16 norm would be far too small."""
    rng = np.random.default_rng(1)
    run = jax.jit(lambda u, r: clip_update(u, ClipRule(CLIP), r))
    for scale, relative in ((1e-15, 1.0), (1e-3, 0.25), (1.0, 4.0), (1e3, 1.0), (1e16, 0.25)):
        raw = {
            "a": jnp.asarray(rng.normal(size=3000) * scale, dtype),
            "b": jnp.asarray(rng.normal() * scale, dtype),
        }
        found, norm = run(raw, jnp.float32(relative))
        wide, sent = (
            np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in tree.values()])
            for tree in (raw, found)
        )
        true = np.linalg.norm(wide)
        np.testing.assert_allclose(float(norm), true, rtol=1e-5)
        assert np.linalg.norm(sent) <= CLIP * (1 + 1e-6)
        np.testing.assert_allclose(
            sent, wide * min(1.0, CLIP * relative / true) / relative, rtol=1e-5, atol=0
        )
        assert found["a"].dtype == jnp.float32


def test_neighbouring_cohorts_differ_by_at_most_the_sensitivity(people):
    rng = np.random.default_rng(2)
    bound = mechanism_of().clipped_grad(lambda p, e: p).sensitivity("add_or_remove_one")
    assert bound == CLIP / DIVISOR
    moved = []
    for one in (0, 1, 4, 5):
        others = [3, *rng.choice([k for k in (0, 1, 4, 5) if k != one], 2, replace=False)]
        ends = [
            flat(round_of(NOISELESS, people, ids)[0].params) for ids in ([one, *others], others)
        ]
        moved.append(np.linalg.norm(ends[0] - ends[1]))
    assert max(moved) <= bound * (1 + 1e-5) and max(moved) > 0.5 * bound


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_client_that_is_not_finite_equals_its_absence(people, bad):
    """Also one whose numbers are finite, but whose norm overflows. Nor does its bit count."""
    x = people.examples["x"].copy()
    x[people.rows[1]] = bad
    broken = people_of(x, people.examples["y"])
    one, info = round_of(ADAPTING, broken, [0, 1, 3, 4])
    without, _ = round_of(ADAPTING, broken, [0, 3, 4])
    assert int(info.sensitive_num_rejected) == 1
    jax.tree.map(np.testing.assert_array_equal, one.params, without.params)
    np.testing.assert_array_equal(one.server.relative_clip_norm, without.server.relative_clip_norm)


def test_adaptive_clipping_against_a_loop(people):
    """The count of uncut clients moves the clip norm; updates are clipped at the moved norm."""
    state = init_federated(ADAPTING, START, len(people))
    relative, expected = 1.0, np.zeros(4)
    updates = means(people)  # whatever the parameters are: the loss is linear
    for chosen in ([0, 1, 2, 3], [3, 4, 5, 1], [0, 3, 4], [0, 1, 2, 3]):
        state, _ = round_of(ADAPTING, people, chosen, state)
        rows = updates[chosen]
        norms = np.linalg.norm(rows, axis=1)
        expected = expected + clipped(rows, CLIP * relative).sum(0) / DIVISOR
        count = np.where(norms <= CLIP * relative, 0.5, -0.5).sum()
        share = np.clip(count / 3.0 + 0.5, 0, 1)  # 3 of 6 clients are expected
        relative *= math.exp(-0.8 * (share - 0.3))
        np.testing.assert_allclose(flat(state.params), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(float(state.server.relative_clip_norm), relative, rtol=1e-5)


def test_adaptive_noise_follows_the_clip_norm():
    """Both releases have their own share; rejects two thirds and three halves."""
    some = Clients({"x": np.zeros((2, 1), np.float32)}, ([0], [1]), ("a", "b"))
    adaptive = AdaptiveClipping(budget_share=0.5, learning_rate=0.05)
    mechanism = mechanism_of(noise_multiplier=1.0, population=2, adaptive_clipping=adaptive)
    inner = fed_avg(lambda w, e: jnp.sum(w) * e["x"][0], optax.sgd(1.0))
    algorithm = private(inner, mechanism, jax.random.key(0))
    state = init_federated(algorithm, jnp.zeros(20_000), 2)
    state = state._replace(server=state.server._replace(relative_clip_norm=jnp.float32(4.0)))
    after, _ = round_of(algorithm, some, [], state)
    expected = 4.0 * math.sqrt(2.0) * CLIP / DIVISOR
    assert abs(float(jnp.std(after.params)) / expected - 1) < 0.05

    def share(count):
        server = algorithm.init(jnp.zeros(()))[0]
        server = server._replace(noise=server.noise._replace(count=count))
        sent = SentUpdate(jnp.zeros(()), jnp.float32(0.0))
        done = algorithm.server_update(server, Aggregate(sent, jnp.float32(0), jnp.int32(0)))
        return 0.5 - jnp.log(done.relative_clip_norm) / 0.05

    # So many clients that the share is not cut to [0, 1].
    mechanism = mechanism_of(noise_multiplier=1.0, adaptive_clipping=adaptive, population=400)
    algorithm = private(inner, mechanism, jax.random.key(0))
    shares = np.asarray(jax.vmap(share)(jnp.arange(4000, dtype=jnp.int32)), np.float64)
    expected = 0.5 / math.sqrt(0.5) / 200.0
    assert abs(shares.std() / expected - 1) < 0.1


def test_the_inner_server_sees_public_constants_only(people):
    """SCAFFOLD's variate moves by the expected share of clients, not by the realised one."""
    seen = []
    inner = INNER._replace(
        server_update=lambda server, aggregate: (
            seen.append(aggregate), INNER.server_update(server, aggregate)
        )[1]
    )  # fmt: skip
    algorithm = private(inner, mechanism_of(noise_multiplier=1.0), jax.random.key(0))
    server = algorithm.init(START)[0]
    for realised in (0, 5):
        sent = SentUpdate(START, ())
        algorithm.server_update(server, Aggregate(sent, jnp.float32(realised), jnp.int32(realised)))
    for aggregate in seen:
        assert (float(aggregate.weight), int(aggregate.num_clients)) == (DIVISOR, 3)
    jax.tree.map(np.testing.assert_array_equal, seen[0].update, seen[1].update)


def test_private_scaffold_clips_change_and_variate_together(people):
    """Against float64: one vector of both, and the server's variate moves by expected / N."""
    algorithm = private(scaffold(sends_its_mean, 1.0, 6), mechanism_of(), jax.random.key(0))
    state, _ = round_of(algorithm, people, [0, 1, 3])
    # One step from zero variates: change = mean, and the fresh variate is minus the change.
    rows = means(people)[[0, 1, 3]]
    both = clipped(np.concatenate([rows, -rows], 1)).sum(0) / DIVISOR
    np.testing.assert_allclose(flat(state.params), both[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(state.server.inner.control), both[4:] / 2, rtol=1e-5, atol=1e-6)
    # What a client keeps is its own, neither clipped nor noised.
    kept = jax.tree.map(lambda v: v[1], state.clients)
    np.testing.assert_allclose(flat(kept), -rows[1], rtol=1e-5)


def test_cohorts_are_the_mechanisms_own(people):
    mechanism = mechanism_of()
    key = jax.random.key(4)
    drawn = [sample_cohort(mechanism, people, n, key) for n in range(20)]
    sampler = mechanism.sampler(6, key)
    for number, chosen in enumerate(drawn):
        batch = sampler.batch(number)
        assert chosen.tolist() == batch.indices[~batch.is_padding_example].tolist()
    assert len({tuple(c) for c in drawn}) > 5
    counts = np.bincount(np.concatenate(drawn), minlength=6)
    assert counts.min() >= 4 and counts.max() <= 17  # binomial(20, 1/2), beyond 3 sigma
    with pytest.raises(DpjaxError, match="rounds 0 to 19"):
        sample_cohort(mechanism, people, 20, key)
    with pytest.raises(DpjaxError, match="population 7"):
        sample_cohort(mechanism_of(population=7), people, 0, key)
    shuffled = mechanism_of(sampling="shuffled")
    parts = [sample_cohort(shuffled, people, n, key).tolist() for n in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(6))


def test_metrics_are_named_sensitive(people):
    algorithm = private(INNER, mechanism_of(noise_multiplier=1.0), jax.random.key(0))
    _, info = round_of(algorithm, people, [0, 1])
    public = [name for name in info._fields if not name.startswith("sensitive_")]
    assert public == ["round"]
    assert not [name for name in PrivateServer._fields if "count" in name or "metric" in name]


def test_what_is_refused(people):
    mechanism, key = mechanism_of(noise_multiplier=1.0), jax.random.key(0)
    algorithm = private(INNER, mechanism, key)
    with pytest.raises(DpjaxError, match="has its own normalize_by"):
        private(algorithm, mechanism, key)
    with pytest.raises(DpjaxError, match="has its own combine"):
        private(INNER._replace(combine=lambda u, w: u), mechanism, key)
    with pytest.raises(DpjaxError, match="population is None"):
        private(INNER, mechanism_of(population=None), key)
    with pytest.raises(DpjaxError, match=r"leaf 'w' is uint32"):
        clip_update({"w": jnp.zeros(2, jnp.uint32)}, ClipRule(1.0))
    state = init_federated(algorithm, START, 6)
    check_private_state(mechanism, state, people)
    with pytest.raises(DpjaxError, match="1 rounds with 0 draws"):
        check_private_state(mechanism, state._replace(round=jnp.int32(1)), people)
    with pytest.raises(DpjaxError, match="accounts for 9"):
        check_private_state(mechanism_of(population=9), state, people)
    moved = state._replace(server=state.server._replace(relative_clip_norm=jnp.float32(2)))
    with pytest.raises(DpjaxError, match="clip norm is fixed"):
        check_private_state(mechanism, moved, people)
    personal = personalised(sends_its_mean, optax.sgd(1.0), is_personal=lambda path: path == "b")
    wrapped = private(personal, mechanism, key)
    with pytest.raises(DpjaxError, match="there are 6 clients, the state has 5"):
        check_private_state(mechanism, init_federated(wrapped, START, 5), people)


def test_a_simulated_epsilon_is_never_alone():
    mechanism = DPSGD(1.0, 0.1, 50, noise_multiplier=2.0, population=1000, normalize_by=100.0)
    both = scaled_to_cohort(mechanism, 2000, 50_000, delta=1e-6)
    # Noise per client in the mean: stddev of the sum over the cohort, as the imagined run has it.
    assert both.actual.stddev == pytest.approx(2.0 / 2000)
    assert both.actual.noise_multiplier == pytest.approx(0.1)
    imagined = DPSGD(1.0, 0.04, 50, noise_multiplier=2.0)
    actual = DPSGD(1.0, 0.1, 50, noise_multiplier=0.1)
    line = both.line()
    assert f"SIMULATED epsilon {imagined.epsilon(1e-6):.4g} (cohort 2,000 imagined)" in line
    assert f"actual epsilon {actual.epsilon(1e-6):.4g} (cohort 100)" in line
    assert f"actual epsilon {actual.epsilon(1e-6, iterations=7):.4g} " in both.line(7)
    aimed = DPSGD(1.0, 1.0, 5, target_epsilon=2.0, target_delta=1e-6, population=1000)
    found = scaled_to_cohort(aimed, 2000, 2000)
    assert 1.98 < found.imagined.epsilon(1e-6) <= 2.0 and found.actual.epsilon(1e-6) > 4
    with pytest.raises(DpjaxError, match="imagined_cohort is 50"):
        scaled_to_cohort(mechanism, 50, 1000, delta=1e-6)
    with pytest.raises(DpjaxError, match="delta is None"):
        scaled_to_cohort(mechanism, 2000, 50_000)
