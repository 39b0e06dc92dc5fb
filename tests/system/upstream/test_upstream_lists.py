"""Lists of tags and referrers: complete and in byte order, however the upstream pages them."""

from __future__ import annotations

import asyncio
import json
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
    found: list[str] = []
    while True:
        page = await source.tags(REPO, found[-1] if found else None, limit)
        found += page.items
        if not page.more:
            return found


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_tags(registry: StoredRegistry, upstream: Hub, image: ImageTree, limit: int) -> None:
    """All tags are listed page by page, from an upstream with another page size, in one reading."""
    content = UpstreamContent()
    names = [f"v{number}" for number in range(50)] + ["Zed", "a_", "latest", "1"]
    content.add(REPO, image, *names)
    upstream.put(content)
    upstream.set(page=20)
    async with upstream_source(registry, upstream.url) as source:
        assert await all_tags(source, limit) == sorted(names)
        assert (await source.tags(REPO, "v48", 10)).items == ["v49", *[f"v{n}" for n in range(5, 10)]]
    assert upstream.count("tags") == 3


async def test_tags_that_are_not_in_byte_order(registry: StoredRegistry) -> None:
    """Registries may sort by collation or not at all, repeat tags, and list invalid ones; no valid tag is lost."""
    pages = {"1": ["b", "B", "a"], "2": ["a", "not a tag", 7, "Z"], "3": None}

    def reply(head: str) -> bytes:
        number = head.split()[1].partition("page=")[2] or "1"
        link = {"link": f'</v2/{REPO}/tags/list?page={int(number) + 1}>; rel="next"'} if number < "3" else {}
        return answer(200, json.dumps({"name": REPO, "tags": pages[number]}), **link)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert await all_tags(source, 2) == ["B", "Z", "a", "b"]


async def test_a_new_tag_is_seen(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A first page is always requested again."""
    async with upstream_source(registry, upstream.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]
        upstream.tag(REPO, "0", image.digest)
        assert (await source.tags(REPO, None, 10)).items == ["0", "1", "latest"]


async def test_a_long_list_is_read_once(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If a list takes many upstream requests, concurrent and later clients share one reading."""
    content = UpstreamContent()
    content.add(REPO, image, *(f"v{number}" for number in range(50)))
    upstream.put(content)
    upstream.set(page=10)
    async with upstream_source(registry, upstream.url) as source:
        upstream.fault(on="tags", stall=True)
        asking = [asyncio.create_task(source.tags(REPO, None, limit)) for limit in (1, 1, 7, 1000)]
        await upstream.arrival(1, "tags")
        asking[0].cancel()
        upstream.release()
        found = await asyncio.gather(*asking[1:])
        assert [len(page.items) for page in found] == [1, 7, 52]
        for _ in range(5):
            assert (await source.tags(REPO, None, 1)).items == ["1"]
    assert upstream.count("tags") == 6


async def test_lists_are_kept_for_a_moment() -> None:
    """Lists are cached for a short time and within a memory limit. The last list is always cached."""
    now, read = 1000.0, 0

    async def reading() -> CompleteList[str]:
        nonlocal read
        read += 1
        return CompleteList([f"{read}"], 2, size)

    readings: ListCache[str] = ListCache("far.test", lambda: now)

    async def count(key: str) -> str:
        return (await readings.get(key, reading, is_first_page=True))[0]

    size = LIST_CACHE_BYTES // 2 - LIST_OVERHEAD_BYTES
    assert [await count(key) for key in "aabbab"] == ["1", "1", "2", "2", "1", "2"]
    now += LIST_CACHED_SECONDS + 1
    assert [await count(key) for key in "aba"] == ["3", "4", "3"]
    size = 2 * LIST_CACHE_BYTES
    assert [await count(key) for key in "cca"] == ["5", "5", "6"]
    await readings.aclose()


async def test_few_lists_are_read_at_a_time(registry: StoredRegistry, upstream: Hub) -> None:
    """Requests for many different lists do not use memory and connections for all of them at once."""
    upstream.fault(on="tags", stall=True, times=MAX_CONCURRENT_LISTS)
    async with upstream_source(registry, upstream.url) as source:
        names = [type(REPO)(f"library/x{number}") for number in range(3 * MAX_CONCURRENT_LISTS)]
        asking = [asyncio.create_task(source.tags(name, None, 9)) for name in names]
        await upstream.arrival(MAX_CONCURRENT_LISTS, "tags")
        await source.get_manifest(REPO, Tag("1"))
        assert upstream.count("tags") == MAX_CONCURRENT_LISTS
        upstream.release()
        ends = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(end, NameUnknown) for end in ends)
    assert upstream.count("tags") == len(names)


async def test_an_upstream_that_refuses_our_page_size(registry: StoredRegistry) -> None:
    """If the upstream refuses our page size, the list is requested without one."""

    def reply(head: str) -> bytes:
        return answer(400) if "n=" in head.split()[1] else answer(200, json.dumps({"tags": ["x"]}))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["x"]


async def test_a_later_page_that_is_refused_ends_the_list(registry: StoredRegistry) -> None:
    """A 400 for a later page is not about our page size: the list fails and does not start again at its first page."""
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


