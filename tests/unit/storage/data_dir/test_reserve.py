"""The disk reserve: a file that occupies space. On a full disk, the file is truncated to make space for changes such as
deletes, and extended again afterwards. A fake system determines how much space is free."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from storage.access import AccountKind, AccountName, Action, Grant, Grantee, GranteeKind
from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import Actor, Manifest, digest_of
from storage.data_dir.blocking_calls import UncancellableFuture
from storage.data_dir.reserve import RESERVE_BYTES, Reserve, ReserveUse
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.cross_process_change_counter import DataVersion
from storage.metadata.sqlite.database import connect
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern

pytestmark = [pytest.mark.real_disk, pytest.mark.full_store]

MIB = 1024 * 1024


APP = RepositoryName("team/app")


class QuotaSystem(System):
    """A system in which a file can have at most `max_bytes` bytes. More bytes are refused with the error number
    `code`."""

    def __init__(self, max_bytes: int = RESERVE_BYTES, code: int = errno.EDQUOT) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.code = code

    def allocate(self, fd: int, size: int) -> None:
        if size > self.max_bytes:
            raise OSError(self.code, os.strerror(self.code))
        super().allocate(fd, size)


@pytest.fixture
def quota() -> QuotaSystem:
    return QuotaSystem()


@pytest.fixture
def reserve(tmp_path: Path, quota: QuotaSystem) -> Iterator[Reserve]:
    with closing(Reserve(tmp_path / "reserve", quota)) as reserve:
        reserve.establish()
        yield reserve


def allocated_bytes(file: Path) -> int:
    return file.stat().st_blocks * 512


@pytest.mark.slow
def test_the_reserve_is_allocated_when_it_is_created(tmp_path: Path, reserve: Reserve) -> None:
    """A new reserve has its full size, and its blocks are allocated. All changes are allowed, and the disk does not
    count as full."""
    assert reserve.is_whole
    assert allocated_bytes(tmp_path / "reserve") >= reserve.full_size == RESERVE_BYTES
    assert [reserve.allows(use) for use in ReserveUse] == [True, True, True]
    assert reserve.disk_full_reason() is None
    reserve.require_free_space()


@pytest.mark.slow
def test_a_sparse_reserve_is_allocated(tmp_path: Path, quota: QuotaSystem) -> None:
    """A copied data directory may have a sparse reserve: a file of full size without blocks. `establish` allocates its
    blocks."""
    (tmp_path / "reserve").touch()
    os.truncate(tmp_path / "reserve", RESERVE_BYTES)
    with closing(Reserve(tmp_path / "reserve", quota)) as reserve:
        reserve.establish()
    assert allocated_bytes(tmp_path / "reserve") >= RESERVE_BYTES


@pytest.mark.slow
def test_the_reserve_is_released_in_steps_and_restored(tmp_path: Path, reserve: Reserve) -> None:
    """For the first attempt of a change, a small part of the reserve is released. If this is not enough, a larger part
    is released, and finally all of it. After the change, even if it has failed, the reserve has its full size again."""
    sizes: list[int] = []

    def attempt() -> str:
        sizes.append(os.stat(tmp_path / "reserve").st_size)
        if sizes[-1] > 0:
            raise StorageFull
        return "done"

    assert reserve.spend(attempt, StorageFull) == "done"
    assert sizes == [RESERVE_BYTES - 256 * 1024, RESERVE_BYTES - 256 * 1024 - RESERVE_BYTES // 8, 0]
    assert reserve.is_whole
    with pytest.raises(ZeroDivisionError):
        reserve.spend(lambda: 1 // 0, StorageFull)
    assert reserve.is_whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.slow
def test_nothing_is_stored_until_the_reserve_has_its_full_size(code: int, quota: QuotaSystem, reserve: Reserve) -> None:
    """After a change, the reserve is extended as far as there is free space. Until it has its full size, changes that
    store content are refused, small changes may use one half of the reserve, and changes that free space may use the
    whole reserve. When there is free space again, the next check extends the reserve to its full size."""
    quota.max_bytes, quota.code = RESERVE_BYTES * 3 // 4, code
    reserve.spend(lambda: None, StorageFull)
    assert [reserve.allows(use) for use in ReserveUse] == [False, True, True]
    assert "disk is full" in str(reserve.disk_full_reason())
    quota.max_bytes = RESERVE_BYTES // 4
    # The change fails at each of its attempts. The whole reserve is released for the last attempt.
    with pytest.raises(StorageFull):
        reserve.spend(_refuse, StorageFull)
    assert [reserve.allows(use) for use in ReserveUse] == [False, False, True]
    with pytest.raises(StorageFull):
        reserve.require_free_space()
    quota.max_bytes = RESERVE_BYTES
    reserve.require_free_space()
    assert reserve.is_whole
    assert reserve.disk_full_reason() is None


def _refuse() -> None:
    raise StorageFull


@pytest.mark.slow
def test_reserve_of_a_killed_process_is_restored(tmp_path: Path, reserve: Reserve) -> None:
    """If a process is killed after it has released the reserve, the file is too short. The next process that calls
    `restore` extends it to its full size."""
    os.truncate(tmp_path / "reserve", 0)
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        assert not other.is_whole
        assert other.restore()
    assert reserve.is_whole


@pytest.mark.slow
def test_only_one_process_uses_the_reserve_at_a_time(tmp_path: Path, reserve: Reserve) -> None:
    """While one process has released the reserve for a change, `restore` in another process returns at once and does
    not extend the file."""
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        reserve.spend(lambda: _assert_true(not other.restore() and not other.is_whole), StorageFull)
        assert other.is_whole


def _assert_true(condition: bool) -> None:
    assert condition


class FullDiskOutsideReserve(System):
    """A system that has no space for a commit while the reserve has its full size."""

    def __init__(self, reserve: Path) -> None:
        super().__init__()
        self._reserve = reserve

    def commit(self, commit: object, *, durable: bool) -> None:
        if self._reserve.stat().st_size == RESERVE_BYTES:
            raise apsw.FullError("refused by the test")
        assert callable(commit)
        commit()


@pytest.mark.slow
async def test_records_of_corrupt_bytes_can_be_deleted_on_a_full_disk(tmp_path: Path) -> None:
    """The mirror records which upstream endpoints have sent corrupt bytes. `entrepot mirror refresh` deletes such
    records, and this works on a full disk."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    digest = digest_of(b"x")
    async with open_registry(data) as registry:
        await registry.records.save_bad_senders("far.test", digest, ["https://far.test"], 60)
    async with open_registry(data, system=FullDiskOutsideReserve(data / "reserve")) as registry:
        assert await registry.records.forget_bad_senders("far.test", [digest]) == 1
        assert not await registry.records.bad_senders("far.test", digest, 60)


