"""A worker over TLS: `serve` on the owner's machine, `connect` on a requester's.

The server shows its certificate, the requester its token; who has neither learns nothing. Each
connection has a thread, a limit on what it may send, and a time for it.
"""

import contextlib
import datetime
import ipaddress
import os
import pathlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated.worker import Worker
from dpjax.federated.worker_pointer import Header, Session
from dpjax.federated.worker_wire import Closed, receive_message, send_message

_MAX_HELLO = 4096  # bytes before the token is known


class Certificate(NamedTuple):
    """Files of a TLS server. The certificate is for everybody, the key for nobody."""

    certificate: pathlib.Path
    private_key: pathlib.Path


def make_certificate(
    folder: str | os.PathLike,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    *,
    days: int = 365,
) -> Certificate:
    """A self-signed certificate for these names and addresses; kept if the folder has one.

    Requesters need the certificate's file, over a way that they trust, as ``cafile``.

    Raises:
      DpjaxError: the package `cryptography` is missing.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise DpjaxError(
            "a certificate needs the package cryptography; install it with "
            "`pip install 'dpjax[federated]'`"
        ) from None
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = Certificate(folder / "certificate.pem", folder / "private_key.pem")
    if made.certificate.exists() and made.private_key.exists():
        return made
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dpjax worker")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_secret(made.private_key, secret)
    made.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return made


def write_secret(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that only its owner may read, from its first moment on."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _general_name(host: str):
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class Server:
    """A worker that listens. From `serve`; close it, or leave the ``with`` block.

    Attributes:
      host, port: where.
    """

    def __init__(self, listener: socket.socket, run: Callable[["Server"], None]):
        self.host, self.port = listener.getsockname()[:2]
        self._listener = listener
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=run, args=(self,), daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def kept(self, connection: socket.socket):
        """While a connection is open, so that `close` ends it."""
        with self._lock:
            if self._is_closed:
                raise ConnectionAbortedError
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def close(self) -> None:
        """Stops listening and ends every connection. The worker itself stays."""
        with self._lock:
            self._is_closed = True
            connections = list(self._open)
        for one in (self._listener, *connections):
            _end(one)
        self._listener.close()
        self._thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def serve(
    worker: Worker,
    certificate: Certificate,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    max_bytes: int = 2**26,
    timeout_s: float = 10.0,
    idle_s: float = 600.0,
    max_connections: int = 32,
    tell: Callable[[str], None] = _tell,
) -> Server:
    """Answers requesters over TLS 1.3, in threads of this process.

    Args:
      certificate: from `make_certificate`, or the files of any other one.
      port: 0 takes a free one; see ``Server.port``.
      max_bytes: arrays of one message.
      timeout_s: for the handshake, for the token, and for a message once it has begun.
      idle_s: between messages.
      max_connections: more at once are turned away.
      tell: is given one line for every refusal; nothing private is in it.

    Guarantee: before the token no more than 4 KiB is read, within ``timeout_s``; whatever comes in
      ends that connection at worst. Requesters are known by their token alone.

    Example:
      >>> import tempfile
      >>> from dpjax.federated.worker_policy import Policy
      >>> with tempfile.TemporaryDirectory() as folder, Worker("alice") as alice:
      ...     files = make_certificate(folder)
      ...     token = alice.enrol("bob")
      ...     x = alice.put(np.float32([1, 2]), name="x", policy=Policy.allow())
      ...     with serve(alice, files) as server:
      ...         with connect(
      ...             "127.0.0.1", server.port, token=token, cafile=files.certificate
      ...         ) as session:
      ...             print((session["x"] + 2).get())
      [3. 4.]
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate.certificate, certificate.private_key)
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise DpjaxError(
            f"cannot serve on {host}:{port} with {certificate.certificate}: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from None
    room = threading.Semaphore(max_connections)

    def answer(server: Server, raw: socket.socket, peer: str) -> None:
        try:
            raw.settimeout(timeout_s)
            with (
                context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False) as tls,
                server.kept(tls),
            ):
                # The socket's own timeout begins anew with every byte.
                patience = threading.Timer(timeout_s, _end, (tls,))
                patience.daemon = True
                patience.start()
                try:
                    tls.do_handshake()
                    requester = _known(worker, tls, peer, timeout_s, tell)
                finally:
                    patience.cancel()
                if requester is not None:
                    _converse(worker, tls, requester, peer, max_bytes, timeout_s, idle_s, tell)
        except ssl.SSLError:
            tell(f"refused {peer}: no TLS 1.3 handshake")
        except TimeoutError:
            tell(f"refused {peer}: too slow")
        except Exception:  # a connection never ends more than itself
            tell(f"lost {peer}")
        finally:
            raw.close()
            room.release()

    def run(server: Server) -> None:
        while True:
            try:
                raw, address = listener.accept()
            except OSError:
                if server._is_closed:
                    return
                continue  # that connection was gone before it was taken
            peer = f"{address[0]}:{address[1]}"
            if not room.acquire(blocking=False):
                tell(f"refused {peer}: {max_connections} connections are open")
                raw.close()
                continue
            threading.Thread(target=answer, args=(server, raw, peer), daemon=True).start()

    return Server(listener, run)


