"""Tests of the upstream client, which reads lists of tags and referrers from an upstream registry."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from registry.mirror.upstream_client import UnconfirmedNameUnknown
from registry.upstream.list_cache import (
    LIST_CACHE_BYTES,
    LIST_CACHED_SECONDS,
    LIST_OVERHEAD_BYTES,
    MAX_CONCURRENT_LISTS,
    CompleteList,
    ListCache,
)
from registry.upstream.request_limits import MIB
from storage.errors import NameUnknown, UpstreamUnavailable
from storage.names import Digest, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.client_images import digest_of
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import (
    ImageTree,
    UpstreamBlob,
    UpstreamContent,
    fallback_index,
    fallback_tag,
    manifest_of,
)
from tests.fakes.upstream_source import REPO, always, answer, scripted_server, upstream_source


async def all_tags(source: Any, limit: int) -> list[str]:
    """Returns all tags. Requests pages of `limit` tags."""
    tags: list[str] = []
    while True:
        page = await source.tags(REPO, tags[-1] if tags else None, limit)
        tags += page.items
        if not page.more:
            return tags


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_tags(registry: StoredRegistry, upstream: Hub, image: ImageTree, limit: int) -> None:
    """All tags can be listed with any page size. The upstream client reads the list once."""
    content = UpstreamContent()
    names = [f"v{number}" for number in range(50)] + ["Zed", "a_", "latest", "1"]
    content.add(REPO, image, *names)
    upstream.put(content)
    upstream.set(page=20)
    async with upstream_source(registry, upstream.url) as source:
        assert await all_tags(source, limit) == sorted(names)
        assert (await source.tags(REPO, "v48", 10)).items == ["v49", *[f"v{n}" for n in range(5, 10)]]
    assert upstream.count("tags") == 3


async def test_unsorted_and_invalid_tags(registry: StoredRegistry) -> None:
    """The upstream client lists all valid tags once and in byte order, whatever the order of the upstream."""
    pages = {"1": ["b", "B", "a"], "2": ["a", "not a tag", 7, "Z"], "3": None}

    def reply(head: str) -> bytes:
        number = head.split()[1].partition("page=")[2] or "1"
        link = {"link": f'</v2/{REPO}/tags/list?page={int(number) + 1}>; rel="next"'} if number < "3" else {}
        return answer(200, json.dumps({"name": REPO, "tags": pages[number]}), **link)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert await all_tags(source, 2) == ["B", "Z", "a", "b"]


async def test_new_tag_is_listed_at_once(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A list of one upstream page is read again for each request for its first page, so a new tag is listed at once."""
    async with upstream_source(registry, upstream.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]
        upstream.tag(REPO, "0", image.digest)
        assert (await source.tags(REPO, None, 10)).items == ["0", "1", "latest"]


