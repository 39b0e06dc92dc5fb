"""Redirects, next pages and token services never lead to addresses that only this server can reach."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.config import Upstream
from registry.mirror.upstream_client import UpstreamClient
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, classify_address, literal_address
from storage.content import Span
from storage.errors import RegistryError, UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import (
    REPO,
    TAG,
    CollectingSink,
    ScriptedServer,
    answer,
    scripted_server,
    upstream_source,
)
from tests.system.upstream.test_tls_and_proxies import http_proxy

NONE = Digest("sha256:" + "0" * 64)
OUTSIDE = "127.0.0.2"
"""An address that these tests treat as public."""


def outside(address: str) -> NetworkClass:
    """Classifies real addresses, but treats OUTSIDE as public: no test leaves this machine."""
    return NetworkClass.PUBLIC if address == OUTSIDE else classify_address(address)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("1.1.1.1", NetworkClass.PUBLIC),
        ("2606:4700:4700::1111", NetworkClass.PUBLIC),
        ("127.0.0.1", NetworkClass.LOOPBACK),
        ("127.9.9.9", NetworkClass.LOOPBACK),
        ("::1", NetworkClass.LOOPBACK),
        ("::ffff:127.0.0.1", NetworkClass.LOOPBACK),
        ("::127.0.0.1", NetworkClass.LOOPBACK),
        ("64:ff9b::7f00:1", NetworkClass.LOOPBACK),
        ("2002:7f00:1::", NetworkClass.LOOPBACK),
        ("10.1.2.3", NetworkClass.PRIVATE),
        ("172.31.0.1", NetworkClass.PRIVATE),
        ("192.168.0.1", NetworkClass.PRIVATE),
        ("100.64.0.1", NetworkClass.PRIVATE),
        ("198.18.0.1", NetworkClass.PRIVATE),
        ("fd00::1", NetworkClass.PRIVATE),
        ("fec0::1", NetworkClass.PRIVATE),
        ("::ffff:10.0.0.1", NetworkClass.PRIVATE),
        ("64:ff9b::a00:1", NetworkClass.PRIVATE),
        ("2002:c0a8:1::", NetworkClass.PRIVATE),
        ("169.254.169.254", NetworkClass.LINK_LOCAL),
        ("fe80::1%eth0", NetworkClass.LINK_LOCAL),
        ("::ffff:169.254.169.254", NetworkClass.LINK_LOCAL),
        ("0.0.0.0", NetworkClass.SPECIAL),
        ("0.1.2.3", NetworkClass.SPECIAL),
        ("::", NetworkClass.SPECIAL),
        ("::ffff:0.0.0.0", NetworkClass.SPECIAL),
        ("224.0.0.1", NetworkClass.SPECIAL),
        ("ff02::1", NetworkClass.SPECIAL),
        ("255.255.255.255", NetworkClass.SPECIAL),
        ("240.0.0.1", NetworkClass.SPECIAL),
        ("192.0.2.1", NetworkClass.SPECIAL),
        ("2001:db8::1", NetworkClass.SPECIAL),
        ("64:ff9b:1::a00:1", NetworkClass.SPECIAL),
        ("2002:808:808::", NetworkClass.PUBLIC),
        ("64:ff9b::808:808", NetworkClass.PUBLIC),
    ],
)
def test_networks(address: str, network: NetworkClass) -> None:
    """An address is classified by its network. An IPv6 address with an embedded IPv4 address has the class of that
    address."""
    assert classify_address(address) is network


def test_where_a_redirect_may_lead() -> None:
    """A redirect may lead to public addresses, and to the first host's network until a redirect leaves it."""
    first = Reach(None, frozenset({("storage.corp", 9000)}))
    inside = first.after(NetworkClass.PRIVATE)
    assert [network for network in NetworkClass if inside.is_allowed(network)] == [
        NetworkClass.PUBLIC,
        NetworkClass.PRIVATE,
    ]
    assert inside.after(NetworkClass.PRIVATE) == inside
    left = inside.after(NetworkClass.PUBLIC)
    assert [network for network in NetworkClass if left.is_allowed(network)] == [NetworkClass.PUBLIC]
    assert left.after(NetworkClass.PRIVATE) == left
    assert left.is_unrestricted("Storage.corp.", 9000)
    assert not left.is_unrestricted("storage.corp", 9001)
    assert not any(
        first.after(NetworkClass.SPECIAL).is_allowed(network)
        for network in NetworkClass
        if network is NetworkClass.SPECIAL
    )


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("x.localhost.", "127.0.0.1"),
        ("[::1]", "::1"),
        ("169.254.169.254", "169.254.169.254"),
        ("registry.test", None),
    ],
)
def test_addresses_in_urls(host: str, found: str | None) -> None:
    """Addresses are recognised in every spelling that resolvers accept."""
    assert literal_address(host) == found


