"""The security headers for browsers and caches in responses outside `/v2`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Response

from registry.app import Entrepot, create_app
from registry.config import Settings
from storage.memory_registry import MemoryRegistry

WANTED = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
HSTS = "strict-transport-security"


def made(tmp_path: Path, registry: MemoryRegistry, **settings: Any) -> Entrepot:
    return create_app(Settings(data=tmp_path, **settings), registry)


def browser(app: Entrepot, url: str = "http://registry.test") -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app, raise_app_exceptions=False), base_url=url)


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/api/openapi.json", "/nothing", "/broken"])
async def test_every_answer_has_them(tmp_path: Path, registry: MemoryRegistry, path: str) -> None:
    """Every response has each header once: pages, data, 404s and errors."""
    app = made(tmp_path, registry)

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError

    async with browser(app) as client:
        answer = await client.get(path)
    assert {name: answer.headers.get_list(name) for name in WANTED} == {name: [WANTED[name]] for name in WANTED}
    assert HSTS not in answer.headers


async def test_a_route_has_its_own(tmp_path: Path, registry: MemoryRegistry) -> None:
    """If a route sets one of the headers, only the route's value is sent."""
    app = made(tmp_path, registry)

    @app.get("/page")
    async def page() -> Response:
        return Response("", headers={"Content-Security-Policy": "default-src 'self'", "Cache-Control": "max-age=60"})

    async with browser(app) as client:
        headers = (await client.get("/page")).headers
    assert headers.get_list("content-security-policy") == ["default-src 'self'"]
    assert headers.get_list("cache-control") == ["max-age=60"]
    assert headers.get_list("x-frame-options") == ["DENY"]


async def test_v2_is_left_alone(tmp_path: Path, registry: MemoryRegistry) -> None:
    """The responses of the distribution API do not get these headers."""
    async with browser(made(tmp_path, registry, public_url="https://registry.test")) as client:
        headers = (await client.get("/v2/")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" not in headers
    assert HSTS not in headers


@pytest.mark.parametrize(
    ("settings", "url", "told"),
    [
        ({}, "http://registry.test", False),
        ({}, "https://registry.test", True),  # TLS, or a trusted proxy's word
        ({"public_url": "https://registry.test"}, "http://registry.test", True),
        ({"public_url": "http://registry.test"}, "http://registry.test", False),
        ({"tls": {"certificate": "c.pem"}}, "http://registry.test", True),
    ],
)
async def test_https_only_where_there_is_https(
    tmp_path: Path, registry: MemoryRegistry, settings: dict[str, Any], url: str, told: bool
) -> None:
    """Browsers are told to use only https if all clients use https."""
    async with browser(made(tmp_path, registry, **settings), url) as client:
        assert (HSTS in (await client.get("/")).headers) == told
