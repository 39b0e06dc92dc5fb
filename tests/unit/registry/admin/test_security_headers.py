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


PUBLIC = {"public_url": "https://registry.test"}
TLS = {"tls": {"certificate": "c.pem"}}


@pytest.mark.parametrize(
    ("settings", "url", "has_hsts"),
    [
        (PUBLIC, "https://registry.test", True),
        (PUBLIC | TLS, "https://REGISTRY.test:443", True),
        ({"public_url": "https://Registry.test:443"}, "https://registry.test", True),
        (PUBLIC, "http://127.0.0.1:5000", True),  # a proxy that sends neither the scheme nor the host of the request
        (PUBLIC, "https://registry.test:5443", False),
        (PUBLIC | TLS, "https://nas.test:5443", False),
        (PUBLIC | TLS, "https://nas.test", False),
        ({"public_url": "https://registry.test:5443"} | TLS, "https://registry.test:5443", False),
        ({"public_url": "https://registry.test:5443"}, "http://registry.test", False),
        ({"public_url": "http://registry.test"}, "https://registry.test", False),
        ({}, "http://registry.test", False),
        ({}, "https://registry.test", False),  # a proxy may have removed the port
        (TLS, "https://registry.test", False),
    ],
)
async def test_hsts_only_at_a_public_url_with_the_port_443(
    tmp_path: Path, registry: MemoryRegistry, settings: dict[str, Any], url: str, has_hsts: bool
) -> None:
    """The header Strict-Transport-Security makes browsers use only https for a host name, on all ports. It is sent if
    `public_url` is an https URL with the port 443, and the request is for its host. Otherwise it could break services
    that use http on other ports of the same host."""
    async with browser(make_app(tmp_path, registry, **settings), url) as client:
        host = url.partition("://")[2]  # as it is, because the client would remove the port 443
        assert (HSTS in (await client.get("/", headers={"host": host})).headers) == has_hsts
