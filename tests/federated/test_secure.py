"""Secure aggregation: exact sums whoever drops out when, and nothing else for the server."""

import collections
import dataclasses
import fractions
import importlib
import itertools
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax.errors import DpjaxError
from dpjax.federated import (
    Aggregate,
    Clients,
    LocalData,
    fed_avg,
    fixed_point,
    init_federated,
    run_round,
    with_aggregator,
)
from dpjax.federated.secure import (
    SecureClient,
    SecureServer,
    from_vector,
    new_identity,
    new_session,
    secure_sum,
    to_vector,
)
from dpjax.federated.secure_messages import (
    Confirmations,
    Keys,
    Reveal,
    Roster,
    Shares,
    Survivors,
    read_secure_message,
)
from dpjax.federated.secure_session import add_masks
from dpjax.federated.shamir import PRIME, join_shares, split_secret, weights_at_zero

STAGES = ("keys", "shares", "masked", "confirm", "reveal")
IN_THE_SUM = ("confirm", "reveal")


def vectors(n, length=40, seed=0):
    rng = np.random.default_rng(seed)
    return {c: rng.integers(0, 2**32, length, dtype=np.uint32) for c in range(n)}


def plain_sum(some, who):
    """In Python's integers."""
    columns = zip(*(some[c].tolist() for c in who), strict=True)
    return [sum(column) % 2**32 for column in columns]


def run_to(step, session, some, identities=None, gone=()):
    """Server and clients at the point where ``step`` is awaited, and what clients got for it."""
    identities = identities or {}
    clients = {c: SecureClient(session, c, identities.get(c)) for c in session.clients}
    server, inbox = SecureServer(session), dict.fromkeys(clients, b"")
    while server.step != step:
        for c, message in inbox.items():
            if (c, server.step) in gone:
                continue
            answers = {"keys": lambda c, m: clients[c].keys(),
                       "shares": lambda c, m: clients[c].share_keys(m),
                       "masked": lambda c, m: clients[c].mask(m, some[c]),
                       "confirm": lambda c, m: clients[c].confirm(m)}  # fmt: skip
            assert server.receive(answers[server.step](c, message)) is None
        inbox = server.advance()
    return server, clients, inbox


# Sums.


@pytest.mark.parametrize("signed", [False, True])
def test_any_dropouts_down_to_the_threshold_leave_the_sum_exact(signed):
    rng = np.random.default_rng(int(signed))
    stages = [s for s in STAGES if signed or s != "confirm"]
    for trial in range(12):
        n = int(rng.integers(4, 10))
        least = 2 * n // 3 + 1 if signed else n // 2 + 1
        threshold = int(rng.integers(least, n + 1))
        leaving = rng.permutation(n)[: int(rng.integers(0, n - threshold + 1))]
        gone = {int(c): stages[int(rng.integers(len(stages)))] for c in leaving}
        some = vectors(n, length=int(rng.integers(1, 50)), seed=trial)
        found = secure_sum(some, threshold, dropouts=gone, signed=signed)
        stay = [c for c in range(n) if gone.get(c, "reveal") in IN_THE_SUM]
        assert found.survivors == tuple(stay)
        assert found.total.tolist() == plain_sum(some, stay)


