"""The files of imported blobs are hard links to the files of the old registry, or copies if they cannot be linked. The
disk may become full during the import."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.errors import StorageFull
from storage.store.stored_registry import StoredRegistry
from storage.usage import ScopeDefinition
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import noise_image
from tests.unit.registry.migration.directory_import.conftest import APP, import_of


async def test_files_are_linked(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tmp_path: Path
) -> None:
    """The file of an imported blob is a hard link to the file of the old registry. It stays if the old file is
    deleted."""
    image = old_registry.push(APP, noise_image("linked", 300_000), "1")
    layer = image.layers[0].digest
    await run_import()

    blob_path = tmp_path / "data" / "blobs" / "sha256" / layer[7:9] / layer[7:]
    assert blob_path.samefile(old_registry.data(layer))
    old_registry.data(layer).unlink()
    await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_files_are_copied_on_request(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tmp_path: Path
) -> None:
    """With `copy`, the file of a blob is a copy."""
    image = old_registry.push(APP, noise_image("copied", 5_000_000), "1")
    result = await run_import(copy=True)

    assert (result["copied"], result["linked"]) == (2, 0)
    for blob in image.blobs.values():
        blob_path = tmp_path / "data" / "blobs" / "sha256" / blob.digest[7:9] / blob.digest[7:]
        assert not blob_path.samefile(old_registry.data(blob.digest))
    await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_files_that_other_users_may_write_are_copied(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """A file of the old registry that other users may write is copied instead of linked, and this is reported."""
    image = old_registry.push(APP, noise_image("shared", 1000), "1")
    for digest in image.blobs:
        old_registry.data(digest).chmod(0o666)
    result = await run_import()

    assert (result["copied"], result["linked"]) == (2, 0)
    [(_, note)] = run_import.reports("note")
    assert note == (
        "the files of this blob and of blobs with the same problem are copied, not linked: other users may write to it"
    )
    await assert_complete(store, APP, image)


class LimitedSystem(System):
    """A system that refuses hard links, and whose disk is full after `writes` writes of large blobs."""

    writes = 1 << 30

    def link(self, fd: int, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        if sum(map(len, chunks)) >= 1000:
            self.writes -= 1
            if self.writes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, chunks, offset)


async def test_a_system_that_refuses_links(tmp_path: Path, old_registry: OldDirectory) -> None:
    """If the system refuses hard links, the files are copied. This is reported once."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 1000), str(number)) for number in range(3)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", system=LimitedSystem()) as store:
        run_import = import_of(store, old_registry)
        result = await run_import()
        assert (result["linked"], result["copied"], result["problems"]) == (0, 6, 0)
        [(_, note)] = run_import.reports("note")
        assert note.endswith("the system does not link it: Operation not permitted")
        for image in images:
            await assert_complete(store, APP, image)


async def test_a_full_disk_ends_the_import(tmp_path: Path, old_registry: OldDirectory) -> None:
    """If the disk becomes full, the import ends with an error, and the imported content stays. After space was freed,
    the next import adds the missing tags."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 100_000), str(number)) for number in range(4)]
    prepare_data_dir(tmp_path / "data")
    system = LimitedSystem()
    system.writes = 2
    async with open_registry(tmp_path / "data", system=system) as store:
        run_import = import_of(store, old_registry)
        with pytest.raises(StorageFull):
            await run_import()
        assert (await store.tags(APP, None, 10)).items == ["0", "1"]
        system.writes = 1 << 30
        assert (await run_import())["tags"] == 2
        for image in images:
            await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


@pytest.mark.parametrize("copy", [False, True])
async def test_files_that_do_not_fit_into_a_quota_are_not_read(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, copy: bool
) -> None:
    """The file of a blob that does not fit into a quota is neither linked nor copied. It is not read, so the import
    does not notice that its bytes are damaged. Images that fit are imported."""
    large = old_registry.push(APP, noise_image("large", 2_000_000), "large")
    small = old_registry.push(APP, noise_image("small", 1000), "small")
    old_registry.write_data(large.layers[0].digest, b"x" * 2_000_000)
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=1_000_000)])
    while await store.usage.count_batch():
        pass
    await run_import(copy=copy)
    [(name, reason)] = run_import.reports()
    assert name == "team/app:large"
    assert reason.startswith("team/ may hold ")
    await assert_complete(store, APP, small)
