"""Lists of tags, repositories and referrers over HTTP (OCI distribution spec, "Content Discovery")."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from registry.auth.rights.sealed_cursors import SEALED_LENGTH
from registry.http import DistributionAPI, RequestLimits
from registry.http.listing import MAX_LAST_CHARACTERS
from storage.content import OCI_INDEX, OCI_MANIFEST, Page, digest_of
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NameSet
from storage.wrappers import RefusingRegistry
from tests.fakes.asgi_client import AsgiAnswer, AsgiClient
from tests.unit.registry.conftest import REPO, V2, put_blob, put_image

SUBJECT = digest_of(b"subject")
SUBJECT_DESCRIPTOR = {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 7}


def next_of(answer: AsgiAnswer) -> str | None:
    """Returns the path in the Link header, or None. Checks that the Link has no host."""
    if "link" not in answer:
        return None
    match = re.fullmatch(r'<(/v2/[!-;=?-~]+)>; rel="next"', answer["link"])
    assert match
    return match[1]


async def walk(client: AsgiClient, path: str, key: str) -> list[list[str]]:
    """Follows the Link headers, and returns the entries of each page."""
    pages, following = [], path
    while following:
        answer = await client("GET", following)
        assert answer.status == 200
        pages.append(answer.json[key])
        following = next_of(answer) or ""
    return pages


async def test_tags_are_in_byte_order(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Tags are sorted by their bytes, as in Go: upper case before lower case, and '-' before digits."""
    tags = ["v10", "v2", "V1", "_x", "a-b", "a.b", "1"]
    await put_image(registry, *tags)
    answer = await client("GET", f"{V2}/tags/list")
    assert answer.json == {"name": REPO, "tags": sorted(tags)}
    assert next_of(answer) is None
    assert (await client("HEAD", f"{V2}/tags/list")).status == 200


