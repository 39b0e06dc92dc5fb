"""Tests of the tokens of the upstream client: all requests share a token, the token is renewed before it expires, and
it comes only from the token service of the upstream."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ManifestUnknown, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import (
    LOGIN,
    REPO,
    TAG,
    UpstreamClock,
    answer,
    fetch,
    logged_in,
    opened_registry,
    scripted_server,
    upstream_source,
)


async def test_concurrent_requests_share_one_token(tmp_path: Path, upstream: Hub, image: ImageTree) -> None:
    """Twenty concurrent requests of two registries with the same data directory get one token together. Later requests
    use it too."""
    upstream.set(auth="bearer", latency=0.02)
    async with (
        opened_registry(tmp_path / "data") as first_registry,
        opened_registry(tmp_path / "data") as second_registry,
        upstream_source(first_registry, upstream.url) as first_source,
        upstream_source(second_registry, upstream.url) as second_source,
    ):
        await asyncio.gather(
            *(source.get_manifest(REPO, TAG) for source in (first_source, second_source) for _ in range(5)),
            *(fetch(source, image.layers[0].digest) for source in (first_source, second_source) for _ in range(5)),
        )
        assert upstream.count("token") == 1
        upstream.forget()
        await second_source.resolve_manifest(REPO, TAG)
        assert [request.status for request in upstream.requests()] == [200]


async def test_token_is_stored_over_a_restart(tmp_path: Path, upstream: Hub) -> None:
    """After a restart, the client uses the stored token, so its first request does not get a 401."""
    upstream.set(auth="bearer")
    for _ in range(2):
        async with opened_registry(tmp_path / "data") as registry, upstream_source(registry, upstream.url) as source:
            await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 1
    assert [request.status for request in upstream.requests("manifest")] == [401, 200, 200]


async def test_a_token_is_renewed_before_it_expires(registry: StoredRegistry, upstream: Hub) -> None:
    """A token is renewed ten seconds before it expires, so that it does not expire while a request is on its way."""
    upstream.set(auth="bearer", token_seconds=300)
    clock = UpstreamClock()
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        await source.get_manifest(REPO, TAG)
        clock.now += 289
        await source.get_manifest(REPO, TAG)
        assert upstream.count("token") == 1
        clock.now += 2
        await source.get_manifest(REPO, TAG)
        assert upstream.count("token") == 2
    assert [request.status for request in upstream.requests("manifest")] == [401, 200, 200, 200]


async def test_refused_token_is_replaced_once(registry: StoredRegistry, upstream: Hub) -> None:
    """If the registry refuses a token that has not expired yet, concurrent requests together get one new token, and are
    sent again."""
    upstream.set(auth="bearer")
    async with upstream_source(registry, upstream.url) as source:
        await source.get_manifest(REPO, TAG)
        upstream.revoke()
        await asyncio.gather(*(source.get_manifest(REPO, TAG) for _ in range(5)))
    assert upstream.count("token") == 2


async def test_refused_token_of_another_process_is_replaced(tmp_path: Path, image: ImageTree) -> None:
    """The registry refuses the token of a process. The process then uses the newer token that another process has
    stored. If the registry refuses this token too, the process gets a new token, and the pull succeeds."""
    accepted: set[str] = set()
    issued: list[str] = []

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            issued.append(f"t{len(issued) + 1}")
            accepted.clear()
            accepted.add(issued[-1])
            return answer(200, json.dumps({"token": issued[-1], "expires_in": 600}))
        if any(f"authorization: bearer {token}\r\n" in head.lower() for token in accepted):
            return answer(200, image.body, content_type=image.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="here"')

    async with (
        opened_registry(tmp_path / "data") as first_registry,
        opened_registry(tmp_path / "data") as second_registry,
        scripted_server(reply) as server,
        upstream_source(first_registry, server.url) as first_source,
        upstream_source(second_registry, server.url) as second_source,
    ):
        await first_source.get_manifest(REPO, TAG)
        accepted.clear()
        await second_source.get_manifest(REPO, TAG)
        accepted.clear()
        assert (await first_source.get_manifest(REPO, TAG)).digest == image.digest
    assert issued == ["t1", "t2", "t3"]


async def test_refused_new_token_is_not_replaced(registry: StoredRegistry) -> None:
    """If the registry refuses a token that was just issued, the client does not get another token."""
    token_requests: list[str] = []

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            token_requests.append(head)
            return answer(200, json.dumps({"token": f"t{len(token_requests)}"}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)
    assert len(token_requests) == 1


async def test_cancelled_request_does_not_cancel_the_shared_token(registry: StoredRegistry, upstream: Hub) -> None:
    """Several requests wait for the same token. If the request that has started to get the token is cancelled, the
    other requests still get the token."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", stall=True)
    async with upstream_source(registry, upstream.url) as source:
        first = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(1, "token")
        waiting_requests = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(3)]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        upstream.release()
        await asyncio.gather(*waiting_requests)
    assert upstream.count("token") == 1


