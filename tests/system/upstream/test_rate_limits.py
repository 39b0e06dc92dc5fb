"""Rate limits of upstreams: 429 and `Retry-After`, and what they hold back."""

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


async def test_too_many_requests(tmp_path: Path, upstream: Hub) -> None:
    """A 429 is reported with its Retry-After. Until then, no process requests a manifest."""
    clock = UpstreamClock()
    upstream.set(limit=1, retry_after=30)
    async with (
        opened_registry(tmp_path / "data") as one,
        opened_registry(tmp_path / "data") as two,
        upstream_source(one, upstream.url, clock=clock) as here,
        upstream_source(two, upstream.url, clock=clock) as there,
    ):
        await here.get_manifest(REPO, TAG)
        with pytest.raises(TooManyRequests) as raised:
            await here.get_manifest(REPO, TAG)
        assert raised.value.retry_after == 30
        upstream.forget()
        clock.now += 10
        for source in (here, there):
            with pytest.raises(TooManyRequests) as raised:
                await source.get_manifest(REPO, TAG)
            assert raised.value.retry_after == 20
        assert upstream.count() == 0
        upstream.set(limit=None)
        clock.now += 21
        await there.get_manifest(REPO, TAG)


async def test_a_limit_holds_what_it_limits(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Hub limits manifests only: HEADs, lists and blobs are requested all the while."""
    upstream.set(limit=0, retry_after=3600)
    layer = held.layers[0]
    async with upstream_source(registry, upstream.url) as source:
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await source.get_manifest(REPO, TAG)
            assert (await source.resolve_manifest(REPO, TAG)).digest == held.digest
            assert (await source.resolve_blob(REPO, Digest(layer.digest))).size == layer.size
            assert bytes((await fetch(source, layer.digest)).body) == layer.read()
            assert (await source.tags(REPO, None, 9)).items == ["1", "latest"]
    assert upstream.count("manifest", "GET") == 1


@pytest.mark.parametrize("kind", ["manifest", "head", "blob", "tags"])
async def test_the_next_is_asked_where_one_limits(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, kind: str
) -> None:
    """When one endpoint limits requests, the next is asked, and the limited one is left out."""
    async with (
        scripted_server(always(answer(429, retry_after="60"))) as full,
        upstream_source(registry, full.url, upstream.url) as source,
    ):
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "manifest": lambda: source.get_manifest(REPO, TAG),
            "head": lambda: source.resolve_manifest(REPO, TAG),
            "blob": lambda: fetch(source, held.layers[0].digest),
            "tags": lambda: source.tags(REPO, None, 9),
        }
        for _ in range(3):
            await requests[kind]()
        assert full.count == 1
        upstream.refuse()
        with pytest.raises(TooManyRequests):  # neither "unknown" nor "unavailable": it has a Retry-After
            await requests[kind]()


async def test_a_limit_elsewhere_holds_nothing(registry: StoredRegistry, held: ImageTree) -> None:
    """A 429 of a redirect's target is reported with its Retry-After, and pauses nothing at the registry."""
    layer = held.layers[0]
    given = [answer(429, retry_after="60"), answer(200, layer.read())]
    async with (
        scripted_server(lambda head: given.pop(0)) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(TooManyRequests) as raised:
            await fetch(source, layer.digest)
        assert raised.value.retry_after == 60
        assert bytes((await fetch(source, layer.digest)).body) == layer.read()


async def test_a_token_service_s_limit_is_its_own(registry: StoredRegistry, upstream: Hub) -> None:
    """While a token service limits requests, requests that have a token are sent."""
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
    """Retry-After in seconds is used up to an hour; five seconds without it."""
    fields = {"retry_after": text} if text else {}
    async with (
        scripted_server(lambda head: answer(429, **fields)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(TooManyRequests) as raised:
            await source.get_manifest(REPO, TAG)
        assert raised.value.retry_after == seconds


async def test_retry_after_a_date(registry: StoredRegistry) -> None:
    """Retry-After may be a date."""
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
def test_a_retry_after_that_is_none(text: str) -> None:
    """Other text, of any length, is ignored."""
    assert parse_retry_after({"retry-after": text}, 0.0) is None


async def test_few_requests_left(tmp_path: Path, upstream: Hub) -> None:
    """`is_nearly_exhausted` holds from a tenth of the limit on, in every process, and expires after an hour."""
    clock = UpstreamClock()
    upstream.set(limit=20)
    async with (
        opened_registry(tmp_path / "data") as one,
        opened_registry(tmp_path / "data") as two,
        upstream_source(one, upstream.url, clock=clock) as here,
        upstream_source(two, upstream.url, clock=clock) as there,
    ):
        for number in range(1, 19):
            assert not here.is_nearly_exhausted()
            await here.get_manifest(REPO, TAG)
            assert here.is_nearly_exhausted() is (number == 18)
        await there.resolve_manifest(REPO, TAG)
        assert there.is_nearly_exhausted()
        clock.now += 3601
        assert not there.is_nearly_exhausted()