async def test_long_list_is_read_once_for_several_clients(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """A list of several upstream pages is read once for clients at the same time and for clients shortly afterwards."""
    content = UpstreamContent()
    content.add(REPO, image, *(f"v{number}" for number in range(50)))
    upstream.put(content)
    upstream.set(page=10)
    async with upstream_source(registry, upstream.url) as source:
        upstream.fault(on="tags", stall=True)
        clients = [asyncio.create_task(source.tags(REPO, None, limit)) for limit in (1, 1, 7, 1000)]
        await upstream.arrival(1, "tags")
        clients[0].cancel()
        upstream.release()
        pages = await asyncio.gather(*clients[1:])
        assert [len(page.items) for page in pages] == [1, 7, 52]
        for _ in range(5):
            assert (await source.tags(REPO, None, 1)).items == ["1"]
    assert upstream.count("tags") == 6


async def test_lists_are_cached_for_a_short_time() -> None:
    """Lists are cached for a short time and within a memory limit. The latest list is cached even if it is above the
    memory limit."""
    now, reading_count = 1000.0, 0

    async def read_list() -> CompleteList[str]:
        nonlocal reading_count
        reading_count += 1
        return CompleteList([f"{reading_count}"], 2, size)

    cache: ListCache[str] = ListCache("far.test", lambda: now)

    async def which_reading(key: str) -> str:
        """Returns the number of the call of `read_list` that returned the list `key`."""
        return (await cache.get(key, read_list, is_first_page=True))[0]

    # Two lists of this size fill the cache.
    size = LIST_CACHE_BYTES // 2 - LIST_OVERHEAD_BYTES - sys.getsizeof("a")
    assert [await which_reading(key) for key in "aabbab"] == ["1", "1", "2", "2", "1", "2"]
    now += LIST_CACHED_SECONDS + 1
    assert [await which_reading(key) for key in "aba"] == ["3", "4", "3"]
    size = 2 * LIST_CACHE_BYTES
    assert [await which_reading(key) for key in "cca"] == ["5", "5", "6"]
    await cache.aclose()


async def test_keys_of_cached_lists_count_against_the_memory_limit() -> None:
    """The key of a list counts against the memory limit, because a client can make the key very long."""
    reading_count = 0

    async def read_list() -> CompleteList[str]:
        nonlocal reading_count
        reading_count += 1
        return CompleteList([], 2, 0)

    cache: ListCache[str] = ListCache("far.test")
    long_key = "x" * (LIST_CACHE_BYTES // 2)
    for key in ("a", f"{long_key}1", f"{long_key}2", "a"):
        await cache.get(key, read_list, is_first_page=True)
    assert reading_count == 4
    await cache.aclose()


async def test_number_of_concurrent_lists_is_limited(registry: StoredRegistry, upstream: Hub) -> None:
    """The upstream client reads only a limited number of lists at once."""
    upstream.fault(on="tags", stall=True, times=MAX_CONCURRENT_LISTS)
    async with upstream_source(registry, upstream.url) as source:
        names = [type(REPO)(f"library/x{number}") for number in range(3 * MAX_CONCURRENT_LISTS)]
        requests = [asyncio.create_task(source.tags(name, None, 9)) for name in names]
        await upstream.arrival(MAX_CONCURRENT_LISTS, "tags")
        await source.get_manifest(REPO, Tag("1"))
        assert upstream.count("tags") == MAX_CONCURRENT_LISTS
        upstream.release()
        results = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(result, NameUnknown) for result in results)
    assert upstream.count("tags") == len(names)


async def test_page_size_that_the_upstream_refuses(registry: StoredRegistry) -> None:
    """If the upstream answers 400 to a request with a page size, the upstream client requests the list without a page
    size."""

    def reply(head: str) -> bytes:
        return answer(400) if "n=" in head.split()[1] else answer(200, json.dumps({"tags": ["x"]}))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["x"]


async def test_refused_later_page_fails_the_list(registry: StoredRegistry) -> None:
    """If the upstream answers 400 for a later page, the list fails. The upstream client does not start again,
    because the upstream itself has named the URL of that page."""
    targets: list[str] = []

    def reply(head: str) -> bytes:
        targets.append(head.split()[1])
        if "last=" in targets[-1]:
            return answer(400, "{}")
        link = {"link": f'</v2/{REPO}/tags/list?last=b>; rel="next"'}
        return answer(200, json.dumps({"name": REPO, "tags": ["a", "b"]}), **link)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match="answers 400"):
            await source.tags(REPO, None, 10)
    assert targets == [f"/v2/{REPO}/tags/list?n=1000", f"/v2/{REPO}/tags/list?last=b"]


async def test_next_page_is_requested_from_the_same_host(registry: StoredRegistry) -> None:
    """The upstream client requests the next page from the original host, even if the header Link names another host,
    such as an internal one."""

    def reply(head: str) -> bytes:
        if "last=" in head.split()[1]:
            return answer(200, json.dumps({"tags": ["y"]}))
        return answer(200, json.dumps({"tags": ["x"]}), link="<http://inner.test:81/v2/q/tags/list?last=x>; rel=next")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["x", "y"]


async def test_missing_and_invalid_lists(registry: StoredRegistry, upstream: Hub) -> None:
    """A missing repository raises NameUnknown. A response that is not a list raises UpstreamUnavailable."""
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(NameUnknown):
            await source.tags(type(REPO)("library/absent"), None, 10)
    for body in ("", "[]", '{"tags": 5}', "<html>"):
        async with (
            scripted_server(always(answer(200, body))) as server,
            upstream_source(registry, server.url) as source,
        ):
            with pytest.raises(UpstreamUnavailable, match="no list of tags"):
                await source.tags(REPO, None, 10)


