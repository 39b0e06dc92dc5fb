"""A fixture that makes data directories small, for stores that a test opens in its own process.

For each data directory, the product creates 512 directories for blob files and 256 lock files, reserves 16 MiB of disk,
and creates the tables of the database one by one. This takes longer than the rest of a unit test. With this fixture,
the reserve is small, the directory for a blob file is created when it is first needed, most lock files are not created
in advance, and the database is a copy of an empty one. Tests of full disks and of the data directory itself have the
marker `full_store` and get complete data directories.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.blobs.blob_store import ListedBlob
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.data_dir import reserve
from storage.data_dir.layout import Layout
from storage.data_dir.system import System
from storage.metadata.sqlite import setup
from storage.names import Digest

SMALL_RESERVE_BYTES = 512 * 1024
_path_of = Layout.path_of
_shard = Layout.shard
_list_shard = FileBlobStore.list_shard
_prepare_database = setup.prepare_database


@pytest.fixture(autouse=True)
def small_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the data directories of this test small."""
    if request.node.get_closest_marker("full_store") is not None:
        return
    monkeypatch.setattr(reserve, "RESERVE_BYTES", SMALL_RESERVE_BYTES)
    monkeypatch.setattr(setup, "prepare_database", _copy_or_prepare_database)
    monkeypatch.setattr(Layout, "lock_files", _two_lock_files)
    monkeypatch.setattr(Layout, "shards", _no_shards)
    monkeypatch.setattr(Layout, "shard", _existing_shard)
    monkeypatch.setattr(Layout, "path_of", _path_in_existing_shard)
    monkeypatch.setattr(Layout, "blob", _blob_in_existing_shard)
    monkeypatch.setattr(FileBlobStore, "list_shard", _list_existing_shard)


def _two_lock_files(layout: Layout) -> Iterator[Path]:
    return iter((layout.metadata_lock, layout.lease_file))


def _no_shards(layout: Layout) -> Iterator[Path]:
    return iter(())


def _existing_shard(layout: Layout, number: int) -> Path:
    return _created(_shard(layout, number))


async def _list_existing_shard(blobs: FileBlobStore, number: int) -> list[ListedBlob]:
    """Lists the blobs in a shard (one of the directories for blob files). Returns an empty list, without starting a
    thread, if the directory does not exist yet."""
    return await _list_shard(blobs, number) if _shard(blobs.layout, number).exists() else []


def _path_in_existing_shard(layout: Layout, place: str) -> Path:
    path = _path_of(layout, place)
    _created(path.parent)
    return path


def _blob_in_existing_shard(layout: Layout, digest: Digest) -> Path:
    return _path_in_existing_shard(layout, layout.blob_place(digest))


def _created(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def _copy_or_prepare_database(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    if layout.metadata.exists():
        _prepare_database(layout, system, free_space)
    else:
        layout.metadata.write_bytes(_empty_database())


@functools.cache
def _empty_database() -> bytes:
    """Returns the database of a new data directory."""
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        _prepare_database(layout, System(), lambda: None)
        return layout.metadata.read_bytes()
