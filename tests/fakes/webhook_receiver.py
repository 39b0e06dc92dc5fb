"""A webhook receiver on loopback. It records all requests, and a test chooses its responses."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.fakes.certificate_authority import KeyPair

DEADLINE = 150.0  # seconds


@dataclass(frozen=True)
class Posted:
    """A request to the receiver, and the status of the response."""

    headers: dict[str, str]
    body: bytes
    status: int

    @cached_property
    def document(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed


@dataclass
class WebhookReceiver:
    """A running receiver. `status`: a function that gets the parsed body of a request and returns the status of the
    response. `location`: the Location header of each response; empty: none. While the event `open` is clear, requests
    get no response. `requests`: all requests so far. `changed`: notified after each request."""

    status: Callable[[dict[str, Any]], int] = lambda _: 204
    location: str = ""
    url: str = ""
    open: threading.Event = field(default_factory=threading.Event)
    requests: list[Posted] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def accepted(self) -> list[dict[str, Any]]:
        """Returns the bodies of the requests that got a 2xx response, in the order of their arrival."""
        with self.changed:
            return [posted.document for posted in self.requests if posted.status < 300]

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Waits until `done` returns True. Calls `done` after each request. `what`: the awaited fact, for the error
        message."""
        deadline = time.monotonic() + DEADLINE
        with self.changed:
            while not done():
                remaining = deadline - time.monotonic()
                assert remaining > 0, f"there was no {what}: {self.requests[-3:]}"
                self.changed.wait(min(remaining, 1.0))


def first_events(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the CloudEvents without those that repeat the id of an earlier one."""
    return list({body["id"]: body for body in reversed(bodies)}.values())[::-1]


@contextlib.contextmanager
def receiver_running(port: int = 0, pair: KeyPair | None = None) -> Iterator[WebhookReceiver]:
    """Runs a receiver until the block ends. `pair`: the certificate and key for TLS; None: plain HTTP."""
    receiver = WebhookReceiver()
    receiver.open.set()
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.open.wait(DEADLINE)
            status = receiver.status(json.loads(body))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with receiver.changed:
                receiver.requests.append(Posted(headers, body, status))
                receiver.changed.notify_all()
            with contextlib.suppress(OSError):
                self.send_response(status)
                if receiver.location:
                    self.send_header("location", receiver.location)
                self.send_header("content-length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def process_request(self, request: Any, client_address: Any) -> None:
            connections.append(request)
            super().process_request(request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    if pair is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pair.certificate, pair.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    scheme = "http" if pair is None else "https"
    receiver.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.open.set()
        server.shutdown()
        server.server_close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
