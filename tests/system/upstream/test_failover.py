"""Upstreams that fail: the error reported, the next endpoint asked, and the circuit breaker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown
from registry.upstream.endpoints import FAILURES_TO_OPEN
from registry.upstream.rate_limits import parse_retry_after
from storage.content import Span
from storage.errors import (
    Denied,
    ManifestUnknown,
    RegistryError,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import (
    REPO,
    CollectingSink,
    UpstreamClock,
    always,
    answer,
    fetch,
    opened_registry,
    scripted_server,
    upstream_source,
)

TAG = Tag("1")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, UpstreamUnavailable),
        (401, ManifestUnknown),
        (403, ManifestUnknown),
        (404, ManifestUnknown),
        (410, ManifestUnknown),
        (429, TooManyRequests),
        (500, UpstreamUnavailable),
        (502, UpstreamUnavailable),
        (503, UpstreamUnavailable),
        (504, UpstreamUnavailable),
    ],
)
async def test_what_a_status_means(registry: StoredRegistry, status: int, error: type[RegistryError]) -> None:
    """The error for each status, for manifests by GET and HEAD and for blobs, without a login."""
    async with scripted_server(lambda head: answer(status)) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(error) as raised:
            await source.get_manifest(REPO, TAG)
        assert isinstance(raised.value, ManifestUnknown) or type(raised.value) is error
        if status != 429:
            with pytest.raises(error):
                await source.resolve_manifest(REPO, TAG)
            with pytest.raises(RegistryError) as raised:
                await fetch(source, "sha256:" + "0" * 64)
            assert raised.value.code == ("BLOB_UNKNOWN" if error is ManifestUnknown else "UNAVAILABLE")


CODE = '{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}'
UNAUTHORIZED = CODE.replace("DENIED", "UNAUTHORIZED")
PAGE = "<html>not for you</html>"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("status", "body", "sure"),
    [
        (404, CODE, True),
        (410, CODE, True),
        (401, CODE, False),
        (403, CODE, True),
        (403, CODE.replace("DENIED", "UNAUTHORIZED"), False),
        (404, "404 page not found\n", False),
        (404, "", False),
        (404, '{"message": "no Route matched with those values"}', False),
        (404, '{"errors": [{"code": "E1020"}]}', False),
        (404, CODE + " " * (64 << 10), False),
        (403, PAGE, False),
        (401, PAGE, False),
    ],
)
async def test_whose_refusal_it_is(registry: StoredRegistry, status: int, body: str, sure: bool, method: str) -> None:
    """A refusal with a registry's error code comes from the registry. A firewall, or a proxy before a restarting
    registry, refuses in other words: that is unconfirmed. So is the registry's refusal of our login, which says nothing
    about the manifest. A response to HEAD has no body, so a GET follows."""

    def reply(head: str) -> bytes:
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await (source.get_manifest if method == "GET" else source.resolve_manifest)(REPO, TAG)
        assert type(raised.value) is (ManifestUnknown if sure else UnconfirmedManifestUnknown)
        assert server.count == (1 if method == "GET" else 2)


async def test_a_refusal_after_a_token_was_got(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """A server that asks for a token and refuses the one it issued is the registry, also for HEAD, without a body."""
    upstream.set(auth="bearer", private=[REPO], username="ann", password="x")
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await source.resolve_manifest(REPO, TAG)
        assert type(raised.value) is ManifestUnknown
    assert upstream.count("manifest", "GET") == 0


@pytest.mark.parametrize("body", [CODE, PAGE, ""])
async def test_a_token_service_s_refusal_is_doubtful(registry: StoredRegistry, body: str) -> None:
    """A token service that refuses anonymous clients says nothing about the manifest: the answer is unconfirmed."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(403, body)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(UnconfirmedManifestUnknown):
                await request(REPO, TAG)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("error", "body", "sure"),
    [
        ("insufficient_scope", CODE, True),
        ("insufficient_scope", UNAUTHORIZED, True),
        ("insufficient_scope", "", True),
        ("", CODE, True),
        ("", UNAUTHORIZED, False),
        ("", UNAUTHORIZED.replace("]", ', {"code": "DENIED"}]'), True),
        ("", "", False),
        ("invalid_token", CODE, False),
        ("invalid_token", UNAUTHORIZED, False),
    ],
)
async def test_a_token_that_is_not_enough(
    registry: StoredRegistry, status: int, error: str, body: str, sure: bool
) -> None:
    """The registry accepts the token and finds it insufficient: there is nothing for anonymous clients. A token that it
    does not accept is a failed login, and so is UNAUTHORIZED without a reason: registries that lost their keys, or
    whose clock is wrong, answer that for every token."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(200, '{"token": "t"}')
        challenge = f'Bearer realm="{server.url}/token"' + (f',error="{error}"' if "bearer t" in head.lower() else "")
        said = b"" if head.startswith("HEAD") else body
        refused = status if "bearer t" in head.lower() else 401
        return answer(refused, said, www_authenticate=challenge, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(ManifestUnknown) as raised:
                await request(REPO, TAG)
            assert type(raised.value) is (ManifestUnknown if sure else UnconfirmedManifestUnknown)


async def test_a_head_that_is_wrong(registry: StoredRegistry, held: ImageTree) -> None:
    """If HEAD says "not found" and GET returns a manifest, the manifest exists."""

    def reply(head: str) -> bytes:
        return answer(404) if head.startswith("HEAD") else answer(200, held.body, content_type=held.media_type)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.resolve_manifest(REPO, TAG)).digest == held.digest


async def test_a_doubtful_answer_is_none(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """After an unconfirmed answer the next endpoint is asked, also for a tag, but its "not found" is not final."""
    async with (
        scripted_server(lambda head: answer(404, PAGE)) as first,
        upstream_source(registry, first.url, upstream.url) as source,
    ):
        assert (await source.resolve_manifest(REPO, TAG)).digest == held.digest
        with pytest.raises(UnconfirmedManifestUnknown):
            await source.resolve_manifest(REPO, Tag("absent"))


async def test_refusals_with_a_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """With a login, refusals are refusals of the login; "not found" stays "not found"."""
    file = tmp_path / "password"
    file.write_text("x")
    for status, error in ((401, Denied), (403, Denied), (404, ManifestUnknown)):
        async with (
            scripted_server(always(answer(status))) as server,
            upstream_source(registry, server.url, username="ann", password_file=file) as source,
        ):
            with pytest.raises(error):
                await source.get_manifest(REPO, TAG)


async def test_codes_in_a_400(registry: StoredRegistry) -> None:
    """A registry that answers 400 for a name it would never store says that there is none."""
    body = '{"errors": [{"code": "NAME_INVALID"}]}'
    async with (
        scripted_server(lambda head: answer(400, body)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)


async def test_a_redirect_s_target_that_refuses_us(registry: StoredRegistry) -> None:
    """A redirect whose URL has expired says nothing about access to the blob: it is a failure that can be retried."""
    async with (
        scripted_server(lambda head: answer(403)) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="refuses us"):
            await fetch(source, "sha256:" + "0" * 64)


async def test_nobody_listens(registry: StoredRegistry, upstream: Hub) -> None:
    """A refused connection is reported at once."""
    upstream.refuse()
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(UpstreamUnavailable) as raised:
            await source.get_manifest(REPO, TAG)
        assert not isinstance(raised.value, UpstreamTimeout)
        with pytest.raises(UpstreamUnavailable) as raised:
            await fetch(source, "sha256:" + "0" * 64)
        assert not isinstance(raised.value, UpstreamTimeout)


async def test_connections_that_do_not_come_about(registry: StoredRegistry) -> None:
    """A connection that is not established is a timeout after connect_timeout."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        # Whoever connects beyond what the queue holds waits for an answer that never comes.
        queued = [await _connecting(host, port) for _ in range(4)]
        try:
            async with upstream_source(
                registry, f"http://{host}:{port}", connect_timeout=0.3, idle_timeout=0.3
            ) as source:
                with pytest.raises(UpstreamTimeout):
                    await source.get_manifest(REPO, TAG)
                with pytest.raises(UpstreamTimeout):
                    await fetch(source, "sha256:" + "0" * 64)
        finally:
            for each in queued:
                each.close()


