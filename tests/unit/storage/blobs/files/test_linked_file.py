"""Linked blobs: the store makes a hard link to a file of another program instead of a copy. If it cannot link the file,
the error says why."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.blobs.blob_store import LinkRefused
from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.data_dir.system import System
from storage.errors import StorageFull
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY

pytestmark = pytest.mark.full_store

REPO = RepositoryName("team/app")
BODY = b"a layer"
DIGEST = digest_of(BODY)


class RefusingSystem(System):
    """A system that refuses hard links with the error number `error`. If `error` is 0, it makes them."""

    error = 0

    def link(self, fd: int, target: Path) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        super().link(fd, target)


@pytest.fixture
def system() -> RefusingSystem:
    return RefusingSystem()


@pytest.fixture
async def store(tmp_path: Path, system: RefusingSystem) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", system=system) as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(BODY)
    path.chmod(0o644)
    return path


@pytest.fixture
def blob_path(tmp_path: Path) -> Path:
    """Returns the path of the blob's file."""
    return tmp_path / "data" / "blobs" / "sha256" / DIGEST.encoded[:2] / DIGEST.encoded


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


async def link(store: StoredRegistry, file: Path) -> None:
    with opened(file) as fd:
        await store.link_blob(REPO, DIGEST, len(BODY), fd, BY)


def assert_same_file(path: Path, other_path: Path) -> None:
    assert path.samefile(other_path)


def assert_missing(path: Path) -> None:
    assert not path.exists()


def replace_file(path: Path, body: bytes) -> None:
    """Puts a new file with `body` at the path."""
    path.unlink(missing_ok=True)
    path.write_bytes(body)


def assert_no_temporary_files(tmp_path: Path) -> None:
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_linked_file_becomes_the_blob(store: StoredRegistry, file: Path, blob_path: Path, tmp_path: Path) -> None:
    """The blob's file is a hard link to the other program's file. The blob stays if the other program replaces its
    file."""
    await link(store, file)
    assert_same_file(blob_path, file)
    replace_file(file, b"other bytes")
    reader = await store.open_blob(REPO, DIGEST)
    assert reader.data == BODY
    await reader.aclose()
    assert_no_temporary_files(tmp_path)


async def test_a_second_link(store: StoredRegistry, file: Path, blob_path: Path, tmp_path: Path) -> None:
    """A crash may leave a link to the file without a row in the database. The next call for the same file succeeds."""
    os.link(file, blob_path)
    await link(store, file)
    assert_same_file(blob_path, file)
    assert_no_temporary_files(tmp_path)


async def test_link_replaces_a_file_of_a_push(
    store: StoredRegistry, file: Path, blob_path: Path, tmp_path: Path
) -> None:
    """If the blob has a file of its own already, such as from a push, the link takes its place."""
    replace_file(blob_path, BODY)
    await link(store, file)
    assert_same_file(blob_path, file)
    assert_no_temporary_files(tmp_path)


async def test_a_file_that_was_replaced_is_not_linked(
    store: StoredRegistry, file: Path, blob_path: Path, tmp_path: Path
) -> None:
    """If the file was replaced after its digest was verified, the link is refused."""
    with opened(file) as fd:
        replace_file(file, b"other bytes")
        with pytest.raises(LinkRefused, match="the system does not link it"):
            await store.link_blob(REPO, DIGEST, len(BODY), fd, BY)
    assert_missing(blob_path)
    assert_no_temporary_files(tmp_path)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
async def test_the_system_refuses_the_link(
    store: StoredRegistry, system: RefusingSystem, file: Path, blob_path: Path, tmp_path: Path, error: int
) -> None:
    """If the system refuses the hard link, the error has the system's reason, and no file is left behind."""
    system.error = error
    with pytest.raises(LinkRefused, match=f"the system does not link it: {os.strerror(error)}"):
        await link(store, file)
    assert_missing(blob_path)
    assert_no_temporary_files(tmp_path)


async def test_a_full_disk(
    store: StoredRegistry, system: RefusingSystem, file: Path, blob_path: Path, tmp_path: Path
) -> None:
    """If there is no space for the link, the error says that the disk is full."""
    system.error = errno.ENOSPC
    with pytest.raises(StorageFull):
        await link(store, file)
    assert_missing(blob_path)
    assert_no_temporary_files(tmp_path)


@pytest.mark.parametrize("mode", [0o664, 0o646])
async def test_a_file_that_others_may_change(store: StoredRegistry, file: Path, mode: int) -> None:
    """A file that its group or all users may write is not linked, because they could change the blob."""
    os.chmod(file, mode)
    with pytest.raises(LinkRefused, match="other users may write to it"):
        await link(store, file)


async def test_a_file_that_cannot_be_linked(store: StoredRegistry, tmp_path: Path) -> None:
    """A directory and a file on another file system are not linked."""
    with pytest.raises(LinkRefused, match="it is not a regular file"):
        await link(store, tmp_path)
    with pytest.raises(LinkRefused, match="it is on another file system"):
        await link(store, Path("/proc/version"))


async def test_a_file_of_another_user(store: StoredRegistry, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user is not linked, because this user could change the blob."""
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:  # only root can change the owner of a file
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LinkRefused, match="it belongs to another user, who could change it"):
        await link(store, file)
