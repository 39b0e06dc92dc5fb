"""Tests that redirects, next pages of lists and token services of an upstream cannot make the server connect to
internal addresses, such as those of its own machine or of a private network."""

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

ABSENT_DIGEST = Digest("sha256:" + "0" * 64)
PUBLIC_ADDRESS = "127.0.0.2"
"""An address that these tests treat as public."""


def classify(address: str) -> NetworkClass:
    """Classifies addresses like the product, but treats PUBLIC_ADDRESS as public, so that no test needs another
    machine."""
    return NetworkClass.PUBLIC if address == PUBLIC_ADDRESS else classify_address(address)


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
    """Addresses are classified by their network. An IPv6 address that contains an IPv4 address has the class of the
    IPv4 address."""
    assert classify_address(address) is network


def test_reach_of_redirects() -> None:
    """A redirect may lead to public addresses. It may also lead to the network of the first host, unless an earlier
    redirect has left this network. Listed hosts are always allowed."""
    initial = Reach(None, frozenset({("storage.corp", 9000)}))
    inside_private = initial.after(NetworkClass.PRIVATE)
    assert [network for network in NetworkClass if inside_private.is_allowed(network)] == [
        NetworkClass.PUBLIC,
        NetworkClass.PRIVATE,
    ]
    assert inside_private.after(NetworkClass.PRIVATE) == inside_private
    after_public = inside_private.after(NetworkClass.PUBLIC)
    assert [network for network in NetworkClass if after_public.is_allowed(network)] == [NetworkClass.PUBLIC]
    assert after_public.after(NetworkClass.PRIVATE) == after_public
    assert after_public.is_unrestricted("Storage.corp.", 9000)
    assert not after_public.is_unrestricted("storage.corp", 9001)
    assert not initial.after(NetworkClass.SPECIAL).is_allowed(NetworkClass.SPECIAL)


