"""Lists of tags with facts about their manifests, such as size and last pull. The web pages show these lists."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from storage.composition import layout_of
from storage.content import Actor
from storage.errors import ManifestUnknown, NameUnknown
from storage.metadata.sqlite import sqlite_tag_listing
from storage.metadata.sqlite.database import connect
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.tag_listing import ListedTag, TagCursor, TagOrder, TagPage, TagQuery
from tests.fakes.registry_content import BY, NOWHERE, descriptor_of, image_of, index_of, push_blob, push_image
from tests.fakes.upkeep_store import APP, START, Clock, clocked_store, pull

MIRRORED = RepositoryName("docker.io/library/ubuntu")
FALLBACK_TAG = "sha256-" + 64 * "a"
SIGNATURE_TAG = FALLBACK_TAG + ".sig"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    async with clocked_store(tmp_path / "data", clock) as opened:
        yield opened


async def all_pages(
    store: StoredRegistry, query: TagQuery, limit: int = 2, repo: RepositoryName = APP
) -> list[TagPage]:
    page_list = [await store.tag_listing.page(repo, query, None, limit)]
    while (after := page_list[-1].next_after) is not None:
        page_list.append(await store.tag_listing.page(repo, query, TagCursor.parse(str(after)), limit))
    return page_list


async def listed_names(
    store: StoredRegistry, order: TagOrder = TagOrder.NAME, text: str = "", limit: int = 2
) -> list[str]:
    """Returns the tag names on all pages in ascending order. Checks that the descending order is the reverse of it."""
    listed = [
        [
            listed_tag.name
            for page in await all_pages(store, TagQuery(text, order, is_descending), limit)
            for listed_tag in page.items
        ]
        for is_descending in (False, True)
    ]
    assert listed[0] == listed[1][::-1]
    return [str(name) for name in listed[0]]


async def find_listed_tag(store: StoredRegistry, name: str) -> ListedTag:
    return await store.tag_listing.tag(APP, Tag(name))


async def test_tags_are_listed_in_each_order(store: StoredRegistry, clock: Clock) -> None:
    """Tags are listed in the order of their names, versions, push times or sizes. Pages of two tags have each tag once,
    in both directions."""
    for size, name in enumerate(["1.10", "latest", "1.9", "1.10-rc1", "Beta"]):
        clock.now += 1
        await push_image(store, APP, size * "x", name)
    assert await listed_names(store) == ["1.10", "1.10-rc1", "1.9", "Beta", "latest"]
    assert await listed_names(store, TagOrder.VERSION) == ["Beta", "latest", "1.9", "1.10-rc1", "1.10"]
    assert await listed_names(store, TagOrder.PUSHED) == ["1.10", "latest", "1.9", "1.10-rc1", "Beta"]
    assert await listed_names(store, TagOrder.SIZE) == ["1.10", "latest", "1.9", "1.10-rc1", "Beta"]


@pytest.mark.parametrize("order", TagOrder)
async def test_equal_values_are_sorted_by_name(store: StoredRegistry, order: TagOrder) -> None:
    """Tags with the same push time, size or version are ordered by name, and each of them is listed once."""
    await push_image(store, APP, "one", *(f"t{number}" for number in range(5)))
    assert await listed_names(store, order) == [f"t{number}" for number in range(5)]


@pytest.mark.parametrize("order", TagOrder)
async def test_tags_are_filtered_by_text(store: StoredRegistry, order: TagOrder) -> None:
    """If the query has a text, only tags that contain the text are listed, regardless of case. Characters such as `%`
    have no special meaning. Tags of signatures are listed only if the query asks for them."""
    await push_image(store, APP, "one", "v1-Alpine", "v1_debian", "alpine", "other", SIGNATURE_TAG, FALLBACK_TAG)
    assert await listed_names(store, order, "ALPINE") == ["alpine", "v1-Alpine"]
    assert await listed_names(store, order, "1_d") == ["v1_debian"]
    assert await listed_names(store, order, "%") == await listed_names(store, order, "*") == []
    assert await listed_names(store, order, "sha256") == []
    pages_with_referrer_tags = await all_pages(store, TagQuery("sha256", order, includes_referrer_tags=True))
    assert {listed_tag.name for page in pages_with_referrer_tags for listed_tag in page.items} == {
        SIGNATURE_TAG,
        FALLBACK_TAG,
    }


async def test_order_by_version_is_up_to_date_after_changes(store: StoredRegistry) -> None:
    """The order by version is kept in memory. It is up to date after each push and delete of a tag. Pushes to other
    repositories do not change it."""
    await push_image(store, APP, "one", "1.9", "1.10")
    assert await listed_names(store, TagOrder.VERSION) == ["1.9", "1.10"]
    await push_image(store, RepositoryName("team/other"), "one", "3")
    await push_image(store, APP, "one", "1.9.1")
    assert await listed_names(store, TagOrder.VERSION) == ["1.9", "1.9.1", "1.10"]
    await store.delete_tag(APP, Tag("1.9"), by=BY)
    assert await listed_names(store, TagOrder.VERSION) == ["1.9.1", "1.10"]


async def test_facts_about_a_tag(store: StoredRegistry, clock: Clock) -> None:
    """The facts about a tag are: when it was last pushed, who pointed it at its manifest, the last pull and the number
    of pulls, the size of the manifest's blobs, and the types and tags of its referrers."""
    image = await push_image(store, APP, "one", "v1", "other")
    assert (await find_listed_tag(store, "v1")).manifest.last_pulled is None
    clock.now += 10
    # bob pushes the tag again without moving it: this changes `pushed`, but not `pushed_by`.
    await store.put_manifest(APP, image, [Tag("v1")], by=Actor("bob"))
    await pull(store, APP, image.digest, clock)
    for number, kind in enumerate(["application/spdx+json", "application/vnd.cncf.notary.signature"] * 2):
        await push_image(store, APP, str(number), subject=image.digest, artifactType=kind)
    await push_image(store, APP, "signature", f"{image.digest.replace(':', '-')}.sig")
    listed = await find_listed_tag(store, "v1")
    facts = listed.manifest
    assert (listed.pushed, listed.pushed_by, facts.stored_at) == (START + 10, BY.name, START)
    assert (facts.last_pulled, facts.pulls) == (START + 10, 1)
    assert facts.stored_bytes == sum(blob.size for blob in image.blobs)
    assert facts.referrer_types == ("application/spdx+json", "application/vnd.cncf.notary.signature")
    assert facts.referrer_suffixes == (".sig",)
    assert (await store.tag_listing.manifest(APP, image.digest)).tags == (Tag("other"), Tag("v1"))


