"""The response cache. A *ready* answer is a response in the cache. As long as the store has not changed since the
answer was cached, the answer is sent again without a call on the registry."""

from __future__ import annotations

import logging
import re
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from registry.asgi import Message
from registry.http.answer_cache import CACHE_BYTES, CACHED_ANSWER_EXTENSION, LARGEST_BODY_BYTES
from storage.names import RepositoryName, Tag
from tests.fakes.answer_cache_site import APP, TAG, V2, AnswerCacheSite
from tests.fakes.app_in_process import running_app
from tests.fakes.asgi_client import AsgiClient, AsgiConnection, CachedAnswerClient, scope_of
from tests.fakes.registry_content import BY, push_blob, push_image

MIB = 1024 * 1024


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[AnswerCacheSite]:
    async with running_app(tmp_path / "data") as service:
        image = await push_image(service.hosted, APP, "x", "latest", "other")
        opened = AnswerCacheSite(service, tmp_path / "data", image)
        await opened.end_background_work()
        yield opened


# Repeated requests


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("endpoint", ["tag", "digest", "tags/list", "ping", "bare ping", "catalog", "referrers"])
@pytest.mark.slow
async def test_a_repeated_read_gets_a_ready_answer(site: AnswerCacheSite, endpoint: str, method: str) -> None:
    """A repeated request gets a ready answer. Its status, headers and body are those of the first response, except for
    the request id."""
    target = {
        "tag": TAG,
        "digest": f"{V2}/manifests/{site.image.digest}",
        "tags/list": f"{V2}/tags/list",
        "ping": "/v2/",
        "bare ping": "/v2",
        "catalog": "/v2/_catalog",
        "referrers": f"{V2}/referrers/{site.image.digest}",
    }[endpoint]
    answer = await site.cached_answer(target, method)
    assert (answer.status, bool(answer.body)) == (200, method == "GET")


@pytest.mark.parametrize("zero_copy", [False, True])
async def test_a_repeated_read_of_a_small_blob_gets_a_ready_answer(site: AnswerCacheSite, zero_copy: bool) -> None:
    """The response with a small blob is cached, whether or not the server can send files."""
    site.request = CachedAnswerClient(site.service.app, zero_copy=zero_copy)
    assert (await site.cached_answer(f"{V2}/blobs/{site.blob}")).body == b"layer of x"


async def test_each_response_has_its_own_id(site: AnswerCacheSite) -> None:
    """Each response has an id of its own, even if the requests are the same."""
    ids = {(await site.request("GET", TAG))["x-request-id"] for _ in range(100)}
    assert len(ids) == 100


async def test_a_ready_answer_is_only_for_its_method_and_path(site: AnswerCacheSite) -> None:
    """A ready answer is sent only for requests with the same method and the same path."""
    await site.cached_answer(TAG)
    await site.cached_answer(TAG, "HEAD")
    assert (await site.request("POST", TAG)).status == 405
    assert (await site.request("OPTIONS", TAG)).status == 204
    assert (await site.request("GET", f"{V2}/manifests/lates")).status == 404
    assert (await site.request("GET", "/v2/team/ap/manifests/latest")).status == 404


# Changes by other processes


async def test_the_next_request_sees_a_tag_that_another_process_moved(site: AnswerCacheSite) -> None:
    """After another process has moved a tag, the next request by tag gets the new manifest. A request by digest still
    gets the old manifest."""
    async with site.other_process() as other:
        for number in range(20):
            before = await site.cached_answer(TAG)
            image = await push_image(other, APP, f"further {number}", "latest")
            after = await site.request("GET", TAG)
            assert (before.body != after.body, after.body) == (True, image.body)
            assert (await site.request("HEAD", TAG))["docker-content-digest"] == image.digest
    assert (await site.request("GET", f"{V2}/manifests/{site.image.digest}")).body == site.image.body


