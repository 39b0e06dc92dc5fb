"""Tests that a standard uvicorn server can use the HTTP protocol class of this project."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Literal

import pytest
import uvicorn

from registry.server.connection.uvicorn_adapter import uvicorn_protocol_class
from registry.server.server_limits import ServerLimits
from tests.system.server.app_process import read_all, read_response
from tests.system.server.echo_app import EchoApp

Loop = Literal["uvloop", "asyncio"]
LOOPS: list[Loop] = ["uvloop", "asyncio"]


@contextmanager
def serving(loop: Loop, limits: ServerLimits | None = None) -> Iterator[int]:
    """Runs a uvicorn server with the protocol class in a thread. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        http = uvicorn_protocol_class(limits)
        server = uvicorn.Server(uvicorn.Config(EchoApp(""), http=http, loop=loop, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize("loop", LOOPS)
def test_requests(loop: Loop) -> None:
    """Requests with and without bodies on one connection reach the application one after another."""
    with serving(loop) as port:
        client = HTTPConnection("127.0.0.1", port)
        for body in (b"", b"abc" * 100_000, b"x"):
            client.request("POST", "/echo", body)
            response = client.getresponse()
            assert response.status == 200
            assert response.headers["date"]
            assert f'"size": {len(body)}' in response.read().decode()
        client.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_malformed_request(loop: Loop) -> None:
    """A malformed request gets the 400 of the protocol class, and the connection closes."""
    with serving(loop) as port, socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (400, "close")


@pytest.mark.parametrize("loop", LOOPS)
def test_timeouts(loop: Loop) -> None:
    """The server disconnects a client that sends nothing."""
    limits = ServerLimits(head_seconds=0.2, timeout_check_seconds=0.05)
    with serving(loop, limits) as port, socket.create_connection(("127.0.0.1", port)) as sock:
        assert read_all(sock) == b""
