"""Tests that interrupt an import from another registry's data directory, by SIGKILL or by a power cut at a durable
step. No stored image is incomplete, and the next import completes the work."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.consistency import ProblemCode
from storage.errors import ManifestUnknown
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import assert_complete
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import ImageTree, index_of, noise_image
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.killed_import import import_once
from tests.system.crash.workload import files_below

REPOSITORIES = ("team/app", "team/copy")


@pytest.fixture
def images() -> list[ImageTree]:
    """An index of two platforms, and a Docker image."""
    return [
        index_of((noise_image("amd64", 3000), "amd64"), (noise_image("arm64", 10), "arm64")),
        noise_image("plain", 3000, 20, docker=True),
    ]


@pytest.fixture
def old_registry(memory_folder: Path, images: list[ImageTree]) -> OldDirectory:
    """The data directory of an old registry. Two repositories have the same images. Every user may write two of the
    files, so the import copies these two instead of hard-linking them."""
    directory = OldDirectory(memory_folder / "old")
    for repo in REPOSITORIES:
        for number, image in enumerate(images):
            directory.push(repo, image, str(number))
    for digest in list(images[0].blobs)[:2]:
        directory.data(digest).chmod(0o666)
    return directory


async def assert_images_complete(store: StoredRegistry, images: list[ImageTree]) -> None:
    """Checks that all blobs and manifests to which a stored manifest refers exist."""
    trees = [tree for image in images for tree in (image, *image.children)]
    for repo in REPOSITORIES:
        for image in trees:
            try:
                await store.resolve_manifest(RepositoryName(repo), Digest(image.digest))
            except ManifestUnknown:
                continue
            await assert_complete(store, repo, image)


async def check_next_import(data: Path, old_registry: OldDirectory, images: list[ImageTree], boot: str) -> None:
    """Checks that the stored images are complete, that the next import completes the work, and that garbage collection
    then leaves only needed content."""
    async with open_registry(data, grace=0, boot=boot) as store:
        # A hard link has the age of the old registry's file. If its database row is missing, it may be old enough to be
        # reported as stray. The collection below removes it.
        await assert_consistent(store, {ProblemCode.STRAY})
        await assert_images_complete(store, images)
    await import_once(old_registry.path, data, boot=boot)
    clock = lambda: time.time() + 3600  # noqa: E731 (every grace period has ended)
    async with open_registry(data, grace=0, expire=60, boot=boot, clock=clock) as store:
        await store.collector.collect(all_shards=True)
        for repo in REPOSITORIES:
            for image in images:
                await assert_complete(store, repo, image)
    blobs = {digest for image in images for digest in image.blobs}
    assert {f"sha256:{path.name}" for path in files_below(data / "blobs")} == blobs
    for folder in ("trash", "uploads", "partials"):
        assert not list((data / folder).iterdir())


@pytest.mark.slow
def test_next_import_completes_a_killed_import(
    memory_folder: Path, old_registry: OldDirectory, images: list[ImageTree]
) -> None:
    """After a SIGKILL, the stored images are complete, the next import completes the work, and the old registry is
    unchanged."""
    folder, before = memory_folder / "killed", old_registry.snapshot()
    prepare_data_dir(folder / "start")

    async def check(data: Path, _: int) -> None:
        await check_next_import(data, old_registry, images, BOOT)

    assert check_killed_runs("tests.system.crash.killed_import", folder, str(old_registry.path), check=check) > 40
    assert old_registry.snapshot() == before


@pytest.mark.slow
async def test_next_import_completes_an_import_after_a_power_cut(
    memory_folder: Path, old_registry: OldDirectory, images: list[ImageTree]
) -> None:
    """On every disk that a power cut could leave, the stored images are complete. On every seventh disk, the test also
    checks that the next import completes the work."""
    start = memory_folder / "start"
    prepare_data_dir(start)

    async def check(data: Path, number: int) -> None:
        if number % 7:
            async with open_registry(data, grace=0, boot="second run") as store:
                await assert_images_complete(store, images)
        else:
            await check_next_import(data, old_registry, images, "second run")

    assert await check_power_cuts(start, partial(import_once, old_registry.path), check, mixtures=0) > 60
