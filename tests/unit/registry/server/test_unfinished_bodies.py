"""Clients that disconnect in the middle of a body: of a form of the pages, a login, a request for a token, and requests
to `/v2` and the API. The requests go through the server's own HTTP connections."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from registry.app import Entrepot
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from registry.ui.pages import PageLimits
from tests.fakes.app_in_process import running_app
from tests.unit.registry.conftest import wait_until

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which `close` resets the connection."""
FORM = "application/x-www-form-urlencoded"
REQUESTS = [
    ("POST", "/ui/login", FORM),
    ("POST", "/ui/language", FORM),
    ("POST", "/ui/logout", FORM),
    ("POST", "/login", FORM),
    ("POST", "/token", FORM),
    ("PUT", "/v2/team/app/manifests/v1", "application/vnd.oci.image.manifest.v1+json"),
    ("PUT", "/api/v1/grants", "application/json"),
]


class PartialClient:
    """A client that sends requests to the application over the server's connections, and disconnects in the middle of
    their bodies."""

    def __init__(self, app: Entrepot, port: int) -> None:
        self._app = app
        self._port = port

    async def send_part(self, method: str, path: str, content_type: str, *, is_reset: bool) -> None:
        """Sends the head of a request and a part of its body. When the application has got the request,
        resets or closes the connection. Returns when the application has ended the request."""
        with socket.socket() as sock:
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.connect(("127.0.0.1", self._port))
            host = f"127.0.0.1:{self._port}"
            head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
            sock.sendall(f"{head}Content-Type: {content_type}\r\nContent-Length: 100\r\n\r\nuser=".encode())
            await wait_until(lambda: self._app.running_requests)
        await wait_until(lambda: not self._app.running_requests)


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "closed"])
async def test_unfinished_bodies_are_no_errors(
    tmp_path: Path, is_reset: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that disconnects in the middle of a body causes no warning in the log, and no page is rendered for
    it."""
    rendered_visitors: list[str] = []
    rendering_slot = PageLimits.rendering_slot

    def recorded_rendering_slot(limits: PageLimits, visitor: str) -> AbstractAsyncContextManager[None]:
        rendered_visitors.append(visitor)
        return rendering_slot(limits, visitor)

    monkeypatch.setattr(PageLimits, "rendering_slot", recorded_rendering_slot)
    loop = asyncio.get_running_loop()
    async with running_app(tmp_path / "data") as site:
        worker = WorkerContext(site.app, loop, ServerLimits(), UnsentBudget(1 << 20, 0.1, loop.time))
        listening = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
        async with listening, asyncio.timeout(60):
            client = PartialClient(site.app, listening.sockets[0].getsockname()[1])
            for method, path, content_type in REQUESTS:
                await client.send_part(method, path, content_type, is_reset=is_reset)
    assert [
        f"{record.levelname} {record.getMessage()}" for record in caplog.records if record.levelno >= logging.WARNING
    ] == []
    assert rendered_visitors == []
