"""A plain uvicorn server runs our protocol class."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
import uvicorn

from registry.server.connection.uvicorn_adapter import uvicorn_protocol_class
from registry.server.server_limits import ServerLimits
from tests.system.server.app_process import read_all, read_response
from tests.system.server.echo_app import EchoApp

LIMITS = ServerLimits(header_seconds=0.2, linger_seconds=0.2, pulse_seconds=0.05)


@pytest.fixture(params=["uvloop", "asyncio"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server in a thread of its own; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            EchoApp(""), http=uvicorn_protocol_class(LIMITS), loop=request.param, log_config=None, lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_requests(port: int) -> None:
    """Requests with and without bodies, one after the other on one connection, reach the application."""
    client = HTTPConnection("127.0.0.1", port)
    for body in (b"", b"abc" * 100_000, b"x"):
        client.request("POST", "/echo", body)
        response = client.getresponse()
        assert response.status == 200
        assert response.headers["date"]
        assert f'"size": {len(body)}' in response.read().decode()
    client.close()


def test_a_malformed_request(port: int) -> None:
    """It gets our error, and the connection ends."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (400, "close")


def test_timeouts(port: int) -> None:
    """A client that sends nothing is cut off without our worker, too."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        assert read_all(sock) == b""
