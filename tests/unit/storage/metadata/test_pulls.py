"""The store of pulls: for each manifest, the time of its last pull and the number of its pulls."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.content import Actor, digest_of
from storage.data_dir.system import boot_id
from storage.names import RepositoryName, Tag
from storage.pulls import PullCount, PullRecord
from storage.store.stored_registry import StoredRegistry
from tests.fakes import written_data_dir as previous_release
from tests.fakes.forked_process import ROOT
from tests.fakes.registry_content import BY, descriptor_of, image_of, push_image
from tests.fakes.upkeep_store import APP, START, Clock, clocked_store

UBUNTU = RepositoryName("docker.io/library/ubuntu")


async def test_pulls_add_up(store: StoredRegistry) -> None:
    """The numbers of pulls are added up. The latest time of a pull counts, in whatever order pulls are stored."""
    image = await push_image(store, APP, "a", "1")
    assert await store.pulls.record_of(APP, image.digest) is None
    await store.pulls.save([PullCount(APP, image.digest, "", START + 50, 2)])
    await store.pulls.save([PullCount(APP, image.digest, "", START + 20, 3)])
    assert await store.pulls.record_of(APP, image.digest) == PullRecord("", START + 50, 5)


async def test_pulls_of_deleted_content_are_ignored(store: StoredRegistry) -> None:
    """If a manifest or repository is unknown when its pulls are stored, these pulls are ignored."""
    unknown = digest_of(b"unknown")
    image = await push_image(store, APP, "a", "1")
    nowhere = RepositoryName("never/pushed/to")
    await store.pulls.save([PullCount(repo, unknown, "", START, 1) for repo in (APP, nowhere)])
    assert await store.pulls.record_of(APP, unknown) is None
    assert await store.pulls.record_of(nowhere, unknown) is None
    assert await store.pulls.record_of(APP, image.digest) is None


async def test_pulls_are_deleted_with_their_manifest(store: StoredRegistry) -> None:
    """When a manifest is deleted, its pulls are deleted as well. If the manifest is pushed again, it has no pulls."""
    image = await push_image(store, APP, "a", "1")
    await store.pulls.save([PullCount(APP, image.digest, "", START, 1)])
    await store.delete_manifest(APP, image.digest, by=BY)
    await push_image(store, APP, "a", "1")
    assert await store.pulls.record_of(APP, image.digest) is None


async def test_a_mirrored_manifest_has_a_record_from_the_start(store: StoredRegistry, clock: Clock) -> None:
    """A mirrored manifest has a record of pulls as soon as it is stored. The record names the upstream, and stays when
    the mirror stores the manifest again or a client pulls it."""
    image = image_of(descriptor_of(b"config"))
    await store.put_manifest(UBUNTU, image, [Tag("1")], by=Actor("mirror"), sparse=True)
    assert await store.pulls.record_of(UBUNTU, image.digest) == PullRecord("docker.io", START, 0)
    clock.pass_days(1)
    await store.put_manifest(UBUNTU, image, [Tag("2")], by=Actor("mirror"), sparse=True)
    assert await store.pulls.record_of(UBUNTU, image.digest) == PullRecord("docker.io", START, 0)
    await store.pulls.save([PullCount(UBUNTU, image.digest, "docker.io", clock(), 1)])
    assert await store.pulls.record_of(UBUNTU, image.digest) == PullRecord("docker.io", clock(), 1)


KILLED_PROCESS = """
import asyncio, os, signal, sys
from pathlib import Path
from storage.composition import open_registry
from storage.names import Digest, RepositoryName
from storage.upkeep.pull_recorder import PullRecorder

async def main(folder, repo, digest):
    async with open_registry(Path(folder)) as store:
        async def locate(name):
            return store, name, None
        recorder = PullRecorder(store.pulls, locate, lambda: 1_700_000_100.0)
        recorder.count((repo, digest))
        await recorder.store()
        recorder.count((repo, digest))
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], RepositoryName(sys.argv[2]), Digest(sys.argv[3])))
"""


@pytest.mark.slow
async def test_stored_pulls_survive_sigkill(tmp_path: Path, clock: Clock) -> None:
    """A process stores one pull, counts a second one, and is killed. The stored pull is kept; the second one is
    lost."""
    async with clocked_store(tmp_path, clock) as store:
        image = await push_image(store, APP, "a", "1")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED_PROCESS, str(tmp_path), APP, image.digest),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    async with asyncio.timeout(60):
        assert await process.wait() == -signal.SIGKILL
    async with open_registry(tmp_path) as store:
        assert await store.pulls.record_of(APP, image.digest) == PullRecord("", START + 100, 1)


async def test_content_mirrored_by_an_earlier_version_has_a_record(tmp_path: Path, clock: Clock) -> None:
    """Content that an earlier version has mirrored gets a record with the time of the migration, so that it can be
    evicted later. Pushed content gets none."""
    written = previous_release.write_data_dir(tmp_path / "data", boot_id())
    started = time.time()
    async with clocked_store(tmp_path / "data", clock) as store:
        record = await store.pulls.record_of(UBUNTU, digest_of(written.mirrored_manifest))
        assert record is not None
        assert (record.upstream, record.pulls) == ("docker.io", 0)
        assert started <= record.last <= time.time()
        assert await store.pulls.record_of(APP, digest_of(written.manifest)) is None