@pytest.mark.parametrize(
    ("host", "address"),
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
def test_addresses_are_recognised_in_every_spelling(host: str, address: str | None) -> None:
    """IP addresses in URLs are recognised in every spelling that resolvers accept, such as `127.1`."""
    assert literal_address(host) == address


def test_redirects_setting() -> None:
    """The setting `redirects` lists hosts with ports. A host without a port stands for the ports 80 and 443. Other
    entries are refused."""
    settings = Upstream.model_validate(
        {"name": "x.test", "redirects": ["Storage.corp:9000", "cdn.corp", "[fd00::1]:1"]}
    )
    assert settings.redirect_host_ports == {
        ("storage.corp", 9000),
        ("cdn.corp", 80),
        ("cdn.corp", 443),
        ("fd00::1", 1),
    }
    for invalid in ("https://storage.corp", "storage.corp/x", "user@storage.corp", "", "x:0", "x:y", ".", ".:9"):
        with pytest.raises(ValueError, match="not a host like"):
            Upstream.model_validate({"name": "x.test", "redirects": [invalid]})


Request = Callable[[UpstreamClient], Awaitable[Any]]
# By name: every kind of request that the upstream client can send.
REQUESTS: dict[str, Request] = {
    "GET of a manifest": lambda source: source.get_manifest(REPO, TAG),
    "HEAD of a manifest": lambda source: source.resolve_manifest(REPO, TAG),
    "tags": lambda source: source.tags(REPO, None, 5),
    "referrers": lambda source: source.referrers(REPO, ABSENT_DIGEST, None, None, 5),
    "size of a blob": lambda source: source.resolve_blob(REPO, ABSENT_DIGEST),
    "blob": lambda source: source.fetch_blob(REPO, ABSENT_DIGEST, Span(0), CollectingSink()),
}


@pytest.fixture
async def internal_service() -> Any:
    """A service on the loopback address. Public endpoints must not make the server connect to it."""
    async with scripted_server(lambda head: answer(200, json.dumps({"name": "secret", "tags": ["secret"]}))) as server:
        yield server


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_redirect_to_an_internal_address_makes_no_connection(
    registry: StoredRegistry, internal_service: ScriptedServer, request_: str, name: str
) -> None:
    """If a public endpoint redirects to an internal address, the client makes no connection to it. This holds for every
    spelling of the address and every kind of request."""
    location = internal_service.url.replace("127.0.0.1", name)

    async with (
        scripted_server(lambda head: answer(307, location=f"{location}/x"), PUBLIC_ADDRESS) as server,
        upstream_source(registry, server.url, classify=classify) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)
        assert server.count > 0
    assert internal_service.connections == 0


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_second_redirect_to_an_internal_address_makes_no_connection(
    registry: StoredRegistry, internal_service: ScriptedServer, request_: str
) -> None:
    """If a redirect leads to a public host, and a second redirect leads from there to an internal address, the client
    makes no connection to the internal address."""
    async with (
        scripted_server(
            lambda head: answer(302, location=f"{internal_service.url}/x"), PUBLIC_ADDRESS
        ) as public_target,
        scripted_server(lambda head: answer(307, location=f"{public_target.url}/x"), PUBLIC_ADDRESS) as server,
        upstream_source(registry, server.url, classify=classify) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)
        assert public_target.count == 1
    assert internal_service.connections == 0


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
async def test_endpoint_on_this_machine_cannot_redirect_to_other_networks(
    registry: StoredRegistry, request_: str, location: str
) -> None:
    """An endpoint on this machine cannot redirect to private, link-local or other special addresses. The test uses the
    real classification of addresses."""
    async with (
        scripted_server(lambda head: answer(307, location=location)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await REQUESTS[request_](source)


async def test_endpoint_on_this_machine_can_redirect_to_this_machine(
    registry: StoredRegistry, internal_service: ScriptedServer
) -> None:
    """An endpoint on a loopback address can redirect to another port of this address."""
    async with (
        scripted_server(lambda head: answer(307, location=f"{internal_service.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        assert (await source.tags(REPO, None, 5)).items == ["secret"]


async def test_redirects_to_listed_targets_are_allowed(
    registry: StoredRegistry,
    upstream: Hub,
    image: ImageTree,
    internal_service: ScriptedServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A redirect to an internal address is allowed if the setting `redirects` lists the target, as the log message
    suggests. Another port of the same address is still refused."""
    upstream.set(redirects=True, cdn=upstream.cdn_url)
    host = f"http://{PUBLIC_ADDRESS}"
    async with (
        scripted_server(
            lambda head: answer(307, location=f"{upstream.url}{head.split()[1]}"), PUBLIC_ADDRESS
        ) as server,
        upstream_source(registry, server.url, classify=classify) as without_targets,
        upstream_source(registry, server.url, classify=classify, redirects=[upstream.address]) as with_one_target,
        upstream_source(
            registry,
            server.url,
            classify=classify,
            redirects=[upstream.address, upstream.cdn_url.removeprefix("http://")],
        ) as with_both_targets,
    ):
        assert server.url.startswith(host)
        for _ in range(2):
            with pytest.raises(UpstreamUnavailable, match="not public"):
                await without_targets.get_manifest(REPO, TAG)
        assert caplog.text.count(f"add '{upstream.address}' to the setting `redirects` of this upstream") == 1
        assert (await with_one_target.get_manifest(REPO, TAG)).digest == image.digest
        digest = Digest(image.layers[0].digest)
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await with_one_target.fetch_blob(REPO, digest, Span(0), CollectingSink())
        sink = CollectingSink()
        await with_both_targets.fetch_blob(REPO, digest, Span(0), sink)
        assert bytes(sink.body) == image.layers[0].read()


async def test_redirect_cannot_use_an_existing_internal_connection(
    registry: StoredRegistry, internal_service: ScriptedServer
) -> None:
    """An upstream has a public and an internal endpoint, and the client has an open connection to the internal one. A
    redirect of the public endpoint to the internal one is still refused."""

    def reply(head: str) -> bytes:
        return answer(503) if is_failing else answer(307, location=f"{internal_service.url}/secret")

    is_failing = True
    async with (
        scripted_server(reply, PUBLIC_ADDRESS) as server,
        upstream_source(registry, server.url, internal_service.url, classify=classify) as source,
    ):
        assert (await source.tags(REPO, None, 5)).items == ["secret"]
        with pytest.raises(RegistryError):
            await source.fetch_blob(REPO, ABSENT_DIGEST, Span(0, 5), CollectingSink())
        is_failing = False
        count = internal_service.count
        internal_service.reply = lambda head: answer(503)
        for request in ("tags", "blob"):
            with pytest.raises(RegistryError):
                await REQUESTS[request](source)
        assert not any("/secret" in head for head in internal_service.heads[count:])


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_connection_goes_to_the_checked_address_of_a_name(
    registry: StoredRegistry, internal_service: ScriptedServer, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """A name resolves to a public and an internal address first, and only to the internal address later. The client
    connects only to the public address that it has checked."""
    port = int(internal_service.url.rpartition(":")[2])
    resolve, lookups = socket.getaddrinfo, []

    def changing_addresses(host: Any, *more: Any, **named: Any) -> Any:
        if host != "moves.test":
            return resolve(host, *more, **named)
        lookups.append(host)
        addresses = [PUBLIC_ADDRESS, "127.0.0.1"] if len(lookups) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", changing_addresses)
    async with (
        scripted_server(lambda head: answer(307, location=f"http://moves.test:{port}/x"), PUBLIC_ADDRESS) as server,
        upstream_source(registry, server.url, classify=classify) as source,
    ):
        for _ in range(2):
            with pytest.raises(UpstreamUnavailable):
                await REQUESTS[request_](source)
    assert lookups
    assert internal_service.connections == 0


@pytest.mark.parametrize("request_kind", ["next page", "token service"])
async def test_next_page_and_token_service_are_checked_again(registry: StoredRegistry, request_kind: str) -> None:
    """The name of an endpoint resolves to a public address first and to an internal address later. Requests for the
    next page or to the token service of this endpoint are then refused."""
    classified: list[str] = []

    def network(address: str) -> NetworkClass:
        classified.append(address)
        return NetworkClass.PUBLIC if len(classified) == 1 else classify_address(address)

    def reply(head: str) -> bytes:
        if request_kind == "next page":
            return answer(200, '{"tags": ["1"]}', link='</v2/secret?x>; rel="next"', connection="close")
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/secret"', connection="close")

    async with (
        scripted_server(reply, PUBLIC_ADDRESS) as server,
        upstream_source(registry, server.url, classify=network) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="not public"):
            await source.tags(REPO, None, 5)
        assert server.count == 1


async def test_internal_token_service_must_be_listed(
    registry: StoredRegistry, internal_service: ScriptedServer, tmp_path: Path
) -> None:
    """An internal token service is not contacted because of a redirect or a challenge of a public endpoint. It is
    contacted if the setting `realms` lists it."""
    file = tmp_path / "password"
    file.write_text("secret")
    login: dict[str, Any] = {"username": "ann", "password_file": file}

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(307, location=f"{internal_service.url}/token")
        if "authorization: bearer" in head.lower():
            return answer(200, '{"tags": ["1"]}')
        return answer(401, www_authenticate=f'Bearer realm="{realm}"')

    internal_service.reply = lambda head: answer(200, '{"token": "t"}')
    async with scripted_server(reply, PUBLIC_ADDRESS) as server:
        realm = f"{server.url}/token"
        for login_settings in (dict[str, Any](), login):
            async with upstream_source(registry, server.url, classify=classify, **login_settings) as source:
                with pytest.raises(UpstreamUnavailable, match="not public"):
                    await source.tags(REPO, None, 5)
        realm = f"{internal_service.url}/token"
        async with upstream_source(registry, server.url, classify=classify) as source:
            with pytest.raises(UpstreamUnavailable, match="realms"):
                await source.tags(REPO, None, 5)
        assert internal_service.connections == 0
        async with upstream_source(registry, server.url, classify=classify, realms=[realm]) as source:
            assert (await source.tags(REPO, None, 5)).items == ["1"]
            assert internal_service.connections == 1


async def test_token_service_on_another_port_must_be_listed(
    registry: StoredRegistry, internal_service: ScriptedServer, tmp_path: Path
) -> None:
    """A token service on another port than the endpoint gets no password, unless the setting `realms` lists it."""
    file = tmp_path / "password"
    file.write_text("secret")
    internal_service.reply = lambda head: answer(200, '{"token": "t"}')

    def reply(head: str) -> bytes:
        if "authorization: bearer" in head.lower():
            return answer(200, '{"tags": ["1"]}')
        return answer(401, www_authenticate=f'Bearer realm="{internal_service.url}/token"')

    login: dict[str, Any] = {"username": "ann", "password_file": file}
    async with scripted_server(reply) as server:
        async with upstream_source(registry, server.url, **login) as source:
            with pytest.raises(UpstreamUnavailable, match="another port"):
                await source.tags(REPO, None, 5)
        assert internal_service.connections == 0
        async with upstream_source(registry, server.url, realms=[f"{internal_service.url}/token"], **login) as source:
            assert (await source.tags(REPO, None, 5)).items == ["1"]
        assert "authorization: basic" in internal_service.heads[0].lower()


@pytest.mark.parametrize("request_", ["GET of a manifest", "blob"])
async def test_redirects_through_a_proxy(
    registry: StoredRegistry, internal_service: ScriptedServer, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """With a proxy, the client refuses redirects to internal addresses in any spelling. It cannot check names, because
    the proxy resolves them."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    locations = ["http://10.0.0.1/x", "http://127.1/x", "http://0x7f000001/x", "http://x.localhost/x"]
    async with (
        scripted_server(lambda head: answer(307, location=locations[0])) as server,
        http_proxy(server.url) as (proxy, proxy_address),
    ):
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy_address}")
        async with upstream_source(registry, "http://registry.test") as source:
            while locations:
                with pytest.raises(UpstreamUnavailable, match="not public"):
                    await REQUESTS[request_](source)
                locations.pop(0)
        assert all("registry.test" in request_line for request_line in proxy.asked)


def test_log_lines_about_refused_targets_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    """The number of log lines about refused targets is limited, because an upstream can name any number of targets."""
    policy = AddressPolicy("x.test")
    for port in range(1000):
        with pytest.raises(UpstreamUnavailable):
            policy.allowed_addresses(Reach(NetworkClass.PUBLIC), "x", port, ["10.0.0.1"])
    assert 10 < len(caplog.records) <= 100
