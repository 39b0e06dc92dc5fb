"""Bad answers for one repository, or none at all, do not affect other repositories of the upstream."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from registry.upstream.endpoints import FAILURES_TO_OPEN
from registry.upstream.requester import REQUESTS_PER_REPOSITORY
from storage.content import Span
from storage.errors import RegistryError, UpstreamUnavailable
from storage.names import Digest, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import TAG, CollectingSink, UpstreamClock, answer, scripted_server, upstream_source
from tests.system.upstream.conftest import ABSENT_DIGEST, BAD_REPO, good_repo, repository, target


def oversized(head: str) -> bytes:
    return answer(200, "{" + " " * (9 << 20) + "}")


BAD_ANSWERS: dict[str, Callable[[str], bytes]] = {
    "too large": oversized,
    "truncated": lambda head: answer(200, "{}", content_length="1000", connection="close"),
    "compressed": lambda head: answer(200, "xxx", content_encoding="gzip"),
    "other bytes": lambda head: answer(200, "{}", docker_content_digest=ABSENT_DIGEST),
    "no JSON": lambda head: answer(200, "nonsense"),
    "redirect to a dead host": lambda head: answer(307, location="http://127.0.0.1:1/x"),
    "redirect to a name that is none": lambda head: answer(307, location="http://absent.invalid/x"),
    "redirect to a long address": lambda head: answer(307, location="/" + "x/" * 30000),
    "redirect to itself": lambda head: answer(307, location=target(head)),
    "redirect to nowhere": lambda head: answer(307),
    "redirect to no address": lambda head: answer(307, location="ftp://x/"),
    "no chunk": lambda head: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
    "500": lambda head: answer(500),
    "418": lambda head: answer(418),
}


@pytest.mark.parametrize("names", ["one", "many of one domain", "many domains"])
async def test_a_name_that_resolves_slowly(
    registry: StoredRegistry, image: ImageTree, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """Slow lookups of any names that one repository's redirects lead to do not delay the lookups of others."""
    resolve, go, asked = socket.getaddrinfo, threading.Event(), asyncio.Event()

    def resolving(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if str(host).endswith("slow.test"):
            go.wait()
        host = "127.0.0.1" if str(host).endswith(".test") else host
        return resolve(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolving)

    def reply(head: str) -> bytes:
        port = server.url.rpartition(":")[2]
        if head.split()[1] == "/there":
            return answer(200, image.body, content_type=image.media_type)
        if repository(head) == "bad":
            led.append(head)
            if len(led) == REQUESTS_PER_REPOSITORY:
                asked.set()
            many = f"n{len(led)}.slow.test" if names == "many of one domain" else f"n.{len(led)}slow.test"
            name = "slow.test" if names == "one" else many
            return answer(307, location=f"http://{name}:{port}/there")
        return answer(307, location=f"http://fast.test:{port}/there")

    led: list[str] = []
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        waiting = [
            asyncio.create_task(source.get_manifest(BAD_REPO, Tag(f"{n}"))) for n in range(REQUESTS_PER_REPOSITORY)
        ]
        try:
            async with asyncio.timeout(8):
                await asked.wait()
                assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        finally:
            go.set()
            await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("bad", BAD_ANSWERS)
async def test_a_bad_answer_is_no_bad_endpoint(registry: StoredRegistry, image: ImageTree, bad: str) -> None:
    """Bad responses, however often, do not open the endpoint's breaker, not even for their own repository."""

    def reply(head: str) -> bytes:
        if repository(head) == "bad":
            return BAD_ANSWERS[bad](head)
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


@pytest.mark.parametrize("how", ["status", "hang up", "hang"])
async def test_an_ill_repository(registry: StoredRegistry, image: ImageTree, how: str) -> None:
    """A repository whose requests get no response, or 503, is left alone; requests for others go on."""
    hang = asyncio.Event()

    async def reply(head: str) -> bytes:
        if repository(head) != "bad":
            return answer(200, image.body, content_type=image.media_type)
        if how == "hang":
            await hang.wait()
        return b"" if how == "hang up" else answer(503)

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
        assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        hang.set()


async def test_500_says_nothing_of_the_endpoint(registry: StoredRegistry) -> None:
    """500 is about its request: it neither ends a row of failures nor counts as one."""
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


async def test_an_ill_endpoint(registry: StoredRegistry) -> None:
    """Once requests for enough different repositories fail, the endpoint's breaker opens for all."""
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


async def test_an_endpoint_that_is_away(registry: StoredRegistry) -> None:
    """If no connection can be made, one repository's failures open the breaker."""
    clock = UpstreamClock()
    async with upstream_source(registry, "http://127.0.0.1:1", clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="reached"):
                await source.fetch_blob(BAD_REPO, Digest(ABSENT_DIGEST), Span(0), CollectingSink())
        with pytest.raises(UpstreamUnavailable, match="lately"):
            await source.get_manifest(good_repo(), TAG)


@pytest.mark.parametrize("where", ["endpoint", "redirect"])
async def test_requests_that_hang(registry: StoredRegistry, image: ImageTree, where: str) -> None:
    """Hundreds of hanging requests of one repository leave connections for the others."""
    hang = asyncio.Event()

    async def reply(head: str) -> bytes:
        if repository(head) != "bad":
            return answer(200, image.body, content_type=image.media_type)
        if where == "redirect" and target(head) != "/hangs/library/bad":
            return answer(307, location=f"{other.url}/hangs/library/bad")
        await hang.wait()
        return b""

    async with (
        scripted_server(reply) as server,
        scripted_server(reply) as other,
        upstream_source(registry, server.url) as source,
    ):
        waiting = [asyncio.create_task(source.get_manifest(BAD_REPO, Tag(f"{n}"))) for n in range(200)]
        hanging = other if where == "redirect" else server
        async with asyncio.timeout(8):
            while hanging.count < REQUESTS_PER_REPOSITORY:  # noqa: ASYNC110  the other side knows nothing of who waits
                await asyncio.sleep(0.01)
            assert (await source.get_manifest(good_repo(), TAG)).digest == image.digest
        assert hanging.count <= REQUESTS_PER_REPOSITORY + 1
        hang.set()
        await asyncio.gather(*waiting, return_exceptions=True)
