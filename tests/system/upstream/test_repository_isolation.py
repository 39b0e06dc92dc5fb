"""Tests that invalid or missing responses for one repository (`BAD_REPO`) do not affect the other repositories of the
same upstream (`good_repo`)."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from registry.single_flight import SingleFlight, cancel_and_wait
from registry.upstream.api_client import MAX_CONNECTIONS
from registry.upstream.breaker import FAILURES_TO_OPEN
from registry.upstream.requester import REQUESTS_PER_REPOSITORY
from storage.content import Manifest, Span
from storage.errors import RegistryError, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import TAG, CollectingSink, UpstreamClock, answer, scripted_server, upstream_source
from tests.system.upstream.conftest import ABSENT_DIGEST, BAD_REPO, good_repo, repository, target


def oversized(head: str) -> bytes:
    return answer(200, "{" + " " * (9 << 20) + "}")


# The responses for BAD_REPO. Each is a function of the head of the request.
BAD_ANSWERS: dict[str, Callable[[str], bytes]] = {
    "too large": oversized,
    "truncated": lambda head: answer(200, "{}", content_length="1000", connection="close"),
    "compressed": lambda head: answer(200, "xxx", content_encoding="gzip"),
    "other bytes": lambda head: answer(200, "{}", docker_content_digest=ABSENT_DIGEST),
    "no JSON": lambda head: answer(200, "nonsense"),
    "redirect to a dead host": lambda head: answer(307, location="http://127.0.0.1:1/x"),
    "redirect to an unknown host": lambda head: answer(307, location="http://absent.invalid/x"),
    "redirect to a long address": lambda head: answer(307, location="/" + "x/" * 30000),
    "redirect to itself": lambda head: answer(307, location=target(head)),
    "redirect without a Location": lambda head: answer(307),
    "redirect to an FTP address": lambda head: answer(307, location="ftp://x/"),
    "invalid chunk": lambda head: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
    "many header lines": lambda head: b"HTTP/1.1 200 OK\r\n" + b"a:b\r\n" * 1000 + b"Content-Length: 0\r\n\r\n",
    "many trailer lines": lambda head: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a:b\r\n" * 1000 + b"\r\n"
    ),
    "500": lambda head: answer(500),
    "418": lambda head: answer(418),
}


@pytest.mark.parametrize("names", ["one", "many of one domain", "many domains"])
async def test_slow_name_lookups_delay_one_repository_only(
    registry: StoredRegistry, image: ImageTree, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """The redirects of one repository lead to names whose lookup is slow. These lookups do not delay the lookups for
    other repositories."""
    resolve, may_resolve, all_redirected = socket.getaddrinfo, threading.Event(), asyncio.Event()

    def slow_getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if str(host).endswith("slow.test"):
            may_resolve.wait()
        host = "127.0.0.1" if str(host).endswith(".test") else host
        return resolve(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow_getaddrinfo)

    def reply(head: str) -> bytes:
        port = server.url.rpartition(":")[2]
        if head.split()[1] == "/there":
            return answer(200, image.body, content_type=image.media_type)
        if repository(head) == "bad":
            redirected_heads.append(head)
            if len(redirected_heads) == REQUESTS_PER_REPOSITORY:
                all_redirected.set()
            numbered_host = (
                f"n{len(redirected_heads)}.slow.test"
                if names == "many of one domain"
                else f"n.{len(redirected_heads)}slow.test"
            )
            name = "slow.test" if names == "one" else numbered_host
            return answer(307, location=f"http://{name}:{port}/there")
        return answer(307, location=f"http://fast.test:{port}/there")

    redirected_heads: list[str] = []
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        requests = [
            asyncio.create_task(source.get_manifest(BAD_REPO, Tag(f"{n}"))) for n in range(REQUESTS_PER_REPOSITORY)
        ]
        try:
            async with asyncio.timeout(8):
                await all_redirected.wait()
                assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        finally:
            may_resolve.set()
            await asyncio.gather(*requests, return_exceptions=True)


@pytest.mark.parametrize("bad_answer", BAD_ANSWERS)
async def test_invalid_responses_do_not_open_the_breaker(
    registry: StoredRegistry, image: ImageTree, bad_answer: str
) -> None:
    """Repeated invalid responses for a repository do not open the circuit breaker. An open breaker would keep the
    client from sending requests. So the client still sends further requests, even for this repository."""

    def reply(head: str) -> bytes:
        if repository(head) == "bad":
            return BAD_ANSWERS[bad_answer](head)
        return answer(200, image.body, content_type=image.media_type)

    clock = UpstreamClock()
    async with scripted_server(reply) as server, upstream_source(registry, server.url, clock=clock) as source:
        requests: list[Callable[[], Awaitable[object]]] = [
            lambda: source.get_manifest(BAD_REPO, TAG),
            lambda: source.resolve_manifest(BAD_REPO, TAG),
            lambda: source.tags(BAD_REPO, None, 5),
            lambda: source.fetch_blob(BAD_REPO, Digest(ABSENT_DIGEST), Span(0, 5), CollectingSink()),
        ]
        for request in requests:
            for _ in range(FAILURES_TO_OPEN + 1):
                clock.now += 0.1
                server.heads.clear()
                with suppress(RegistryError):
                    await request()
                assert server.count > 0
        assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest


@pytest.mark.parametrize("failure", ["status", "hang up", "hang"])
async def test_failures_of_one_repository_open_the_breaker_for_it_only(
    registry: StoredRegistry, image: ImageTree, failure: str
) -> None:
    """If requests for one repository repeatedly get no response or 503, the client sends no further requests for this
    repository for a while. It still sends requests for other repositories."""
    may_respond = asyncio.Event()

    async def reply(head: str) -> bytes:
        if repository(head) != "bad":
            return answer(200, image.body, content_type=image.media_type)
        if failure == "hang":
            await may_respond.wait()
        return b"" if failure == "hang up" else answer(503)

    clock = UpstreamClock()
    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, clock=clock, idle_timeout=0.3) as source,
    ):
        for _ in range(2 * FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(BAD_REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match="lately"):
            await source.get_manifest(BAD_REPO, TAG)
        manifest: Manifest | None = None
        async with asyncio.timeout(10):
            while manifest is None:
                with suppress(UpstreamTimeout):  # a machine that stalls; an open breaker raises another error
                    manifest = await source.get_manifest(good_repo(), TAG)
        assert manifest.digest == image.digest
        may_respond.set()


async def test_status_500_does_not_count_for_the_breaker(registry: StoredRegistry) -> None:
    """A 500 concerns only its request. The breaker opens after a number of failures in a row: a 500 does not count as a
    failure, and does not reset the count."""
    clock, status = UpstreamClock(), 503
    async with (
        scripted_server(lambda head: answer(status)) as server,
        upstream_source(registry, server.url, clock=clock) as source,
    ):
        for count in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            status = 503
            with pytest.raises(UpstreamUnavailable, match="503"):
                await source.get_manifest(good_repo(count), TAG)
            if count + 1 < FAILURES_TO_OPEN:
                status = 500
                with pytest.raises(UpstreamUnavailable, match="500"):
                    await source.get_manifest(BAD_REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match="lately"):
            await source.get_manifest(good_repo(), TAG)


async def test_failures_of_many_repositories_open_the_breaker_for_all(registry: StoredRegistry) -> None:
    """After failures for a number of different repositories, the breaker of the endpoint opens for all repositories."""
    clock = UpstreamClock()
    async with (
        scripted_server(lambda head: answer(503)) as server,
        upstream_source(registry, server.url, clock=clock) as source,
    ):
        for count in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await source.get_manifest(good_repo(count), TAG)
        with pytest.raises(UpstreamUnavailable, match="lately"):
            await source.get_manifest(good_repo(9), TAG)
        assert server.count == FAILURES_TO_OPEN


async def test_failed_connections_open_the_breaker_for_all(registry: StoredRegistry) -> None:
    """If no connection to the endpoint can be established, the failures of one repository are enough to open the
    breaker for all repositories."""
    clock = UpstreamClock()
    async with upstream_source(registry, "http://127.0.0.1:1", clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="reached"):
                await source.fetch_blob(BAD_REPO, Digest(ABSENT_DIGEST), Span(0), CollectingSink())
        with pytest.raises(UpstreamUnavailable, match="lately"):
            await source.get_manifest(good_repo(), TAG)


async def test_requests_of_clients_that_left_do_not_wait_for_connections(
    registry: StoredRegistry, image: ImageTree
) -> None:
    """While all connections are in use, shared tasks whose callers have left end without sending their requests. The
    next free connection goes to a caller that still waits."""
    may_respond, all_connected = asyncio.Event(), asyncio.Event()
    requested: list[str] = []

    async def reply(head: str) -> bytes:
        requested.append(repository(head))
        if len(requested) == MAX_CONNECTIONS:
            all_connected.set()
        await may_respond.wait()
        return answer(200, image.body, content_type=image.media_type)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        flights = SingleFlight[Manifest]()

        def request(name: str) -> asyncio.Task[Manifest]:
            repo = RepositoryName(f"library/{name}")
            return asyncio.create_task(flights.run(repo, lambda: source.get_manifest(repo, TAG)))

        busy = [request(f"busy{number}") for number in range(MAX_CONNECTIONS)]
        await all_connected.wait()
        leaving = [request(f"left{number}") for number in range(50)]
        staying = request("stays")
        await asyncio.sleep(0)
        assert len(flights) == MAX_CONNECTIONS + 51
        await cancel_and_wait(leaving)
        async with asyncio.timeout(8):
            while len(flights) > MAX_CONNECTIONS + 1:  # noqa: ASYNC110  a task ends as soon as it begins to wait
                await asyncio.sleep(0.01)
        may_respond.set()
        assert (await staying).digest == image.digest
        await asyncio.gather(*busy)
    assert requested[MAX_CONNECTIONS:] == ["stays"]


async def test_requests_fail_when_the_client_is_closed(registry: StoredRegistry) -> None:
    """When the client is closed, requests that wait for a response or for a connection raise UpstreamUnavailable."""
    may_respond, all_connected = asyncio.Event(), asyncio.Event()
    requested: list[str] = []

    async def reply(head: str) -> bytes:
        requested.append(head)
        if len(requested) == MAX_CONNECTIONS:
            all_connected.set()
        await may_respond.wait()
        return answer(200, b"{}")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        repos = [RepositoryName(f"library/{number}") for number in range(MAX_CONNECTIONS + 1)]
        requests = [asyncio.create_task(source.get_manifest(repo, TAG)) for repo in repos]
        await all_connected.wait()
        await source.aclose()
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(error) for error in errors] == [UpstreamUnavailable] * len(requests)
        may_respond.set()


@pytest.mark.parametrize("hanging_host", ["endpoint", "redirect"])
async def test_hanging_requests_leave_connections_for_others(
    registry: StoredRegistry, image: ImageTree, hanging_host: str
) -> None:
    """200 requests for one repository get no response, from the endpoint or from the target of a redirect. The number
    of connections per repository is limited, so requests for other repositories succeed."""
    may_respond = asyncio.Event()

    async def reply(head: str) -> bytes:
        if repository(head) != "bad":
            return answer(200, image.body, content_type=image.media_type)
        if hanging_host == "redirect" and target(head) != "/hangs/library/bad":
            return answer(307, location=f"{redirect_target.url}/hangs/library/bad")
        await may_respond.wait()
        return b""

    async with (
        scripted_server(reply) as server,
        scripted_server(reply) as redirect_target,
        upstream_source(registry, server.url) as source,
    ):
        waiting = [asyncio.create_task(source.get_manifest(BAD_REPO, Tag(f"{n}"))) for n in range(200)]
        hanging_server = redirect_target if hanging_host == "redirect" else server
        async with asyncio.timeout(8):
            while hanging_server.count < REQUESTS_PER_REPOSITORY:  # noqa: ASYNC110  the server has no event to wait for
                await asyncio.sleep(0.01)
            assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        assert hanging_server.count <= REQUESTS_PER_REPOSITORY + 1
        may_respond.set()
        await asyncio.gather(*waiting, return_exceptions=True)