def _end(connection: socket.socket) -> None:
    # Of the socket below TLS: another thread may be within TLS at this moment.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _known(worker: Worker, tls, peer: str, timeout_s: float, tell) -> str | None:
    """Whose token comes first, or None after a refusal."""
    try:
        hello, _ = receive_message(
            tls, max_bytes=0, idle_s=timeout_s, timeout_s=timeout_s, max_header=_MAX_HELLO
        )
        return worker.requester_of(hello.get("token"))
    except Closed:
        return None
    except DpjaxError as error:
        tell(f"refused {peer}: {error}")
        send_message(tls, {"error": str(error)}, [], timeout_s=timeout_s)
        return None


def _converse(
    worker: Worker, tls, requester: str, peer: str, max_bytes, timeout_s, idle_s, tell
) -> None:
    """Requests until the other side has enough."""
    key = worker.open_session(requester)
    welcome = {"worker": worker.name, "requester": requester, "max_bytes": max_bytes}
    try:
        send_message(tls, welcome, [], timeout_s=timeout_s)
        while True:
            header, arrays = receive_message(
                tls, max_bytes=max_bytes, idle_s=idle_s, timeout_s=timeout_s
            )
            reply, values = worker.handle(key, header, arrays)
            send_message(tls, reply, values, timeout_s=timeout_s)
    except Closed:
        return
    except DpjaxError as error:
        # After a message that is none, nobody knows where the next one begins.
        tell(f"refused {requester} at {peer}: {error}")
        send_message(tls, {"error": str(error)}, [], timeout_s=timeout_s)
    finally:
        worker.close_session(key)


def connect(
    host: str,
    port: int,
    *,
    token: str,
    cafile: str | os.PathLike,
    timeout_s: float = 60.0,
    max_bytes: int = 2**30,
) -> Session:
    """A session with a worker elsewhere.

    Args:
      token: from the owner's `Worker.enrol`.
      cafile: the worker's certificate, from its owner. Without it the token would go to whoever
        answers.
      timeout_s: for each answer.
      max_bytes: arrays of one answer.

    Raises:
      DpjaxError: nobody there, another certificate, or a token that the worker does not know.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    where = f"{host}:{port}"
    try:
        context.load_verify_locations(cafile)
        raw = socket.create_connection((host, port), timeout=timeout_s)
    except (OSError, OverflowError) as error:
        raise DpjaxError(
            f"cannot reach {where} with {cafile}: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        tls = context.wrap_socket(raw, server_hostname=host)
    except (OSError, ssl.SSLError) as error:
        raw.close()
        why = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error
        raise DpjaxError(
            f"{where} is not the worker of {cafile} ({why}); the token was not sent"
        ) from None

    most = max_bytes

    def send(header: Header, arrays: Sequence[np.ndarray]) -> tuple[Header, list[np.ndarray]]:
        size = sum(x.nbytes for x in arrays)
        if size + 4096 > most:
            raise DpjaxError(f"the arrays have {size} bytes; the worker takes {most} at once")
        try:
            send_message(tls, header, arrays, timeout_s=timeout_s)  # packs before it sends
            try:
                return receive_message(
                    tls, max_bytes=max_bytes, idle_s=timeout_s, timeout_s=timeout_s
                )
            except DpjaxError:
                tls.close()  # nobody knows where the next answer begins
                raise
        except (Closed, OSError):
            tls.close()
            raise DpjaxError(f"the connection to {where} is lost; connect again") from None

    try:
        hello, _ = send({"token": token}, [])
        if "error" in hello:
            raise DpjaxError(f"{where}: {hello['error']}")
        names = str(hello.get("worker")), str(hello.get("requester"))
        most = int(hello.get("max_bytes", 0))
    except DpjaxError:
        tls.close()
        raise
    except (TypeError, ValueError):
        tls.close()
        raise DpjaxError(f"{where} does not answer as a worker") from None
    return Session(send, *names, tls.close)
