"""An import that ends at any durable step, by SIGKILL or by a power cut: no image is half there, and the next import
brings the rest."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.errors import ManifestUnknown
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import assert_whole
from tests.fakes.old_directory import OldDirectory
from tests.fakes.server_process import ROOT
from tests.fakes.upstream_content import ImageTree, index_of, noise_image
from tests.system.crash.killed_import import import_once
from tests.system.crash.power_cut_disk import RecordingSystem, ReplayedDisk
from tests.system.crash.workload import files_below, sweep

REPOSITORIES = ("team/app", "team/copy")


@pytest.fixture
def images() -> list[ImageTree]:
    return [
        index_of((noise_image("amd64", 3000), "amd64"), (noise_image("arm64", 10), "arm64")),
        noise_image("plain", 3000, 20, docker=True),
    ]


@pytest.fixture
def old(quick: Path, images: list[ImageTree]) -> OldDirectory:
    """Two repositories with the same images; a part of the files cannot be linked, so they are copied."""
    made = OldDirectory(quick / "old")
    for repo in REPOSITORIES:
        for number, image in enumerate(images):
            made.push(repo, image, str(number))
    for digest in list(images[0].blobs)[:2]:
        made.data(digest).chmod(0o666)
    return made


async def assert_nothing_half(store: StoredRegistry, images: list[ImageTree]) -> None:
    """Each manifest that is here has all that it refers to."""
    trees = [tree for image in images for tree in (image, *image.children)]
    for repo in REPOSITORIES:
        for image in trees:
            try:
                await store.resolve_manifest(RepositoryName(repo), Digest(image.digest))
            except ManifestUnknown:
                continue
            await assert_whole(store, repo, image)


async def check(data: Path, old: OldDirectory, images: list[ImageTree], boot: str) -> None:
    """What is there is whole; the next import completes it; garbage collection leaves nothing else."""
    async with open_registry(data, grace=0, boot=boot) as store:
        await assert_nothing_half(store, images)
    await import_once(old.path, data, boot=boot)
    clock = lambda: time.time() + 3600  # noqa: E731
    async with open_registry(data, grace=0, expire=60, boot=boot, clock=clock) as store:
        await sweep(store)
        for repo in REPOSITORIES:
            for image in images:
                await assert_whole(store, repo, image)
    blobs = {digest for image in images for digest in image.blobs}
    assert {f"sha256:{path.name}" for path in files_below(data / "blobs")} == blobs
    for folder in ("trash", "uploads", "partials"):
        assert not list((data / folder).iterdir())


@pytest.mark.slow
def test_an_import_that_is_killed_at_a_durable_step(quick: Path, old: OldDirectory, images: list[ImageTree]) -> None:
    command = [sys.executable, "-m", "tests.system.crash.killed_import", str(old.path), str(quick / "killed")]
    (quick / "killed").mkdir()
    before = old.snapshot()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            number, code = map(int, line.split())
            data = quick / "killed" / str(number)
            try:
                asyncio.run(check(data, old, images, "first run of the machine"))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed before step {number}")
                raise
            shutil.rmtree(data)
            assert code in (-signal.SIGKILL, 0)
    assert code == 0, "the last process should have come through"
    assert number > 40
    assert old.snapshot() == before


@pytest.mark.slow
async def test_an_import_that_a_power_cut_ends(quick: Path, old: OldDirectory, images: list[ImageTree]) -> None:
    recorded, data = quick / "recorded", quick / "data"
    prepare_data_dir(recorded)
    prepare_data_dir(data)
    system = RecordingSystem(recorded)
    disk = ReplayedDisk(system.snapshot())
    await import_once(old.path, recorded, system, boot="first run")
    cuts = 0
    for number, entry in enumerate(system.log):
        disk.follow(entry)
        for left in disk.cuts(number, mixtures=0):
            left.lay_out(data)
            cuts += 1
            try:
                if cuts % 7:
                    async with open_registry(data, grace=0, boot="second run") as store:
                        await assert_nothing_half(store, images)
                else:
                    await check(data, old, images, "second run")
            except BaseException as error:
                error.add_note(f"power cut after step {number}, {entry[:3]!r:.100}; left: {left.how}")
                raise
    assert cuts > 100
