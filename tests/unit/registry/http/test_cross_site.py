"""Requests that a web page of another site makes a browser send. The registry refuses such a request if it would change
content. It also refuses a read under a foreign host name that would expose a registry without accounts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from registry.http import DistributionAPI
from registry.http.cross_site import CrossSiteCheck
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from tests.fakes.asgi_client import AsgiClient
from tests.fakes.registry_content import push_image

UPLOADS = "/v2/team/app/blobs/uploads/"
HOST = {"host": "localhost:5000"}


def client_of(
    registry: MemoryRegistry,
    *,
    address: str = "127.0.0.1",
    public_url: str | None = None,
    is_open: Callable[[], bool] = lambda: True,
) -> AsgiClient:
    """Returns a client of the registry. `is_open()`: whether the registry has no accounts."""
    cross_site_check = CrossSiteCheck(public_url, {"mirror.example.com"}, is_open)
    client = AsgiClient(DistributionAPI(registry, public_url=public_url, cross_site=cross_site_check))
    client.address = address
    return client


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "http://evil.example:5000"},
    {"origin": "http://localhost:8000"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://[bad"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "origin": "http://localhost:5000"},
    {"sec-fetch-site": "same-origin", "origin": "null"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("is_open", [True, False])
async def test_a_page_of_another_site_changes_nothing(
    registry: MemoryRegistry, headers: dict[str, str], is_open: bool
) -> None:
    """A page of another site cannot upload a blob, start an upload session, push a manifest or delete anything. The
    browser's preflight request is refused too. No header allows the page to read the responses."""
    client = client_of(registry, is_open=lambda: is_open)
    for method, path in (
        ("POST", UPLOADS),
        ("POST", UPLOADS + "?digest=sha256:" + "0" * 64),
        ("PATCH", UPLOADS + "0" * 8),
        ("PUT", "/v2/team/app/manifests/latest"),
        ("DELETE", "/v2/team/app/manifests/latest"),
        ("OPTIONS", UPLOADS),
    ):
        answer = await client(method, path, {**HOST, **headers}, b"data")
        assert (answer.status, answer.code) == (403, "DENIED"), (method, path)
        assert "set public_url" in answer.body.decode()
        assert not [name for name, _ in answer.fields if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://localhost:5000"},
        {"origin": "http://LOCALHOST:5000", "accept-language": "en"},
        {"sec-fetch-site": "same-origin", "origin": "http://localhost:5000"},
        {"sec-fetch-site": "none"},
        {"origin": "https://registry.example.com"},
        {"host": "registry.example.com:443", "origin": "https://registry.example.com"},
        {"host": "[::1]:5000", "origin": "http://[::1]:5000"},
    ],
    ids=str,
)
async def test_registry_clients_and_own_pages_may_push(registry: MemoryRegistry, headers: dict[str, str]) -> None:
    """Registry clients may push, because they send no browser headers. A page at the registry's own address may push
    too."""
    client = client_of(registry, public_url="https://registry.example.com")
    assert (await client("POST", UPLOADS, {**HOST, **headers})).status == 202


async def test_pages_of_other_sites_cannot_see_the_response(registry: MemoryRegistry) -> None:
    """A GET from a page of another site is answered, but no header allows the browser to show the response to the
    page."""
    answer = await client_of(registry)("GET", "/v2/_catalog", {**HOST, "origin": "https://evil.example"})
    assert answer.status == 200
    assert not [name for name, _ in answer.fields if name.startswith("access-control-")]


@pytest.mark.parametrize("browser_headers", [{"accept-language": "en"}, {"sec-fetch-site": "same-origin"}], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_a_browser_cannot_read_under_a_foreign_host_name(
    registry: MemoryRegistry, browser_headers: dict[str, str], method: str
) -> None:
    """If the registry has no accounts, it refuses a browser on the same machine that uses an unknown host name for the
    registry. This prevents DNS rebinding. The error says what to do."""
    await push_image(registry, RepositoryName("team/app"), "one", "latest")
    client = client_of(registry)
    path = UPLOADS if method == "POST" else "/v2/team/app/manifests/latest"
    origin = {"origin": "http://evil.example:5000"} if method == "POST" else {}
    answer = await client(method, path, {"host": "evil.example:5000", **browser_headers, **origin})
    assert answer.status == 403
    if method != "HEAD":
        assert "set public_url" in answer.body.decode()


@pytest.mark.parametrize(
    "host", ["localhost:5000", "127.0.0.1:5000", "[::1]:5000", "192.0.2.1", "a.localhost", "mirror.example.com:80"]
)
async def test_reads_under_known_names_are_allowed(registry: MemoryRegistry, host: str) -> None:
    """A browser may read if the host in the request is a local name, an IP address or a name in the settings. A
    registry client may read under any host name."""
    client = client_of(registry)
    assert (await client("GET", "/v2/_catalog", {"host": host, "accept-language": "en"})).status == 200
    assert (await client("GET", "/v2/_catalog", {"host": "in-etc-hosts:5000"})).status == 200
    public = client_of(registry, public_url="https://evil.example/")
    assert (await public("GET", "/v2/_catalog", {"host": "evil.example", "accept-language": "en"})).status == 200


async def test_any_name_is_allowed_from_other_machines_and_with_accounts(registry: MemoryRegistry) -> None:
    """A request from another machine may use any host name, and so may every request if the registry has accounts. In
    both cases, DNS rebinding gives no access to private content."""
    headers = {"host": "evil.example", "accept-language": "en"}
    assert (await client_of(registry, address="192.0.2.7")("GET", "/v2/_catalog", headers)).status == 200
    assert (await client_of(registry, is_open=lambda: False)("GET", "/v2/_catalog", headers)).status == 200