async def test_new_client_contacts_nobody(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """Creating a client opens no connection and reads no file."""
    absent = tmp_path / "absent"
    async with upstream_source(registry, upstream.url, username="ann", password_file=absent, ca_file=absent) as source:
        assert (source.name, source.connections, source.is_near_rate_limit()) == ("far.test", 8, False)
    assert upstream.opened == 0


async def test_token_service_refuses_anonymous_clients(registry: StoredRegistry) -> None:
    """A token service may answer anonymous clients with 401 or 403 instead of issuing a token without permissions. The
    content is then unknown."""
    for status in (401, 403):

        def reply(head: str, status: int = status) -> bytes:
            if "/token" in head.split()[1]:
                return answer(status)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, TAG)


async def test_an_identity_token(registry: StoredRegistry, tmp_path: Path) -> None:
    """An identity token from a docker config is sent to the token service with POST, as a refresh token."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"far.test": {"auth": "PHRva2VuPjo=", "identitytoken": "id-1"}}}))

    def reply(head: str) -> bytes:
        target = head.split()[1]
        if target == "/token":
            return answer(200, json.dumps({"access_token": "given"}), connection="close")
        if "authorization: bearer given" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x y"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, docker_config=file) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]
    token_heads = [head for head in server.heads if "/token" in head.split()[1]]
    assert [head.split()[0] for head in token_heads] == ["POST"]
    assert "authorization" not in token_heads[0].lower()


async def test_token_service_that_allows_only_post(registry: StoredRegistry, tmp_path: Path) -> None:
    """If the token service answers 405 to GET, the password is sent with POST."""

    def reply(head: str) -> bytes:
        method, target, _ = head.split(maxsplit=2)
        if target.startswith("/token"):
            response = answer(200, json.dumps({"access_token": "given"}), connection="close")
            return response if method == "POST" else answer(405)
        if "authorization: bearer given" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_realm_on_a_foreign_host_is_not_contacted(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the token service in a challenge (the realm) is on a foreign host, the client does not contact it, with or
    without a password. The log explains how to allow it with the setting `realms`."""
    upstream.set(auth="bearer", realm=f"{upstream.auth_url}/token", **LOGIN)
    for login in ({}, logged_in(tmp_path)):
        async with upstream_source(registry, upstream.url, **login) as source:
            for _ in range(2):
                with pytest.raises(UpstreamUnavailable, match="token service"):
                    await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 0
    assert caplog.text.count("add it to the upstream's realms") == 2
    async with upstream_source(
        registry, upstream.url, realms=[f"{upstream.auth_url}/token"], **logged_in(tmp_path)
    ) as source:
        await source.get_manifest(REPO, TAG)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 500}, UpstreamUnavailable),
        ({"status": 404}, UpstreamUnavailable),
        ({"status": 200}, UpstreamUnavailable),
        ({"hangup": True, "times": 2}, UpstreamUnavailable),
        ({"status": 429, "retry_after": "7"}, TooManyRequests),
        ({"stall": True}, UpstreamTimeout),
    ],
)
async def test_errors_of_a_failing_token_service(
    registry: StoredRegistry, upstream: Hub, fault: dict[str, Any], error: type[Exception]
) -> None:
    """If the token service fails, requests raise the same errors as for a failing upstream."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", **fault)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        with pytest.raises(error):
            await source.get_manifest(REPO, TAG)


async def test_invalid_tokens_are_refused(registry: StoredRegistry) -> None:
    """A missing token, and a token that cannot be a header value, raise UpstreamUnavailable."""
    for body in ("{}", "[]", "nonsense", '{"token": 5}', '{"token": "a b"}', '{"token": "a\\r\\nHost: x"}'):

        def reply(head: str, body: str = body) -> bytes:
            if "/token" in head.split()[1]:
                return answer(200, body)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(UpstreamUnavailable, match="token"):
                await source.get_manifest(REPO, TAG)


async def test_each_repository_has_its_own_token(registry: StoredRegistry, tmp_path: Path) -> None:
    """The client gets a separate token for each repository, with permission to pull only."""
    content = UpstreamContent()
    other_repo = RepositoryName("library/other")
    with hub(tmp_path, content, auth="bearer") as empty_hub:
        async with upstream_source(registry, empty_hub.url) as source:
            for repo in (REPO, other_repo):
                with pytest.raises(ManifestUnknown):
                    await source.get_manifest(repo, TAG)
        scopes = sorted(request.path.partition("scope=")[2] for request in empty_hub.requests("token"))
    assert scopes == ["repository%3Alibrary%2Fapp%3Apull", "repository%3Alibrary%2Fother%3Apull"]
