"""Messages of workers, and a worker that is a process of its own behind TLS."""

import contextlib
import json
import math
import random
import socket
import ssl
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.federated import connect, make_certificate
from dpjax.federated.worker_wire import pack_message, read_message_bytes


def refused(match):
    return pytest.raises(DpjaxError, match=match)


def test_messages_come_back_and_broken_ones_do_not():
    arrays = [
        np.float32([[1, 2]]), np.array(True), np.zeros((0, 3), np.int64), np.float64([np.nan]),
        np.asarray(jnp.bfloat16([1.5])),
    ]  # fmt: skip
    data = pack_message({"do": "x", "n": [1, None]}, arrays)
    header, found = read_message_bytes(data, max_bytes=1000)
    assert header == {"do": "x", "n": [1, None]}
    for one, other in zip(arrays, found, strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        assert one.shape == other.shape
    for n in range(len(data)):
        with pytest.raises(DpjaxError):
            read_message_bytes(data[:n], max_bytes=1000)
    rng = random.Random(1)
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(DpjaxError):
            read_message_bytes(bytes(broken), max_bytes=1000)
    with refused("bytes; at most"):
        read_message_bytes(data, max_bytes=10)
    for text in (b'{"arrays_sent": [["float32", [1099511627775, 2]]]}', b"[" * 9999, b"[1]",
                 b'{"arrays_sent": [["object", [1]]]}', b'{"arrays_sent": [], "n": NaN}',
                 b'{"arrays_sent": [["float32", [-1]]]}', b"\xff"):  # fmt: skip
        head = b"dpW\x01" + len(text).to_bytes(4, "little") + (4).to_bytes(8, "little")
        with refused("malformed message"):
            read_message_bytes(head + text + bytes(4), max_bytes=1000)
    with refused("must be finite"):
        pack_message({"number": math.inf}, [])


def test_a_real_process_over_tls(tmp_path):
    rows = np.full((200, 2), 0.25, np.float32)
    np.save(tmp_path / "x.npy", rows)
    folder = tmp_path / "alice"
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "dpjax.federated.worker_cli", "--name", "alice", "--folder",
        str(folder), "--data", f"x={tmp_path / 'x.npy'}", "--requesters", "bob", "--policy",
        "laplace", "--target-epsilon", "0.25",
    ]  # fmt: skip
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    try:
        port = json.loads(process.stdout.readline())["port"]
        token = (folder / "bob.token").read_text()
        cafile = folder / "certificate.pem"
        for secret in ("bob.token", "private_key.pem", "answers.jsonl"):
            assert (folder / secret).stat().st_mode & 0o077 == 0

        # Strangers: one line each, and the worker goes on.
        with refused("does not know this token; ask its owner"):
            connect("127.0.0.1", port, token="x" * 43, cafile=cafile)
        other = make_certificate(tmp_path / "other").certificate
        with refused("is not the worker of .*; the token was not sent"):
            connect("127.0.0.1", port, token=token, cafile=other)
        for sent in (b"GET / HTTP/1.0\r\n\r\n", bytes(1000), pack_message({"token": token}, [])):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
                plain.sendall(sent)
                with pytest.raises((ConnectionError, StopIteration)):
                    while got := plain.recv(100):
                        assert got[0] == 21  # an alert of TLS, and the end
                    raise StopIteration
        context = ssl.create_default_context(cafile=cafile)
        for sent in (b"x" * 100, b"dpW\x01" + b"\xff" * 12):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
                    tls.sendall(sent)
                    assert b"error" in tls.recv(1000)
                    assert tls.recv(1000) == b""
        context = ssl.create_default_context(cafile=cafile)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(raw, server_hostname="127.0.0.1")

        with connect("127.0.0.1", port, token=token, cafile=cafile) as session:
            assert session.listing()["x"].shape == (200, 2)
            y = session["x"] * 2 + 1
            assert repr(y) == "<pointer to float32[200,2] on alice>"
            mean = y.mean(axis=0).get()
            # Bounds 1 to 3: scale 10 * 2 * 2 / 200 = 0.2 for each of the two.
            assert mean.shape == (2,) and np.all(np.abs(mean - 1.5) < 0.2 * 30)
            assert np.array_equal(y.mean(axis=0).get(), mean)
            with refused("alice: single records are not released"):
                y.get()
            own = session.put(np.float32([1, 2]))
            assert (own + np.float32([1, 1])).get().tolist() == [2, 3]
            y.sum().get()
            with refused("over the budget"):
                y.mean().get()
            assert session.spent() == (pytest.approx(0.2), 0.0, 2)
            with refused("the worker takes 67108864 at once"):
                session.put(np.zeros(2**24, np.float32))
        with refused("the connection to .* is lost"):
            y.mean().get()
        with connect("127.0.0.1", port, token=token, cafile=cafile) as session:
            with refused("over the budget"):  # a new connection is no new budget
                session["x"].mean().get()
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()
    lines = log.read_text().splitlines()
    assert len(lines) == 8, lines
    assert all(x.startswith(("refused 127.0.0.1:", "lost 127.0.0.1:")) for x in lines), lines
    assert token not in log.read_text()
    with refused("cannot reach"):
        connect("127.0.0.1", port, token=token, cafile=cafile)
