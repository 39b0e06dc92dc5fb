"""Tokens for upstreams: obtained once for all requests, renewed in time, and from the upstream's token service only."""

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


async def test_one_token_for_all_who_ask(tmp_path: Path, upstream: Hub, image: ImageTree) -> None:
    """Twenty concurrent requests in two processes obtain one token, and later requests use it."""
    upstream.set(auth="bearer", latency=0.02)
    async with (
        opened_registry(tmp_path / "data") as one,
        opened_registry(tmp_path / "data") as two,
        upstream_source(one, upstream.url) as here,
        upstream_source(two, upstream.url) as there,
    ):
        await asyncio.gather(
            *(source.get_manifest(REPO, TAG) for source in (here, there) for _ in range(5)),
            *(fetch(source, image.layers[0].digest) for source in (here, there) for _ in range(5)),
        )
        assert upstream.count("token") == 1
        upstream.forget()
        await there.resolve_manifest(REPO, TAG)
        assert [seen.status for seen in upstream.requests()] == [200]


async def test_a_token_is_kept_over_a_restart(tmp_path: Path, upstream: Hub) -> None:
    """The next process starts with the token, without a 401."""
    upstream.set(auth="bearer")
    for _ in range(2):
        async with opened_registry(tmp_path / "data") as registry, upstream_source(registry, upstream.url) as source:
            await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 1
    assert [seen.status for seen in upstream.requests("manifest")] == [401, 200, 200]


async def test_a_token_is_renewed_before_it_expires(registry: StoredRegistry, upstream: Hub) -> None:
    """A token is renewed ten seconds early, so that none expires on its way."""
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
    assert [seen.status for seen in upstream.requests("manifest")] == [401, 200, 200, 200]


async def test_a_token_that_is_refused_is_dropped(registry: StoredRegistry, upstream: Hub) -> None:
    """A refused token is replaced once, whatever its lifetime, and the request is sent again."""
    upstream.set(auth="bearer")
    async with upstream_source(registry, upstream.url) as source:
        await source.get_manifest(REPO, TAG)
        upstream.revoke()
        await asyncio.gather(*(source.get_manifest(REPO, TAG) for _ in range(5)))
    assert upstream.count("token") == 2


async def test_a_token_of_another_process_that_is_refused(tmp_path: Path, image: ImageTree) -> None:
    """A process whose token is refused finds a token that another process got since. When the registry refuses that
    one, too, the process gets a new one: the pull goes on."""
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
        opened_registry(tmp_path / "data") as registry,
        opened_registry(tmp_path / "data") as other,
        scripted_server(reply) as server,
        upstream_source(registry, server.url) as one,
        upstream_source(other, server.url) as two,
    ):
        await one.get_manifest(REPO, TAG)
        accepted.clear()
        await two.get_manifest(REPO, TAG)
        accepted.clear()
        assert (await one.get_manifest(REPO, TAG)).digest == image.digest
    assert issued == ["t1", "t2", "t3"]


async def test_a_registry_that_refuses_every_token(registry: StoredRegistry) -> None:
    """A new token that the registry refuses is not followed by another one."""
    issued: list[str] = []

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            issued.append(head)
            return answer(200, json.dumps({"token": f"t{len(issued)}"}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)
    assert len(issued) == 1


async def test_one_who_leaves_takes_no_token_from_others(registry: StoredRegistry, upstream: Hub) -> None:
    """Cancelling the request that started to obtain a token leaves the token to the waiting requests."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", stall=True)
    async with upstream_source(registry, upstream.url) as source:
        first = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(1, "token")
        others = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(3)]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        upstream.release()
        await asyncio.gather(*others)
    assert upstream.count("token") == 1


async def test_nothing_is_contacted_before_it_is_needed(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path
) -> None:
    """Creating a client contacts nobody and reads no file."""
    absent = tmp_path / "absent"
    async with upstream_source(registry, upstream.url, username="ann", password_file=absent, ca_file=absent) as source:
        assert (source.name, source.connections, source.is_nearly_exhausted()) == ("far.test", 8, False)
    assert upstream.opened == 0


async def test_a_token_service_that_refuses_the_anonymous(registry: StoredRegistry) -> None:
    """A token service may answer anonymous clients with 401 or 403 instead of a token without rights; the content is
    then unknown."""
    for status in (401, 403):

        def reply(head: str, status: int = status) -> bytes:
            if "/token" in head.split()[1]:
                return answer(status)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, TAG)


async def test_an_identity_token(registry: StoredRegistry, tmp_path: Path) -> None:
    """An identity token is sent to the token service by POST, as a refresh token."""
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


async def test_a_token_service_that_knows_post_alone(registry: StoredRegistry, tmp_path: Path) -> None:
    """If GET is not allowed, the password is sent by POST."""

    def reply(head: str) -> bytes:
        method, target, _ = head.split(maxsplit=2)
        if target.startswith("/token"):
            said = answer(200, json.dumps({"access_token": "given"}), connection="close")
            return said if method == "POST" else answer(405)
        if "authorization: bearer given" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_a_realm_elsewhere_is_not_asked(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A realm on a foreign host is not contacted, with or without a password. The log says how to allow it."""
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
async def test_a_token_service_that_fails(
    registry: StoredRegistry, upstream: Hub, fault: dict[str, Any], error: type[Exception]
) -> None:
    """A failing token service is a failure of the upstream."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", **fault)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        with pytest.raises(error):
            await source.get_manifest(REPO, TAG)


async def test_tokens_that_are_none(registry: StoredRegistry) -> None:
    """Text that cannot be a header value, or no text, is not accepted as a token."""
    for body in ("{}", "[]", "nonsense", '{"token": 5}', '{"token": "a b"}', '{"token": "a\\r\\nHost: x"}'):

        def reply(head: str, body: str = body) -> bytes:
            if "/token" in head.split()[1]:
                return answer(200, body)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(UpstreamUnavailable, match="token"):
                await source.get_manifest(REPO, TAG)


async def test_the_scope_is_the_repository_s(registry: StoredRegistry, tmp_path: Path) -> None:
    """Each repository has its own token, for pull only."""
    content = UpstreamContent()
    other = RepositoryName("library/other")
    with hub(tmp_path, content, auth="bearer") as empty:
        async with upstream_source(registry, empty.url) as source:
            for repo in (REPO, other):
                with pytest.raises(ManifestUnknown):
                    await source.get_manifest(repo, TAG)
        scopes = sorted(seen.path.partition("scope=")[2] for seen in empty.requests("token"))
    assert scopes == ["repository%3Alibrary%2Fapp%3Apull", "repository%3Alibrary%2Fother%3Apull"]
