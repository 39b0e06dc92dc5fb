"""The search index stays correct if SQLite uses row ids again, if files or rows are damaged, and if documents are
large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from storage.content import Manifest
from storage.errors import SearchIndexDamaged
from storage.metadata.sqlite.search import index_tables
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES
from storage.upkeep import search_indexing
from storage.upkeep.schedule import cancel_all
from storage.upkeep.search_indexing import SearchIndexer, keep_indexed
from tests.fakes.blob_files import layout_behind
from tests.fakes.registry_content import BY, descriptor_of, image_of, push_blob, push_image
from tests.fakes.scrub_runs import cut, file_of, scrub
from tests.fakes.second_connection import second_connection

from .conftest import SearchedStore

APP, MIRRORED = RepositoryName("team/app"), RepositoryName("hub.example/team/app")


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the background task look for new content every 0.02 seconds."""
    monkeypatch.setattr(search_indexing, "CHECK_SECONDS", 0.02)


def run_sql(searched: SearchedStore, sql: str, *values: Any) -> None:
    """Runs SQL directly on the database of the store."""
    with closing(second_connection(layout_behind(searched.store).metadata)) as db:
        db.execute(sql, values)


def config_with(color: str) -> bytes:
    return json.dumps({"config": {"Labels": {"color": color}}}).encode()


async def push_colored(searched: SearchedStore, color: str, *tags: str) -> Manifest:
    """Pushes an image whose config has the label `color`. Does not update the index."""
    config = await push_blob(searched.store, APP, config_with(color))
    manifest = image_of(config)
    await searched.store.put_manifest(APP, manifest, [Tag(tag) for tag in tags], by=BY)
    return manifest


async def add_mirrored(searched: SearchedStore, config: bytes, tag: str, **fields: Any) -> None:
    """Adds a manifest without its blobs, as a mirror does."""
    manifest = image_of(descriptor_of(config), **fields)
    await searched.store.metadata.put_manifest(MIRRORED, manifest, [Tag(tag)], BY, True, None)


@asynccontextmanager
async def background(searched: SearchedStore, indexer: SearchIndexer | None = None) -> AsyncIterator[None]:
    """A context manager that runs the background task which updates the index."""
    task = asyncio.create_task(keep_indexed(indexer or searched.store.search_indexer, searched.store.leases))
    try:
        yield
    finally:
        await cancel_all([task])


async def wait_until_found(searched: SearchedStore, text: str, expected: list[str]) -> None:
    """Waits until the search for labels with `text` has the expected result."""
    while await searched.labels(text) != expected:  # noqa: ASYNC110 - another task writes the index
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_rebuilt", [False, True], ids=["tag history", "new index"])
async def test_damaged_tag_names(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch, is_rebuilt: bool) -> None:
    """Tag names that are not valid UTF-8, because the database is damaged, are not in the index. They prevent no other
    tag from being indexed, neither by the tag history nor when all stored tags are added to a new index."""
    monkeypatch.setattr(index_tables, "TAGS_PER_BATCH", 2)  # a batch of the stored tags ends with a damaged name
    for tag in ("bad-1", "bad-2", "bad-3", "good-1"):
        await push_image(searched.store, APP, tag, tag)
    await searched.store.delete_tag(APP, Tag("bad-3"), by=BY)
    for table, column in (("tag", "name"), ("tag_history", "tag")):
        run_sql(
            searched,
            f"UPDATE {table} SET {column} = CAST(x'62ff' || CAST({column} AS BLOB) AS TEXT) WHERE {column} LIKE 'bad%'",
        )
    if is_rebuilt:
        await searched.store.search_index.rebuild()
    await searched.index()
    await searched.push("team/app:good-2")
    assert await searched.tags("good") == ["team/app:good-1", "team/app:good-2"]
    assert await searched.tags("1") == ["team/app:good-1"]


@pytest.mark.parametrize("is_ascending", [True, False])
async def test_several_reused_row_ids(searched: SearchedStore, is_ascending: bool) -> None:
    """After the newest manifests are deleted, in any order, SQLite uses their row ids again. A new manifest is
    indexed although the index knows its row id already."""
    store = searched.store
    images = [await push_image(store, APP, str(number), "v1") for number in range(4)]
    await searched.index()
    for each in images[1:] if is_ascending else images[:0:-1]:
        await store.delete_manifest(APP, each.digest, by=BY, restorable=False)
    await push_image(store, APP, "new", "new", annotations={"color": "blue"})
    await searched.index()
    assert await searched.labels("blue") == ["team/app:new"]


async def test_reused_blob_ids(searched: SearchedStore) -> None:
    """When a config is stored, its row may get the id of a deleted blob. The config is indexed nevertheless."""
    store = searched.store
    await add_mirrored(searched, config_with("purple"), "v1")
    for number in range(3):
        await push_blob(store, APP, f"blob {number}".encode())
    await searched.index()
    run_sql(searched, "DELETE FROM blob_link; DELETE FROM collect_queue; DELETE FROM blob WHERE id = 2")
    run_sql(searched, "DELETE FROM blob WHERE id = 3")
    await push_blob(store, MIRRORED, config_with("purple"))
    await searched.index()
    assert await searched.labels("purple") == ["hub.example/team/app:v1"]


