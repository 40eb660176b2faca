"""What comes from outside: refused with the right reason, whatever the bytes are."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax.errors import DpjaxError
from dpjax.federated import (
    CheckedUpdate,
    Rejection,
    Rejections,
    UpdateMessage,
    check_update,
    pack_update,
    read_message,
    unpack_update,
)

TREE = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": [np.float64(2.5) * np.ones(()), np.array([True, False])],
    "code": np.array([2**32 - 1, 0], np.uint32),
    "half": np.asarray(jnp.array([1.5, -3.0], jnp.bfloat16)),
    "none": np.zeros((0, 4), np.float32),
}
MESSAGE = UpdateMessage("ann", 7, bytes(range(16)), 3.0, pack_update(TREE))


def check(message=MESSAGE, **options):
    return check_update(message, TREE, **{"round": 7, **options})


def reason(message, **options):
    found = check(message, **options)
    assert isinstance(found, Rejection), found
    return found.reason


def changed(**leaves):
    return dataclasses.replace(MESSAGE, payload=pack_update({**TREE, **leaves}))


def test_updates_come_back_bit_for_bit():
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    found = unpack_update(pack_update(TREE), like)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    # Arrays of JAX are packed the same; the wire is raw values after a header.
    assert pack_update(jax.tree.map(jnp.asarray, {"w": TREE["w"]})) == pack_update({"w": TREE["w"]})
    assert pack_update({"w": TREE["w"]}).endswith(struct.pack("<6f", *range(6)))


def test_a_good_message_passes_and_is_then_remembered():
    arrived = read_message(MESSAGE.to_bytes(), max_bytes=1000)
    assert arrived == MESSAGE
    found = check(arrived, clients={"ann"}, l2_bound=8.57, max_weight=3.0)
    assert isinstance(found, CheckedUpdate) and found.weight == 3.0
    np.testing.assert_array_equal(found.update["w"], TREE["w"])
    seen = set(found.identities)
    assert reason(MESSAGE, seen=seen) == "replayed"
    fresh = dataclasses.replace(MESSAGE, nonce=b"n" * 16)
    assert reason(fresh, seen=seen) == "duplicate"
    # The next round is open to her, but not with the old nonce; others may have it.
    assert isinstance(check(dataclasses.replace(fresh, round=8), round=8, seen=seen), CheckedUpdate)
    assert reason(dataclasses.replace(MESSAGE, round=8), round=8, seen=seen) == "replayed"
    other = dataclasses.replace(MESSAGE, client="bob")
    assert isinstance(check(other, seen=seen), CheckedUpdate)


def test_norms_are_of_all_float_leaves_and_do_not_overflow():
    squares = [np.sum(np.square(np.asarray(x, np.float64)))
               for x in (TREE["w"], TREE["b"][0], TREE["half"])]  # fmt: skip
    norm = np.sqrt(sum(squares))
    assert isinstance(check(l2_bound=norm * (1 + 1e-9)), CheckedUpdate)
    assert reason(MESSAGE, l2_bound=norm * (1 - 1e-9)) == "norm too large"
    huge = changed(w=np.full((2, 3), 3e38, np.float32))
    assert reason(huge, l2_bound=1e38) == "norm too large"
    assert isinstance(check(huge, l2_bound=8e38), CheckedUpdate)
    tiny = changed(w=np.full((2, 3), 1e-40, np.float32))
    assert isinstance(check(tiny, l2_bound=5.0), CheckedUpdate)


def test_every_reason():
    counts = Rejections()
    body = MESSAGE.to_bytes()
    nan, inf = TREE["w"].copy(), TREE["w"].copy()
    nan[1, 2], inf[0, 0] = np.nan, -np.inf
    boolean = bytearray(MESSAGE.payload)
    at = MESSAGE.payload.index(b"\x01\x00", MESSAGE.payload.index(b"]]") + 2 + 8)
    boolean[at] = 2
    cases = [
        ("stale round", check(round=8)),
        ("future round", check(round=6)),
        ("unknown client", check(clients={"bob"})),
        ("bad weight", check(dataclasses.replace(MESSAGE, weight=np.nan))),
        ("bad weight", check(dataclasses.replace(MESSAGE, weight=-1.0))),
        ("bad weight", check(max_weight=2.5)),
        ("not finite", check(changed(w=nan))),
        ("not finite", check(changed(w=inf))),
        ("not finite", check(changed(half=np.asarray(jnp.array([1, jnp.nan], jnp.bfloat16))))),
        ("not finite", check(changed(b=[np.asarray(np.inf), TREE["b"][1]]))),
        ("wrong dtype", check(changed(w=TREE["w"].astype(np.float64)))),
        ("wrong dtype", check(changed(code=TREE["code"].astype(np.int32)))),
        ("wrong shape", check(changed(w=TREE["w"].T))),
        ("wrong shape", check(changed(none=np.zeros((0, 5), np.float32)))),
        ("wrong structure", check(changed(more=np.zeros(1, np.float32)))),
        ("wrong structure", check(changed(b=TREE["b"][:1]))),
        ("malformed", check(dataclasses.replace(MESSAGE, payload=MESSAGE.payload[:-1]))),
        ("malformed", check(dataclasses.replace(MESSAGE, payload=b""))),
        ("malformed", check(dataclasses.replace(MESSAGE, payload=bytes(boolean)))),
        ("too large", check(dataclasses.replace(MESSAGE, payload=MESSAGE.payload + b"\0"))),
        ("too large", read_message(body, max_bytes=len(body) - 1)),
        ("malformed", read_message(body[:-1], max_bytes=1000)),
        ("malformed", read_message(body + b"\0", max_bytes=1000)),
        ("malformed", read_message(b"", max_bytes=1000)),
    ]
    for expected, found in cases:
        assert isinstance(found, Rejection) and found.reason == expected, (expected, found)
        assert found.detail and "\n" not in found.detail
        counts = counts.add(found)
    assert counts.total == len(cases) and counts.counts["not finite"] == 4
    assert counts.counts["wrong shape"] == 2
    with pytest.raises(DpjaxError, match="update refused: wrong shape"):
        unpack_update(changed(w=TREE["w"].T).payload, TREE)
    with pytest.raises(DpjaxError, match="nonce has 3 bytes"):
        dataclasses.replace(MESSAGE, nonce=b"abc").to_bytes()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_rejected(data):
    assert isinstance(read_message(data, max_bytes=200), Rejection)
    assert isinstance(check(dataclasses.replace(MESSAGE, payload=data)), Rejection)
    with pytest.raises(DpjaxError, match="update refused"):
        unpack_update(data, TREE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["['w']", "float32", "uint32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_headers_that_are_json_of_something_else_are_rejected(value):
    header = json.dumps(value).encode()
    payload = b"dpjU\x01" + struct.pack("<I", len(header)) + header + bytes(40)
    assert isinstance(check(dataclasses.replace(MESSAGE, payload=payload)), Rejection)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_or_cut_message_never_crashes(data):
    """Flips in values are other values; anything else must be found."""
    body = bytearray(MESSAGE.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] ^= data.draw(st.integers(1, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))])
    found = read_message(body, max_bytes=1000)
    if isinstance(found, UpdateMessage):
        found = check(found)
    assert isinstance(found, Rejection | CheckedUpdate)
    if len(body) < len(MESSAGE.to_bytes()):
        assert isinstance(found, Rejection)


def test_a_deeply_nested_header_and_a_huge_claimed_length_are_cheap():
    for header in (b"[" * 100_000, b"[" * 900, b"1" * 1000):
        payload = b"dpjU\x01" + struct.pack("<I", len(header)) + header
        assert isinstance(check(dataclasses.replace(MESSAGE, payload=payload)), Rejection)
    payload = b"dpjU\x01" + struct.pack("<I", 2**32 - 1) + b"[]"
    assert reason(dataclasses.replace(MESSAGE, payload=payload)) == "malformed"