async def test_the_next_page_is_asked_at_home(registry: StoredRegistry) -> None:
    """A Link that names another host, as behind a proxy, is followed on the requested origin."""

    def reply(head: str) -> bytes:
        if "last=" in head.split()[1]:
            return answer(200, json.dumps({"tags": ["y"]}))
        return answer(200, json.dumps({"tags": ["x"]}), link="<http://inner.test:81/v2/q/tags/list?last=x>; rel=next")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.tags(REPO, None, 10)).items == ["x", "y"]


async def test_lists_that_are_none(registry: StoredRegistry, upstream: Hub) -> None:
    """A missing repository raises NameUnknown; an invalid list is an upstream failure."""
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
    """Manifests that refer to an image: three signatures and a bill of materials."""
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


@pytest.mark.parametrize("api", [True, False])
async def test_referrers(registry: StoredRegistry, upstream: Hub, image: ImageTree, api: bool) -> None:
    """Referrers come from the API in pages, or from the fallback tag; filtered and sorted by digest."""
    content = UpstreamContent()
    made = signatures(image)
    for each in made:
        content.add(REPO, each)
    if not api:
        content.add(REPO, fallback_index(*made), fallback_tag(image.digest))
    upstream.put(content)
    upstream.set(referrers=api, page=2)
    ordered = sorted(each.digest for each in made)
    async with upstream_source(registry, upstream.url) as source:
        subject = Digest(image.digest)
        page = await source.referrers(REPO, subject, None, None, 100)
        assert ([each.digest for each in page.items], page.more) == (ordered, False)
        assert {(each.annotations or {})["number"] for each in page.items} == {"0", "1", "2", "3"}
        page = await source.referrers(REPO, subject, "application/vnd.test.sbom", None, 100)
        assert [each.digest for each in page.items] == [made[3].digest]
        page = await source.referrers(REPO, subject, None, ordered[0], 2)
        assert ([each.digest for each in page.items], page.more) == (ordered[1:3], True)
        nothing = await source.referrers(REPO, Digest("sha256:" + "0" * 64), None, None, 100)
        assert (nothing.items, nothing.more) == ([], False)


@pytest.mark.parametrize("api", [200, 404])
async def test_referrers_that_are_in_doubt(registry: StoredRegistry, api: int) -> None:
    """If something other than the registry refuses the list or the fallback tag, cached referrers can be listed. A
    refusal by the registry is an empty list."""
    body = "<html>not for you</html>"

    def reply(head: str) -> bytes:
        if "/referrers/" in head.split()[1] and api == 404:
            return answer(404)
        return answer(403 if body.startswith("<") else 404, body)

    subject = Digest("sha256:" + "0" * 64)
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UnconfirmedNameUnknown):
            await source.referrers(REPO, subject, None, None, 10)
        body = '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
        assert not (await source.referrers(REPO, subject, None, None, 10)).items


async def test_referrers_that_were_filtered_there(registry: StoredRegistry) -> None:
    """`OCI-Filters-Applied` marks a filtered list; descriptors without an artifact type are accepted then."""
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest_of(b"x"), "size": 1}
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    )
    applied = {"oci_filters_applied": "artifactType"}
    async with (
        scripted_server(lambda head: answer(200, index, **applied)) as server,
        upstream_source(registry, server.url) as source,
    ):
        subject = Digest("sha256:" + "0" * 64)
        assert len((await source.referrers(REPO, subject, "a/b", None, 9)).items) == 1
        assert "artifactType=a%2Fb" in server.heads[0]
        applied.clear()
        assert (await source.referrers(REPO, subject, "a/b", None, 9)).items == []


async def test_a_list_without_end(registry: StoredRegistry) -> None:
    """Reading an endless list stops after a limited number of pages."""
    body = json.dumps({"tags": ["x"]})
    round_about = {"link": '</v2/x/tags/list?n=1>; rel="next"'}
    async with (
        scripted_server(lambda head: answer(200, body, **round_about)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="does not end"):
            await source.tags(REPO, None, 10)


async def test_a_list_that_is_too_long(registry: StoredRegistry) -> None:
    """Reading stops when a list exceeds its memory limit."""
    body = json.dumps({"tags": ["x"]}) + " " * (7 * MIB)
    following = {"link": '</v2/x/tags/list?n=1>; rel="next"'}
    async with (
        scripted_server(always(answer(200, body, **following))) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="a list of more than"):
            await source.tags(REPO, None, 10)
        assert server.count < 12


async def test_a_page_of_too_many_tags(registry: StoredRegistry) -> None:
    """A page that would take too long to parse is refused, and the message names the limit."""
    page = b'{"name":"a","tags":[' + b'"a",' * 400_000 + b'"b"]}'
    async with scripted_server(always(answer(200, page))) as script, upstream_source(registry, script.url) as source:
        with pytest.raises(UpstreamUnavailable, match="a list that is too large: it holds more than 300000 values"):
            await source.tags(REPO, None, 10)


async def test_a_list_that_takes_too_much_memory(registry: StoredRegistry) -> None:
    """Entries count against the memory limit beside their text: pages of short tags are bounded, too."""
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


async def test_many_tags_come_in_order(registry: StoredRegistry) -> None:
    """More tags than are sorted in one call are in order."""
    tags = [f"{n * 7919 % 35_000:05}" for n in range(35_000)]
    async with (
        scripted_server(always(answer(200, json.dumps({"tags": tags})))) as script,
        upstream_source(registry, script.url) as source,
    ):
        page = await source.tags(REPO, "20000", 5)
    assert page.items == [f"{n:05}" for n in range(20_001, 20_006)]