async def _connecting(host: str, port: int) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.connect_ex((host, port))
    return made


async def test_names_that_do_not_resolve(registry: StoredRegistry) -> None:
    """A name that does not resolve is reported, with the name."""
    async with upstream_source(registry, "http://absent.invalid") as source:
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await fetch(source, "sha256:" + "0" * 64)


@pytest.mark.parametrize("fault", [{"status": 503}, {"hangup": True, "times": 2}, {"stall": True}, {"status": 500}])
async def test_the_next_endpoint_is_asked(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """When the first endpoint fails, the next is asked, for every kind of request."""
    with hub(tmp_path, UpstreamContent()) as first:
        async with upstream_source(registry, first.url, upstream.url, idle_timeout=2) as source:
            for request in (
                lambda: source.get_manifest(REPO, TAG),
                lambda: source.resolve_manifest(REPO, TAG),
                lambda: source.tags(REPO, None, 5),
                lambda: source.resolve_blob(REPO, Digest(held.layers[0].digest)),
                lambda: fetch(source, held.layers[0].digest),
            ):
                first.fault(on="any", method="", **fault)
                await request()
                first.clear()


async def test_the_breaker(registry: StoredRegistry, upstream: Hub) -> None:
    """After failures in a row the endpoint is not asked for a moment. Then one request tries it, and the others wait
    for its result."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=None)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await source.get_manifest(REPO, TAG)
        upstream.forget()
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await fetch(source, "sha256:" + "0" * 64)
        assert upstream.count() == 0
        clock.now += 5
        with pytest.raises(UpstreamUnavailable, match="answers 503"):
            await source.get_manifest(REPO, TAG)
        clock.now += 5
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        clock.now += 5.1
        upstream.clear()
        upstream.fault(on="manifest", stall=True)
        probe = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(2, "manifest")
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        upstream.release()
        await probe
        await source.get_manifest(REPO, TAG)


async def test_a_probe_that_is_cancelled(registry: StoredRegistry, upstream: Hub) -> None:
    """If the request that tries the endpoint is cancelled, the next one tries it."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=FAILURES_TO_OPEN)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
        clock.now += 6
        upstream.fault(on="manifest", stall=True)
        probe = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(FAILURES_TO_OPEN + 1, "manifest")
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        await source.get_manifest(REPO, TAG)


async def test_a_probe_that_takes_long(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A blob may be the request that tries an endpoint. Once its headers arrive, other requests are let through, and
    later failures are counted from zero."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=FAILURES_TO_OPEN)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
        clock.now += 6
        upstream.fault(stall_after=100_000)
        sink = CollectingSink()
        probe = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.until_async(lambda: sink.at > 0)
        await source.get_manifest(REPO, TAG)
        upstream.release()
        await probe


async def test_many_failures_at_once_are_one(registry: StoredRegistry, upstream: Hub) -> None:
    """Eight connections that break together do not open the breaker."""
    upstream.fault(on="any", stall=True, times=8, status=503)
    async with upstream_source(registry, upstream.url) as source:
        tasks = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(8)]
        await upstream.arrival(8)
        upstream.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        await source.get_manifest(REPO, TAG)


async def test_one_bad_thing_is_no_bad_endpoint(registry: StoredRegistry, upstream: Hub) -> None:
    """A manifest that always gets 500, or a blob that breaks off, does not stop other requests."""
    upstream.fault(on="manifest", match="bad", status=500, times=None)
    async with upstream_source(registry, upstream.url) as source:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, Tag("bad"))
        await source.get_manifest(REPO, TAG)


