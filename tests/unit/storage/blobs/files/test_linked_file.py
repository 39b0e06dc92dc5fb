"""The file of another program becomes a blob by a hard link, or the store says why it cannot."""

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
    """A system that refuses hard links with the error number `error`; 0: it makes them."""

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
def here(tmp_path: Path) -> Path:
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


def assert_same_file(one: Path, other: Path) -> None:
    assert one.samefile(other)


def assert_missing(path: Path) -> None:
    assert not path.exists()


def replace_file(path: Path, body: bytes) -> None:
    """Puts another file at the path."""
    path.unlink(missing_ok=True)
    path.write_bytes(body)


def assert_nothing_left(tmp_path: Path) -> None:
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_the_file_gets_a_second_name(store: StoredRegistry, file: Path, here: Path, tmp_path: Path) -> None:
    await link(store, file)
    assert_same_file(here, file)
    replace_file(file, b"other bytes")
    reader = await store.open_blob(REPO, DIGEST)
    assert reader.data == BODY
    await reader.aclose()
    assert_nothing_left(tmp_path)


async def test_a_second_link(store: StoredRegistry, file: Path, here: Path, tmp_path: Path) -> None:
    """If the blob's file is a link to the same file already, as after a crash before the row was stored, the call
    succeeds."""
    os.link(file, here)
    await link(store, file)
    assert_same_file(here, file)
    assert_nothing_left(tmp_path)


async def test_a_pushed_file_is_replaced(store: StoredRegistry, file: Path, here: Path, tmp_path: Path) -> None:
    replace_file(here, BODY)
    await link(store, file)
    assert_same_file(here, file)
    assert_nothing_left(tmp_path)


async def test_another_file_of_the_same_name(store: StoredRegistry, file: Path, here: Path, tmp_path: Path) -> None:
    """If the file was replaced after its digest was verified, the link is refused."""
    with opened(file) as fd:
        replace_file(file, b"other bytes")
        with pytest.raises(LinkRefused, match="the system does not link it"):
            await store.link_blob(REPO, DIGEST, len(BODY), fd, BY)
    assert_missing(here)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
async def test_the_system_refuses(
    store: StoredRegistry, system: RefusingSystem, file: Path, here: Path, tmp_path: Path, error: int
) -> None:
    system.error = error
    with pytest.raises(LinkRefused, match=f"the system does not link it: {os.strerror(error)}"):
        await link(store, file)
    assert_missing(here)
    assert_nothing_left(tmp_path)


async def test_a_full_disk(
    store: StoredRegistry, system: RefusingSystem, file: Path, here: Path, tmp_path: Path
) -> None:
    system.error = errno.ENOSPC
    with pytest.raises(StorageFull):
        await link(store, file)
    assert_missing(here)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("mode", [0o664, 0o646])
async def test_a_file_that_others_may_change(store: StoredRegistry, file: Path, mode: int) -> None:
    os.chmod(file, mode)
    with pytest.raises(LinkRefused, match="other users may write to it"):
        await link(store, file)


async def test_a_file_that_cannot_be_linked(store: StoredRegistry, tmp_path: Path) -> None:
    with pytest.raises(LinkRefused, match="it is not a regular file"):
        await link(store, tmp_path)
    with pytest.raises(LinkRefused, match="it is on another file system"):
        await link(store, Path("/proc/version"))


async def test_a_file_of_another_user(store: StoredRegistry, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:  # only root can give a file away
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LinkRefused, match="it belongs to another user, who could change it"):
        await link(store, file)
