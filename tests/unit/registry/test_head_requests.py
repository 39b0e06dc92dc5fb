"""HEAD requests outside `/v2`: monitors and load balancers send them to the health checks and pages."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from storage.names import RepositoryName
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.page_store import add_image
from tests.unit.registry.conftest import wait_until

APP = RepositoryName("team/app")
CHANGING = {"date", "x-request-id", "content-length"}
"""Headers that may differ between two responses to the same request: a time in the body can change its length."""
PATHS = {
    "/livez": 200,
    "/readyz": 200,
    "/health/live": 200,
    "/health/ready": 200,
    "/": 200,
    "/ui": 303,
    "/ui/": 303,
    "/ui/login": 200,
    "/ui/repositories": 200,
    "/ui/system": 303,
    "/ui/nothing": 404,
    "/metrics": 401,
    "/api/docs": 200,
    "/api/docs/swagger-ui.css": 200,
    "/api/openapi.json": 200,
    "/api/v1/me": 401,
    "/api/v1/grants": 401,
    "/nothing": 404,
}
"""Paths outside `/v2`, with the status that a client without a login gets."""
OF_ADMINS = {
    "/metrics": 200,
    "/api/v1/me": 200,
    "/api/v1/grants": 200,
    "/api/v1/users?limit=1": 200,
    "/api/v1/users?limit=x": 422,
    f"/api/v1/repositories/{APP}/tag-list": 200,
    f"/api/v1/repositories/{APP}/manifests/v1/raw": 200,
    "/api/v1/repositories/team/none/tag-list": 404,
    "/token?service=entrepot": 200,
}
"""Paths outside `/v2`, with the status that an admin gets."""


Answer = tuple[int, list[tuple[str, str]], bytes]
"""The status, the headers except those in CHANGING, and the body of a response."""


class HttpClient:
    """Sends requests over one connection of the server. A HEAD that got a body would disturb the next response."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    async def send(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        return await asyncio.to_thread(self._send, method, path, headers)

    def _send(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        self._connection.request(method, path, headers=dict(headers))
        answer = self._connection.getresponse()
        body = answer.read()
        fields = [(name.lower(), value) for name, value in answer.getheaders()]
        return answer.status, sorted(field for field in fields if field[0] not in CHANGING), body

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class HeadSite:
    """A running registry with the admin `root`, and a client that is connected to it. `login`: the headers of root's
    requests."""

    app: AppInProcess
    client: HttpClient
    login: Mapping[str, str]

    async def check(self, paths: Mapping[str, int], headers: Mapping[str, str]) -> None:
        """Sends GET and HEAD to each path. Fails unless both get this status and the same headers, and HEAD no body."""
        for path, status in paths.items():
            get, head = await self.client.send("GET", path, headers), await self.client.send("HEAD", path, headers)
            assert (get[0], head[0], head[2]) == (status, status, b""), path
            assert get[1] == head[1], path


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[HeadSite]:
    loop = asyncio.get_running_loop()
    async with running_app(tmp_path / "data", metrics={"allow": []}, events={"keep": 3600.0}) as app:
        login = {"authorization": await app.user("root", admin=True)}
        store: Any = app.app.service.access.management.upkeep.store  # type: ignore[union-attr]
        await add_image(store, APP, "v1", [b"layer" * 100_000])
        worker = WorkerContext(app.app, loop, ServerLimits(), UnsentBudget(1 << 20, 0.1, loop.time))
        listening = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
        async with listening, asyncio.timeout(60):
            client = HttpClient(listening.sockets[0].getsockname()[1])
            try:
                yield HeadSite(app, client, login)
            finally:
                client.close()


async def test_head_is_get_without_a_body(site: HeadSite) -> None:
    """Outside `/v2`, a HEAD gets the status and the headers of a GET, but no body: for the health checks, the pages,
    the metrics and the API, also if the request is refused."""
    await site.check(PATHS, {})
    await site.check(OF_ADMINS, site.login)


async def test_a_head_of_a_stream_ends(site: HeadSite, caplog: pytest.LogCaptureFixture) -> None:
    """A HEAD of a response that is sent in parts, such as the stream of events or the archive of an image, gets only
    the headers. The registry does not produce the rest: the stream is closed, without a warning in the log."""
    archive = f"/api/v1/repositories/{APP}/manifests/v1/archive"
    status, headers, body = await site.client.send("HEAD", archive, site.login)
    assert (status, body) == (200, b"")
    assert ("content-type", "application/x-tar") in headers
    stream = {**site.login, "accept": "text/event-stream"}
    status, headers, body = await site.client.send("HEAD", "/api/v1/events", stream)
    assert (status, body) == (200, b"")
    await wait_until(lambda: not site.app.app.running_requests and not site.app.app.event_streams)
    assert (await site.client.send("GET", "/livez", {}))[0] == 200
    assert caplog.records == []


async def test_head_is_refused_where_there_is_no_get(site: HeadSite) -> None:
    """A path without a GET refuses HEAD with 405. Where there is a GET, the header Allow of a 405 has HEAD as well."""
    status, headers, body = await site.client.send("HEAD", "/api/v1/gc", site.login)
    assert (status, dict(headers)["allow"], body) == (405, "POST", b"")
    status, headers, _ = await site.client.send("DELETE", "/livez", {})
    assert (status, dict(headers)["allow"]) == (405, "GET, HEAD")