@pytest.mark.parametrize("deleted", ["tag", "manifest", "blob"])
@pytest.mark.slow
async def test_content_that_another_process_deleted_gets_404(site: AnswerCacheSite, deleted: str) -> None:
    """After another process has deleted content, the next request gets 404: for a tag, for a manifest by its digest and
    its tags, and for a blob."""
    blob, digest = f"{V2}/blobs/{site.blob}", f"{V2}/manifests/{site.image.digest}"
    for target in (TAG, digest, blob):
        for method in ("GET", "HEAD")[: 1 if target == blob else 2]:
            await site.cached_answer(target, method)
    assert (await site.cached_answer(f"{V2}/tags/list")).json["tags"] == ["latest", "other"]
    async with site.other_process() as other:
        if deleted == "tag":
            await other.delete_tag(APP, Tag("latest"), by=BY)
        else:
            await other.delete_manifest(APP, site.image.digest, by=BY)
        if deleted == "blob":
            await other.delete_blob(APP, site.blob, by=BY)
        for target, exists in ((TAG, False), (digest, deleted == "tag"), (blob, deleted != "blob")):
            for method in ("GET", "HEAD"):
                assert (await site.request(method, target)).status == (200 if exists else 404)
        assert (await site.request("GET", f"{V2}/tags/list")).json["tags"] == (["other"] if deleted == "tag" else [])


async def test_the_next_list_has_content_that_another_process_pushed(site: AnswerCacheSite) -> None:
    """After a push by another process, the list of tags has the new tag, the catalog has the new repository, and the
    list of referrers has the new referrer."""
    referrers = f"{V2}/referrers/{site.image.digest}"
    for target in (f"{V2}/tags/list", "/v2/_catalog", referrers):
        await site.cached_answer(target)
    async with site.other_process() as other:
        await push_image(other, RepositoryName("new/one"), "y", "1")
        assert (await site.request("GET", "/v2/_catalog")).json["repositories"] == ["new/one", APP]
        image = await push_image(other, APP, "z", "zz", subject=site.image.digest)
        assert (await site.request("GET", f"{V2}/tags/list")).json["tags"] == ["latest", "other", "zz"]
        assert [referrer["digest"] for referrer in (await site.request("GET", referrers)).json["manifests"]] == [
            image.digest
        ]


async def test_a_response_is_not_cached_if_the_store_changes_while_it_is_sent(site: AnswerCacheSite) -> None:
    """A response is not cached if the store changes while the response is being sent."""
    async with site.other_process() as other:
        for number in range(5):
            connection = AsgiConnection("GET", [], leaves=False)

            async def send(message: Message, to: AsgiConnection = connection, seed: str = f"new {number}") -> None:
                if message["type"] == "http.response.start":
                    await push_image(other, APP, seed, "latest")
                await to.send(message)

            scope = {**scope_of("GET", TAG, {}), "extensions": {CACHED_ANSWER_EXTENSION: {}}}
            await site.service.app(scope, connection.receive, send)
            assert connection.answer.status == 200
            answer = await site.request("GET", TAG)
            assert not site.request.ready
            assert answer.body == (await other.get_manifest(APP, Tag("latest"))).body != connection.answer.body


async def test_the_cache_is_empty_after_the_application_has_ended(tmp_path: Path) -> None:
    """After the application has ended, it has no ready answers. Its store is closed, so it would not notice changes."""
    async with running_app(tmp_path / "data") as service:
        site = AnswerCacheSite(service, tmp_path / "data", await push_image(service.hosted, APP, "x", "latest"))
        await site.end_background_work()
        await site.cached_answer(TAG)
        assert site.has_ready(TAG)
    assert not site.has_ready(TAG)


# Responses that are not cached


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("range", "bytes=0-3", 206),
        ("if-none-match", '"sha256:0"', 200),
        ("if-none-match", "*", 304),
        ("if-match", '"sha256:0"', 412),
        ("if-range", '"sha256:0"', 200),
        ("expect", "100-continue", 200),
        ("content-length", "0", 200),
        ("content-length", "5", 200),
        ("transfer-encoding", "chunked", 200),
    ],
)
@pytest.mark.slow
async def test_a_request_with_a_range_a_condition_or_a_body_bypasses_the_cache(
    site: AnswerCacheSite, name: str, value: str, status: int
) -> None:
    """A request with a range, a condition, a body or `Expect` is never answered from the cache. The ready answer for
    the plain request stays in the cache."""
    target = f"{V2}/blobs/{site.blob}"
    await site.cached_answer(target)
    assert (await site.never_ready(target, headers={name: value})).status == status
    await site.cached_answer(target)