async def test_large_annotations_are_not_indexed(searched: SearchedStore) -> None:
    """A manifest with large annotations is indexed without its annotations."""
    image = await push_image(searched.store, APP, "seed", "v1", annotations={"color": "red", "text": "x" * 70_000})
    [manifest] = (await searched.store.search_index.unindexed_manifests()).manifests
    assert manifest.annotations is None
    await searched.index()
    assert await searched.labels("red") == []
    assert await searched.digests(image.digest) == [("team/app", True)]


async def test_a_batch_is_limited_in_bytes(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifests that are read at once have at most about `MAX_BATCH_BYTES`. The other manifests are indexed in the
    next batches."""
    monkeypatch.setattr(index_tables, "MAX_BATCH_BYTES", 1000)
    for number in range(5):
        await push_image(searched.store, APP, str(number), f"v{number}", annotations={"color": "red", "x": "y" * 600})
    batch = await searched.store.search_index.unindexed_manifests()
    assert (len(batch.manifests), batch.is_full) == (2, True)
    await searched.index()
    assert len(await searched.labels("red")) == 5


async def test_many_manifests_wait_for_one_config(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many manifests refer to a config that is not stored yet. When the config is stored, a few of the manifests are
    indexed with its labels immediately, and the others later."""
    monkeypatch.setattr(index_tables, "MANIFESTS_PER_BATCH", 2)
    monkeypatch.setattr(index_tables, "INCOMPLETE_PER_PAGE", 2)
    config = config_with("purple")
    for number in range(5):
        await add_mirrored(searched, config, f"v{number}", annotations={"number": str(number)})
    await searched.index()
    await push_blob(searched.store, MIRRORED, config)
    await searched.index()
    assert len(await searched.labels("purple")) == 2
    await searched.store.search_indexer.read_incomplete_again()
    assert len(await searched.labels("purple")) == 5


async def test_the_event_loop_runs_between_two_manifests(searched: SearchedStore) -> None:
    """The indexer lets the event loop run other tasks between two manifests. This holds even if all files are small and
    cached, so that the indexer never waits for the disk."""
    for number in range(5):
        await push_colored(searched, f"red{number}")
    iterations, iterations_at_reads = 0, []

    async def may_read(repo: RepositoryName, digest: Digest) -> bool:
        iterations_at_reads.append(iterations)
        return True

    async def count_iterations() -> None:
        nonlocal iterations
        while True:
            iterations += 1
            await asyncio.sleep(0)

    other_tasks = [asyncio.create_task(count_iterations())]
    store = searched.store
    await SearchIndexer(store.search_index, store.metadata, store.blobs, may_read).run()
    await cancel_all(other_tasks)
    assert len(set(iterations_at_reads)) == 5


async def test_a_config_that_cannot_be_read(searched: SearchedStore) -> None:
    """If the file of a config is too short, other content is still indexed. The config is read again later."""
    config = config_with("red") + b" " * 100_000  # too large to be read as one piece
    for data in (config_with("dark"), config):
        blob = await push_blob(searched.store, APP, data)
        await searched.store.put_manifest(APP, image_of(blob), [Tag("first")], by=BY)
        cut(file_of(searched.store, blob.digest))
    await push_colored(searched, "blue", "second")
    await searched.index()
    assert (await searched.labels("red"), await searched.labels("blue")) == ([], ["team/app:second"])
    file_of(searched.store, blob.digest).write_bytes(config)
    await searched.store.search_indexer.read_incomplete_again()
    assert (await searched.labels("red"), await searched.labels("dark")) == (["team/app:first"], [])


@pytest.mark.parametrize("column", ["body", "annotations", "digest"])
async def test_a_row_that_is_damaged(searched: SearchedStore, column: str) -> None:
    """If the text in a row is not UTF-8, other content is still indexed."""
    damaged = await push_image(searched.store, APP, "damaged", "v1", annotations={"color": "red"})
    value = b'{"config": {"digest": "\xff"}}'
    kind = "BLOB" if column == "body" else "TEXT"
    run_sql(searched, f"UPDATE manifest SET {column} = CAST(? AS {kind}) WHERE digest = ?", value, damaged.digest)
    await push_image(searched.store, APP, "sound", "v2", annotations={"color": "blue"})
    await searched.index()
    assert await searched.labels("blue") == ["team/app:v2"]


async def test_the_background_task_continues_after_an_unexpected_error(
    searched: SearchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an unexpected error, the background task tries again and indexes the content."""
    monkeypatch.setattr(search_indexing, "RETRY_SECONDS", 0.01)
    failures = iter((True, True))

    async def may_read(repo: RepositoryName, digest: Digest) -> bool:
        if next(failures, False):
            raise RuntimeError("a mistake")
        return True

    store = searched.store
    await push_colored(searched, "red", "v1")
    async with background(searched, SearchIndexer(store.search_index, store.metadata, store.blobs, may_read)):
        await wait_until_found(searched, "red", ["team/app:v1"])


async def test_a_blob_that_the_repository_gets_later(searched: SearchedStore) -> None:
    """A repository has a manifest but not its config. If the repository then gets a link to the config, which the store
    has already, the config's labels are indexed."""
    await push_colored(searched, "red", "v1")
    await add_mirrored(searched, config_with("red"), "v2")
    await searched.index()
    labels_before = await searched.labels("red")
    await searched.store.mount_blob(MIRRORED, descriptor_of(config_with("red")).digest, APP, by=BY)
    await searched.store.search_indexer.read_incomplete_again()
    assert (labels_before, len(await searched.labels("red"))) == (["team/app:v1"], 2)


async def test_config_of_a_repaired_manifest_is_indexed(searched: SearchedStore) -> None:
    """The config of a manifest is named only in the manifest's body. If the body was damaged and is repaired by a push,
    the background task indexes the config at its next start."""
    image = await push_colored(searched, "red", "v1")
    run_sql(searched, "UPDATE manifest SET body = ? WHERE digest = ?", b"{}" + image.body[2:], image.digest)
    await scrub(searched.store)
    await searched.index()
    await searched.store.search_indexer.read_incomplete_again()
    labels_before = await searched.labels("red")
    await searched.store.put_manifest(APP, image, by=BY)
    async with background(searched):
        await wait_until_found(searched, "red", ["team/app:v1"])
    assert labels_before == []


async def test_a_config_that_clients_may_not_read(searched: SearchedStore) -> None:
    """The labels of a config are indexed only when clients may read the config."""
    allowed: set[RepositoryName] = set()

    async def may_read(repo: RepositoryName, digest: Digest) -> bool:
        return repo in allowed

    store = searched.store
    indexer = SearchIndexer(store.search_index, store.metadata, store.blobs, may_read)
    await push_colored(searched, "red", "v1")
    await indexer.run()
    await indexer.read_incomplete_again()
    labels_before = await searched.labels("red")
    allowed.add(APP)
    await indexer.read_incomplete_again()
    assert (labels_before, await searched.labels("red")) == ([], ["team/app:v1"])


SQL_DAMAGES = (
    "DELETE FROM search_word_data",
    "DELETE FROM search_word_config",  # the table cannot be opened
    "UPDATE search_word_data SET block = x'00' WHERE id = 10",
    "DROP TABLE search_name_data",
)


@pytest.mark.parametrize("sql", SQL_DAMAGES)
async def test_a_damaged_index_is_built_again(searched: SearchedStore, sql: str) -> None:
    """If the background task finds that the index is damaged, it builds the index again."""
    await searched.push("team/app:v1", annotations={"color": "red"})
    run_sql(searched, sql)
    async with background(searched):
        await push_image(searched.store, RepositoryName("other/app"), "second", "v2", annotations={"color": "blue"})
        await wait_until_index_is_rebuilt(searched, lambda found: len(found) == 2)
    assert await searched.labels("red") == ["team/app:v1"]
    assert await searched.names("app") == ["other/app", "team/app"]


async def test_only_the_process_with_the_slot_builds_the_index_again(searched: SearchedStore) -> None:
    """While another process holds the slot, the background task leaves a damaged index as it is, because that process
    may be building the index again."""
    await searched.push("team/app:v1")
    # Makes SQLite find the page of an index where it expects the table. The new schema version makes all connections
    # read the number of the page again.
    run_sql(
        searched,
        "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema "
        "WHERE name = 'tag_history_at') WHERE name = 'search_progress'; PRAGMA schema_version = 1000000",
    )
    async with searched.store.leases.try_slot(search_indexing.SLOT, count=1) as has_slot:
        assert has_slot
        async with background(searched):
            await asyncio.sleep(0.2)  # ten checks
        with pytest.raises(SearchIndexDamaged):
            searched.store.search_index.has_unindexed()


async def wait_until_index_is_rebuilt(searched: SearchedStore, is_done: Callable[[list[str]], bool]) -> None:
    """Waits until a search for the label `color` succeeds and `is_done` accepts its result."""
    while True:
        try:
            if is_done(await searched.labels("color")):
                return
        except SearchIndexDamaged:
            pass
        await asyncio.sleep(0.02)


async def test_a_search_in_a_damaged_index(searched: SearchedStore) -> None:
    """A search that reads a damaged table of the index raises `SearchIndexDamaged`. Searches in other tables work."""
    await searched.push("team/app:v1", annotations={"color": "red"})
    run_sql(searched, "DELETE FROM search_word_data")
    with pytest.raises(SearchIndexDamaged, match="fsck --repair"):
        await searched.store.search.find_by_labels(["red"], ALL_NAMES, 0, 10)
    assert await searched.tags("v1") == ["team/app:v1"]
