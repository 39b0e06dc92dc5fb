"""Searches that are passed on to an upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from registry.admin.content_searches import ContentSearches
from registry.auth.rights.principal import UNPRIVILEGED, open_principal
from registry.backend import open_backend
from registry.config import Settings, Upstream
from registry.upstream import hub_search
from registry.upstream.hub_search import CACHED_SECONDS, PAUSE_SECONDS, UpstreamSearch, open_upstream_search
from storage.composition import prepare_data_dir
from tests.fakes.upkeep_store import Clock


class SearchServer:
    """An upstream's search. `answer`: the body that it sends; None: it never answers."""

    def __init__(self) -> None:
        self.answer: bytes | None = json.dumps({"results": [{"name": "nginx", "star_count": 5}]}).encode()
        self.status = 200
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head.split(" ")[1])
        if self.answer is None:
            await reader.read()  # until the client gives up
        else:
            length = f"content-length: {len(self.answer)}\r\nconnection: close\r\n\r\n"
            writer.write(f"HTTP/1.1 {self.status} x\r\n{length}".encode() + self.answer)
        writer.close()


@asynccontextmanager
async def searched(clock: Clock) -> AsyncIterator[tuple[SearchServer, UpstreamSearch]]:
    fake = SearchServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    search = open_upstream_search(Upstream(name="docker.io", endpoints=[url], search=f"{url}/v1/search"), clock)
    try:
        yield fake, search
    finally:
        await search.aclose()
        server.close()
        await server.wait_closed()


async def test_answers_are_cached() -> None:
    """One request for many searches, also at the same time, until the answer is old."""
    clock = Clock()
    async with searched(clock) as (fake, search):
        found = await asyncio.gather(*(search.find("nginx & co", 25, 1) for _ in range(5)))
        assert [[each.name for each in results] for results in found] == [["nginx"]] * 5
        assert fake.requests == ["/v1/search?q=nginx+%26+co&n=25&page=1"]
        clock.now += CACHED_SECONDS
        await search.find("nginx & co", 25, 1)
        assert len(fake.requests) == 2


async def test_bad_answers() -> None:
    """They are nothing found, and then the upstream is left alone for a while."""
    clock = Clock()
    async with searched(clock) as (fake, search):
        fake.answer = json.dumps(
            {"results": [{"name": 7}, "x", {"name": "a", "description": 1, "star_count": -1}]}
        ).encode()
        [only] = await search.find("odd", 25, 1)
        assert (only.name, only.description, only.stars, only.is_official) == ("a", "", 0, False)
        for number, (status, answer) in enumerate(((500, b""), (200, b"no JSON"), (200, b"[]"), (200, b"x" * 2**21))):
            fake.status, fake.answer = status, answer
            asked = len(fake.requests)
            assert list(await search.find(f"x{number}", 25, 1)) == []
            assert list(await search.find(f"y{number}", 25, 1)) == []
            assert len(fake.requests) == asked + 1
            clock.now += PAUSE_SECONDS


async def test_an_upstream_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search waits for a moment, the next ones not at all."""
    async with searched(Clock()) as (fake, search):
        assert await search.find("warm up", 25, 1)  # the first request makes the HTTP client
        monkeypatch.setattr(hub_search, "TIMEOUT_SECONDS", 0.2)
        fake.answer = None
        assert list(await search.find("x", 25, 1)) == []
        assert list(await search.find("y", 25, 1)) == []
        assert fake.requests[1:] == ["/v1/search?q=x&n=25&page=1"]


async def test_results_have_the_names_of_here(tmp_path: Path) -> None:
    """Those under which they can be pulled here; what the principal may not pull is left out, and so is what is no
    name."""
    fake = SearchServer()
    results = [{"name": name} for name in ("nginx", "bitnami/nginx", "No Name", "x" * 300)]
    fake.answer = json.dumps({"results": results}).encode()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    hub = Upstream(name="docker.io", endpoints=[url], search=f"{url}/v1/search", default=True)
    prepare_data_dir(tmp_path)
    async with open_backend(Settings(data=tmp_path, upstream=[hub])) as backend:
        searches = ContentSearches(backend.store, backend.router, backend.upstream_search)
        for principal, names in (
            (open_principal(), ["docker.io/library/nginx", "docker.io/bitnami/nginx"]),
            (open_principal(["docker.io"]), []),
            (UNPRIVILEGED, []),
        ):
            found = await searches.at_upstream(principal, "nginx", 25, 1)
            assert [name for name, _ in found] == names
    server.close()
    await server.wait_closed()
