"""TLS clients for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes.certificate_authority import KeyPair
from tests.system.server.app_process import AppProcess, read_response

GET = b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n"


def client_context(authority: Path, pair: KeyPair | None = None) -> ssl.SSLContext:
    """Returns a TLS context of a client that trusts this authority. `pair`: the client certificate, if it has one."""
    context = ssl.create_default_context(cafile=authority)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


@contextlib.contextmanager
def tls_connection(running: AppProcess, context: ssl.SSLContext, buffer: int | None = None) -> Iterator[ssl.SSLSocket]:
    """Opens a connection and performs the handshake. `buffer`: the size of the receive buffer in bytes."""
    with socket.socket() as sock:
        sock.settimeout(15)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(running.address)
        with context.wrap_socket(sock, server_hostname="localhost") as wrapped:
            yield wrapped


def ask(sock: ssl.SSLSocket, request: bytes = GET) -> dict[str, Any]:
    """Sends the request. Returns the JSON of the response."""
    sock.sendall(request)
    status, _, body = read_response(sock)
    assert status == 200
    return dict(json.loads(body))


def serial(sock: ssl.SSLSocket) -> str:
    """Returns the serial number of the server's certificate."""
    certificate = sock.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])
