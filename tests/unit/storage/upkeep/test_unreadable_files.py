"""Garbage collection and the consistency check of a store with files whose inodes the disk cannot read. They skip these
files with a warning, and do their work on all other files."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from storage.blobs.files import unreadable_files
from storage.blobs.files.leftovers import free_disk_space, list_partials
from storage.blobs.files.unreadable_files import MAX_WARNED_PATHS, has_unreadable_inode
from storage.composition import open_registry, prepare_data_dir
from storage.consistency import ProblemCode
from storage.content import digest_of
from storage.data_dir.layout import Layout
from storage.data_dir.system import System, boot_id
from storage.errors import StorageFailed
from storage.names import Digest, RepositoryName, UploadID
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from tests.fakes.blob_files import layout_behind
from tests.fakes.registry_content import push_blob, push_image, read_blob
from tests.fakes.scrub_runs import scrub
from tests.fakes.unreadable_files import UnreadableFiles

REPO = RepositoryName("team/app")
LONG_AGO = 7200.0
"""Age in seconds of all content that garbage collection may remove."""


class Clock:
    """A clock whose time is `ahead` seconds later than the present time."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=3600, expire=3600, clock=clock) as opened:
        yield opened


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> UnreadableFiles:
    return UnreadableFiles(monkeypatch)


async def upload_directory(store: StoredRegistry, layout: Layout) -> Path:
    return layout.upload(await _start_upload(store))


async def upload_file(store: StoredRegistry, layout: Layout) -> Path:
    return layout.upload(await _start_upload(store)) / "1"


async def file_of_ended_upload(store: StoredRegistry, layout: Layout) -> Path:
    upload = await _start_upload(store)
    await store.metadata.end_upload(upload)
    return layout.upload(upload) / "1"


async def _start_upload(store: StoredRegistry) -> UploadID:
    writer = await store.start_upload(REPO)
    await writer.write(b"an upload that nobody continues")
    await writer.aclose()
    return writer.id


async def partial_data(store: StoredRegistry, layout: Layout) -> Path:
    return layout.partial_data(await _start_download(store, layout))


async def partial_state(store: StoredRegistry, layout: Layout) -> Path:
    return layout.partial_state(await _start_download(store, layout))


async def _start_download(store: StoredRegistry, layout: Layout) -> str:
    digest = digest_of(b"x" * 5000)
    partial = await store.partials.claim(digest, 5000)
    await asyncio.to_thread(partial.write_at, 0, b"x" * 4096)
    partial.close()
    return layout.partial_name(digest, 5000)


async def file_in_trash(_store: StoredRegistry, layout: Layout) -> Path:
    path = layout.trash / "left"
    path.write_bytes(b"by a round that was killed")
    return path


async def stray(_store: StoredRegistry, layout: Layout) -> Path:
    path = layout.blob(digest_of(b"bytes without a row"))
    path.write_bytes(b"bytes without a row")
    return path


async def unneeded_blob(store: StoredRegistry, layout: Layout) -> Path:
    return layout.blob((await push_blob(store, REPO, b"another blob that no manifest needs")).digest)


@pytest.mark.parametrize(
    "make",
    [
        upload_directory,
        upload_file,
        file_of_ended_upload,
        partial_data,
        partial_state,
        file_in_trash,
        stray,
        unneeded_blob,
    ],
)
@pytest.mark.slow
async def test_collection_skips_an_unreadable_file(
    store: StoredRegistry,
    clock: Clock,
    unreadable: UnreadableFiles,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[StoredRegistry, Layout], Awaitable[Path]],
) -> None:
    """A round of garbage collection leaves the file where it is, logs a warning with its path, and removes the other
    garbage. Later rounds do the same, without a further warning for some time. Once the file can be read again, a round
    removes it too."""
    layout = layout_behind(store)
    path = await make(store, layout)
    unreadable.paths.add(path)
    for number in range(2):
        garbage = await push_blob(store, REPO, b"no manifest needs this %d" % number)
        clock.ahead += LONG_AGO
        caplog.clear()
        with caplog.at_level(logging.WARNING, "storage.damage"):
            await store.collector.collect(all_shards=True)
        assert not layout.blob(garbage.digest).exists()
        warnings = [text for text in caplog.messages if str(path) in text and "Structure needs cleaning" in text]
        assert len(warnings) == (number == 0)
        await store.collector.collect(dry_run=True, all_shards=True)
    unreadable.paths.clear()
    assert path.exists()
    await store.collector.collect(all_shards=True)
    assert not path.exists()


