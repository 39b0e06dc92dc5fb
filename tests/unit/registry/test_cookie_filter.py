"""The filter for the cookies of requests outside `/v2`."""

from __future__ import annotations

from pathlib import Path

import httpx2
from fastapi import Request

from registry.app import create_app
from registry.config import Settings
from storage.memory_registry import MemoryRegistry
from tests.fakes.instruction_count import count_instructions


def client_of(tmp_path: Path, registry: MemoryRegistry) -> httpx2.AsyncClient:
    """Returns a client of an application whose route `/cookies` returns the cookies of the request as JSON."""
    app = create_app(Settings(data=tmp_path), registry)

    @app.get("/cookies")
    async def cookies(request: Request) -> dict[str, str]:
        return request.cookies

    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://registry.test")


async def test_cookies_with_a_backslash_are_ignored(tmp_path: Path, registry: MemoryRegistry) -> None:
    """A route does not see cookies with a backslash, and sees all others."""
    async with client_of(tmp_path, registry) as client:
        answer = await client.get("/cookies", headers={"Cookie": 'a=1; b="\\"2\\""; c="3"; d=\\; e=5'})
    assert answer.json() == {"a": "1", "c": "3", "e": "5"}


async def test_escapes_in_a_long_cookie_cost_nothing(tmp_path: Path, registry: MemoryRegistry) -> None:
    """A cookie with thousands of escapes costs as much as one with a single escape. Python's parser would need two
    seconds for the long one, and would block the event loop."""
    totals = []
    async with client_of(tmp_path, registry) as client:
        for escapes in (1, 1, 1_500):  # the first request does work that later ones do not repeat
            with count_instructions() as count:
                answer = await client.get("/cookies", headers={"Cookie": 'a="%s"' % (r"\1" * escapes)})
            assert answer.json() == {}
            totals.append(count.total)
    assert totals[2] < totals[1] + 1_000
