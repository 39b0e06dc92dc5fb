"""A full round of garbage collection reports each removal. A dry run reports the same removals and removes nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.errors import StorageFailed
from storage.jobs import JSON, JobRunning, JobStopped, slot_name
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import collector
from storage.upkeep.collection_job import GC, MAX_RECORDS, collection_work
from storage.upkeep.collection_report import Removal, RemovalKind
from storage.upkeep.job_runner import run_in_command
from storage.upkeep.removal_gate import blob_removals_blocked
from tests.fakes.registry_content import BY, index_of, push_blob, push_image
from tests.fakes.second_connection import second_connection

APP, OTHER = RepositoryName("team/app"), RepositoryName("team/other")
HOUR = 3600.0


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare_data_dir(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
async def store(data: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, grace=HOUR, expire=HOUR, clock=clock) as opened:
        yield opened


def replace_by_copy(data: Path) -> None:
    """Moves a directory away and puts a copy in its place."""
    old = data.rename(data.with_name("old"))
    shutil.copytree(old, data)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def collect_all(store: StoredRegistry, *, dry_run: bool) -> list[Removal]:
    """Runs a full round of garbage collection, and returns the reported removals."""
    removals: list[Removal] = []

    async def add_removal(removal: Removal) -> None:
        removals.append(removal)

    report = await store.collector.collect(add_removal, dry_run=dry_run, all_shards=True)
    assert sum(report.counts.values()) == len(removals)
    assert report.freed_bytes == sum(removal.size for removal in removals)
    return removals


def write_stray(data: Path, content: bytes, written: float) -> Digest:
    """Writes a blob file without a row in the database. `written`: the file's time of modification."""
    digest = digest_of(content)
    path = data / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (written, written))
    return digest


async def make_garbage(store: StoredRegistry, data: Path, clock: Clock) -> dict[str, Any]:
    """Makes garbage of each kind that the next round removes, and similar content that must stay. Returns the content
    that the tests need."""
    await push_image(store, APP, "kept", "latest")
    deleted = await push_image(store, APP, "gone")
    shared = await push_blob(store, APP, b"in two repositories")
    await push_blob(store, OTHER, b"in two repositories")
    needed_once = await push_blob(store, APP, b"needed in one of two repositories")
    await push_blob(store, OTHER, b"needed in one of two repositories")
    await store.put_manifest(OTHER, index_of([needed_once]), [], by=BY)  # an index that lists a blob
    await store.delete_manifest(APP, deleted.digest, by=BY)
    writer = await store.start_upload(APP)
    await writer.write(b"an upload that nobody goes on with")
    await writer.aclose()
    abandoned_upload = data / "uploads" / writer.id
    partial = await store.partials.claim(digest_of(b"x" * 5000), 5000)
    await asyncio.to_thread(partial.write_at, 0, b"x" * 4096)
    partial.close()
    old_stray = write_stray(data, b"bytes without a row", clock.now - 2 * HOUR)
    (data / "trash" / "left").write_bytes(b"by a round that was killed")
    db = second_connection(data / "entrepot.db")
    db.execute(
        "INSERT OR REPLACE INTO deleted_manifest (repository, digest, media_type, pushed, deleted, body) "
        "SELECT id, ?, 'type', ?, ?, ? FROM repository WHERE name = ?",
        (deleted.digest, clock.now, clock.now, deleted.body, APP),
    )
    db.close()
    clock.now += HOUR + 1
    new_stray = write_stray(data, b"bytes whose row is about to be stored", clock.now)
    for path in files(abandoned_upload):
        os.utime(path, (clock.now, clock.now))
    for path in files(data / "partials"):
        os.utime(path, (clock.now - HOUR - 1, clock.now - HOUR - 1))
    await push_blob(store, APP, b"pushed just now")
    return {
        "deleted": deleted,
        "shared": shared,
        "needed once": needed_once,
        "old stray": old_stray,
        "new stray": new_stray,
        "upload": writer.id,
    }