def test_settings() -> None:
    """`redirects` lists hosts with ports; without a port, the ports of http and https are meant."""
    settings = Upstream.model_validate(
        {"name": "x.test", "redirects": ["Storage.corp:9000", "cdn.corp", "[fd00::1]:1"]}
    )
    assert settings.redirect_host_ports == {
        ("storage.corp", 9000),
        ("cdn.corp", 80),
        ("cdn.corp", 443),
        ("fd00::1", 1),
    }
    for wrong in ("https://storage.corp", "storage.corp/x", "user@storage.corp", "", "x:0", "x:y", ".", ".:9"):
        with pytest.raises(ValueError, match="not a host like"):
            Upstream.model_validate({"name": "x.test", "redirects": [wrong]})


Request = Callable[[UpstreamClient], Awaitable[Any]]
REQUESTS: dict[str, Request] = {
    "GET of a manifest": lambda source: source.get_manifest(REPO, TAG),
    "HEAD of a manifest": lambda source: source.resolve_manifest(REPO, TAG),
    "tags": lambda source: source.tags(REPO, None, 5),
    "referrers": lambda source: source.referrers(REPO, NONE, None, None, 5),
    "size of a blob": lambda source: source.resolve_blob(REPO, NONE),
    "blob": lambda source: source.fetch_blob(REPO, NONE, Span(0), CollectingSink()),
}