def signatures(image: ImageTree) -> list[ImageTree]:
    """Returns manifests that refer to the image: three signatures and a bill of materials (SBOM)."""
    kinds = ["application/vnd.test.signature"] * 3 + ["application/vnd.test.sbom"]
    return [
        manifest_of(
            UpstreamBlob(b"{}", "application/vnd.oci.empty.v1+json"),
            UpstreamBlob(f"signature {number}".encode(), "text/plain"),
            artifact_type=kind,
            subject=image,
            annotations={"number": str(number)},
        )
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("has_api", [True, False])
async def test_referrers(registry: StoredRegistry, upstream: Hub, image: ImageTree, has_api: bool) -> None:
    """The upstream client reads referrers from the referrers API, or from the fallback tag if the upstream has no such
    API. It filters referrers by artifact type and sorts them by digest."""
    content = UpstreamContent()
    referrers = signatures(image)
    for referrer in referrers:
        content.add(REPO, referrer)
    if not has_api:
        content.add(REPO, fallback_index(*referrers), fallback_tag(image.digest))
    upstream.put(content)
    upstream.set(referrers=has_api, page=2)
    ordered = sorted(referrer.digest for referrer in referrers)
    async with upstream_source(registry, upstream.url) as source:
        subject = Digest(image.digest)
        page = await source.referrers(REPO, subject, None, None, 100)
        assert ([referrer.digest for referrer in page.items], page.more) == (ordered, False)
        assert {(referrer.annotations or {})["number"] for referrer in page.items} == {"0", "1", "2", "3"}
        page = await source.referrers(REPO, subject, "application/vnd.test.sbom", None, 100)
        assert [referrer.digest for referrer in page.items] == [referrers[3].digest]
        page = await source.referrers(REPO, subject, None, ordered[0], 2)
        assert ([referrer.digest for referrer in page.items], page.more) == (ordered[1:3], True)
        empty_page = await source.referrers(REPO, Digest("sha256:" + "0" * 64), None, None, 100)
        assert (empty_page.items, empty_page.more) == ([], False)


@pytest.mark.parametrize("api_status", [200, 404])
async def test_a_proxy_cannot_confirm_that_referrers_are_missing(registry: StoredRegistry, api_status: int) -> None:
    """If a proxy refuses the request, the upstream client raises UnconfirmedNameUnknown. If the upstream itself answers
    that there is no such manifest, the list is empty. `api_status` 404: the upstream has no referrers API."""
    body = "<html>not for you</html>"

    def reply(head: str) -> bytes:
        if "/referrers/" in head.split()[1] and api_status == 404:
            return answer(404)
        return answer(403 if body.startswith("<") else 404, body)

    subject = Digest("sha256:" + "0" * 64)
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UnconfirmedNameUnknown):
            await source.referrers(REPO, subject, None, None, 10)
        body = '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
        assert not (await source.referrers(REPO, subject, None, None, 10)).items


async def test_referrers_filtered_by_the_upstream(registry: StoredRegistry) -> None:
    """The header `OCI-Filters-Applied` states that the upstream has filtered the list. Without the header, the
    upstream client filters the list."""
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest_of(b"x"), "size": 1}
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    )
    filter_header = {"oci_filters_applied": "artifactType"}
    async with (
        scripted_server(lambda head: answer(200, index, **filter_header)) as server,
        upstream_source(registry, server.url) as source,
    ):
        subject = Digest("sha256:" + "0" * 64)
        assert len((await source.referrers(REPO, subject, "a/b", None, 9)).items) == 1
        assert "artifactType=a%2Fb" in server.heads[0]
        filter_header.clear()
        assert (await source.referrers(REPO, subject, "a/b", None, 9)).items == []


async def test_endless_list(registry: StoredRegistry) -> None:
    """A list whose pages do not end fails after a limited number of pages."""
    body = json.dumps({"tags": ["x"]})
    link_to_itself = {"link": '</v2/x/tags/list?n=1>; rel="next"'}
    async with (
        scripted_server(lambda head: answer(200, body, **link_to_itself)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="does not end"):
            await source.tags(REPO, None, 10)


async def test_list_beyond_the_memory_limit(registry: StoredRegistry) -> None:
    """A list beyond the memory limit fails, and the upstream client stops reading."""
    body = json.dumps({"tags": ["x"]}) + " " * (7 * MIB)
    next_page = {"link": '</v2/x/tags/list?n=1>; rel="next"'}
    async with (
        scripted_server(always(answer(200, body, **next_page))) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="a list of more than"):
            await source.tags(REPO, None, 10)
        assert server.count < 12


async def test_page_with_too_many_tags(registry: StoredRegistry) -> None:
    """A page with too many tags is refused."""
    page = b'{"name":"a","tags":[' + b'"a",' * 400_000 + b'"b"]}'
    async with scripted_server(always(answer(200, page))) as script, upstream_source(registry, script.url) as source:
        with pytest.raises(UpstreamUnavailable, match="a list that is too large: it holds more than 300000 values"):
            await source.tags(REPO, None, 10)


async def test_list_of_short_tags_beyond_the_memory_limit(registry: StoredRegistry) -> None:
    """A list of many short tags is limited too, because each tag counts with more than its text."""
    number = 0

    def reply(head: str) -> bytes:
        nonlocal number
        first, number = number, number + 50_000
        tags = json.dumps({"tags": [f"{n:x}" for n in range(first, number)]})
        return answer(200, tags, link=f'</v2/{REPO}/tags/list?last={number}>; rel="next"')

    async with scripted_server(reply) as script, upstream_source(registry, script.url) as source:
        with pytest.raises(UpstreamUnavailable, match="a list of more than"):
            await source.tags(REPO, None, 10)
        assert script.count < 10


async def test_many_tags_are_sorted(registry: StoredRegistry) -> None:
    """A long list is in byte order, although the upstream client sorts it in parts."""
    # The list has each number once, in a mixed order: 7919 and 35,000 have no common factor.
    tags = [f"{n * 7919 % 35_000:05}" for n in range(35_000)]
    async with (
        scripted_server(always(answer(200, json.dumps({"tags": tags})))) as script,
        upstream_source(registry, script.url) as source,
    ):
        page = await source.tags(REPO, "20000", 5)
    assert page.items == [f"{n:05}" for n in range(20_001, 20_006)]
