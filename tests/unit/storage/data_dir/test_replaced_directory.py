"""A process whose data directory was moved away or replaced, for example by a restore beside the running server. It has
the old database open."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from storage.access import AccountKind, AccountName
from storage.composition import open_registry, prepare_data_dir
from storage.errors import DataDirectoryReplaced
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, all_tags, index_of, push_blob, push_image, read_blob

APP = RepositoryName("team/app")
Change = Callable[[StoredRegistry], Awaitable[object]]


class Clock:
    """A clock that stands still until a test moves it."""

    now = 1_750_000_000.0

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
    async with open_registry(data, clock=clock) as opened:
        yield opened


def move_away(data: Path) -> Path:
    """Moves a directory away, and returns its new path."""
    return data.rename(data.with_name("old"))


def replace_by_copy(data: Path) -> None:
    """Moves a directory away and puts a copy in its place."""
    old = move_away(data)
    shutil.copytree(old, data, ignore=shutil.ignore_patterns("*-shm"))


async def push_manifest(store: StoredRegistry) -> None:
    await store.put_manifest(APP, index_of([]), [Tag("new")], by=BY)


async def delete_tag(store: StoredRegistry) -> None:
    await store.delete_tag(APP, Tag("v1"), by=BY)


async def delete_manifest(store: StoredRegistry) -> None:
    await store.delete_manifest(APP, (await store.resolve_manifest(APP, Tag("v1"))).digest, by=BY)


async def add_account(store: StoredRegistry) -> None:
    await store.accounts.add_account(AccountName("ann"), AccountKind.USER, password_hash=None, by=BY)


CHANGES: list[Change] = [
    lambda store: store.start_upload(APP, by=BY),
    push_manifest,
    delete_tag,
    delete_manifest,
    add_account,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_replaced", [True, False])
async def test_changes_are_refused(store: StoredRegistry, data: Path, change: Change, is_replaced: bool) -> None:
    """A process whose data directory was replaced or moved away refuses pushes, deletes and changes of accounts,
    because the old database would keep them. The error says where the operator learns what to do."""
    await push_image(store, APP, "one", "v1")
    (replace_by_copy if is_replaced else move_away)(data)
    with pytest.raises(DataDirectoryReplaced, match=r"was moved away or replaced while .*; /readyz says what to do"):
        await change(store)


async def test_reads_go_on(store: StoredRegistry, data: Path, clock: Clock) -> None:
    """Reads go on in a process whose data directory was replaced. This includes the look-up of a blob that would record
    the time of its use."""
    await push_image(store, APP, "one", "v1")
    unused = await push_blob(store, APP, b"unused")
    replace_by_copy(data)
    clock.now += 3600
    assert await all_tags(store, APP) == ["v1"]
    assert (await store.resolve_blob(APP, unused.digest)).size == unused.size
    assert await read_blob(store, APP, unused.digest) == b"unused"


async def test_a_directory_that_comes_back_takes_changes_again(store: StoredRegistry, data: Path) -> None:
    """If the directory is back at its path, the process makes changes again."""
    old = move_away(data)
    with pytest.raises(DataDirectoryReplaced):
        await push_manifest(store)
    old.rename(data)
    await push_manifest(store)
    assert await all_tags(store, APP) == ["new"]


async def test_a_lost_blob_is_not_blamed_on_the_client(store: StoredRegistry, data: Path) -> None:
    """If a blob of the old database has no file in the new directory, the client learns that the directory was
    replaced, and not that it should push the blob again."""
    blob = await push_blob(store, APP, b"a blob")
    shutil.rmtree(data)
    prepare_data_dir(data)
    with pytest.raises(DataDirectoryReplaced):
        await read_blob(store, APP, blob.digest)