async def test_a_request_with_a_query_bypasses_the_cache(site: AnswerCacheSite) -> None:
    """A request with a query is never answered from the cache, even if the query has no meaning."""
    await site.cached_answer(f"{V2}/tags/list")
    assert (await site.never_ready(f"{V2}/tags/list?n=1")).json["tags"] == ["latest"]
    assert (await site.never_ready(f"{V2}/tags/list?last=latest")).json["tags"] == ["other"]
    assert (await site.never_ready(f"{TAG}?x")).status == 200


async def test_a_head_of_a_blob_bypasses_the_cache(site: AnswerCacheSite) -> None:
    """A HEAD of a blob is never answered from the cache, even after a GET of the blob. The HEAD has to reach the
    store, which then protects the blob from garbage collection."""
    target = f"{V2}/blobs/{site.blob}"
    await site.cached_answer(target)
    assert (await site.never_ready(target, "HEAD")).status == 200


@pytest.mark.parametrize("target", ["manifests/none", "blobs/sha256:" + "0" * 64, "tags/lists", "blobs/x"])
async def test_an_error_is_never_cached(site: AnswerCacheSite, target: str) -> None:
    """Only responses with status 200 are cached."""
    for method in ("GET", "HEAD"):
        assert (await site.never_ready(f"{V2}/{target}", method)).status in (400, 404)


async def test_the_status_of_an_upload_session_is_never_cached(site: AnswerCacheSite) -> None:
    """The status of an upload session is never cached, because the version of the store does not change when data is
    written to the session."""
    location = (await site.request("POST", f"{V2}/blobs/uploads/"))["location"]
    assert (await site.never_ready(location))["range"] == "0-0"
    assert (
        await site.request("PATCH", location, {"content-type": "application/octet-stream"}, b"x" * 10)
    ).status == 202
    answer = await site.never_ready(location)
    assert (answer.status, answer["range"]) == (204, "0-9")


@pytest.mark.parametrize("zero_copy", [False, True])
async def test_a_large_body_is_not_cached(site: AnswerCacheSite, zero_copy: bool) -> None:
    """A response is cached if its body has at most the largest size for the cache. A response with a larger body is not
    cached."""
    site.request = CachedAnswerClient(site.service.app, zero_copy=zero_copy)
    too_large = (await push_blob(site.service.hosted, APP, b"y" * (LARGEST_BODY_BYTES + 1))).digest
    assert len((await site.never_ready(f"{V2}/blobs/{too_large}")).body) == LARGEST_BODY_BYTES + 1
    if not zero_copy:
        largest = (await push_blob(site.service.hosted, APP, b"x" * LARGEST_BODY_BYTES)).digest
        assert (await site.cached_answer(f"{V2}/blobs/{largest}")).body == b"x" * LARGEST_BODY_BYTES


async def test_nothing_is_cached_if_the_server_does_not_ask_for_cached_answers(site: AnswerCacheSite) -> None:
    """The cache is used only if the HTTP server asks for cached answers by an extension of the ASGI scope. Otherwise no
    response is cached."""
    for _ in range(4):
        assert (await AsgiClient(site.service.app)("GET", TAG)).status == 200
    await site.request("GET", TAG)
    assert not site.request.ready


# Memory, the access log and the rate limit


@pytest.mark.slow
async def test_a_blob_that_is_sent_in_parts_is_not_collected_in_memory(site: AnswerCacheSite) -> None:
    """Over TLS, a blob is sent in parts. The cache does not collect these parts in memory."""
    size = 32 * MIB
    digest = (await push_blob(site.service.hosted, APP, bytes(size))).digest
    sent_bytes = 0

    async def send(message: Message) -> None:
        nonlocal sent_bytes
        sent_bytes += len(message.get("body", b""))

    scope = {**scope_of("GET", f"{V2}/blobs/{digest}", {}), "extensions": {CACHED_ANSWER_EXTENSION: {}}}
    tracemalloc.start()
    try:
        await site.service.app(scope, AsgiConnection("GET", [], leaves=False).receive, send)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent_bytes == size
    assert peak_bytes < 8 * MIB