@pytest.fixture
async def inside() -> Any:
    """A service on loopback that nothing outside may reach."""
    async with scripted_server(lambda head: answer(200, json.dumps({"name": "secret", "tags": ["secret"]}))) as server:
        yield server


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_a_redirect_inside(registry: StoredRegistry, inside: ScriptedServer, request_: str, name: str) -> None:
    """A redirect to an internal address, in any spelling and for any kind of request, makes no connection."""
    location = inside.url.replace("127.0.0.1", name)

    async with (
        scripted_server(lambda head: answer(307, location=f"{location}/x"), OUTSIDE) as server,
        upstream_source(registry, server.url, classify=outside) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)
        assert server.count > 0
    assert inside.connections == 0


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_a_second_redirect_inside(registry: StoredRegistry, inside: ScriptedServer, request_: str) -> None:
    """A redirect over another public host to an internal address makes no connection there either."""
    async with (
        scripted_server(lambda head: answer(302, location=f"{inside.url}/x"), OUTSIDE) as other,
        scripted_server(lambda head: answer(307, location=f"{other.url}/x"), OUTSIDE) as server,
        upstream_source(registry, server.url, classify=outside) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)
        assert other.count == 1
    assert inside.connections == 0


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
@pytest.mark.parametrize(
    "location",
    [
        "http://10.255.255.1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00::1]/x",
        "http://[fe80::1]/x",
        "http://0.0.0.0:1/x",
        "http://224.0.0.1/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://[64:ff9b::a9fe:a9fe]/x",
    ],
)
async def test_an_endpoint_on_this_machine(registry: StoredRegistry, request_: str, location: str) -> None:
    """An endpoint on this machine may redirect to this machine, not to other networks. The connections are real."""
    async with (
        scripted_server(lambda head: answer(307, location=location)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)


async def test_the_same_network(registry: StoredRegistry, inside: ScriptedServer) -> None:
    """An endpoint on loopback may redirect to another port there."""
    async with (
        scripted_server(lambda head: answer(307, location=f"{inside.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        assert (await source.tags(REPO, None, 5)).items == ["secret"]


async def test_a_target_that_is_listed(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, inside: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings may list targets of redirects, as the log suggests. Another port of the target stays closed."""
    upstream.set(redirects=True, cdn=upstream.cdn_url)
    host = f"http://{OUTSIDE}"
    async with (
        scripted_server(lambda head: answer(307, location=f"{upstream.url}{head.split()[1]}"), OUTSIDE) as server,
        upstream_source(registry, server.url, classify=outside) as closed,
        upstream_source(registry, server.url, classify=outside, redirects=[upstream.address]) as half,
        upstream_source(
            registry,
            server.url,
            classify=outside,
            redirects=[upstream.address, upstream.cdn_url.removeprefix("http://")],
        ) as source,
    ):
        assert server.url.startswith(host)
        for _ in range(2):
            with pytest.raises(UpstreamUnavailable, match="not public"):
                await closed.get_manifest(REPO, TAG)
        assert caplog.text.count(f"add '{upstream.address}' to the upstream's redirects") == 1
        assert (await half.get_manifest(REPO, TAG)).digest == held.digest
        digest = Digest(held.layers[0].digest)
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await half.fetch_blob(REPO, digest, Span(0), CollectingSink())
        sink = CollectingSink()
        await source.fetch_blob(REPO, digest, Span(0), sink)
        assert bytes(sink.body) == held.layers[0].read()


async def test_a_connection_that_is_open_already(registry: StoredRegistry, inside: ScriptedServer) -> None:
    """With two endpoints of one upstream, the one outside cannot redirect to the one inside over an existing
    connection."""

    def reply(head: str) -> bytes:
        return answer(503) if away else answer(307, location=f"{inside.url}/secret")

    away = True
    async with (
        scripted_server(reply, OUTSIDE) as server,
        upstream_source(registry, server.url, inside.url, classify=outside) as source,
    ):
        assert (await source.tags(REPO, None, 5)).items == ["secret"]
        with pytest.raises(RegistryError):
            await source.fetch_blob(REPO, NONE, Span(0, 5), CollectingSink())
        away = False
        count = inside.count
        inside.reply = lambda head: answer(503)
        for request in ("tags", "blob"):
            with pytest.raises(RegistryError):
                await REQUESTS[request](source)
        assert not any("/secret" in head for head in inside.heads[count:])


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_a_name_that_moves(
    registry: StoredRegistry, inside: ScriptedServer, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """A name resolves to an outside address when it is checked and to an inside one later: the checked address is used.
    A name with addresses of both kinds is contacted outside."""
    port = int(inside.url.rpartition(":")[2])
    resolve, given = socket.getaddrinfo, []

    def moving(host: Any, *more: Any, **named: Any) -> Any:
        if host != "moves.test":
            return resolve(host, *more, **named)
        given.append(host)
        addresses = [OUTSIDE, "127.0.0.1"] if len(given) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    async with (
        scripted_server(lambda head: answer(307, location=f"http://moves.test:{port}/x"), OUTSIDE) as server,
        upstream_source(registry, server.url, classify=outside) as source,
    ):
        for _ in range(2):
            with pytest.raises(UpstreamUnavailable):
                await REQUESTS[request_](source)
    assert given
    assert inside.connections == 0


@pytest.mark.parametrize("what", ["next page", "token service"])
async def test_an_endpoint_that_moves(registry: StoredRegistry, what: str) -> None:
    """The next page and the token service of an endpoint that was outside when it named them, and is inside now, are
    refused."""
    looked: list[str] = []

    def network(address: str) -> NetworkClass:
        looked.append(address)
        return NetworkClass.PUBLIC if len(looked) == 1 else classify_address(address)

    def reply(head: str) -> bytes:
        if what == "next page":
            return answer(200, '{"tags": ["1"]}', link='</v2/secret?x>; rel="next"', connection="close")
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/secret"', connection="close")

    async with (
        scripted_server(reply, OUTSIDE) as server,
        upstream_source(registry, server.url, classify=network) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await source.tags(REPO, None, 5)
        assert server.count == 1


async def test_a_token_service_inside(registry: StoredRegistry, inside: ScriptedServer, tmp_path: Path) -> None:
    """A token service inside is not used because of a redirect or a challenge, unless `realms` lists it."""
    file = tmp_path / "password"
    file.write_text("secret")
    login: dict[str, Any] = {"username": "ann", "password_file": file}

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(307, location=f"{inside.url}/token")
        if "authorization: bearer" in head.lower():
            return answer(200, '{"tags": ["1"]}')
        return answer(401, www_authenticate=f'Bearer realm="{realm}"')

    inside.reply = lambda head: answer(200, '{"token": "t"}')
    async with scripted_server(reply, OUTSIDE) as server:
        realm = f"{server.url}/token"
        for more in (dict[str, Any](), login):
            async with upstream_source(registry, server.url, classify=outside, **more) as source:
                with pytest.raises(UpstreamUnavailable, match="not public"):
                    await source.tags(REPO, None, 5)
        realm = f"{inside.url}/token"
        async with upstream_source(registry, server.url, classify=outside) as source:
            with pytest.raises(UpstreamUnavailable, match="realms"):
                await source.tags(REPO, None, 5)
        assert inside.connections == 0
        async with upstream_source(registry, server.url, classify=outside, realms=[realm]) as source:
            assert (await source.tags(REPO, None, 5)).items == ["1"]
            assert inside.connections == 1


async def test_a_token_service_on_another_port(
    registry: StoredRegistry, inside: ScriptedServer, tmp_path: Path
) -> None:
    """A token service on another port gets no password unless `realms` lists it."""
    file = tmp_path / "password"
    file.write_text("secret")
    inside.reply = lambda head: answer(200, '{"token": "t"}')

    def reply(head: str) -> bytes:
        if "authorization: bearer" in head.lower():
            return answer(200, '{"tags": ["1"]}')
        return answer(401, www_authenticate=f'Bearer realm="{inside.url}/token"')

    login: dict[str, Any] = {"username": "ann", "password_file": file}
    async with scripted_server(reply) as server:
        async with upstream_source(registry, server.url, **login) as source:
            with pytest.raises(UpstreamUnavailable, match="another port"):
                await source.tags(REPO, None, 5)
        assert inside.connections == 0
        async with upstream_source(registry, server.url, realms=[f"{inside.url}/token"], **login) as source:
            assert (await source.tags(REPO, None, 5)).items == ["1"]
        assert "authorization: basic" in inside.heads[0].lower()


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_by_a_proxy(
    registry: StoredRegistry, inside: ScriptedServer, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """Through a proxy, addresses in any spelling are refused here; names are resolved by the proxy, which must refuse
    them."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    locations = ["http://10.0.0.1/x", "http://127.1/x", "http://0x7f000001/x", "http://x.localhost/x"]
    async with (
        scripted_server(lambda head: answer(307, location=locations[0])) as server,
        http_proxy(server.url) as (between, address),
    ):
        monkeypatch.setenv("HTTP_PROXY", f"http://{address}")
        async with upstream_source(registry, "http://registry.test") as source:
            while locations:
                with pytest.raises(UpstreamUnavailable, match="not public"):
                    await REQUESTS[request_](source)
                locations.pop(0)
        assert all("registry.test" in each for each in between.asked)


def test_what_is_logged_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Log lines about refused targets are bounded, since an upstream can name any number of them."""
    gate = AddressPolicy("x.test")
    for port in range(1000):
        with pytest.raises(UpstreamUnavailable):
            gate.allowed_addresses(Reach(NetworkClass.PUBLIC), "x", port, ["10.0.0.1"])
    assert 10 < len(caplog.records) <= 100