async def test_the_one_that_failed_comes_later(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path
) -> None:
    """After a failure, the other endpoints are asked first."""
    content = UpstreamContent()
    content.add(REPO, held, "1")
    with hub(tmp_path, content) as first:
        async with upstream_source(registry, first.url, upstream.url) as source:
            first.fault(on="any", status=503)
            await source.get_manifest(REPO, TAG)
            await source.get_manifest(REPO, TAG)
            assert (first.count(), upstream.count()) == (1, 2)


@pytest.mark.parametrize("says", [404, 401, 403])
@pytest.mark.parametrize("trouble", ["ill", "gone", "left alone"])
async def test_only_the_first_says_what_tags_there_are(
    registry: StoredRegistry, upstream: Hub, trouble: str, says: int
) -> None:
    """While the first endpoint fails, another endpoint's "not found" is no answer for content without a digest. It is
    again when the first one answers."""
    body = '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
    clock = UpstreamClock()
    async with (
        scripted_server(lambda head: answer(says, body)) as second,
        upstream_source(registry, upstream.url, second.url, clock=clock) as source,
    ):
        if trouble == "gone":
            upstream.refuse()
        else:
            upstream.fault(on="any", method="", status=503, times=None)
        rounds = FAILURES_TO_OPEN + 1 if trouble == "left alone" else 1
        for _ in range(rounds):
            for request in (source.get_manifest(REPO, TAG), source.resolve_manifest(REPO, TAG)):
                clock.now += 0.1
                with pytest.raises(UpstreamUnavailable):
                    await request
        with pytest.raises(UpstreamUnavailable):
            await source.tags(REPO, None, 10)
        with pytest.raises(UpstreamUnavailable):
            await source.referrers(REPO, Digest("sha256:" + "0" * 64), None, None, 10)
        upstream.clear()
        if trouble == "gone":
            upstream.listen()
        clock.now += 61
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, Tag("absent"))
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]


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
        with pytest.raises(TooManyRequests):  # and not "unknown", nor "unavailable": it says when to come again
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