async def test_the_response_to_a_single_request_is_not_cached(site: AnswerCacheSite) -> None:
    """A response is cached only when the same request is received a second time. So requests for many different names
    do not evict the ready answers."""
    assert (await site.request("GET", TAG)).status == 200
    assert not site.has_ready(TAG)
    await site.cached_answer(TAG)


@pytest.mark.slow
async def test_the_cache_has_a_largest_size(site: AnswerCacheSite) -> None:
    """The bodies of all ready answers together do not exceed the size of the cache. The oldest answers are evicted."""
    digest = (await push_blob(site.service.hosted, APP, b"x" * LARGEST_BODY_BYTES)).digest
    targets = [
        f"{V2}/blobs/sha256:{_spelled(digest[7:], number)}" for number in range(3 * CACHE_BYTES // LARGEST_BODY_BYTES)
    ]
    for target in targets:
        for _ in range(2):
            assert (await site.request("GET", target)).status == 200
    ready = [site.has_ready(target) for target in targets]
    assert 0 < sum(ready) * LARGEST_BODY_BYTES <= CACHE_BYTES
    assert ready[-1]
    assert not ready[0]


def _spelled(text: str, number: int) -> str:
    """Returns `text` with some characters percent-encoded. Each `number` gives another spelling of the same text."""
    return "".join(f"%{ord(letter):x}" if number >> bit & 1 else letter for bit, letter in enumerate(text))


ACCESS_LINE = re.compile(
    r"(\S+) (\S+) status=200 bytes=\d+ received=0 ms=[\d.]+ principal=anonymous address=(\S+) "
    r"repository=(\S+) reference=(\S+) cache=answer request=(\S+) trace=- agent=.*"
)


@pytest.mark.parametrize("endpoint", ["get_manifest", "resolve_manifest", "open_blob", "tags", "repositories"])
@pytest.mark.slow
async def test_a_ready_answer_is_in_the_access_log(
    site: AnswerCacheSite, caplog: pytest.LogCaptureFixture, endpoint: str
) -> None:
    """When a ready answer is sent, the access log gets one line. It has the method, the path, the principal, the
    address, and the request id of the response."""
    digest = str(site.image.digest)
    method, target, repo, reference = {
        "get_manifest": ("GET", TAG, APP, "latest"),
        "resolve_manifest": ("HEAD", f"{V2}/manifests/{digest}", APP, digest),
        "open_blob": ("GET", f"{V2}/blobs/{site.blob}", APP, str(site.blob)),
        "tags": ("GET", f"{V2}/tags/list", APP, "-"),
        "repositories": ("GET", "/v2/_catalog", "-", "-"),
    }[endpoint]
    caplog.set_level(logging.INFO, "registry.access")
    await site.cached_answer(target, method)
    for address in ("192.0.2.7", "198.51.100.9", "2001:db8::1"):
        caplog.clear()
        site.request.address = address
        answer = await site.request(method, target)
        assert site.request.ready
        (record,) = [record for record in caplog.records if record.name == "registry.access"]
        match = ACCESS_LINE.fullmatch(record.getMessage())
        assert match is not None
        assert match.groups() == (method, target, address, repo, reference, answer["x-request-id"])


async def test_ready_answers_count_toward_the_rate_limit(tmp_path: Path) -> None:
    """Ready answers count toward the rate limit. A client that exceeds the limit gets 429. Clients at other addresses
    still get ready answers."""
    limits: dict[str, Any] = {"requests_per_second": 0.001, "burst": 5}
    async with running_app(tmp_path / "data", limits=limits) as service:
        site = AnswerCacheSite(service, tmp_path / "data", await push_image(service.hosted, APP, "x", "latest"))
        await site.end_background_work()
        for number in range(5):
            assert (await site.request("GET", TAG)).status == 200
            assert site.request.ready == (number > 1)  # the second response is cached
        for _ in range(3):
            refused = await site.request("GET", TAG)
            assert (refused.status, refused.code, site.request.ready) == (429, "TOOMANYREQUESTS", False)
            assert int(refused["retry-after"]) > 0
        site.request.address = "198.51.100.9"
        for _ in range(5):
            assert (await site.request("GET", TAG)).status == 200
            assert site.request.ready
        assert (await site.request("GET", TAG)).status == 429