async def test_a_dry_run_reports_the_removals_of_a_run(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """A dry run and the run after it report the same removals. The dry run changes no file."""
    garbage = await make_garbage(store, data, clock)
    sizes_before = {path: path.stat().st_size for path in files(data)}

    planned = await collect_all(store, dry_run=True)
    assert {path: path.stat().st_size for path in files(data)} == sizes_before
    removals = await collect_all(store, dry_run=False)

    assert set(planned) == set(removals)
    assert len(planned) == len(removals)
    reported_removals = {(removal.kind, removal.repository, removal.item) for removal in removals}
    blobs = [descriptor.digest for descriptor in garbage["deleted"].blobs]
    assert reported_removals == {
        (RemovalKind.TRASH, "", ""),
        (RemovalKind.PARTIAL, "", digest_of(b"x" * 5000)),
        (RemovalKind.UPLOAD, APP, garbage["upload"]),
        (RemovalKind.MANIFEST, APP, garbage["deleted"].digest),
        *(
            (RemovalKind.LINK, APP, digest)
            for digest in [*blobs, garbage["shared"].digest, garbage["needed once"].digest]
        ),
        (RemovalKind.LINK, OTHER, garbage["shared"].digest),
        *((RemovalKind.BLOB, "", digest) for digest in [*blobs, garbage["shared"].digest]),
        (RemovalKind.STRAY, "", garbage["old stray"]),
    }
    assert await collect_all(store, dry_run=False) == []
    assert files(data / "trash") == files(data / "uploads") == files(data / "partials") == []


async def test_bytes_of_a_shared_blob_count_once(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """If all links of a shared blob are removed, its bytes count once, for the blob itself. The removal of a link
    counts no bytes."""
    for number in range(4):
        await push_blob(store, RepositoryName(f"team/{number}"), b"the same layer")
    clock.now += HOUR + 1
    for dry_run in (True, False):
        removals = await collect_all(store, dry_run=dry_run)
        assert [removal.size for removal in removals if removal.kind is RemovalKind.BLOB] == [len(b"the same layer")]
        assert [removal.size for removal in removals if removal.kind is RemovalKind.LINK] == [0] * 4


@pytest.mark.parametrize("needed_index", [0, 1, 2])
async def test_a_blob_that_a_repository_needs_is_not_removed(
    store: StoredRegistry, clock: Clock, needed_index: int
) -> None:
    """If one of three repositories still needs a blob, the links of the other two are removed, but not the blob."""
    names = [RepositoryName(f"team/{number}") for number in range(3)]
    for name in names:
        layer = await push_blob(store, name, b"the same layer")
    clock.now += HOUR + 1
    await store.metadata.touch_blob(names[needed_index], layer.digest)
    for dry_run in (True, False):
        removals = await collect_all(store, dry_run=dry_run)
        assert {(removal.kind, removal.repository) for removal in removals} == {
            (RemovalKind.LINK, name) for name in names if name != names[needed_index]
        }


async def test_the_reason_names_the_repository_and_the_time(store: StoredRegistry, clock: Clock) -> None:
    """The reason of a removed link names the repository, and the time since which no manifest has needed the blob."""
    await push_blob(store, APP, b"a layer")
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock.now))
    clock.now += HOUR + 1
    link, blob = await collect_all(store, dry_run=False)
    assert link.reason == f"no manifest of {APP} has referred to it since {since}"
    assert blob.reason == "no repository has it any more"