@pytest.mark.slow
async def test_deletes_use_the_reserve_and_pushes_do_not(tmp_path: Path) -> None:
    """On a disk without space outside the reserve, a push is refused, but tags and manifests can be deleted. Afterwards
    the reserve has its full size again."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    manifest = Manifest.parse(
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}',
        "application/vnd.oci.image.index.v1+json",
    )
    by = Actor("somebody")
    async with open_registry(data) as registry:
        await registry.put_manifest(APP, manifest, [Tag("1")], by=by)
    async with open_registry(data, system=FullDiskOutsideReserve(data / "reserve")) as registry:
        with pytest.raises(StorageFull):
            await registry.put_manifest(APP, manifest, [Tag("2")], by=by)
        assert (data / "reserve").stat().st_size == RESERVE_BYTES, "the refused push must not use the reserve"
        await registry.delete_tag(APP, Tag("1"), by=by)
        await registry.delete_manifest(APP, manifest.digest, by=by)
        assert not (await registry.repositories(None, 10)).items
    assert (data / "reserve").stat().st_size == RESERVE_BYTES


class FaultySystem(System):
    """A system with faults. While `full` is true, it allocates no space for the reserve. While `broken` is true, it
    cannot sync a directory. The next `unexpected_errors` calls of `allocate` raise an unexpected error."""

    def __init__(self) -> None:
        super().__init__()
        self.full = self.broken = False
        self.unexpected_errors = 0

    def allocate(self, fd: int, size: int) -> None:
        if self.unexpected_errors:
            self.unexpected_errors -= 1
            raise MemoryError("raised by the test")
        if self.full:
            raise OSError(errno.ENOSPC, "refused by the test")
        super().allocate(fd, size)

    def sync(self, fd: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "refused by the test")
        super().sync(fd)


@contextmanager
def running_commit_thread(data: Path, system: System) -> Iterator[CommitThread]:
    layout = layout_of(data)
    with (
        closing(Reserve(layout.reserve, system)) as reserve,
        closing(connect(layout.metadata, read_only=True)) as db,
        closing(DataVersion(db)) as version,
        closing(CommitThread(layout, system, version, reserve)) as writer,
    ):
        yield writer


async def outcome_of(change: UncancellableFuture[object]) -> object:
    """Waits up to 10 s for a change, and returns its result or its error. A change cannot be cancelled, so a change
    that takes longer is left running."""
    await asyncio.wait([change], timeout=10)
    assert change.done(), "the change did not end within 10 s"
    return change.exception() or change.result()


def _insert(name: str) -> Callable[[apsw.Connection], object]:
    return lambda db: db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,)).fetchall()


@pytest.mark.slow
async def test_a_refused_change_does_not_touch_the_database(data: Path) -> None:
    """On a full disk, a change that stores content is refused before it touches the database. So a fault of the
    database at this time has no effect. A later change that may use the whole reserve succeeds."""
    system = FaultySystem()
    with running_commit_thread(data, system) as writer:
        system.full = system.broken = True
        os.truncate(data / "reserve", 4096)
        assert isinstance(await outcome_of(writer.run(_insert("a"))), StorageFull)
        system.broken = False
        assert await outcome_of(writer.run(_insert("b"), reserve_use=ReserveUse.ALL)) == []


@pytest.mark.slow
async def test_the_commit_thread_survives_unexpected_errors(data: Path) -> None:
    """After an unexpected error, all changes of the same transaction get an error. Later changes succeed."""
    system = FaultySystem()
    with running_commit_thread(data, system) as writer:
        system.unexpected_errors = 1
        os.truncate(data / "reserve", 4096)
        assert isinstance(await outcome_of(writer.run(_insert("a"))), StorageFailed)
        assert await outcome_of(writer.run(_insert("a"))) == []


class FailsAfterCommit(FaultySystem):
    """A system whose disk is full at the first attempt to commit. The second attempt succeeds, and the next allocation
    after it raises an unexpected error."""

    attempts = 0

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self.attempts += 1
        if self.attempts == 1:
            raise apsw.FullError("refused by the test")
        super().commit(commit, durable=durable)
        self.unexpected_errors = self.attempts == 2


@pytest.mark.slow
async def test_error_after_the_commit_does_not_fail_the_change(data: Path) -> None:
    """If an error occurs after the commit, when the reserve is extended again, the committed change still succeeds. The
    first change may use the whole reserve, so it gets a second attempt."""
    system = FailsAfterCommit()
    with running_commit_thread(data, system) as writer:
        assert await outcome_of(writer.run(_insert("a"), reserve_use=ReserveUse.ALL)) == []
        assert system.attempts == 2
        assert not system.unexpected_errors, "the error was not raised"
        assert await outcome_of(writer.run(_insert("b"))) == []


@pytest.mark.slow
async def test_unreadable_version_after_the_commit_does_not_fail_the_change(data: Path) -> None:
    """If the data version of the database (a counter of changes by other processes) cannot be read after the commit,
    the change succeeds and is not made a second time."""
    layout, versions = layout_of(data), iter([0])  # the second `next(versions)` raises StopIteration
    with (
        closing(Reserve(layout.reserve, System())) as reserve,
        closing(CommitThread(layout, System(), lambda: next(versions), reserve)) as writer,
    ):
        assert await outcome_of(writer.run(_insert("a"))) == []


@pytest.mark.slow
async def test_changes_that_add_rights_leave_half_of_the_reserve(data: Path) -> None:
    """If less than half of the reserve is left, accounts, groups and grants cannot be added. Rights can be removed, and
    a password can be changed, because this may be needed to lock out an attacker."""
    system, by = FaultySystem(), Actor("admin")
    alice, bob, dev, ops = map(AccountName, ("alice", "bob", "dev", "ops"))
    grant = Grant(Grantee(GranteeKind.GROUP, "dev"), NamePattern("team/*"), Action.PULL)
    async with open_registry(data, system=system) as registry:
        accounts = registry.accounts
        await accounts.add_account(alice, AccountKind.USER, password_hash="old", by=by)
        await accounts.add_group(dev, by=by)
        await accounts.add_member(dev, alice, by=by)
        await accounts.put_grant(grant, by=by)
        system.full = True
        os.truncate(data / "reserve", RESERVE_BYTES // 2 - 4096)
        for addition in (
            accounts.add_account(bob, AccountKind.USER, password_hash=None, by=by),
            accounts.set_admin(alice, True, by=by),
            accounts.set_enabled(alice, True, by=by),
            accounts.add_group(ops, by=by),
            accounts.add_member(dev, alice, by=by),
            accounts.put_grant(grant, by=by),
        ):
            with pytest.raises(StorageFull):
                await addition
        await accounts.set_password(alice, "new", by=by)
        await accounts.set_admin(alice, False, by=by)
        await accounts.remove_grant(grant.subject, grant.pattern, by=by)
        await accounts.remove_member(dev, alice, by=by)
        await accounts.remove_group(dev, by=by)
        await accounts.set_enabled(alice, False, by=by)
        await accounts.remove_account(alice, by=by)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.slow
def test_a_file_system_without_preallocation_has_no_reserve(
    code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If a file system cannot allocate blocks in advance, there is no reserve. All changes are allowed, and the disk
    does not count as full. Each process logs once that there is no reserve."""
    with closing(Reserve(tmp_path / "reserve", QuotaSystem(0, code))) as reserve:
        reserve.establish()
        for _ in range(3):
            reserve.require_free_space()
        assert [reserve.allows(use) for use in ReserveUse] == [True, True, True]
        assert reserve.disk_full_reason() is None
        assert reserve.spend(lambda: "done", StorageFull) == "done"
    with closing(Reserve(tmp_path / "reserve", QuotaSystem(0, code))) as other_reserve:
        other_reserve.require_free_space()
    assert caplog.text.count("cannot reserve space") == 2, "one for each process"