def test_sparse_pairs_leave_the_sum_exact_or_say_that_they_cannot():
    """Random dropouts; a group below its threshold is one clear error, never a wrong sum."""
    rng = np.random.default_rng(7)
    outcomes = collections.Counter()
    for trial in range(25):
        n, degree = int(rng.integers(11, 20)), int(rng.choice([6, 8]))
        threshold = degree // 2 + 1
        leaving = rng.permutation(n)[: int(rng.integers(0, n // 4 + 1))]
        stages = ("keys", "shares", "masked", "reveal")
        gone = {int(c): stages[int(rng.integers(4))] for c in leaving}
        some = vectors(n, 20, seed=trial)
        try:
            found = secure_sum(some, threshold, dropouts=gone, degree=degree)
        except DpjaxError as error:
            assert "nothing was unmasked" in str(error)
            outcomes["refused"] += 1
            continue
        stay = {c for c in range(n) if gone.get(c, "reveal") == "reveal"}
        assert {*found.survivors} <= stay  # without some whose group was too small to begin with
        assert found.total.tolist() == plain_sum(some, found.survivors)
        outcomes["summed", {*found.survivors} == stay] += 1
    # The ring is random; without dropouts, a quarter of the trials, it cannot fail.
    assert outcomes["summed", True] >= 8, outcomes
    session = new_session(range(12), 3, 8, degree=4)
    group = session.groups()[5] - {5}
    gone = {(c, "masked") for c in sorted(group)[:3]}
    with pytest.raises(DpjaxError, match="group are left and the threshold is 3; nothing was"):
        run_to("reveal", session, vectors(12, 8), gone=gone)


def test_sparse_groups_are_mutual_connected_and_random():
    session = new_session(range(30), 5, 3, degree=8)
    groups = session.groups()
    assert all(len(g) == 9 and c in g for c, g in groups.items())
    assert all(c in groups[v] for c, g in groups.items() for v in g)
    reached = {0}
    for _ in range(30):
        reached |= {v for c in reached for v in groups[c]}
    assert reached == {*range(30)}
    other = new_session(range(30), 5, 3, degree=8).groups()
    assert sum(groups[c] != other[c] for c in range(30)) > 25
    # A server that shows a client others than its neighbours is refused.
    server, clients, inbox = run_to("shares", session, vectors(30, 3))
    stranger = next(c for c in range(30) if c not in groups[0])
    told = Roster.from_bytes(inbox[0])
    more = sorted([*told.keys, server._keys[stranger]], key=lambda k: k.sender)
    with pytest.raises(DpjaxError, match="not this one's peers"):
        clients[0].share_keys(Roster(session.id, tuple(more)).to_bytes())
    sent = Shares.from_bytes(clients[0].share_keys(inbox[0]))
    assert {c for c, _ in sent.sealed} == groups[0] - {0}
    few = dataclasses.replace(sent, sealed=sent.sealed[1:])
    assert server.receive(few.to_bytes()).reason == "wrong structure"


@pytest.mark.parametrize("stage", STAGES)
def test_one_fewer_than_the_threshold_is_one_clear_error(stage):
    some = vectors(7)
    exactly = dict.fromkeys((0, 6), stage)
    found = secure_sum(some, 5, dropouts=exactly, signed=True)
    stay = range(7) if stage in IN_THE_SUM else range(1, 6)
    assert found.total.tolist() == plain_sum(some, stay)
    with pytest.raises(DpjaxError, match=f"4 clients are left at step '{stage}'.*threshold is 5"):
        secure_sum(some, 5, dropouts={**exactly, 3: stage}, signed=True)


def test_a_session_that_failed_unmasks_nothing():
    session = new_session(range(5), 3, 8)
    server, clients, inbox = run_to("reveal", session, vectors(5, 8))
    for c in (0, 1):
        server.receive(clients[c].reveal(inbox[c]))
    with pytest.raises(DpjaxError, match="2 clients are left"):
        server.total()
    assert server.receive(clients[2].reveal(inbox[2])).reason == "wrong step"
    for again in (server.total, server.advance):
        with pytest.raises(DpjaxError, match="failed"):
            again()


@pytest.mark.parametrize("length", [1, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 5])
def test_blocks_of_masks_join(length):
    """Against the whole expansion in one call."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    keys = [bytes([k]) * 16 for k in range(3)]
    expected = np.arange(length, dtype=np.uint32)
    for sign, key in zip((1, -1, 1), keys, strict=True):
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        words = np.frombuffer(stream.update(bytes(4 * length)), "<u4").astype(np.int64)
        expected = ((expected.astype(np.int64) + sign * words) % 2**32).astype(np.uint32)
    total = np.arange(length, dtype=np.uint32)
    add_masks(total, list(zip(keys, (1, -1, 1), strict=True)))
    np.testing.assert_array_equal(total, expected)


def test_a_round_through_the_protocol_is_the_simulated_round():
    """The same local updates and server update; only the way of the sum differs."""
    people = Clients(
        {"x": np.float32([[1, 2], [3, -1], [0, 5], [2, 2], [7, 1]])},
        ([0, 1], [2], [3], [4]), tuple("abcd"),
    )  # fmt: skip
    inner = fed_avg(lambda w, e: jnp.sum((w["w"] - e["x"]) ** 2), optax.sgd(0.1))
    algorithm = with_aggregator(inner, fixed_point(8.0, max_clients=4), max_weight=2)
    state = init_federated(algorithm, {"w": jnp.zeros(2)}, 4)
    key = jax.random.key(0)
    cohort = people.cohort(range(4), key, batch_size=None)
    simulated, _ = run_round(algorithm, state, cohort, key, engine="jit")

    update = jax.jit(algorithm.local_update)
    sent = {}
    for place in range(4):
        at = [getattr(cohort, f)[0, place] for f in
              ("first_step", "num_steps", "steps_per_epoch", "num_examples")]  # fmt: skip
        one = jax.tree.map(lambda x: jnp.asarray(x[0]), (cohort.examples, cohort.batches))
        data = LocalData(*one, *map(jnp.asarray, at))
        who = int(cohort.client[0, place])
        sent[who] = update(state.server, (), data, jax.random.fold_in(key, who)).update
    found = secure_sum({c: to_vector(tree) for c, tree in sent.items()}, 3)
    total = jax.tree.map(jnp.asarray, from_vector(found.total, sent[0]))
    count = jnp.int32(len(found.survivors))
    server = algorithm.server_update(state.server, Aggregate(total, jnp.float32(4), count))
    # The same integers; compiled apart, a float32 division may end in another last bit.
    np.testing.assert_allclose(server.params["w"], simulated.params["w"], rtol=3e-7)


# What the server sees.


@pytest.mark.parametrize("content", ["zeros", "ones", "counting"])
def test_one_masked_vector_is_uniform_bits(content):
    """Bytes, and the words' 16 high bits, by chi-square; the test sees a bias of 1 byte in 20."""
    length = 100_000
    vector = {"zeros": np.zeros(length, np.uint32), "ones": np.full(length, 2**32 - 1, np.uint32),
              "counting": np.arange(length, dtype=np.uint32)}[content]  # fmt: skip
    some = dict.fromkeys(range(4), vector)
    session = new_session(range(4), 3, length)
    server, clients, inbox = run_to("masked", session, some)
    masked = {c: read_secure_message(clients[c].mask(inbox[c], vector)).vector for c in (0, 1)}

    def p_values(words):
        whole = np.bincount(words.view(np.uint8), minlength=256)
        high = np.bincount(words >> 22, minlength=1024)
        ones = [int(np.sum(words >> bit & 1)) for bit in range(32)]
        return [
            scipy.stats.chisquare(whole).pvalue,
            scipy.stats.chisquare(high).pvalue,
            min(scipy.stats.binomtest(k, length, 0.5).pvalue for k in ones) * 32,
        ]

    for words in masked.values():
        assert min(p_values(words)) > 1e-7
    # Two clients with the same vector, and one client in two sessions, send unrelated bits.
    again, others, box = run_to("masked", new_session(range(4), 3, length), some)
    second = read_secure_message(others[0].mask(box[0], vector)).vector
    for a, b in ((masked[0], masked[1]), (masked[0], second)):
        assert np.mean(a == b) < 1e-3
        assert min(p_values(a - b)) > 1e-7
        assert min(p_values(a ^ b)) > 1e-7
    # With power: one byte in 20 left as it was is seen.
    leaky = np.array(masked[0])
    leaky.view(np.uint8)[::20] = vector.view(np.uint8)[::20]
    if content != "counting":
        assert min(p_values(leaky)) < 1e-12


def everything_in(thing, seen=None):
    """All bytes and integers that can be reached from an object."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType):
        return
    seen[id(thing)] = thing  # kept, so that no other object gets its number
    if isinstance(thing, bytes | bytearray | memoryview):
        yield bytes(thing)
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    elif isinstance(thing, int):
        yield thing.to_bytes(40, "big", signed=True)
    elif isinstance(thing, collections.abc.Mapping):
        for pair in thing.items():
            yield from everything_in(pair, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for x in thing:
            yield from everything_in(x, seen)
    elif hasattr(thing, "__dict__"):
        yield from everything_in(vars(thing), seen)


def secrets_of(client, vector):
    own = [client._encryption_key, client._mask_key, client._seed, vector.tobytes()]
    shares = [x.to_bytes(33) for x in client._own_share if x]  # none before they are made
    return own + shares


def test_the_server_holds_no_secret_of_a_client():
    """Its whole memory, at every step: before the end nothing, at the end what it may know."""
    some, identity = vectors(5, 64), {c: new_identity() for c in range(5)}
    session = new_session(range(5), 4, 64, {c: k[1] for c, k in identity.items()})
    private = {c: k[0] for c, k in identity.items()}
    for step in ("shares", "masked", "confirm", "reveal"):
        gone = {(2, "masked")}
        server, clients, inbox = run_to(step, session, some, private, gone)
        held = b"|".join(everything_in((server, inbox)))
        # The search finds what is there.
        for known in (session.id, *(k.mask_key for k in server._keys.values())):
            assert known in held
        for c, client in clients.items():
            for secret in (*secrets_of(client, some[c]), private[c]):
                assert secret not in held, (step, c)
    for c in (0, 1, 3, 4):
        assert server.receive(clients[c].reveal(inbox[c])) is None
    held = b"|".join(everything_in(server))
    for c, client in clients.items():
        # Shares of each client's one secret, by t clients; of its other secret not one.
        key_shares = [dict(r.mask_keys).get(c) for r in server._reveals.values()]
        seed_shares = [dict(r.self_masks).get(c) for r in server._reveals.values()]
        assert all(key_shares) == (c == 2) and all(seed_shares) == (c != 2)
        assert any(key_shares) != any(seed_shares)
        assert client._encryption_key not in held and some[c].tobytes() not in held
    assert server.total().tolist() == plain_sum(some, (0, 1, 3, 4))


# Servers and clients that do not play by the rules.


def test_a_client_never_gives_both_secrets_of_anybody():
    some, session = vectors(5), new_session(range(5), 3, 40)
    server, clients, inbox = run_to("reveal", session, some, gone={(4, "masked")})
    told = read_secure_message(inbox[0])
    assert told.survivors == (0, 1, 2, 3) and told.dropped == (4,)
    attacks = {
        "as survivor and as missing": dataclasses.replace(told, dropped=(3, 4)),
        "other clients": dataclasses.replace(told, survivors=(0, 1, 2)),
        "this client as missing": Survivors(session.id, (1, 2, 3, 4), (0,)),
        "fewer survivors": Survivors(session.id, (0, 1), (2, 3, 4)),
        "another session": dataclasses.replace(told, session=bytes(16)),
        "a Reveal": Reveal(session.id, 1, (), ()),
    }
    for what, attack in attacks.items():
        with pytest.raises(DpjaxError, match=what):
            clients[0].reveal(attack.to_bytes())
    # One answer, and then none, whatever is asked.
    answer = read_secure_message(clients[0].reveal(inbox[0]))
    assert [c for c, _ in answer.self_masks] == [0, 1, 2, 3]
    assert [c for c, _ in answer.mask_keys] == [4]
    swapped = Survivors(session.id, (0, 1, 4), (2, 3))
    for request in (inbox[0], swapped.to_bytes()):
        with pytest.raises(DpjaxError, match="answers each once"):
            clients[0].reveal(request)
    # Told different stories, no two groups of a threshold exist: 3 + 3 > 5.
    with pytest.raises(DpjaxError, match="it must be 3 to 5"):
        new_session(range(5), 2, 40)


def test_signed_clients_find_out_that_they_were_told_different_survivors():
    identity = {c: new_identity() for c in range(6)}
    public, private = ({c: k[i] for c, k in identity.items()} for i in (1, 0))
    session = new_session(range(6), 5, 40, public)
    server, clients, inbox = run_to("confirm", session, vectors(6), private)
    one = Survivors(session.id, tuple(range(6)), ())
    other = Survivors(session.id, (0, 1, 2, 3, 4), (5,))
    sent = {c: read_secure_message(clients[c].confirm((one if c < 3 else other).to_bytes()))
            for c in range(5)}  # fmt: skip
    signatures = tuple((c, s.signature) for c, s in sent.items())
    for c in range(5):
        with pytest.raises(DpjaxError, match="other survivors than those that client"):
            clients[c].reveal(Confirmations(session.id, signatures).to_bytes())
        with pytest.raises(DpjaxError, match="fewer confirmations"):
            clients[c].reveal(Confirmations(session.id, signatures[:3]).to_bytes())
    with pytest.raises(DpjaxError, match="answers each once"):
        clients[0].confirm(other.to_bytes())
    assert server.receive(sent[0].to_bytes()) is None
    assert server.receive(sent[4].to_bytes()).reason == "bad signature"


def test_keys_that_are_not_signed_by_their_client_are_refused():
    """By the server, and by clients when the server itself puts others in."""
    identity = {c: new_identity() for c in range(4)}
    public, private = ({c: k[i] for c, k in identity.items()} for i in (1, 0))
    session = new_session(range(4), 3, 5, public)
    server, clients, inbox = run_to("shares", session, vectors(4, 5), private)
    told = Roster.from_bytes(inbox[0])
    fake = SecureClient(session, 2, new_identity()[0]).keys()
    assert SecureServer(session).receive(fake).reason == "bad signature"
    keys = (*told.keys[:2], Keys.from_bytes(fake), told.keys[3])
    with pytest.raises(DpjaxError, match="keys that client 2 did not sign"):
        clients[0].share_keys(Roster(session.id, keys).to_bytes())
    keys = (Keys.from_bytes(SecureClient(session, 0, private[0]).keys()), *told.keys[1:])
    with pytest.raises(DpjaxError, match="other keys for this client"):
        clients[0].share_keys(Roster(session.id, keys).to_bytes())
    twice = dataclasses.replace(told.keys[1], encryption_key=told.keys[3].encryption_key)
    with pytest.raises(DpjaxError, match="used twice"):
        clients[0].share_keys(Roster(session.id, (told.keys[0], twice, *told.keys[2:])).to_bytes())
    with pytest.raises(DpjaxError, match="fewer clients"):
        clients[0].share_keys(Roster(session.id, told.keys[:2]).to_bytes())


def test_a_vector_is_masked_once_and_must_fit():
    some, session = vectors(4), new_session(range(4), 3, 40)
    server, clients, inbox = run_to("masked", session, some)
    for wrong in (some[0][:-1], some[0].astype(np.float32), some[0].reshape(2, 20)):
        with pytest.raises(DpjaxError, match="the session sums uint32"):
            clients[0].mask(inbox[0], wrong)
    before = some[0].copy()
    clients[0].mask(inbox[0], some[0])
    np.testing.assert_array_equal(some[0], before)  # the caller's array is not masked in place
    with pytest.raises(DpjaxError, match="answers each once"):  # a difference would show
        clients[0].mask(inbox[0], np.zeros(40, np.uint32))
    few = Shares(session.id, 2**32 - 1, read_secure_message(inbox[1]).sealed[:1])
    with pytest.raises(DpjaxError, match="fewer clients"):
        clients[1].mask(few.to_bytes(), some[1])


def test_the_server_refuses_with_a_reason_and_counts():
    some, session = vectors(5), new_session(range(5), 3, 40)
    server, clients, inbox = run_to("masked", session, some)
    sent = {c: clients[c].mask(inbox[c], some[c]) for c in range(4)}
    other = new_session(range(5), 3, 40)
    _, strangers, box = run_to("masked", other, some)
    good = read_secure_message(sent[0])
    short = dataclasses.replace(good, vector=good.vector[:-1]).to_bytes()
    assert server.receive(sent[0]) is None
    cases = [
        ("duplicate", sent[0], {}),
        ("wrong session", strangers[1].mask(box[1], some[1]), {}),
        ("wrong step", SecureClient(session, 1).keys(), {}),
        ("wrong step", inbox[1], {}),
        ("unknown client", sent[1], {"sender": 2}),
        ("unknown client", dataclasses.replace(good, sender=77).to_bytes(), {}),
        ("wrong shape", dataclasses.replace(good, sender=1, vector=good.vector[1:]).to_bytes(), {}),
        ("malformed", sent[1][:-1], {}),
        ("malformed", sent[1] + b"\0", {}),
        ("malformed", b"", {}),
        ("malformed", short[:-3], {}),
        ("too large", bytes(10_000), {}),
    ]
    for expected, data, options in cases:
        found = server.receive(data, **options)
        assert found is not None and found.reason == expected, (expected, found)
    assert server.rejections.total == len(cases)
    assert server.rejections.counts["malformed"] == 4
    # None of it left a trace in the sum.
    for c in (1, 2, 3):
        assert server.receive(sent[c], sender=c) is None
    inbox = server.advance()
    for c in range(4):
        assert server.receive(clients[c].reveal(inbox[c])) is None
    extra = Reveal(session.id, 4, (), ())
    assert server.receive(extra.to_bytes()).reason == "unknown client"
    assert server.total().tolist() == plain_sum(some, range(4))


def test_keys_of_low_order_and_keys_in_use_are_refused():
    session = new_session(range(3), 2, 4)
    server = SecureServer(session)
    first = Keys.from_bytes(SecureClient(session, 0).keys())
    for weak in (bytes(32), b"\x01" + bytes(31)):
        found = server.receive(dataclasses.replace(first, mask_key=weak).to_bytes())
        assert found.reason == "malformed" and "weak" in found.detail
    assert server.receive(first.to_bytes()) is None
    copied = dataclasses.replace(first, sender=1)
    assert server.receive(copied.to_bytes()).reason == "duplicate"


def test_a_client_whose_sealed_shares_are_garbage_does_not_stop_the_others():
    """Each peer leaves that share out; where t are left, the sum is right, else it is refused."""
    some = vectors(5)
    for spoiled, works in ((1, True), (2, False)):
        session = new_session(range(5), 3, 40)
        server, clients, inbox = run_to("shares", session, some)
        for c in range(5):
            sent = Shares.from_bytes(clients[c].share_keys(inbox[c]))
            if c == 4:
                rows = [(p, bytes(len(s)) if p < spoiled else s) for p, s in sent.sealed]
                sent = dataclasses.replace(sent, sealed=tuple(rows))
            assert server.receive(sent.to_bytes()) is None
        inbox = server.advance()
        for c in range(4):
            server.receive(clients[c].mask(inbox[c], some[c]))
        inbox = server.advance()
        for c in range(4):
            assert server.receive(clients[c].reveal(inbox[c])) is None
        if works:
            assert server.total().tolist() == plain_sum(some, range(4))
        else:
            with pytest.raises(DpjaxError, match="and 3 are needed"):
                server.total()


@pytest.mark.parametrize("table", ["self_masks", "mask_keys"])
def test_a_wrong_share_is_an_error_and_not_a_wrong_sum(table):
    some, session = vectors(5), new_session(range(5), 3, 40)
    server, clients, inbox = run_to("reveal", session, some, gone={(4, "masked")})
    for c in range(4):
        answer = Reveal.from_bytes(clients[c].reveal(inbox[c]))
        if c == 0:
            rows = [(p, bytes(32) + b"\x07") for p, _ in getattr(answer, table)]
            answer = dataclasses.replace(answer, **{table: tuple(rows)})
        assert server.receive(answer.to_bytes()) is None
    with pytest.raises(DpjaxError, match="are wrong"):
        server.total()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_bytes_never_crash_the_server(data):
    """Arbitrary bytes, and real messages with bits flipped or ends cut."""
    server, sent = BROKEN
    body = bytearray(data.draw(st.sampled_from(sent)))
    if data.draw(st.booleans()):
        body = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 3)) if body else 0):
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))])
    before = len(server.arrived)
    found = server.receive(body)
    assert (found is None) == (len(server.arrived) > before)
    try:
        message = read_secure_message(body)
    except DpjaxError:
        return
    assert message.to_bytes() == body  # one way to write each message


def broken():
    session = new_session(range(40), 21, 3)
    server, clients, inbox = run_to("masked", session, vectors(40, 3))
    sent = [c.mask(inbox[k], np.zeros(3, np.uint32)) for k, c in clients.items()][:8]
    answers = Reveal(session.id, 3, ((1, bytes(33)), (5, bytes(33))), ())
    return server, [*sent, inbox[0], SecureClient(session, 3).keys(), answers.to_bytes()]


BROKEN = broken()


def test_sessions_refuse_what_would_not_be_safe():
    identity = {c: new_identity()[1] for c in range(6)}
    for wrong, what in (
        (lambda: new_session(range(6), 3, 5), "4 to 6"),
        (lambda: new_session(range(6), 7, 5), "4 to 6"),
        (lambda: new_session(range(6), 4, 5, identity), "5 to 6"),
        (lambda: new_session(range(9), 3, 5, degree=4), None),
        (lambda: new_session(range(9), 2, 5, degree=4), "of 5 clients; it must be 3 to 5"),
        (lambda: new_session(range(9), 3, 5, degree=3), "must be even"),
        (lambda: new_session(range(9), 5, 5, degree=8), "below 8"),
        (lambda: new_session(range(6), 5, 5, identity, degree=4), "not signed"),
        (lambda: new_session([1], 1, 5), "two or more"),
        (lambda: new_session([1, 1, 2], 2, 5), "two or more"),
        (lambda: new_session([0, 2**32 - 2], 2, 5), "numbered from 0"),
        (lambda: new_session(range(3), 2, 0), "at least one number"),
        (lambda: new_session(range(5), 4, 5, identity), "one public key for each"),
        (lambda: SecureClient(new_session(range(3), 2, 5), 3), "not in the session"),
        (lambda: SecureClient(new_session(range(3), 2, 5), 1, bytes(32)), "signed sessions"),
        (lambda: to_vector({"w": np.zeros(3, np.float32)}), "fixed_point"),
        (lambda: from_vector(np.zeros(3, np.uint32), {"w": np.zeros(4)}), "3 numbers"),
    ):
        if what is None:
            wrong()
            continue
        with pytest.raises(DpjaxError, match=what):
            wrong()


def test_bytes_per_client_are_four_a_number_and_a_constant():
    for n, length in ((4, 1000), (10, 1000), (10, 5000)):
        found = secure_sum(vectors(n, length), n // 2 + 1)
        rest = {found.sent[c] - 4 * length for c in range(n)}
        # Head and keys, then n - 1 sealed shares, n + 1 shares at most.
        assert max(rest) <= 400 + 160 * n


def test_without_the_extra_one_line_names_the_command(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("dpjax.federated.secure")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(DpjaxError, match="pip install 'dpjax\\[federated\\]'"):
        importlib.import_module("dpjax.federated.secure")


# Shamir.


def test_shares_against_lagrange_in_fractions():
    """Small numbers, no modulus in the reference: the polynomial through t points, at 0."""
    prime = 2**127 - 1
    for secret, rest in ((17, (5, 3)), (0, (9,)), (123456, ())):
        numbers = iter(rest)
        shares = split_secret(
            secret,
            [2, 3, 7, 11],
            len(rest) + 1,
            prime=prime,
            randbelow=lambda n, numbers=numbers: next(numbers),
        )
        assert shares == {x: secret + sum(a * x**k for k, a in enumerate(rest, 1)) for x in shares}
        for points in itertools.combinations(shares, len(rest) + 1):
            at_zero = fractions.Fraction(0)
            for x in points:
                others = [fractions.Fraction(-o, x - o) for o in points if o != x]
                at_zero += shares[x] * math.prod(others)
            assert at_zero == secret
            chosen = {x: shares[x] for x in points}
            assert join_shares(chosen, len(rest) + 1, prime=prime) == secret
            weights = weights_at_zero(points, prime=prime)
            assert sum(weights.values()) % prime == 1


def test_fewer_shares_than_the_threshold_say_nothing():
    """All polynomials over a small field: each pair of shares is as likely for every secret."""
    prime = 7
    for points in ((1, 2), (3, 6)):
        counts = {}
        for secret in range(prime):
            seen = collections.Counter()
            for rest in itertools.product(range(prime), repeat=2):
                numbers = iter(rest)
                shares = split_secret(
                    secret,
                    [1, 2, 3, 6],
                    3,
                    prime=prime,
                    randbelow=lambda n, numbers=numbers: next(numbers),
                )
                seen[tuple(shares[x] for x in points)] += 1
            counts[secret] = seen
        assert all(seen == counts[0] for seen in counts.values())
        assert len(counts[0]) == prime**2 and set(counts[0].values()) == {1}


def test_the_library_draws_coefficients_uniformly():
    """t - 1 shares of a fixed secret, over a small field, by chi-square; t shares always join."""
    seen = collections.Counter()
    for _ in range(5000):
        shares = split_secret(3, [1, 2, 4], 2, prime=11)
        seen[shares[4]] += 1
        assert join_shares({4: shares[4], 1: shares[1]}, 2, prime=11) == 3
    assert scipy.stats.chisquare([seen[k] for k in range(11)]).pvalue > 1e-6


def test_secrets_of_all_32_bytes():
    for secret in (0, 1, 2**256 - 1, int.from_bytes(bytes(range(32)))):
        shares = split_secret(secret, range(1, 8), 4)
        assert all(0 <= s < PRIME for s in shares.values())
        assert join_shares({x: shares[x] for x in (7, 2, 5, 1)}, 4) == secret
        assert join_shares({x: shares[x] for x in (7, 2, 5)}, 3) != secret
    for wrong in (
        lambda: split_secret(1, [0, 1], 2), lambda: split_secret(1, [1, 1], 2),
        lambda: split_secret(PRIME, [1, 2], 2), lambda: split_secret(1, [1, 2], 3),
        lambda: split_secret(1, [1, 2], 0), lambda: join_shares({1: 5}, 2),
    ):  # fmt: skip
        with pytest.raises(DpjaxError):
            wrong()
