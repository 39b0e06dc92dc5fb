"""Logins and tokens for one repository do not affect other repositories of the upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamClient
from registry.upstream.endpoints import FAILURES_TO_OPEN
from storage.errors import ManifestUnknown, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import TAG, UpstreamClock, answer, scripted_server, upstream_source
from tests.system.upstream.conftest import BAD, good, repository, target


def listed(head: str) -> bytes:
    """Answers a list of one tag to requests with a token."""
    return answer(200, json.dumps({"name": "x", "tags": ["1"]}))


async def tags(source: UpstreamClient, repo: RepositoryName) -> list[str]:
    return list((await source.tags(repo, None, 5)).items)


LOGIN_FAILURES: dict[str, Callable[[str], str]] = {
    "untrusted realm": lambda url: 'Bearer realm="http://elsewhere.test/token"',
    "realm that is no address": lambda url: 'Bearer realm="nonsense"',
    "dead token service": lambda url: 'Bearer realm="http://127.0.0.1:1/token"',
    "anonymous refused": lambda url: f'Bearer realm="{url}/refuses"',
    "no token": lambda url: f'Bearer realm="{url}/garbage"',
    "failing token service": lambda url: f'Bearer realm="{url}/fails"',
    "token service at its limit": lambda url: f'Bearer realm="{url}/limited"',
    "same token service, another service": lambda url: f'Bearer realm="{url}/token",service="limited"',
    "Basic": lambda url: 'Basic realm="x"',
    "unknown scheme": lambda url: "Negotiate abc",
    "huge": lambda url: f'Bearer realm="{url}/token?{"x" * 5000}"',
}


@pytest.mark.parametrize("order", ["bad first", "good first"])
@pytest.mark.parametrize("failure", LOGIN_FAILURES)
async def test_a_login_that_fails(registry: StoredRegistry, failure: str, order: str) -> None:
    """Whatever one repository's challenge leads to, its tags are unconfirmed, not gone, and all others can log in,
    known and new ones."""

    def reply(head: str) -> bytes:
        where = target(head)
        if where == "/token" and "service=limited" not in head:
            return answer(200, '{"token": "t"}')
        if where in ("/token", "/limited"):
            return answer(429, retry_after="3600")
        if not where.startswith("/v2/"):
            status = {"/refuses": 401, "/garbage": 200, "/fails": 503}[where]
            return answer(status, '{"errors": [{"code": "DENIED"}]}')
        if repository(head) == "bad":
            return answer(401, www_authenticate=LOGIN_FAILURES[failure](server.url))
        if "authorization: bearer t" in head.lower():
            return listed(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        if order == "good first":
            assert await tags(source, good()) == ["1"]
        for count in range(2 * FAILURES_TO_OPEN):
            for request in (source.resolve_manifest, source.get_manifest):
                with pytest.raises(RegistryError) as raised:
                    await request(BAD, TAG)
                assert type(raised.value) is not ManifestUnknown
            assert await tags(source, good(count)) == ["1"]
            assert await tags(source, good()) == ["1"]


async def test_a_token_service_that_hangs(registry: StoredRegistry) -> None:
    """A hanging token service delays its repository only, also if it is the service that worked before."""
    hang = asyncio.Event()

    async def reply(head: str) -> bytes:
        where = target(head)
        if where == "/hangs":
            await hang.wait()
        if not where.startswith("/v2/"):
            return answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return listed(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{realms.get(repository(head), "token")}"')

    realms = {"bad": "hangs"}
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        waiting = [asyncio.create_task(source.get_manifest(BAD, Tag(f"{n}"))) for n in range(40)]
        async with asyncio.timeout(8):
            for count in range(5):
                assert await tags(source, good(count)) == ["1"]
        assert not any(task.done() for task in waiting)
        realms["good9"] = "hangs"  # the guess leads to the service that works, and its token is refused
        hang.set()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_remembered_challenge_that_became_wrong(registry: StoredRegistry, held: ImageTree) -> None:
    """The repository's cached token service hangs, and the registry names another one now: the request is sent without
    a token and learns of the new service. The endpoint is not blamed."""
    hang, name, clock = asyncio.Event(), "first", UpstreamClock()

    async def reply(head: str) -> bytes:
        where = target(head)
        if where == "/first" and name != "first":
            await hang.wait()
        if not where.startswith("/v2/"):
            return answer(200, json.dumps({"token": where[1:]}))
        if f"authorization: bearer {name}\r" in head.lower():
            return answer(200, held.body, content_type=held.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{name}"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, clock=clock) as source:
        assert (await source.get_manifest(BAD, TAG)).digest == held.digest
        name = "second"
        clock.now += 100  # the token has expired, the challenge is still cached
        assert (await source.get_manifest(BAD, TAG)).digest == held.digest
        hang.set()


@pytest.mark.parametrize("how", ["hangs", "token service hangs", "503", "500"])
async def test_an_endpoint_that_is_asked_how_to_log_in(
    registry: StoredRegistry, held: ImageTree, tmp_path: Path, how: str
) -> None:
    """When `/v2/` names no login, or its token service does not answer, requests are sent without a login, and the
    response says what is required. An anonymous refusal is not believed then."""
    hang = asyncio.Event()
    file = tmp_path / "password"
    file.write_text("secret")

    async def reply(head: str) -> bytes:
        where = target(head)
        if where == "/v2/" and how.isdigit():
            return answer(int(how))
        if where == "/hangs" or (where == "/v2/" and how == "hangs"):
            await hang.wait()
        if where == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/hangs"')
        if where == "/token":
            return answer(200, '{"token": "t"}')
        if repository(head) == "bad":
            return answer(404, '{"errors": [{"code": "NAME_UNKNOWN"}]}')
        if "authorization: bearer t" in head.lower():
            return answer(200, held.body, content_type=held.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        with pytest.raises(UpstreamUnavailable):
            await source.get_manifest(BAD, TAG)
        assert (await source.get_manifest(good(), TAG)).digest == held.digest
        hang.set()


async def test_a_guess_that_became_wrong(registry: StoredRegistry) -> None:
    """The first repository's token service hangs after it worked once: the others find their own."""
    hang, hangs = asyncio.Event(), False

    async def reply(head: str) -> bytes:
        where = target(head)
        if where == "/first" and hangs:
            await hang.wait()
        if not where.startswith("/v2/"):
            return answer(200, json.dumps({"token": where[1:]}))
        name = "first" if repository(head) == "bad" else "token"
        if f"authorization: bearer {name}\r" in head.lower():
            return listed(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{name}"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert await tags(source, BAD) == ["1"]
        hangs = True
        async with asyncio.timeout(20):
            for count in range(5):
                assert await tags(source, good(count)) == ["1"]
        hang.set()


async def test_a_new_repository_costs_no_401(registry: StoredRegistry) -> None:
    """Once a token service has worked at an endpoint, the next repository's token is obtained first."""

    def reply(head: str) -> bytes:
        if target(head) == "/token":
            return answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return listed(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        await tags(source, good(0))
        assert server.count == 3
        await tags(source, good(1))
        assert [target(head) for head in server.heads[3:]] == ["/token", f"/v2/{good(1)}/tags/list"]


async def test_a_password_is_not_sent_for_others(registry: StoredRegistry, tmp_path: Path) -> None:
    """One repository asks for Basic: requests for others do not carry the password."""
    file = tmp_path / "password"
    file.write_text("secret")

    def reply(head: str) -> bytes:
        where = target(head)
        if where == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
        if where == "/token":
            return answer(200, '{"token": "t"}')
        if repository(head) == "bad":
            asked = "authorization: basic" in head.lower()
            return listed(head) if asked else answer(401, www_authenticate='Basic realm="x"')
        return listed(head) if "authorization: bearer t" in head.lower() else answer(401)

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        for count in range(3):
            assert await tags(source, BAD) == ["1"]
            assert await tags(source, good(count)) == ["1"]
        sent = [head for head in server.heads if "authorization: basic" in head.lower()]
        assert {repository(head) for head in sent if target(head).startswith("/v2/")} == {"bad"}


async def test_a_limit_on_one_token(registry: StoredRegistry) -> None:
    """A 429 of the token service for one repository pauses that token only."""
    clock = UpstreamClock()

    def reply(head: str) -> bytes:
        if target(head) == "/token":
            return answer(429, retry_after="100") if repository(head) == "bad" else answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return listed(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, clock=clock) as source:
        for count in range(3):
            with pytest.raises(TooManyRequests):
                await source.get_manifest(BAD, TAG)
            assert await tags(source, good(count)) == ["1"]
        assert sum(target(head) == "/token" and repository(head) == "bad" for head in server.heads) == 1
        clock.now += 101
        with pytest.raises(TooManyRequests):
            await source.get_manifest(BAD, TAG)
        assert sum(target(head) == "/token" and repository(head) == "bad" for head in server.heads) == 2


async def test_a_login_that_fails_is_no_unknown(registry: StoredRegistry, tmp_path: Path) -> None:
    """A registry may hide private content from anonymous clients with 404: while no token can be obtained for the
    login, that says nothing."""
    file = tmp_path / "password"
    file.write_text("secret")

    def reply(head: str) -> bytes:
        if target(head) == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
        if target(head) == "/token":
            return answer(503)
        if repository(head) == "good0":
            return listed(head)
        return answer(404, '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        for request in (source.resolve_manifest(BAD, TAG), source.get_manifest(BAD, TAG), tags(source, BAD)):
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await request
        assert await tags(source, good()) == ["1"]


async def test_a_login_that_is_gone(registry: StoredRegistry, tmp_path: Path) -> None:
    """After a logout in a configured docker config, nothing becomes unknown."""
    file = tmp_path / "config.json"
    file.write_text('{"auths": {}}')
    gone = answer(404, '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
    async with (
        scripted_server(lambda head: gone) as server,
        upstream_source(registry, server.url, docker_config=file) as source,
    ):
        with pytest.raises(UnconfirmedManifestUnknown):
            await source.get_manifest(BAD, TAG)