@pytest.mark.slow
async def test_a_dry_run_over_several_batches(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """If there is more garbage than one batch, a dry run reports each removal once."""
    db = second_connection(data / "entrepot.db")
    with db:
        db.execute("INSERT INTO repository (id, name, created) VALUES (7, 'team/many', 0)")
        for number in range(521):
            digest = digest_of(str(number).encode())
            db.execute("INSERT INTO blob VALUES (?, ?, 1, '', 0)", (number + 1, digest))
            if number % 2:
                db.execute("INSERT INTO blob_link VALUES (7, ?, 0, 1)", (number + 1,))
            db.execute("INSERT INTO collect_queue VALUES (?, ?, 5)", (7 if number % 2 else 0, digest))
            db.execute("INSERT INTO upload VALUES (?, 'team/many', 'sha256', 0, NULL, '', 5, 5, '')", (_uuid(number),))
            db.execute("INSERT INTO deleted_manifest (repository, digest, media_type, pushed, deleted, body) "
                       "VALUES (7, ?, 'type', 5, 5, X'00')", (digest,))  # fmt: skip
    db.close()
    planned, done = await collect_all(store, dry_run=True), await collect_all(store, dry_run=False)
    assert set(planned) == set(done)
    counts = {kind: sum(removal.kind is kind for removal in planned) for kind in RemovalKind}
    assert (counts[RemovalKind.LINK], counts[RemovalKind.BLOB]) == (260, 521)
    assert counts[RemovalKind.UPLOAD] == counts[RemovalKind.MANIFEST] == 521


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


async def run_job(store: StoredRegistry, steps: list[Mapping[str, JSON]], **arguments: object) -> Any:
    return await run_in_command(
        store.jobs, store.leases, GC, arguments, collection_work(store.collector), actor="cli:alice",
        on_step=steps.append,
    )  # fmt: skip


async def test_the_job_reports_removals_and_totals(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """The garbage collection job reports each removal as a step. Its result has the totals by kind. The result of a dry
    run also has the removals."""
    await make_garbage(store, data, clock)
    planned: list[Mapping[str, JSON]] = []
    removed: list[Mapping[str, JSON]] = []
    preview = await run_job(store, planned, dry_run=True, strays=True)
    result = await run_job(store, removed, strays=True)

    assert [{"event": "would be removed", **record} for record in preview["records"]] == planned
    assert not preview["more"]
    assert len(planned) <= MAX_RECORDS
    assert (preview["totals"], preview["bytes"]) == (result["totals"], result["bytes"])
    assert "records" not in result
    assert result["totals"]["link"] == {"count": 5, "bytes": 0}
    assert result["bytes"] == sum(step["bytes"] for step in removed)
    assert {step["event"] for step in removed} == {"removed"}
    assert set(removed[0]) == {"event", "kind", "repository", "item", "bytes", "reason"}


@pytest.mark.slow
async def test_a_second_collection_is_refused_while_one_runs(store: StoredRegistry) -> None:
    """While a garbage collection runs, a second one is refused. The error names the actor and the job of the first."""
    async with store.leases.try_slot(slot_name(GC), count=1):
        await store.jobs.add(GC, {}, actor="cli:alice", holder="command, process 1")
        with pytest.raises(JobRunning, match=r"cli:alice is running gc already \(job 1, command, process 1\)"):
            await run_job(store, [])


async def test_a_stopped_collection_is_finished_by_the_next(store: StoredRegistry, clock: Clock) -> None:
    """If a round is stopped, the next round removes the remaining garbage. Both rounds together report each removal
    once."""
    for number in range(5):
        await push_blob(store, APP, str(number).encode())
    clock.now += HOUR + 1
    reported: list[Removal] = []

    async def stop_after_two(removal: Removal) -> None:
        reported.append(removal)
        if len(reported) == 2:
            raise JobStopped

    with pytest.raises(JobStopped):
        await store.collector.collect(stop_after_two)
    remaining = await collect_all(store, dry_run=False)
    assert (
        sorted(removal.kind for removal in [*reported, *remaining]) == [RemovalKind.BLOB] * 5 + [RemovalKind.LINK] * 5
    )
    assert await collect_all(store, dry_run=False) == []


async def test_collection_ends_its_removals_for_a_waiting_backup(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup that starts during a collection waits until the present batch of blobs is removed, not for all blobs.
    The next round removes the remaining blobs."""
    monkeypatch.setattr(collector, "BATCH_SIZE", 2)
    for number in range(7):
        await push_blob(store, APP, str(number).encode())
    clock.now += HOUR + 1
    removed_blobs: list[Removal] = []
    are_blocked = asyncio.Event()

    async def hold_back_removals() -> None:
        async with blob_removals_blocked(store.leases):
            are_blocked.set()

    async with asyncio.TaskGroup() as tasks:

        async def start_backup(removal: Removal) -> None:
            if removal.kind != RemovalKind.BLOB:
                return
            removed_blobs.append(removal)
            if len(removed_blobs) == 1:
                tasks.create_task(hold_back_removals())
                await asyncio.sleep(0)  # the backup takes the slots that are free

        await store.collector.collect(start_backup)
    assert len(removed_blobs) == 2
    assert are_blocked.is_set()
    assert len(await collect_all(store, dry_run=False)) == 5


async def test_large_deleted_manifests_are_removed_in_several_transactions(store: StoredRegistry, data: Path) -> None:
    """A deleted manifest is stored until the end of the grace period, so that it can be restored. Large deleted
    manifests are removed in several transactions, so that no push waits long for a transaction. One round removes all
    of them."""
    db = second_connection(data / "entrepot.db")
    with db:
        for number in range(3):
            digest = digest_of(str(number).encode())
            db.execute(
                "INSERT INTO deleted_manifest (repository, digest, media_type, pushed, deleted, body) "
                "VALUES (1, ?, 'type', 5, 5, zeroblob(600000))",
                (digest,),
            )
    db.close()
    assert len(await store.metadata.drop_deleted_manifests(10, 500)) == 1
    assert [removal.size for removal in await collect_all(store, dry_run=False)] == [600_000] * 2


async def test_untagged_manifests_stay(store: StoredRegistry, clock: Clock) -> None:
    """Garbage collection does not remove untagged manifests and their blobs, even if they are old."""
    await push_image(store, APP, "untagged")
    clock.now += 1000 * HOUR
    assert await collect_all(store, dry_run=False) == []


async def test_a_replaced_data_directory_keeps_its_blobs(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """If an operator restores a backup in place of the data directory while a server runs, the server's next round of
    garbage collection deletes no blob of the restored directory, and says that the server has to be restarted."""
    manifest = await push_image(store, APP, "one", "v1")
    await store.delete_manifest(APP, manifest.digest, by=BY)
    replace_by_copy(data)
    before = files(data / "blobs")
    clock.now += 3 * HOUR
    with pytest.raises(StorageFailed, match="was moved away or replaced while the server was running"):
        await store.collector.collect()
    assert files(data / "blobs") == before
