"""A full round of garbage collection reports what it removes. A dry run reports the same and removes nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.jobs import JSON, JobRunning, JobStopped, slot_name
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.collection_job import GC, MAX_RECORDS, collection_work
from storage.upkeep.job_runner import run_in_command
from storage.upkeep.removals import Removal, RemovalKind
from tests.fakes.registry_content import BY, index_of, push_blob, push_image

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


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def round_of(store: StoredRegistry, *, dry_run: bool) -> list[Removal]:
    removals: list[Removal] = []

    async def note(removal: Removal) -> None:
        removals.append(removal)

    report = await store.collector.collect(note, dry_run=dry_run, all_shards=True)
    assert sum(report.counts.values()) == len(removals)
    assert report.freed_bytes == sum(removal.size for removal in removals)
    return removals


def write_stray(data: Path, content: bytes, written: float) -> Digest:
    """Writes a blob file that no row names."""
    digest = digest_of(content)
    path = data / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (written, written))
    return digest


async def make_garbage(store: StoredRegistry, data: Path, clock: Clock) -> dict[str, Any]:
    """Makes one thing of each kind that the next round may remove, and similar things that must stay."""
    await push_image(store, APP, "kept", "latest")
    gone = await push_image(store, APP, "gone")
    shared = await push_blob(store, APP, b"in two repositories")
    await push_blob(store, OTHER, b"in two repositories")
    half = await push_blob(store, APP, b"needed in one of two repositories")
    await push_blob(store, OTHER, b"needed in one of two repositories")
    await store.put_manifest(OTHER, index_of([half]), [], by=BY)  # an index that lists a blob
    await store.delete_manifest(APP, gone.digest, by=BY)
    writer = await store.start_upload(APP)
    await writer.write(b"an upload that nobody goes on with")
    await writer.aclose()
    abandoned = data / "uploads" / writer.id
    partial = await store.partials.claim(digest_of(b"x" * 5000), 5000)
    await asyncio.to_thread(partial.write_at, 0, b"x" * 4096)
    partial.close()
    lost = write_stray(data, b"bytes without a row", clock.now - 2 * HOUR)
    (data / "trash" / "left").write_bytes(b"by a round that was killed")
    db = apsw.Connection(str(data / "entrepot.db"))
    db.execute(
        "INSERT OR REPLACE INTO deleted_manifest (repository, digest, media_type, pushed, deleted, body) "
        "SELECT id, ?, 'type', ?, ?, ? FROM repository WHERE name = ?",
        (gone.digest, clock.now, clock.now, gone.body, APP),
    )
    db.close()
    clock.now += HOUR + 1
    young = write_stray(data, b"bytes whose row is about to be stored", clock.now)
    for path in files(abandoned):
        os.utime(path, (clock.now, clock.now))
    for path in files(data / "partials"):
        os.utime(path, (clock.now - HOUR - 1, clock.now - HOUR - 1))
    await push_blob(store, APP, b"pushed just now")
    return {"gone": gone, "shared": shared, "half": half, "lost": lost, "young": young, "upload": writer.id}


async def test_a_dry_run_reports_what_a_run_removes(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """The dry run and the run report the same records. The dry run changes no file and no row."""
    made = await make_garbage(store, data, clock)
    before = {path: path.stat().st_size for path in files(data)}

    planned = await round_of(store, dry_run=True)
    assert {path: path.stat().st_size for path in files(data)} == before
    done = await round_of(store, dry_run=False)

    assert set(planned) == set(done)
    assert len(planned) == len(done)
    found = {(removal.kind, removal.repository, removal.item) for removal in done}
    blobs = [descriptor.digest for descriptor in made["gone"].blobs]
    assert found == {
        (RemovalKind.TRASH, "", ""),
        (RemovalKind.PARTIAL, "", digest_of(b"x" * 5000)),
        (RemovalKind.UPLOAD, APP, made["upload"]),
        (RemovalKind.MANIFEST, APP, made["gone"].digest),
        *((RemovalKind.LINK, APP, digest) for digest in [*blobs, made["shared"].digest, made["half"].digest]),
        (RemovalKind.LINK, OTHER, made["shared"].digest),
        *((RemovalKind.BLOB, "", digest) for digest in [*blobs, made["shared"].digest]),
        (RemovalKind.STRAY, "", made["lost"]),
    }
    assert await round_of(store, dry_run=False) == []
    assert files(data / "trash") == files(data / "uploads") == files(data / "partials") == []


async def test_bytes_of_a_shared_blob_count_once(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """The bytes of a shared blob are freed with its last link. A link itself frees no bytes."""
    for number in range(4):
        await push_blob(store, RepositoryName(f"team/{number}"), b"the same layer")
    clock.now += HOUR + 1
    for dry_run in (True, False):
        removals = await round_of(store, dry_run=dry_run)
        assert [removal.size for removal in removals if removal.kind is RemovalKind.BLOB] == [len(b"the same layer")]
        assert [removal.size for removal in removals if removal.kind is RemovalKind.LINK] == [0] * 4


@pytest.mark.parametrize("kept", [0, 1, 2])
async def test_a_blob_that_one_repository_still_needs_is_not_counted(
    store: StoredRegistry, clock: Clock, kept: int
) -> None:
    """A blob does not count as freed while any repository needs it."""
    names = [RepositoryName(f"team/{number}") for number in range(3)]
    for name in names:
        layer = await push_blob(store, name, b"the same layer")
    clock.now += HOUR + 1
    await store.metadata.touch_blob(names[kept], layer.digest)
    for dry_run in (True, False):
        removals = await round_of(store, dry_run=dry_run)
        assert {(removal.kind, removal.repository) for removal in removals} == {
            (RemovalKind.LINK, name) for name in names if name != names[kept]
        }


async def test_the_reason_names_the_repository_and_the_time(store: StoredRegistry, clock: Clock) -> None:
    await push_blob(store, APP, b"a layer")
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock.now))
    clock.now += HOUR + 1
    link, blob = await round_of(store, dry_run=False)
    assert link.reason == f"no manifest of {APP} has referred to it since {since}"
    assert blob.reason == "no repository has it any more"


@pytest.mark.slow
async def test_many_things_are_listed_in_batches(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """A dry run over more garbage than one batch reports each thing once."""
    db = apsw.Connection(str(data / "entrepot.db"))
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
    planned, done = await round_of(store, dry_run=True), await round_of(store, dry_run=False)
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


async def test_the_job_gives_records_and_totals(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """Each removal is a step of the job. The result has the totals by kind, and after a dry run also the records."""
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


async def test_a_second_collection_says_who_is_at_work(store: StoredRegistry) -> None:
    async with store.leases.try_slot(slot_name(GC), count=1):
        await store.jobs.add(GC, {}, actor="cli:alice", holder="command, process 1")
        with pytest.raises(JobRunning, match=r"cli:alice is running gc already \(job 1, command, process 1\)"):
            await run_job(store, [])


async def test_a_stopped_collection_is_finished_by_the_next(store: StoredRegistry, clock: Clock) -> None:
    """What a stopped round has removed stays removed. Nothing is counted or removed twice."""
    for number in range(5):
        await push_blob(store, APP, str(number).encode())
    clock.now += HOUR + 1
    seen: list[Removal] = []

    async def stop_after_two(removal: Removal) -> None:
        seen.append(removal)
        if len(seen) == 2:
            raise JobStopped

    with pytest.raises(JobStopped):
        await store.collector.collect(stop_after_two)
    rest = await round_of(store, dry_run=False)
    assert sorted(removal.kind for removal in [*seen, *rest]) == [RemovalKind.BLOB] * 5 + [RemovalKind.LINK] * 5
    assert await round_of(store, dry_run=False) == []


async def test_large_deleted_manifests_go_in_several_transactions(store: StoredRegistry, data: Path) -> None:
    """Large deleted manifests are removed in several transactions, so that no push waits long for one of them. One
    round removes all of them."""
    db = apsw.Connection(str(data / "entrepot.db"))
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
    assert [removal.size for removal in await round_of(store, dry_run=False)] == [600_000] * 2


async def test_untagged_manifests_stay(store: StoredRegistry, clock: Clock) -> None:
    """Untagged manifests stay with their blobs, however old they are."""
    await push_image(store, APP, "untagged")
    clock.now += 1000 * HOUR
    assert await round_of(store, dry_run=False) == []