async def test_the_pages_have_each_tag_once(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Together, the pages of up to `n` tags have each tag once. The last page has no Link, even if it has `n` tags."""
    tags = sorted(f"t{number}" for number in range(10))
    await put_image(registry, *tags)
    for count in (1, 3, 5, 10, 11):
        pages = await walk(client, f"{V2}/tags/list?n={count}", "tags")
        assert [tag for page in pages for tag in page] == tags
        assert [len(page) for page in pages[:-1]] == [count] * (len(pages) - 1)
        assert pages[-1]


async def test_last_without_n(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The list has all tags that sort after `last`. A tag with the name `last` need not exist."""
    await put_image(registry, "a", "b", "c")
    assert (await client("GET", f"{V2}/tags/list?last=a")).json["tags"] == ["b", "c"]
    assert (await client("GET", f"{V2}/tags/list?last=bb&n=5")).json["tags"] == ["c"]
    assert (await client("GET", f"{V2}/tags/list?last=zz")).json["tags"] == []


async def test_n_zero(client: AsgiClient, registry: MemoryRegistry) -> None:
    """With `n=0`, the list is empty and has no Link. An unknown repository still gets 404."""
    await put_image(registry, "a")
    answer = await client("GET", f"{V2}/tags/list?n=0")
    assert (answer.json["tags"], "link" in answer) == ([], False)
    answer = await client("GET", "/v2/_catalog?n=0")
    assert (answer.json, "link" in answer) == ({"repositories": []}, False)
    assert (await client("GET", "/v2/never/heard/tags/list?n=0")).code == "NAME_UNKNOWN"


@pytest.mark.parametrize("n", ["-1", "x", "", "1.5", "1e3", "+1", "%2B1", "0x1", "9" * 30, "\u0661"])
async def test_a_bad_n_is_400(client: AsgiClient, registry: MemoryRegistry, n: str) -> None:
    """If `n` is not a number in ASCII digits, the request gets 400."""
    await put_image(registry, "a")
    for path in (f"{V2}/tags/list", "/v2/_catalog"):
        answer = await client("GET", f"{path}?n={n}".encode())
        assert (answer.status, answer.code) == (400, "UNSUPPORTED")


async def test_a_last_longer_than_any_cursor_is_400(client: AsgiClient, registry: MemoryRegistry) -> None:
    """If `last` is longer than every name and every cursor of the registry, the request gets 400. The text need not be
    a name."""
    await put_image(registry, "a")
    for path in (f"{V2}/tags/list", "/v2/_catalog", f"{V2}/referrers/{SUBJECT}"):
        assert (await client("GET", f"{path}?last={'%F0%9F%98%80' * MAX_LAST_CHARACTERS}")).status == 200
        answer = await client("GET", f"{path}?last={'~' * (MAX_LAST_CHARACTERS + 1)}")
        assert (answer.status, answer.code) == (400, "UNSUPPORTED")
        assert f"last has {MAX_LAST_CHARACTERS + 1} characters" in answer.json["errors"][0]["message"]
    assert MAX_LAST_CHARACTERS >= SEALED_LENGTH


async def test_pages_have_a_largest_size(registry: MemoryRegistry) -> None:
    """Without `n`, a page has the default size. With an `n` above the limit, a page has the largest allowed size. Both
    have a Link to the next page."""
    limits = RequestLimits(tags_per_page=4, default_repositories_per_page=2, max_repositories_per_page=3)
    client = AsgiClient(DistributionAPI(registry, limits=limits))
    tags = sorted(f"t{number}" for number in range(10))
    await put_image(registry, *tags)
    for query in ("", "?n=1000000"):
        pages = await walk(client, f"{V2}/tags/list{query}", "tags")
        assert [len(page) for page in pages] == [4, 4, 2]
    for name in ("a", "b", "c"):
        await put_image(registry, "1", repo=name)
    assert [len(page) for page in await walk(client, "/v2/_catalog", "repositories")] == [2, 2]
    assert [len(page) for page in await walk(client, "/v2/_catalog?n=9", "repositories")] == [3, 1]


async def test_a_repository_without_tags_has_an_empty_list(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The list of a repository without tags is empty, and not null."""
    await put_image(registry)
    assert (await client("GET", f"{V2}/tags/list")).json == {"name": REPO, "tags": []}


async def test_catalog(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The catalog has the repositories in byte order, in pages. Names with '/' work as `last`."""
    assert (await client("GET", "/v2/_catalog")).json == {"repositories": []}
    names = ["a/b", "a-b", "a", "z/y/x", "b"]
    for name in names:
        await put_image(registry, "1", repo=name)
    pages = await walk(client, "/v2/_catalog?n=2", "repositories")
    assert [name for page in pages for name in page] == sorted(names)


async def test_referrers_of_nothing_are_an_empty_index(client: AsgiClient) -> None:
    """A request for the referrers in an unknown repository gets 200 with an empty index. A 404 would make clients use
    fallback tags instead."""
    answer = await client("GET", f"/v2/never/heard/referrers/{SUBJECT}")
    assert (answer.status, answer["content-type"]) == (200, OCI_INDEX)
    assert answer.json == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}


async def test_referrers(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Each descriptor has the artifact type of its manifest (or the type of its config) and the annotations. A response
    with a filter says that the filter was applied."""
    plain = await put_image(registry, subject=SUBJECT_DESCRIPTOR)
    signed = await put_image(
        registry, subject=SUBJECT_DESCRIPTOR, artifactType="application/x+json", annotations={"k": "\u00e9\U0001f600"}
    )
    path = f"{V2}/referrers/{SUBJECT}"
    answer = await client("GET", path)
    listed = {part["digest"]: part for part in answer.json["manifests"]}
    assert listed.keys() == {plain.digest, signed.digest}
    assert listed[plain.digest]["artifactType"] == "application/x.test"
    assert "annotations" not in listed[plain.digest]
    assert listed[signed.digest]["annotations"] == {"k": "\u00e9\U0001f600"}
    assert "oci-filters-applied" not in answer
    for query in ("application/x%2Bjson", "application/x+json", "application%2Fx%2Bjson"):
        answer = await client("GET", f"{path}?artifactType={query}")
        assert answer["oci-filters-applied"] == "artifactType"
        assert [part["digest"] for part in answer.json["manifests"]] == [signed.digest]


@pytest.mark.parametrize(
    "limits", [RequestLimits(referrers_per_page=3), RequestLimits(referrers_page_bytes=1000)], ids=["count", "bytes"]
)
async def test_referrers_come_in_pages(registry: MemoryRegistry, limits: RequestLimits) -> None:
    """Pages are limited by count and by size in bytes. Together they have each referrer once, and the links keep the
    filter. A referrer that is larger than a page is on a page of its own."""
    client = AsgiClient(DistributionAPI(registry, limits=limits))
    fields: dict[str, Any] = {"subject": SUBJECT_DESCRIPTOR, "artifactType": "application/x+json"}
    digests = {(await put_image(registry, **fields, annotations={"n": str(n)})).digest for n in range(8)}
    digests.add((await put_image(registry, **fields, annotations={"n": "x" * 2000})).digest)
    await put_image(registry, subject=SUBJECT_DESCRIPTOR)
    pages = await walk(client, f"{V2}/referrers/{SUBJECT}?artifactType=application/x%2Bjson", "manifests")
    listed = [part["digest"] for page in pages for part in page]  # type: ignore[index]
    assert len(pages) >= 3
    assert len(listed) == len(set(listed))
    assert set(listed) == digests


async def test_lists_are_revalidated(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Lists have `Cache-Control: no-cache`, so caches must revalidate a list before each use."""
    await put_blob(registry, b"x")
    for path in (f"{V2}/tags/list", "/v2/_catalog", f"{V2}/referrers/{SUBJECT}"):
        assert (await client("GET", path))["cache-control"] == "no-cache"


class SlowListing(RefusingRegistry):
    """A registry whose call `repositories` never returns. It waits until the request is cancelled."""

    def __init__(self) -> None:
        self.is_called, self.is_cancelled = asyncio.Event(), asyncio.Event()

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        self.is_called.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.is_cancelled.set()
        raise AssertionError


@pytest.mark.slow
async def test_a_list_is_cancelled_when_the_client_disconnects() -> None:
    """If the client disconnects while the registry makes a list, the call on the registry is cancelled. So the request
    does not stay in the queue of list requests."""
    slow, disconnected = SlowListing(), asyncio.Event()
    client = AsgiClient(DistributionAPI(slow))
    running = asyncio.create_task(client("GET", "/v2/_catalog", leaves=True, after=disconnected))
    await slow.is_called.wait()
    disconnected.set()
    await asyncio.wait([running], timeout=10)
    assert slow.is_cancelled.is_set()
    answer = await running
    assert not answer.status
