"""The stores of the bench `upkeep`. The bench inserts rows into the database, which equal the rows that pushes and
mirrors create. A collection or an eviction removes exactly the content that the bench has added."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.errors import TrialFailed
from bench.growth.synthetic_store import repository_name
from bench.loaders.http_client import MANIFEST_TYPE
from bench.random_content import CONFIG_TYPE, BlobContent, make_blob
from bench.report.goals import upkeep_goals
from bench.upkeep.upkeep_rows import upkeep_rows
from bench.upkeep.upkeep_store import (
    TAGS_PER_REPOSITORY,
    UPSTREAM,
    AddedContent,
    StoreSize,
    UpkeepStore,
    manifest_of_layer,
    mirrored_name,
    small_layer,
)
from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import Actor, Manifest
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from storage.upkeep.evictor import Budget, CacheLimits, Evictor
from storage.upkeep.usage_counting import configure_and_count
from storage.usage import ScopeDefinition
from tests.fakes.second_connection import second_connection

SIZE = StoreSize(60)
BY = Actor("anonymous", "127.0.0.1", "", "bench")
CONFIG = make_blob(b"{}", CONFIG_TYPE)
BASE = RepositoryName("base/app")
SCOPES = [
    ScopeDefinition(f"cache {UPSTREAM}", (f"{UPSTREAM}/",), upstream=UPSTREAM),
    ScopeDefinition("cache", (f"{UPSTREAM}/",)),
]
# Ids, times, the collector's queue and the audit log are not compared. Only pushes fill the queue and the log.
IN_REPOSITORY = "JOIN repository r ON r.id = x.repository"
OF_MANIFEST = f"JOIN manifest m ON m.id = x.manifest {IN_REPOSITORY.replace('x.', 'm.')}"
ROWS = {
    "repository": "SELECT name, manifests FROM repository",
    "blob": "SELECT digest, size, place FROM blob",
    "blob_link": f"SELECT r.name, b.digest, confirmed FROM blob_link x {IN_REPOSITORY} JOIN blob b ON b.id = x.blob",
    "manifest": "SELECT r.name, digest, media_type, size, subject, artifact_type, annotations, body FROM manifest x "
    + IN_REPOSITORY,
    "manifest_blob": f"SELECT r.name, x.digest, m.digest FROM manifest_blob x {OF_MANIFEST}",
    "tag": f"SELECT r.name, x.name, m.digest FROM tag x {OF_MANIFEST}",
    "tag_history": "SELECT r.name, tag, digest, actor, address, request_id, user_agent FROM tag_history x "
    + IN_REPOSITORY,
    "manifest_pull": f"SELECT r.name, m.digest, upstream, pulls FROM manifest_pull x {OF_MANIFEST}",
    "cached_manifest": f"SELECT r.name, m.digest, upstream FROM cached_manifest x {OF_MANIFEST}",
    "usage_scope": "SELECT name, blobs, bytes, tags, complete FROM usage_scope",
    "usage_member": f"SELECT r.name, scope, links_to, tags_to, manifests_to FROM usage_member x {IN_REPOSITORY}",
    "usage_blob": "SELECT scope, b.digest, x.size, links FROM usage_blob x JOIN blob b ON b.id = x.blob",
    "upload": "SELECT * FROM upload",
}


async def push_blob(store: StoredRegistry, repo: RepositoryName, blob: BlobContent) -> None:
    writer = await store.start_upload(repo)
    assert isinstance(blob.content, bytes)
    await writer.write(blob.content)
    await writer.commit(Digest(blob.digest))


async def push_images(store: StoredRegistry, name: str, *, mirrored: bool) -> None:
    repo = RepositoryName(name)
    await push_blob(store, repo, CONFIG)
    for number in range(TAGS_PER_REPOSITORY):
        layer = small_layer(f"{name}:{number}")
        await push_blob(store, repo, layer)
        manifest = Manifest.parse(manifest_of_layer(CONFIG, layer), MANIFEST_TYPE)
        await store.put_manifest(repo, manifest, [Tag(f"t{number}")], by=BY, sparse=mirrored)


async def prepare(data: Path) -> None:
    """Prepares a data directory as a server with a mirror would, and pushes the config."""
    prepare_data_dir(data)
    async with open_registry(data) as store:
        await configure_and_count(store.usage, store.leases, SCOPES)
        await push_blob(store, BASE, CONFIG)
        await store.put_manifest(BASE, Manifest.parse(manifest_of_layer(CONFIG, CONFIG), MANIFEST_TYPE), by=BY)


@pytest.fixture
async def filled(tmp_path: Path) -> AsyncIterator[tuple[UpkeepStore, StoredRegistry]]:
    """Yields a filled store twice: as the bench opens it, and as a server opens it."""
    await prepare(tmp_path)
    content = UpkeepStore(tmp_path, SIZE, CONFIG)
    content.fill()
    async with open_registry(tmp_path) as store:
        yield content, store


def rows(data: Path) -> dict[str, list[Any]]:
    db = second_connection(layout_of(data).metadata)
    try:
        return {table: sorted(map(str, db.execute(sql).fetchall())) for table, sql in ROWS.items()}
    finally:
        db.close()


async def check(store: StoredRegistry) -> list[ConfirmedProblem]:
    """Runs the consistency check with all digests."""
    found = list[ConfirmedProblem]()

    async def on_problem(finding: ConfirmedProblem) -> None:
        found.append(finding)

    async def on_progress(done: int, total: int, what: str) -> None: ...

    await store.checker.check(CheckOptions(hash_bytes=True), on_problem, on_progress)
    return found


async def evict_to(store: StoredRegistry, size: int) -> int:
    """Evicts images until the cache has at most `size` bytes. Returns their number."""

    async def list_downloads() -> set[Digest]:
        return set()

    evictor = Evictor(
        store.cached_images,
        store.usage,
        store.collector,
        store.leases,
        CacheLimits((UPSTREAM,)),
        list_downloads=list_downloads,
        free_bytes=lambda: None,
        clock=time.time,
    )
    return await evictor.evict_to(Budget("cache", (UPSTREAM,), size))


async def test_inserted_rows_equal_rows_of_pushes(tmp_path: Path) -> None:
    """Bulk insertion gives the same rows as pushes and a mirror, in every compared table."""
    for name in ("filled", "pushed"):
        await prepare(tmp_path / name)
    UpkeepStore(tmp_path / "filled", SIZE, CONFIG).fill()
    async with open_registry(tmp_path / "pushed") as store:
        for number in range(SIZE.repositories):
            await push_images(store, repository_name(number), mirrored=False)
            await push_images(store, mirrored_name(number), mirrored=True)
    assert rows(tmp_path / "filled") == rows(tmp_path / "pushed")


async def test_a_filled_store_is_consistent(filled: tuple[UpkeepStore, StoredRegistry]) -> None:
    """A consistency check of a filled store finds no fault. A collection and an eviction remove no content."""
    content, store = filled
    counts_before = content.counts()
    assert await check(store) == []
    # The push of the config added a blob, and an entry to the collector's queue.
    assert (counts_before.blobs, counts_before.queued) == (SIZE.blobs + 1, 1)
    assert not await store.collector.collect(all_shards=True)
    assert await evict_to(store, counts_before.mirrored_bytes) == 0
    assert content.counts() == counts_before


async def test_a_collection_removes_the_garbage_alone(filled: tuple[UpkeepStore, StoredRegistry]) -> None:
    """A collection removes the added garbage with its files, and nothing else."""
    content, store = filled
    added = content.add_garbage(25)
    assert await check(store) == []
    report = await store.collector.collect()
    assert (report.links, report.blobs) == (25, 25)
    content.check_gone(added)
    assert await check(store) == []


async def test_an_eviction_removes_the_stale_images_alone(filled: tuple[UpkeepStore, StoredRegistry]) -> None:
    """An eviction down to the former size of the cache removes exactly the added images."""
    content, store = filled
    added = content.add_stale_images(25)
    assert await check(store) == []
    assert await evict_to(store, added.before.mirrored_bytes) == 25
    content.check_gone(added)
    assert await check(store) == []


async def test_an_incomplete_or_excessive_removal_fails_the_trial(filled: tuple[UpkeepStore, StoredRegistry]) -> None:
    """`check_gone` raises TrialFailed if an added blob is not removed, or if another blob is missing."""
    content, store = filled
    added = content.add_garbage(2)
    with pytest.raises(TrialFailed, match="2 rows and 2 files are left"):
        content.check_gone(added)
    await store.collector.collect()
    wrong_count = AddedContent(added.digests, added.before._replace(blobs=added.before.blobs + 1))
    with pytest.raises(TrialFailed, match="0 rows and 0 files are left"):
        content.check_gone(wrong_count)
    content.check_gone(replace(wrong_count, before=added.before))


async def test_seconds_of_a_job_leave_out_the_queue(filled: tuple[UpkeepStore, StoredRegistry]) -> None:
    """The time of a job does not include its wait in the queue. A job that fails, or does not end in time, raises
    TrialFailed."""
    content, store = filled
    done = await store.jobs.add("gc", {}, actor="bench")
    await store.jobs.start(done.id, "test")
    await store.jobs.end(done.id, done.state.DONE, "", {"bytes": 7})
    seconds, result = content.wait_for_job(done.id, 5)
    assert (seconds <= 0, result) == (True, {"bytes": 7})
    failed = await store.jobs.add("gc", {}, actor="bench")
    await store.jobs.end(failed.id, failed.state.FAILED, "the disk is broken")
    with pytest.raises(TrialFailed, match="ended as failed: the disk is broken"):
        content.wait_for_job(failed.id, 5)
    queued = await store.jobs.add("gc", {}, actor="bench")
    with pytest.raises(TrialFailed, match="did not end within"):
        content.wait_for_job(queued.id, 0.01)


def test_every_goal_names_a_measured_row_and_figure() -> None:
    """Every goal names an existing row and figure of the bench's report. No two rows of the report have the same
    name."""
    row_names = [row.name for row in upkeep_rows()]
    assert len(set(row_names)) == len(row_names)
    measured = {(row.name, figure.key) for row in upkeep_rows() for figure in row.figures}
    assert {(goal.row, goal.key) for goal in upkeep_goals("10", "1,000")} <= measured