def fail_unlinks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makes every unlink fail from now on, as on a disk that refuses all changes. The returned list gets the paths."""
    paths: list[Path] = []

    def fail(path: str | os.PathLike[str], **_options: object) -> None:
        paths.append(Path(path))
        raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))

    monkeypatch.setattr(os, "unlink", fail)
    return paths


async def test_a_disk_that_refuses_to_delete_a_download(store: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal of old downloads fails if the disk can read a file but not delete it: the disk may refuse all
    changes."""
    path = await partial_data(store, layout_behind(store))
    failed_unlinks = fail_unlinks(monkeypatch)
    assert [partial.digest for partial in await store.partials.expire(1e12, dry_run=True)] == [digest_of(b"x" * 5000)]
    with pytest.raises(StorageFailed):
        await store.partials.expire(1e12)
    assert failed_unlinks == [path]


async def test_freeing_space_on_a_disk_that_refuses_deletions(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a start on a full disk, an error of a deletion ends the step, because the next deletion would fail too."""
    layout = layout_behind(store)
    for name in ("one", "two"):
        (layout.trash / name).write_bytes(b"deleted")
        (await store.partials.claim(digest_of(name.encode()), 10)).close()
    failed_unlinks = fail_unlinks(monkeypatch)
    free_disk_space(layout, System(), boot_id())
    assert [path.parent for path in failed_unlinks] == [layout.trash, layout.partials]


@pytest.mark.parametrize("make", [partial_data, partial_state, file_in_trash])
@pytest.mark.parametrize("boot", ["present", "earlier"])
async def test_freeing_space_skips_an_unreadable_file(
    store: StoredRegistry,
    unreadable: UnreadableFiles,
    make: Callable[[StoredRegistry, Layout], Awaitable[Path]],
    boot: str,
) -> None:
    """At a start on a full disk, a file that cannot be read stays, and the others are deleted."""
    layout = layout_behind(store)
    path = await make(store, layout)
    unreadable.paths.add(path)
    for name in ("one", "two"):
        (layout.trash / name).write_bytes(b"deleted")
        (await store.partials.claim(digest_of(name.encode()), 10)).close()
    free_disk_space(layout, System(), boot_id() if boot == "present" else "another boot")
    left = {*layout.trash.iterdir(), *layout.partials.iterdir()}
    assert path in left
    assert {file.stem for file in left} == {path.stem}


def test_warnings_about_the_same_file_are_limited(
    tmp_path: Path, unreadable: UnreadableFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is at most one warning about a file in ten minutes. The memory for the times of warnings is limited."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    files = [tmp_path / str(number) for number in range(MAX_WARNED_PATHS + 10)]
    unreadable.paths.update(files)
    for now[0], expected in ((1000, 1), (1599, 1), (1600, 2)):
        assert has_unreadable_inode(files[0])
        assert len(caplog.messages) == expected
    assert all(has_unreadable_inode(file) for file in files)
    assert len(caplog.messages) == 1 + len(files)
    assert len(unreadable_files.warned_at) <= MAX_WARNED_PATHS


async def findings(store: StoredRegistry, options: CheckOptions) -> set[tuple[ProblemCode, str, bool]]:
    """Checks the store. Returns the code and the item of each problem, and whether it was repaired."""
    found: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        found.append(finding)

    async def on_progress(_done: int, _total: int, _message: str) -> None:
        pass

    await store.checker.check(options, on_problem, on_progress)
    return {(finding.problem.code, finding.problem.item, finding.repair is not None) for finding in found}


@pytest.fixture
async def layer(store: StoredRegistry, unreadable: UnreadableFiles) -> Digest:
    """The digest of a blob that a manifest needs, and whose file cannot be read."""
    await push_image(store, REPO, "image", "latest")
    digest = digest_of(b"layer of image")
    unreadable.paths.add(layout_behind(store).blob(digest))
    return digest


@pytest.mark.parametrize("hash_bytes", [False, True])
@pytest.mark.slow
async def test_a_check_reports_an_unreadable_blob(
    store: StoredRegistry, unreadable: UnreadableFiles, layer: Digest, hash_bytes: bool
) -> None:
    """A check reports a blob whose file cannot be read. A repair marks the blob as damaged and leaves the file."""
    expected = ProblemCode.BLOB_FILE_DIGEST, layer
    assert await findings(store, CheckOptions(hash_bytes=hash_bytes)) == {(*expected, False)}
    assert await findings(store, CheckOptions(hash_bytes=hash_bytes, repair=True)) == {(*expected, True)}
    assert await findings(store, CheckOptions(hash_bytes=hash_bytes)) == set()
    unreadable.paths.clear()
    assert layout_behind(store).blob(layer).exists()


@pytest.mark.parametrize("hash_bytes", [False, True])
@pytest.mark.slow
async def test_a_repair_stops_after_many_damaged_blobs(
    store: StoredRegistry, unreadable: UnreadableFiles, hash_bytes: bool
) -> None:
    """After 20 blobs in a row that it takes out of use, a repair stops with an error, as scrub does, because the disk
    may be faulty. A check without repair goes on. An undamaged blob between them begins a new row."""
    digests = [(await push_blob(store, REPO, b"blob %d" % number)).digest for number in range(50)]
    whole = digests.pop(10)
    layout = layout_behind(store)
    for number, digest in enumerate(digests):
        if number % 2:
            unreadable.paths.add(layout.blob(digest))
        else:
            layout.blob(digest).unlink()
    assert len(await findings(store, CheckOptions(hash_bytes=hash_bytes))) == 49
    with pytest.raises(StorageFailed, match=r"the last 20 blobs are all damaged.*entrepot scrub --keep-going"):
        await findings(store, CheckOptions(hash_bytes=hash_bytes, repair=True))
    marked = {blob.digest for blob in (await store.damage.damaged_blobs(None, 100)).items}
    assert marked == set(digests[: 10 + 20])
    assert len(await findings(store, CheckOptions(hash_bytes=hash_bytes, repair=True))) == 19
    assert await read_blob(store, REPO, whole) == b"blob 10"


async def test_an_unreadable_blob_that_scrub_has_marked(
    store: StoredRegistry, layer: Digest, caplog: pytest.LogCaptureFixture
) -> None:
    """After scrub has marked the blob as damaged, its file is still there. Checks, repairs and the search for strays
    skip the file."""
    result, _ = await scrub(store)
    assert result["damaged"] == 1
    for repair in (False, True):
        assert await findings(store, CheckOptions(repair=repair)) == set()
    await store.collector.collect(all_shards=True)
    assert {str(layout_behind(store).blob(layer)) in text for text in caplog.messages if "skipped" in text} == {True}


@pytest.mark.parametrize("repair", [False, True])
async def test_a_check_reports_an_unreadable_stray(
    store: StoredRegistry, unreadable: UnreadableFiles, repair: bool
) -> None:
    """A check reports a file without a row that cannot be read, and a repair leaves it. A stray that can be read is
    reported only when it is old."""
    layout = layout_behind(store)
    path = await stray(store, layout)
    assert await findings(store, CheckOptions(repair=repair)) == set()
    unreadable.paths.add(path)
    expected = ProblemCode.STRAY, digest_of(b"bytes without a row"), False
    assert await findings(store, CheckOptions(repair=repair)) == {expected}
    unreadable.paths.clear()
    assert path.exists()


async def test_an_unreadable_file_in_the_quarantine(store: StoredRegistry, unreadable: UnreadableFiles) -> None:
    """The list of the quarantine has all files but the one that cannot be read."""
    layout = layout_behind(store)
    digests = [digest_of(b"one"), digest_of(b"two")]
    for digest in digests:
        layout.path_of(layout.quarantine_place(digest)).write_bytes(b"damaged")
    unreadable.paths.add(layout.path_of(layout.quarantine_place(digests[0])))
    assert [entry.digest for entry in await store.blobs.list_quarantine()] == digests[1:]


async def test_a_download_with_an_unreadable_state_counts_as_running(
    store: StoredRegistry, unreadable: UnreadableFiles
) -> None:
    """If the state file of a download cannot be read, eviction treats it as running, because it may be."""
    layout = layout_behind(store)
    running = await store.partials.claim(digest_of(b"y"), 1)
    idle = await partial_state(store, layout)
    assert await store.partials.list_downloads() == {digest_of(b"y")}
    unreadable.paths.add(layout.partial_state(layout.partial_name(digest_of(b"y"), 1)))
    assert await store.partials.list_downloads() == {digest_of(b"y")}
    unreadable.paths.add(idle)
    assert await store.partials.list_downloads() == {digest_of(b"y"), digest_of(b"x" * 5000)}
    assert list_partials(layout, boot_id()) == []
    running.close()
