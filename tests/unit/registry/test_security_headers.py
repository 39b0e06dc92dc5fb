"""The security headers in responses outside `/v2`, which restrict what browsers and caches may do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Response

from registry.app import Entrepot, create_app
from registry.config import Settings
from storage.memory_registry import MemoryRegistry

REQUIRED_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
HSTS = "strict-transport-security"


def make_app(tmp_path: Path, registry: MemoryRegistry, **settings: Any) -> Entrepot:
    return create_app(Settings(data=tmp_path, **settings), registry)


def browser(app: Entrepot, url: str = "http://registry.test") -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app, raise_app_exceptions=False), base_url=url)


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/api/openapi.json", "/nothing", "/broken"])
async def test_every_response_has_the_security_headers(tmp_path: Path, registry: MemoryRegistry, path: str) -> None:
    """Every response outside `/v2` has each security header once. This includes pages, data and errors."""
    app = make_app(tmp_path, registry)

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError

    async with browser(app) as client:
        answer = await client.get(path)
    assert {name: answer.headers.get_list(name) for name in REQUIRED_HEADERS} == {
        name: [REQUIRED_HEADERS[name]] for name in REQUIRED_HEADERS
    }
    assert HSTS not in answer.headers


async def test_a_route_can_set_its_own_values(tmp_path: Path, registry: MemoryRegistry) -> None:
    """If a route sets one of the headers, only the route's value is sent."""
    app = make_app(tmp_path, registry)

    @app.get("/page")
    async def page() -> Response:
        return Response("", headers={"Content-Security-Policy": "default-src 'self'", "Cache-Control": "max-age=60"})

    async with browser(app) as client:
        headers = (await client.get("/page")).headers
    assert headers.get_list("content-security-policy") == ["default-src 'self'"]
    assert headers.get_list("cache-control") == ["max-age=60"]
    assert headers.get_list("x-frame-options") == ["DENY"]


async def test_v2_does_not_get_the_security_headers(tmp_path: Path, registry: MemoryRegistry) -> None:
    """The responses of the distribution API do not get these headers."""
    async with browser(make_app(tmp_path, registry, public_url="https://registry.test")) as client:
        headers = (await client.get("/v2/")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" not in headers
    assert HSTS not in headers


@pytest.mark.parametrize(
    ("settings", "url", "has_hsts"),
    [
        ({}, "http://registry.test", False),
        ({}, "https://registry.test", True),  # the scheme is known from TLS or from a trusted proxy
        ({"public_url": "https://registry.test"}, "http://registry.test", True),
        ({"public_url": "http://registry.test"}, "http://registry.test", False),
        ({"tls": {"certificate": "c.pem"}}, "http://registry.test", True),
    ],
)
async def test_hsts_if_all_clients_use_https(
    tmp_path: Path, registry: MemoryRegistry, settings: dict[str, Any], url: str, has_hsts: bool
) -> None:
    """The header Strict-Transport-Security, with which browsers use only https, is sent if the request or the settings
    show that clients use https."""
    async with browser(make_app(tmp_path, registry, **settings), url) as client:
        assert (HSTS in (await client.get("/")).headers) == has_hsts
