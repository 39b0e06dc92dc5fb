"""Lists over HTTP (OCI distribution spec, "Content Discovery")."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from registry.http import DistributionAPI, RequestLimits
from storage.content import OCI_INDEX, OCI_MANIFEST, Page, digest_of
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NameSet
from storage.wrappers import RefusingRegistry
from tests.fakes.asgi_client import AsgiAnswer, AsgiClient
from tests.unit.registry.conftest import REPO, V2, put_blob, put_image

SUBJECT = digest_of(b"subject")
ABOUT = {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 7}


def next_of(answer: AsgiAnswer) -> str | None:
    """Returns the path in the Link header, which never has a host."""
    if "link" not in answer:
        return None
    found = re.fullmatch(r'<(/v2/[!-;=?-~]+)>; rel="next"', answer["link"])
    assert found
    return found[1]


async def walk(client: AsgiClient, path: str, key: str) -> list[list[str]]:
    """Follows the Link headers and returns the entries of all pages."""
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


async def test_a_walk_over_tags_sees_each_once(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The pages with `n` tags have each tag once. The last page has no Link, even if it is full."""
    tags = sorted(f"t{number}" for number in range(10))
    await put_image(registry, *tags)
    for count in (1, 3, 5, 10, 11):
        pages = await walk(client, f"{V2}/tags/list?n={count}", "tags")
        assert [tag for page in pages for tag in page] == tags
        assert [len(page) for page in pages[:-1]] == [count] * (len(pages) - 1)
        assert pages[-1]


async def test_last_without_n(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The list has all tags after `last`. There need not be a tag `last`."""
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


@pytest.mark.parametrize("given", ["-1", "x", "", "1.5", "1e3", "+1", "%2B1", "0x1", "9" * 30, "\u0661"])
async def test_a_bad_n_is_400(client: AsgiClient, registry: MemoryRegistry, given: str) -> None:
    """A value of `n` that is not a number in digits gets 400."""
    await put_image(registry, "a")
    for path in (f"{V2}/tags/list", "/v2/_catalog"):
        answer = await client("GET", f"{path}?n={given}".encode())
        assert (answer.status, answer.code) == (400, "UNSUPPORTED")


async def test_pages_have_a_greatest_size(registry: MemoryRegistry) -> None:
    """Without `n`, or with a larger `n`, a page has the largest allowed size and a Link to the rest. All pages together
    have every tag."""
    client = AsgiClient(
        DistributionAPI(registry, limits=RequestLimits(tags_per_page=4, default_catalog_page=2, max_catalog_page=3))
    )
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
    """An unknown repository gets 200 with an empty index, because a 404 would make clients use fallback tags."""
    answer = await client("GET", f"/v2/never/heard/referrers/{SUBJECT}")
    assert (answer.status, answer["content-type"]) == (200, OCI_INDEX)
    assert answer.json == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}


async def test_referrers(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Descriptors have their artifact type (here that of the config) and annotations. The response says that the filter
    was applied."""
    plain = await put_image(registry, subject=ABOUT)
    signed = await put_image(
        registry, subject=ABOUT, artifactType="application/x+json", annotations={"k": "\u00e9\U0001f600"}
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
    """Pages are limited by count and by size. The pages have each referrer once and keep the filter. A referrer that is
    larger than a page is a page of its own."""
    client = AsgiClient(DistributionAPI(registry, limits=limits))
    about: dict[str, Any] = {"subject": ABOUT, "artifactType": "application/x+json"}
    digests = {(await put_image(registry, **about, annotations={"n": str(n)})).digest for n in range(8)}
    digests.add((await put_image(registry, **about, annotations={"n": "x" * 2000})).digest)
    await put_image(registry, subject=ABOUT)
    pages = await walk(client, f"{V2}/referrers/{SUBJECT}?artifactType=application/x%2Bjson", "manifests")
    listed = [part["digest"] for page in pages for part in page]  # type: ignore[index]
    assert len(pages) >= 3
    assert len(listed) == len(set(listed))
    assert set(listed) == digests


async def test_lists_are_revalidated(client: AsgiClient, registry: MemoryRegistry) -> None:
    """Caches must revalidate a list before each use."""
    await put_blob(registry, b"x")
    for path in (f"{V2}/tags/list", "/v2/_catalog", f"{V2}/referrers/{SUBJECT}"):
        assert (await client("GET", path))["cache-control"] == "no-cache"


class SlowListing(RefusingRegistry):
    """A registry whose list of repositories never comes: the call waits until the request ends."""

    def __init__(self) -> None:
        self.waiting, self.left = asyncio.Event(), asyncio.Event()

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


@pytest.mark.slow
async def test_a_client_that_leaves_does_not_wait_for_a_list() -> None:
    """Requests of one account for lists wait for each other. A client that disconnects leaves the queue."""
    queue, gone = SlowListing(), asyncio.Event()
    client = AsgiClient(DistributionAPI(queue))
    running = asyncio.create_task(client("GET", "/v2/_catalog", leaves=True, after=gone))
    await queue.waiting.wait()
    gone.set()
    await asyncio.wait([running], timeout=10)
    assert queue.left.is_set()
    answer = await running
    assert not answer.status
