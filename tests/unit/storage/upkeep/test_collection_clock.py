"""Garbage collection after the clock of the machine was ahead for some time and was then set back."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.errors import BlobUnknown
from storage.metadata.sqlite.upkeep import future_times
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import collector
from storage.upkeep.collection_report import RemovalKind
from tests.fakes.registry_content import BY, push_blob, push_image, read_blob
from tests.unit.storage.upkeep.test_collection import APP, HOUR, OTHER, Clock, collect_all
from tests.unit.storage.upkeep.test_collection import clock as clock
from tests.unit.storage.upkeep.test_collection import data as data
from tests.unit.storage.upkeep.test_collection import store as store

YEAR = 365 * 86_400.0


@pytest.fixture
def corrected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a round correct times in the future when it first sees them."""
    monkeypatch.setattr(collector, "CONFIRM_FUTURE_SECONDS", 0.0)


async def removed_kinds(store: StoredRegistry) -> list[RemovalKind]:
    return sorted(removal.kind for removal in await collect_all(store, dry_run=False))


async def test_garbage_from_the_future_is_removed(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch, corrected_at_once: None
) -> None:
    """Unused blobs, uploads and deleted manifests that were left while the clock was ahead stay for the usual time from
    the first collection on after the clock was set back. Then they are removed."""
    monkeypatch.setattr(future_times, "MAX_CORRECTED_ROWS", 2)  # so that several transactions are needed
    clock.now += YEAR
    for number in range(3):
        await push_blob(store, APP, b"unused %d" % number)
    deleted = await push_image(store, APP, "deleted")
    await store.delete_manifest(APP, deleted.digest, by=BY)
    upload = await store.start_upload(APP)
    await upload.write(b"unfinished")
    await upload.aclose()
    clock.now -= YEAR
    assert await collect_all(store, dry_run=True) == []

    assert await removed_kinds(store) == []
    clock.now += HOUR - 1
    assert await removed_kinds(store) == []
    clock.now += 2
    blobs = 3 + len(deleted.blobs)
    assert await removed_kinds(store) == sorted(
        [RemovalKind.LINK, RemovalKind.BLOB] * blobs + [RemovalKind.UPLOAD, RemovalKind.MANIFEST]
    )


async def test_a_use_in_the_future_does_not_keep_a_blob(
    store: StoredRegistry, clock: Clock, corrected_at_once: None
) -> None:
    """A blob that was queued for removal before the clock was ahead, and that a client used meanwhile, stays for
    further grace periods. Then it is removed."""
    blob = await push_blob(store, APP, b"used once more")
    clock.now += YEAR
    await store.resolve_blob(APP, blob.digest)
    clock.now += HOUR / 2 - YEAR
    await push_blob(store, OTHER, b"younger")
    clock.now += HOUR / 2 + 1
    assert await removed_kinds(store) == []
    assert await read_blob(store, APP, blob.digest) == b"used once more"
    for _ in range(2):  # the first round corrects the time of the use
        clock.now += HOUR + 1
        await collect_all(store, dry_run=False)
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(APP, blob.digest)


async def test_a_clock_that_was_behind_ends_no_grace_period(store: StoredRegistry, clock: Clock) -> None:
    """The clock is a year behind during a round, as after a start of the machine, and is then set right. The round has
    not changed the times of uploads, of unused blobs and of deleted manifests, so they stay for the rest of their
    time."""
    await push_blob(store, APP, b"unused")
    deleted = await push_image(store, APP, "deleted")
    await store.delete_manifest(APP, deleted.digest, by=BY)
    upload = await store.start_upload(APP)
    await upload.write(b"unfinished")
    await upload.aclose()
    clock.now -= YEAR
    assert await removed_kinds(store) == []
    clock.now += YEAR + HOUR / 2
    assert await removed_kinds(store) == []


@pytest.mark.parametrize("kind", [RemovalKind.PARTIAL, RemovalKind.UPLOAD])
async def test_files_from_the_future_are_removed(
    store: StoredRegistry, data: Path, clock: Clock, kind: RemovalKind
) -> None:
    """The files of an unfinished download, or of an upload whose session has ended, were written while the clock was
    ahead. After the clock was set back, they stay for the usual time and are then removed."""
    if kind is RemovalKind.PARTIAL:
        partial = await store.partials.claim(digest_of(b"x" * 5000), 5000)
        await asyncio.to_thread(partial.write_at, 0, b"x" * 4096)
        partial.close()
        written = list((data / "partials").iterdir())
    else:
        written = [data / "uploads" / "00000000-0000-4000-8000-000000000001"]
        written[0].mkdir()
    future = time.time() + YEAR
    for path in written:
        os.utime(path, (future, future))
    clock.now = time.time()
    assert await removed_kinds(store) == []
    clock.now = time.time() + HOUR + 1
    assert await removed_kinds(store) == [kind]
