"""A federation passed through messages equals the compiled round, and survives what goes wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.errors import DpjaxError
from dpjax.federated import Clients, fed_avg, init_federated, private, run_round, scaffold
from dpjax.federated.aggregation import fixed_point, with_aggregator
from dpjax.federated.deployment import (
    Answer,
    Plan,
    init_deployed,
    outgoing,
    server_round,
)
from dpjax.federated.deployment_client import (
    Request,
    answer_request,
    load_memory,
    save_memory,
)

SIZES = (7, 0, 4, 3)
KEY, DATA_KEY = jax.random.key(5), jax.random.key(6)
FEDERATION = "ab" * 16


def loss_fn(params, example):
    guess = jnp.tanh(jnp.dot(params["a"], example["x"]) + params["b"])
    return (guess - example["y"]) ** 2


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32)
    y = np.tanh(x @ [1.0, -1.0, 0.5]).astype(np.float32)
    rows = np.split(rng.permutation(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return Clients({"x": x, "y": y}, tuple(rows), tuple(f"c{n}" for n in range(len(SIZES))))


def alone(people, number):
    """What one machine holds: a single client under its own name."""
    rows = people.rows[number]
    examples = jax.tree.map(lambda v: v[rows], people.examples)
    if not len(rows):  # an array needs an example, which nobody holds
        examples = jax.tree.map(lambda v: np.zeros_like(v[:1]), people.examples)
    return Clients(examples, (np.arange(len(rows)),), (people.names[number],))


@functools.cache
def make(name):
    mechanism = dpjax.DPSGD(
        0.5, 0.75, 10, noise_multiplier=0.4, population=len(SIZES), normalize_by=3.0
    )
    plain = fed_avg(loss_fn, optax.sgd(0.3), optax.adam(0.1))
    hidden = private(plain, mechanism, jax.random.key(3))
    return {
        "fed_avg": lambda: plain,
        "scaffold": lambda: scaffold(loss_fn, 0.3, num_clients=len(SIZES)),
        "private": lambda: hidden,
        "integers": lambda: with_aggregator(
            plain, fixed_point(8.0, max_clients=4), max_weight=max(SIZES)
        ),
        "private integers": lambda: with_aggregator(
            hidden, fixed_point(1.0, max_clients=4, rounding="toward_zero")
        ),
    }[name]()


START = {"a": jnp.array([0.3, 0.1, -0.2], jnp.float32), "b": jnp.float32(0.05)}
EXAMPLE = {"x": np.zeros(3, np.float32), "y": np.float32(0)}


@functools.cache  # what is compiled belongs to the plan
def planned(algorithm):
    return Plan(algorithm, START, EXAMPLE, len(SIZES), batch_size=3, epochs=2)


def simulate(algorithm, people, cohorts):
    state = init_federated(algorithm, START, len(people))
    for number, ids in enumerate(cohorts):
        key = jax.random.fold_in(DATA_KEY, number)
        cohort = people.cohort(ids, key, batch_size=3, epochs=2)
        state, _ = run_round(algorithm, state, cohort, KEY, engine="jit")
        yield state


def request_for(plan, state, number, nonce=bytes(16)):
    accepted = int(state.accepted[number])
    arrays = outgoing(plan, state)
    return Request(FEDERATION, plan.fingerprint(), int(state.round), accepted, nonce, arrays)


def ask(plan, state, people, memories, number):
    answer, memories[number] = answer_request(
        plan,
        memories.get(number),
        request_for(plan, state, number),
        alone(people, number),
        0,
        number=number,
        key=KEY,
        data_key=DATA_KEY,
    )
    return answer


def close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["fed_avg", "scaffold", "private", "integers", "private integers"])
def test_messages_equal_the_compiled_round(people, name):
    algorithm = make(name)
    plan, memories, cohorts = planned(algorithm), {}, ([0, 1, 2, 3], [3, 0], [2, 1], [0, 3, 2])
    state = init_deployed(plan)
    for ids, expected in zip(cohorts, simulate(algorithm, people, cohorts), strict=True):
        # Whoever answers first: the sum is the same.
        answers = {n: ask(plan, state, people, memories, n) for n in reversed(ids)}
        state = server_round(plan, state, answers)
        close(state.params, expected.params, 1e-6)
    assert int(state.round) == 4
    if name == "scaffold":
        for number, memory in memories.items():
            close(memory.after, jax.tree.map(lambda x, n=number: x[n], expected.clients), 1e-6)
        assert any(np.any(np.abs(m.after["a"]) > 1e-3) for m in memories.values())


def test_the_order_of_arrival_changes_no_bit(people):
    plan, memories = planned(make("fed_avg")), {}
    state = init_deployed(plan)
    answers = {n: ask(plan, state, people, memories, n) for n in (2, 0, 3)}
    one = server_round(plan, state, answers)
    other = server_round(plan, state, {n: answers[n] for n in (3, 2, 0)})
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_clients_are_sent_what_they_read_and_no_noise_key(people):
    names = planned(make("private")).sent_names
    assert set(names) == {"inner.params.a", "inner.params.b"}
    sent = outgoing(planned(make("private")), init_deployed(planned(make("private"))))
    secret = np.asarray(
        jax.random.key_data(init_deployed(planned(make("private"))).server.noise.key)
    )
    for value in sent.values():
        assert secret.tobytes() not in np.asarray(value).tobytes()
    # The moments of Adam stay at home, SCAFFOLD's variate must travel.
    assert set(planned(make("fed_avg")).sent_names) == {"params.a", "params.b"}
    assert {"control.a", "control.b"} < set(planned(make("scaffold")).sent_names)


def test_a_server_key_that_the_clients_would_read_is_refused():
    plain = make("fed_avg")

    def init(params):
        server, client = plain.init(params)
        return (server, jax.random.key(1)), client

    def local_update(server, client, data, key):
        result = plain.local_update(server[0], client, data, key)
        noise = jax.random.normal(server[1])
        return result._replace(update=jax.tree.map(lambda x: x + noise, result.update))

    leaky = plain._replace(init=init, local_update=local_update)
    with pytest.raises(DpjaxError, match="random key in the server's state"):
        planned(leaky).sent_names  # noqa: B018


def test_a_request_that_comes_again_gets_the_same_answer(people, tmp_path):
    plan, memories = planned(make("scaffold")), {}
    state = init_deployed(plan)
    first = ask(plan, state, people, memories, 0)
    # Through the file, as after a restart of the client.
    save_memory(tmp_path / "c0", memories[0])
    assert (tmp_path / "c0").stat().st_mode & 0o077 == 0
    memories[0] = load_memory(tmp_path / "c0", plan)
    again = ask(plan, state, people, memories, 0)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    )
    # Other parameters in the same round: a second look at the data under the same noise.
    other = state._replace(
        server=state.server._replace(params=jax.tree.map(lambda x: x + 1, state.server.params))
    )
    with pytest.raises(DpjaxError, match="answered for other parameters"):
        ask(plan, other, people, memories, 0)
    later = server_round(plan, state, {0: first})
    ask(plan, later, people, memories, 0)
    with pytest.raises(DpjaxError, match="has passed"):
        ask(plan, state, people, memories, 0)


def test_a_client_that_was_too_slow_is_as_if_it_had_not_taken_part(people):
    algorithm = make("scaffold")
    plan, memories, state = planned(algorithm), {}, None
    state = init_deployed(plan)
    cohorts = ([0, 2, 3], [2, 3], [0, 2, 3])  # client 0 is late in the second round
    for number, expected in enumerate(simulate(algorithm, people, cohorts)):
        answers = {n: ask(plan, state, people, memories, n) for n in (0, 2, 3)}
        if number == 1:
            del answers[0]
        state = server_round(plan, state, answers)
        close(state.params, expected.params, 1e-6)
        close(state.server.control, expected.server.control, 1e-6)


def test_what_does_not_belong_is_refused(people, tmp_path):
    plan, memories = planned(make("fed_avg")), {}
    state = init_deployed(plan)
    ask(plan, state, people, memories, 0)
    options = {"number": 0, "key": KEY, "data_key": DATA_KEY}
    with pytest.raises(DpjaxError, match="new state folder, and a new key"):
        other = request_for(plan, state, 0)._replace(federation="cd" * 16)
        answer_request(plan, memories[0], other, alone(people, 0), 0, **options)
    with pytest.raises(DpjaxError, match="plan is not this client's"):
        smaller = Plan(make("fed_avg"), START, EXAMPLE, len(SIZES), batch_size=2, epochs=2)
        answer_request(smaller, None, request_for(plan, state, 0), alone(people, 0), 0, **options)
    save_memory(tmp_path / "m", memories[0])
    with pytest.raises(DpjaxError, match="not the memory of a client of this plan"):
        load_memory(tmp_path / "m", planned(make("scaffold")))
    assert load_memory(tmp_path / "none", plan) is None
    with pytest.raises(DpjaxError, match="there are 4 clients"):
        server_round(plan, state, {4: Answer(START, 1.0, {})})


def test_an_empty_round_moves_nothing_unless_the_divisor_is_public():
    plan = planned(make("fed_avg"))
    state = init_deployed(plan)
    after = server_round(plan, state, {})
    close(after.server, state.server, 0)
    assert int(after.round) == 1
    plan = planned(make("private"))
    after = server_round(plan, init_deployed(plan), {})
    moved = np.asarray(after.params["a"] - START["a"])
    assert np.all(moved != 0)  # noise alone: an outsider cannot tell that nobody came
    assert int(after.server.noise.count) == 1