async def test_facts_about_an_index(store: StoredRegistry, clock: Clock) -> None:
    """The facts about an index include all stored manifests that the index lists. A blob of several manifests counts
    once."""
    layer = await push_blob(store, APP, b"shared")
    children = [image_of(await push_blob(store, APP, f"config {n}".encode()), [layer]) for n in range(2)]
    for child in children:
        await store.put_manifest(APP, child, by=BY)
    await store.put_manifest(APP, index_of([child.descriptor for child in children]), [Tag("v1")], by=BY)
    await pull(store, APP, children[1].digest, clock)
    facts = (await find_listed_tag(store, "v1")).manifest
    assert facts.stored_bytes == layer.size + 2 * len("config 0")
    assert (facts.last_pulled, facts.pulls) == (START, 1)


async def test_sizes_are_added_up_for_a_limited_number_of_blobs(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page reads a limited number of references to blobs. The tags after this limit are listed without a size."""
    for name in ("a", "b"):
        await push_image(store, APP, name, name)
    monkeypatch.setattr(sqlite_tag_listing, "_MAX_BLOB_ROWS", 3)
    [page] = await all_pages(store, TagQuery())
    assert [listed_tag.manifest.stored_bytes is None for listed_tag in page.items] == [False, True]


async def test_a_page_reads_a_limited_number_of_manifests(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page reads a limited number of manifests, including those that indexes list. Tags after this limit are listed
    without a size. If an order by size would need more manifests, the list is ordered by name instead."""
    for name in ("a", "b"):
        children = [await push_image(store, APP, f"{name}{number}") for number in range(3)]
        await store.put_manifest(APP, index_of([each.descriptor for each in children]), [Tag(name)], by=BY)
    await push_image(store, APP, "c", "c")
    monkeypatch.setattr(sqlite_tag_listing, "MAX_READ_MANIFESTS", 6)
    page = await store.tag_listing.page(APP, TagQuery(order=TagOrder.SIZE), None, 10)
    assert (page.order, [listed_tag.name for listed_tag in page.items]) == (TagOrder.NAME, ["a", "b", "c"])
    assert [listed_tag.manifest.stored_bytes is None for listed_tag in page.items] == [False, True, True]
    monkeypatch.setattr(sqlite_tag_listing, "MAX_READ_MANIFESTS", 10)
    page = await store.tag_listing.page(APP, TagQuery(order=TagOrder.SIZE), None, 10)
    assert (page.order, page.items[0].name) == (TagOrder.SIZE, "c")


async def test_other_lookups_do_not_wait_for_tag_lists(store: StoredRegistry) -> None:
    """The tag lists of the web pages are read in a thread of their own, so other lookups do not wait for them."""
    await push_image(store, APP, "one", "v1")
    is_reading, may_continue = threading.Event(), threading.Event()

    def block(_: object) -> None:
        is_reading.set()
        assert may_continue.wait(60)

    listing: Any = store.tag_listing
    blocked = asyncio.create_task(listing._scans.run(block))
    await asyncio.to_thread(is_reading.wait, 60)
    try:
        await store.retention.tag_facts(APP, None)
        assert not blocked.done()
    finally:
        may_continue.set()
        await blocked


async def test_cached_content(store: StoredRegistry) -> None:
    """A mirrored repository may lack content that its manifests refer to. `present` returns only cached manifests and
    blobs, and the size of an image counts only cached blobs."""
    layers = [descriptor_of(b"stored"), descriptor_of(b"not stored")]
    await push_blob(store, MIRRORED, b"stored")
    image = image_of(descriptor_of(b"config"), layers)
    absent = image_of(descriptor_of(b"other"))
    index = index_of([image.descriptor, absent.descriptor])
    for manifest in (image, index):
        await store.put_manifest(MIRRORED, manifest, [Tag("v1")], by=Actor("mirror"), sparse=True)
    present = await store.tag_listing.stored_sizes(
        MIRRORED, [image.digest, absent.digest], [layer.digest for layer in layers]
    )
    assert present == {image.digest: len(image.body), layers[0].digest: layers[0].size}
    facts = (await store.tag_listing.tag(MIRRORED, Tag("v1"))).manifest
    assert (facts.stored_bytes, facts.last_pulled, facts.pulls) == (layers[0].size, None, 0)
    assert await store.tag_listing.stored_sizes(MIRRORED, [], []) == {}


async def test_an_unknown_repository_tag_or_digest(store: StoredRegistry) -> None:
    """A repository that never had content is unknown. A repository whose tags were all deleted has an empty list. An
    unknown tag or digest raises an error."""
    image = await push_image(store, APP, "one", "v1")
    await store.delete_manifest(APP, image.digest, by=BY)
    assert [page.items for page in await all_pages(store, TagQuery())] == [[]]
    with pytest.raises(ManifestUnknown):
        await find_listed_tag(store, "v1")
    with pytest.raises(ManifestUnknown):
        await store.tag_listing.manifest(APP, image.digest)
    with pytest.raises(NameUnknown):
        await store.tag_listing.page(NOWHERE, TagQuery(), None, 10)


def add_tags(folder: Path, count: int) -> None:
    """Adds `count` tags with names `v1.N.M` to the newest manifest, with their history, as pushes would do."""
    db = connect(layout_of(folder / "data").metadata)
    numbers = f"WITH n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1})"
    target = "(SELECT id, repository, digest FROM manifest ORDER BY id DESC LIMIT 1) m"
    name = "'v1.' || (i / 100) || '.' || (i % 100)"
    db.execute(f"{numbers} INSERT INTO tag SELECT m.repository, {name}, m.id, {START} + i FROM n, {target}")
    db.execute(
        f"{numbers} INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
        f"SELECT m.repository, {name}, m.digest, {START} + i, 'bulk', '', '', '' FROM n, {target}"
    )
    db.close()


@pytest.mark.slow
async def test_a_hundred_thousand_tags(store: StoredRegistry, tmp_path: Path) -> None:
    """Of 100,000 tags in the order by name, version or push, the first page and a page in the middle have the right
    tags. So many tags cannot be ordered by size: the page is ordered by name, and states this. A text of the query that
    only few tags contain makes the order by size possible."""
    await push_image(store, APP, "one")
    add_tags(tmp_path, 100_000)
    middle = TagCursor("v1.499.99", START + 49_999)
    for order, first, after_middle in (
        (TagOrder.NAME, "v1.0.0", "v1.5.0"),
        (TagOrder.VERSION, "v1.0.0", "v1.500.0"),
        (TagOrder.PUSHED, "v1.0.0", "v1.500.0"),
    ):
        page = await store.tag_listing.page(APP, TagQuery(order=order), None, 100)
        assert (page.items[0].name, len(page.items), page.order) == (first, 100, order)
        page = await store.tag_listing.page(APP, TagQuery(order=order), middle, 100)
        assert page.items[0].name == after_middle
    newest = await store.tag_listing.page(APP, TagQuery(order=TagOrder.VERSION, is_descending=True), None, 1)
    assert newest.items[0].name == "v1.999.99"
    by_size = await store.tag_listing.page(APP, TagQuery(order=TagOrder.SIZE), None, 1)
    assert by_size.order is TagOrder.NAME
    few = await store.tag_listing.page(APP, TagQuery("v1.123.", TagOrder.SIZE), None, 1)
    assert (few.items[0].name, few.order) == ("v1.123.0", TagOrder.SIZE)
