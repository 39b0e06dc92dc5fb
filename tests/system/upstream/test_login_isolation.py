"""Tests that login problems of one repository (`BAD_REPO`) do not affect the other repositories of the same upstream
(`good_repo`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamClient
from registry.upstream.breaker import FAILURES_TO_OPEN
from storage.errors import ManifestUnknown, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import TAG, UpstreamClock, answer, scripted_server, upstream_source
from tests.system.upstream.conftest import BAD_REPO, good_repo, repository, target


def tag_list(head: str) -> bytes:
    """Returns a response with a list of one tag."""
    return answer(200, json.dumps({"name": "x", "tags": ["1"]}))


async def tags(source: UpstreamClient, repo: RepositoryName) -> list[str]:
    """Returns the first tags of the repository."""
    return list((await source.tags(repo, None, 5)).items)


# The WWW-Authenticate of BAD_REPO that makes each login fail, for the URL of the server.
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
async def test_failing_login_affects_one_repository_only(registry: StoredRegistry, failure: str, order: str) -> None:
    """Whatever way the login for one repository fails, its manifests are never reported as deleted. The login for all
    other repositories works, for repositories that were requested before and for new ones."""

    def reply(head: str) -> bytes:
        path = target(head)
        if path == "/token" and "service=limited" not in head:
            return answer(200, '{"token": "t"}')
        if path in ("/token", "/limited"):
            return answer(429, retry_after="3600")
        if not path.startswith("/v2/"):
            status = {"/refuses": 401, "/garbage": 200, "/fails": 503}[path]
            return answer(status, '{"errors": [{"code": "DENIED"}]}')
        if repository(head) == "bad":
            return answer(401, www_authenticate=LOGIN_FAILURES[failure](server.url))
        if "authorization: bearer t" in head.lower():
            return tag_list(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        if order == "good first":
            assert await tags(source, good_repo()) == ["1"]
        for count in range(2 * FAILURES_TO_OPEN):
            for request in (source.resolve_manifest, source.get_manifest):
                with pytest.raises(RegistryError) as raised:
                    await request(BAD_REPO, TAG)
                assert type(raised.value) is not ManifestUnknown
            assert await tags(source, good_repo(count)) == ["1"]
            assert await tags(source, good_repo()) == ["1"]


async def test_hanging_token_service_delays_one_repository_only(registry: StoredRegistry) -> None:
    """If a token service does not respond, only requests for the repository that uses it wait. Requests for other
    repositories succeed."""
    may_respond = asyncio.Event()

    async def reply(head: str) -> bytes:
        path = target(head)
        if path == "/hangs":
            await may_respond.wait()
        if not path.startswith("/v2/"):
            return answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return tag_list(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{realms.get(repository(head), "token")}"')

    realms = {"bad": "hangs"}
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        waiting = [asyncio.create_task(source.get_manifest(BAD_REPO, Tag(f"{n}"))) for n in range(40)]
        async with asyncio.timeout(8):
            for count in range(5):
                assert await tags(source, good_repo(count)) == ["1"]
        assert not any(task.done() for task in waiting)
        # The client first tries the token service that works for others, and its token is refused.
        realms["good9"] = "hangs"
        may_respond.set()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_outdated_cached_challenge_is_replaced(registry: StoredRegistry, image: ImageTree) -> None:
    """The client has cached the token service of a repository. This service now hangs, and the registry names another
    service. The client then sends the request without a token, gets the new challenge, and uses the new service."""
    may_respond, name, clock = asyncio.Event(), "first", UpstreamClock()

    async def reply(head: str) -> bytes:
        path = target(head)
        if path == "/first" and name != "first":
            await may_respond.wait()
        if not path.startswith("/v2/"):
            return answer(200, json.dumps({"token": path[1:]}))
        if f"authorization: bearer {name}\r" in head.lower():
            return answer(200, image.body, content_type=image.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{name}"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, clock=clock) as source:
        assert (await source.get_manifest(BAD_REPO, TAG)).digest == image.digest
        name = "second"
        clock.now += 100  # now the token has expired, but the challenge is still cached
        assert (await source.get_manifest(BAD_REPO, TAG)).digest == image.digest
        may_respond.set()


@pytest.mark.parametrize("failure", ["hangs", "token service hangs", "503", "500"])
async def test_requests_are_sent_without_a_login_if_v2_fails(
    registry: StoredRegistry, image: ImageTree, tmp_path: Path, failure: str
) -> None:
    """The client with a password first requests `/v2/` to find out how to log in. If `/v2/` or its token service fails,
    the client sends the request without a login, and follows the challenge in the response. If the response is a 404,
    the client raises UpstreamUnavailable, because content may be hidden from clients without a login."""
    may_respond = asyncio.Event()
    file = tmp_path / "password"
    file.write_text("secret")

    async def reply(head: str) -> bytes:
        path = target(head)
        if path == "/v2/" and failure.isdigit():
            return answer(int(failure))
        if path == "/hangs" or (path == "/v2/" and failure == "hangs"):
            await may_respond.wait()
        if path == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/hangs"')
        if path == "/token":
            return answer(200, '{"token": "t"}')
        if repository(head) == "bad":
            return answer(404, '{"errors": [{"code": "NAME_UNKNOWN"}]}')
        if "authorization: bearer t" in head.lower():
            return answer(200, image.body, content_type=image.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        with pytest.raises(UpstreamUnavailable):
            await source.get_manifest(BAD_REPO, TAG)
        assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        may_respond.set()


async def test_other_repositories_find_their_own_token_service(registry: StoredRegistry) -> None:
    """The client tries the token service of the first repository for other repositories too. If this service hangs
    later, the other repositories still get tokens from their own service."""
    may_respond, is_hanging = asyncio.Event(), False

    async def reply(head: str) -> bytes:
        path = target(head)
        if path == "/first" and is_hanging:
            await may_respond.wait()
        if not path.startswith("/v2/"):
            return answer(200, json.dumps({"token": path[1:]}))
        name = "first" if repository(head) == "bad" else "token"
        if f"authorization: bearer {name}\r" in head.lower():
            return tag_list(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/{name}"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert await tags(source, BAD_REPO) == ["1"]
        is_hanging = True
        async with asyncio.timeout(20):
            for count in range(5):
                assert await tags(source, good_repo(count)) == ["1"]
        may_respond.set()


async def test_token_of_a_new_repository_is_requested_in_advance(registry: StoredRegistry) -> None:
    """Once a token service has worked for one repository, the client requests the token for the next repository in
    advance, and so avoids a 401."""

    def reply(head: str) -> bytes:
        if target(head) == "/token":
            return answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return tag_list(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        await tags(source, good_repo(0))
        assert server.count == 3
        await tags(source, good_repo(1))
        assert [target(head) for head in server.heads[3:]] == ["/token", f"/v2/{good_repo(1)}/tags/list"]


async def test_basic_password_is_sent_for_one_repository_only(registry: StoredRegistry, tmp_path: Path) -> None:
    """If one repository requires Basic authentication, the password is not sent with requests for other
    repositories."""
    file = tmp_path / "password"
    file.write_text("secret")

    def reply(head: str) -> bytes:
        path = target(head)
        if path == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
        if path == "/token":
            return answer(200, '{"token": "t"}')
        if repository(head) == "bad":
            has_password = "authorization: basic" in head.lower()
            return tag_list(head) if has_password else answer(401, www_authenticate='Basic realm="x"')
        return tag_list(head) if "authorization: bearer t" in head.lower() else answer(401)

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        for count in range(3):
            assert await tags(source, BAD_REPO) == ["1"]
            assert await tags(source, good_repo(count)) == ["1"]
        heads_with_password = [head for head in server.heads if "authorization: basic" in head.lower()]
        assert {repository(head) for head in heads_with_password if target(head).startswith("/v2/")} == {"bad"}


async def test_rate_limit_of_a_token_affects_one_repository_only(registry: StoredRegistry) -> None:
    """After a 429 of the token service for one repository, the client waits before it requests this token again. Tokens
    for other repositories are requested immediately."""
    clock = UpstreamClock()

    def reply(head: str) -> bytes:
        if target(head) == "/token":
            return answer(429, retry_after="100") if repository(head) == "bad" else answer(200, '{"token": "t"}')
        if "authorization: bearer t" in head.lower():
            return tag_list(head)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, clock=clock) as source:
        for count in range(3):
            with pytest.raises(TooManyRequests):
                await source.get_manifest(BAD_REPO, TAG)
            assert await tags(source, good_repo(count)) == ["1"]
        assert sum(target(head) == "/token" and repository(head) == "bad" for head in server.heads) == 1
        clock.now += 101
        with pytest.raises(TooManyRequests):
            await source.get_manifest(BAD_REPO, TAG)
        assert sum(target(head) == "/token" and repository(head) == "bad" for head in server.heads) == 2


async def test_not_found_without_a_token_is_unavailable(registry: StoredRegistry, tmp_path: Path) -> None:
    """A registry may hide private content from anonymous clients with 404. If the client has a password but gets no
    token, such a 404 therefore raises UpstreamUnavailable."""
    file = tmp_path / "password"
    file.write_text("secret")

    def reply(head: str) -> bytes:
        if target(head) == "/v2/":
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
        if target(head) == "/token":
            return answer(503)
        if repository(head) == "good0":
            return tag_list(head)
        return answer(404, '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, username="ann", password_file=file) as source,
    ):
        for request in (
            source.resolve_manifest(BAD_REPO, TAG),
            source.get_manifest(BAD_REPO, TAG),
            tags(source, BAD_REPO),
        ):
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await request
        assert await tags(source, good_repo()) == ["1"]


async def test_not_found_after_a_logout_is_unconfirmed(registry: StoredRegistry, tmp_path: Path) -> None:
    """A docker config file is configured, but it has no login any more. A 404 of the upstream is then unconfirmed, so
    that the mirror deletes no cached content."""
    file = tmp_path / "config.json"
    file.write_text('{"auths": {}}')
    not_found = answer(404, '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
    async with (
        scripted_server(lambda head: not_found) as server,
        upstream_source(registry, server.url, docker_config=file) as source,
    ):
        with pytest.raises(UnconfirmedManifestUnknown):
            await source.get_manifest(BAD_REPO, TAG)
