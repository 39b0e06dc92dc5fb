"""Tests of rate limits of upstreams: how the upstream client treats 429 and `Retry-After`, and which requests it stops
sending."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from registry.upstream.rate_limits import parse_retry_after
from storage.errors import TooManyRequests
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import (
    REPO,
    TAG,
    UpstreamClock,
    always,
    answer,
    fetch,
    opened_registry,
    scripted_server,
    upstream_source,
)


async def test_all_processes_wait_after_a_429(tmp_path: Path, upstream: Hub) -> None:
    """A 429 raises TooManyRequests with its Retry-After. Until this time, no process of the server requests a manifest
    from the upstream."""
    clock = UpstreamClock()
    upstream.set(limit=1, retry_after=30)
    async with (
        opened_registry(tmp_path / "data") as first_registry,
        opened_registry(tmp_path / "data") as second_registry,
        upstream_source(first_registry, upstream.url, clock=clock) as first_source,
        upstream_source(second_registry, upstream.url, clock=clock) as second_source,
    ):
        await first_source.get_manifest(REPO, TAG)
        with pytest.raises(TooManyRequests) as raised:
            await first_source.get_manifest(REPO, TAG)
        assert raised.value.retry_after == 30
        upstream.forget()
        clock.now += 10
        for source in (first_source, second_source):
            with pytest.raises(TooManyRequests) as raised:
                await source.get_manifest(REPO, TAG)
            assert raised.value.retry_after == 20
        assert upstream.count() == 0
        upstream.set(limit=None)
        clock.now += 21
        await second_source.get_manifest(REPO, TAG)


async def test_manifest_limit_does_not_stop_other_requests(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """Docker Hub limits GET requests for manifests only. After a 429 for a manifest, the client still sends HEAD
    requests and requests for lists and blobs."""
    upstream.set(limit=0, retry_after=3600)
    layer = image.layers[0]
    async with upstream_source(registry, upstream.url) as source:
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await source.get_manifest(REPO, TAG)
            assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest
            assert (await source.resolve_blob(REPO, Digest(layer.digest))).size == layer.size
            assert bytes((await fetch(source, layer.digest)).body) == layer.read()
            assert (await source.tags(REPO, None, 9)).items == ["1", "latest"]
    assert upstream.count("manifest", "GET") == 1


@pytest.mark.parametrize("kind", ["manifest", "head", "blob", "tags"])
async def test_next_endpoint_is_used_after_a_429(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, kind: str
) -> None:
    """If one endpoint answers 429, the client uses the next endpoint, and sends no further request to the limited
    one."""
    async with (
        scripted_server(always(answer(429, retry_after="60"))) as limited,
        upstream_source(registry, limited.url, upstream.url) as source,
    ):
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "manifest": lambda: source.get_manifest(REPO, TAG),
            "head": lambda: source.resolve_manifest(REPO, TAG),
            "blob": lambda: fetch(source, image.layers[0].digest),
            "tags": lambda: source.tags(REPO, None, 9),
        }
        for _ in range(3):
            await requests[kind]()
        assert limited.count == 1
        upstream.refuse()
        # The client reports the 429 rather than the failed connection, because the 429 has a Retry-After.
        with pytest.raises(TooManyRequests):
            await requests[kind]()


async def test_429_of_a_redirect_target_does_not_limit_the_registry(registry: StoredRegistry, image: ImageTree) -> None:
    """A 429 of the target of a redirect raises TooManyRequests with its Retry-After. Requests to the registry are not
    delayed."""
    layer = image.layers[0]
    responses = [answer(429, retry_after="60"), answer(200, layer.read())]
    async with (
        scripted_server(lambda head: responses.pop(0)) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(TooManyRequests) as raised:
            await fetch(source, layer.digest)
        assert raised.value.retry_after == 60
        assert bytes((await fetch(source, layer.digest)).body) == layer.read()


async def test_numbers_of_a_redirect_target_are_not_those_of_the_registry(
    registry: StoredRegistry, image: ImageTree
) -> None:
    """The target of a redirect states that few requests are left. This does not count as the rate limit of the
    registry, whose own numbers still count."""
    layer = image.layers[0]
    few = {"ratelimit_limit": "100", "ratelimit_remaining": "5"}
    async with (
        scripted_server(always(answer(200, layer.read(), **few))) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        assert bytes((await fetch(source, layer.digest)).body) == layer.read()
        assert not source.is_near_rate_limit()
        assert await registry.records.allowance("far.test") is None
        server.reply = always(answer(200, layer.read(), **few))
        await fetch(source, layer.digest)
        assert source.is_near_rate_limit()


async def test_numbers_are_stored_again_after_the_clock_was_set_back(
    registry: StoredRegistry, image: ImageTree
) -> None:
    """The numbers of a response that came while the clock was ahead are stored with that time. After the clock is set
    right, the same numbers in the next response count."""
    layer, clock = image.layers[0], UpstreamClock()
    few = {"ratelimit_limit": "100", "ratelimit_remaining": "5"}
    async with (
        scripted_server(always(answer(200, layer.read(), **few))) as server,
        upstream_source(registry, server.url, clock=clock) as source,
    ):
        clock.now += 86_400
        await fetch(source, layer.digest)
        clock.now -= 86_400
        assert not source.is_near_rate_limit()  # the numbers from the future are unknown now
        await fetch(source, layer.digest)
        assert source.is_near_rate_limit()


async def test_429_of_the_token_service_does_not_limit_the_registry(registry: StoredRegistry, upstream: Hub) -> None:
    """After a 429 of the token service, requests for which the client already has a token are still sent."""
    upstream.set(auth="bearer")
    async with upstream_source(registry, upstream.url) as source:
        await source.get_manifest(REPO, TAG)
        upstream.fault(on="token", status=429, retry_after="60")
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await source.get_manifest(type(REPO)("library/other"), TAG)
        await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 2


@pytest.mark.parametrize(("text", "seconds"), [("7", 7), ("", 5), ("soon", 5), ("99999999", 3600), ("0", 1)])
async def test_retry_after(registry: StoredRegistry, text: str, seconds: int) -> None:
    """The client waits for the seconds in Retry-After, at least one second and at most an hour. Without a valid value
    it waits five seconds."""
    fields = {"retry_after": text} if text else {}
    async with (
        scripted_server(lambda head: answer(429, **fields)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(TooManyRequests) as raised:
            await source.get_manifest(REPO, TAG)
        assert raised.value.retry_after == seconds


async def test_retry_after_a_date(registry: StoredRegistry) -> None:
    """Retry-After can be a date. It is converted to seconds."""
    clock = UpstreamClock()
    date = formatdate(clock.now + 42, usegmt=True)
    async with (
        scripted_server(lambda head: answer(429, retry_after=date)) as server,
        upstream_source(registry, server.url, clock=clock) as source,
    ):
        with pytest.raises(TooManyRequests) as raised:
            await source.get_manifest(REPO, TAG)
        assert raised.value.retry_after == 42


@pytest.mark.parametrize("text", ["1" * 60000, "Fri, " * 12000, "(" * 60000, "1 " * 30000, "a, b, c"])
def test_invalid_retry_after_is_ignored(text: str) -> None:
    """Other text in Retry-After is ignored, even if it is very long."""
    assert parse_retry_after({"retry-after": text}, 0.0) is None


async def test_few_requests_left(tmp_path: Path, upstream: Hub) -> None:
    """`is_near_rate_limit` returns True in every process once at most a tenth of the allowed requests is left. It
    returns False again after an hour."""
    clock = UpstreamClock()
    upstream.set(limit=20)
    async with (
        opened_registry(tmp_path / "data") as first_registry,
        opened_registry(tmp_path / "data") as second_registry,
        upstream_source(first_registry, upstream.url, clock=clock) as first_source,
        upstream_source(second_registry, upstream.url, clock=clock) as second_source,
    ):
        for number in range(1, 19):
            assert not first_source.is_near_rate_limit()
            await first_source.get_manifest(REPO, TAG)
            assert first_source.is_near_rate_limit() is (number == 18)
        await second_source.resolve_manifest(REPO, TAG)
        assert second_source.is_near_rate_limit()
        clock.now += 3601
        assert not second_source.is_near_rate_limit()
