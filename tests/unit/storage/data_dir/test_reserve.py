"""The reserve: a file that occupies space, which is given up for changes that free space on a full disk. A fake file
system tells how much room there is."""

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
    """A system that gives a file at most `most` bytes, and refuses more with the error number `code`."""

    def __init__(self, most: int = RESERVE_BYTES, code: int = errno.EDQUOT) -> None:
        super().__init__()
        self.most = most
        self.code = code

    def allocate(self, fd: int, size: int) -> None:
        if size > self.most:
            raise OSError(self.code, os.strerror(self.code))
        super().allocate(fd, size)


@pytest.fixture
def quota() -> QuotaSystem:
    return QuotaSystem()


@pytest.fixture
def reserve(tmp_path: Path, quota: QuotaSystem) -> Iterator[Reserve]:
    with closing(Reserve(tmp_path / "reserve", quota)) as made:
        made.establish()
        yield made


def allocated(file: Path) -> int:
    return file.stat().st_blocks * 512


def test_it_takes_its_room_when_it_is_made(tmp_path: Path, reserve: Reserve) -> None:
    """The reserve has its full size from the start, and its blocks are allocated. The disk has no problem."""
    assert reserve.is_whole
    assert allocated(tmp_path / "reserve") >= reserve.size == RESERVE_BYTES
    assert [reserve.allows(need) for need in ReserveUse] == [True, True, True]
    assert reserve.disk_full_reason() is None
    reserve.require_room()


def test_a_hole_in_its_place_is_filled(tmp_path: Path, quota: QuotaSystem) -> None:
    """If a copy of a data directory has a reserve without blocks, its blocks are allocated."""
    (tmp_path / "reserve").touch()
    os.truncate(tmp_path / "reserve", RESERVE_BYTES)
    with closing(Reserve(tmp_path / "reserve", quota)) as reserve:
        reserve.establish()
    assert allocated(tmp_path / "reserve") >= RESERVE_BYTES


def test_little_is_given_up_first_and_taken_back(tmp_path: Path, reserve: Reserve) -> None:
    """A change that needs little space gets a small part of the reserve, one that needs more gets a larger part, and at
    most all of it. After the change, also after a failed one, the reserve takes the free space back."""
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
def test_while_it_is_not_whole_nothing_is_stored(code: int, quota: QuotaSystem, reserve: Reserve) -> None:
    """After a change, the reserve takes back the space that is free. Until it has its full size, changes that store
    content are refused, small changes may use one half of it, and changes that free space all of it. Once there is
    space, the next question takes it back."""
    quota.most, quota.code = RESERVE_BYTES * 3 // 4, code
    reserve.spend(lambda: None, StorageFull)
    assert [reserve.allows(need) for need in ReserveUse] == [False, True, True]
    assert "disk is full" in str(reserve.disk_full_reason())
    quota.most = RESERVE_BYTES // 4
    with pytest.raises(StorageFull):  # so all of it is given up
        reserve.spend(_refuse, StorageFull)
    assert [reserve.allows(need) for need in ReserveUse] == [False, False, True]
    with pytest.raises(StorageFull):
        reserve.require_room()
    quota.most = RESERVE_BYTES
    reserve.require_room()
    assert reserve.is_whole
    assert reserve.disk_full_reason() is None


def _refuse() -> None:
    raise StorageFull


def test_who_died_in_between_left_nothing_behind(tmp_path: Path, reserve: Reserve) -> None:
    """If a process is killed while it has given the reserve up, the file is too short. The next process that looks at
    it takes the space back."""
    os.truncate(tmp_path / "reserve", 0)
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        assert not other.is_whole
        assert other.restore()
    assert reserve.is_whole


def test_one_at_a_time_over_all_processes(tmp_path: Path, reserve: Reserve) -> None:
    """While one process has given the reserve up, another process neither takes the space back nor waits."""
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        reserve.spend(lambda: _holds(not other.restore() and not other.is_whole), StorageFull)
        assert other.is_whole


def _holds(fact: bool) -> None:
    assert fact


class FullAt(System):
    """A system that has no room for a commit while the reserve has its full size."""

    def __init__(self, reserve: Path) -> None:
        super().__init__()
        self._reserve = reserve

    def commit(self, commit: object, *, durable: bool) -> None:
        if self._reserve.stat().st_size == RESERVE_BYTES:
            raise apsw.FullError("refused by the test")
        assert callable(commit)
        commit()


async def test_what_was_wrong_can_be_forgotten(tmp_path: Path) -> None:
    """`entrepot mirror refresh` deletes records, so it works on a full disk."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    digest = digest_of(b"x")
    async with open_registry(data) as registry:
        await registry.records.save_bad_senders("far.test", digest, ["https://far.test"], 60)
    async with open_registry(data, system=FullAt(data / "reserve")) as registry:
        assert await registry.records.forget_bad_senders("far.test", [digest]) == 1
        assert not await registry.records.bad_senders("far.test", digest, 60)


async def test_deletes_use_it_and_pushes_do_not(tmp_path: Path) -> None:
    """On a disk that has room for a commit only from the reserve, a push is refused, and a manifest can be deleted and
    an account disabled. The reserve has its full size afterwards."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    manifest = Manifest.parse(
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}',
        "application/vnd.oci.image.index.v1+json",
    )
    by = Actor("somebody")
    async with open_registry(data) as registry:
        await registry.put_manifest(APP, manifest, [Tag("1")], by=by)
    async with open_registry(data, system=FullAt(data / "reserve")) as registry:
        with pytest.raises(StorageFull):
            await registry.put_manifest(APP, manifest, [Tag("2")], by=by)
        assert (data / "reserve").stat().st_size == RESERVE_BYTES, "it was not given up for that"
        await registry.delete_tag(APP, Tag("1"), by=by)
        await registry.delete_manifest(APP, manifest.digest, by=by)
        assert not (await registry.repositories(None, 10)).items
    assert (data / "reserve").stat().st_size == RESERVE_BYTES


class Broken(System):
    """A system with faults. While `full` is true, it refuses room for the reserve. While `broken` is true, it cannot
    sync a directory. The next `strange` calls for room raise an unexpected error."""

    def __init__(self) -> None:
        super().__init__()
        self.full = self.broken = False
        self.strange = 0

    def allocate(self, fd: int, size: int) -> None:
        if self.strange:
            self.strange -= 1
            raise MemoryError("raised by the test")
        if self.full:
            raise OSError(errno.ENOSPC, "refused by the test")
        super().allocate(fd, size)

    def sync(self, fd: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "refused by the test")
        super().sync(fd)


@contextmanager
def writing(data: Path, system: System) -> Iterator[CommitThread]:
    layout = layout_of(data)
    with (
        closing(Reserve(layout.reserve, system)) as reserve,
        closing(connect(layout.metadata, read_only=True)) as db,
        closing(DataVersion(db)) as version,
        closing(CommitThread(layout, system, version, reserve)) as writer,
    ):
        yield writer


async def came_to(step: UncancellableFuture[object]) -> object:
    """Returns the outcome of a change. A change cannot be cancelled, so one that does not end is left running."""
    await asyncio.wait([step], timeout=10)
    assert step.done(), "nobody ends the wait"
    return step.exception() or step.result()


def _insert(name: str) -> Callable[[apsw.Connection], object]:
    return lambda db: db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,)).fetchall()


async def test_a_refused_change_leaves_the_database_alone(data: Path) -> None:
    """On a full disk, a change that stores content is refused before it touches the database. So a failure of the
    database at that moment does no harm, and later changes succeed."""
    system = Broken()
    with writing(data, system) as writer:
        system.full = system.broken = True
        os.truncate(data / "reserve", 4096)
        assert isinstance(await came_to(writer.run(_insert("a"))), StorageFull)
        system.broken = False
        assert await came_to(writer.run(_insert("b"), reserve_use=ReserveUse.RELIEF)) == []


async def test_the_writer_survives_what_nobody_foresaw(data: Path) -> None:
    """After an unexpected error, all changes of the batch get an error, and later changes succeed."""
    system = Broken()
    with writing(data, system) as writer:
        system.strange = 1
        os.truncate(data / "reserve", 4096)
        assert isinstance(await came_to(writer.run(_insert("a"))), StorageFailed)
        assert await came_to(writer.run(_insert("a"))) == []


class FailsAfterwards(Broken):
    """A system that has room for a commit at the second attempt. After that commit, nothing works."""

    tries = 0

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self.tries += 1
        if self.tries == 1:
            raise apsw.FullError("refused by the test")
        super().commit(commit, durable=durable)
        self.strange = self.tries == 2


async def test_what_is_committed_succeeds_whatever_follows(data: Path) -> None:
    """An error after the commit, when the reserve takes its space back, does not make the committed change fail."""
    system = FailsAfterwards()
    with writing(data, system) as writer:
        assert await came_to(writer.run(_insert("a"), reserve_use=ReserveUse.RELIEF)) == []
        assert system.tries == 2
        assert not system.strange, "the error was not raised"
        assert await came_to(writer.run(_insert("b"))) == []


async def test_an_error_after_the_commit_is_not_the_changes(data: Path) -> None:
    """If the version of the database cannot be read after the commit, the changes succeed, and are not made a second
    time."""
    layout, marks = layout_of(data), iter([0])
    with (
        closing(Reserve(layout.reserve, System())) as reserve,
        closing(CommitThread(layout, System(), lambda: next(marks), reserve)) as writer,
    ):
        assert await came_to(writer.run(_insert("a"))) == []


async def test_what_adds_rights_leaves_half_of_the_reserve(data: Path) -> None:
    """With less than half of the reserve left, accounts, groups and grants cannot be added. Rights can be removed, and
    a password can be changed, because this may lock an attacker out."""
    system, by = Broken(), Actor("admin")
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
        for adding in (
            accounts.add_account(bob, AccountKind.USER, password_hash=None, by=by),
            accounts.set_admin(alice, True, by=by),
            accounts.set_enabled(alice, True, by=by),
            accounts.add_group(ops, by=by),
            accounts.add_member(dev, alice, by=by),
            accounts.put_grant(grant, by=by),
        ):
            with pytest.raises(StorageFull):
                await adding
        await accounts.set_password(alice, "new", by=by)
        await accounts.set_admin(alice, False, by=by)
        await accounts.remove_grant(grant.subject, grant.pattern, by=by)
        await accounts.remove_member(dev, alice, by=by)
        await accounts.remove_group(dev, by=by)
        await accounts.set_enabled(alice, False, by=by)
        await accounts.remove_account(alice, by=by)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_without_a_reserve_where_none_can_be(code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system that cannot allocate blocks in advance has no reserve. Changes are admitted, the log says so once,
    and the disk counts as having no problem."""
    with closing(Reserve(tmp_path / "reserve", QuotaSystem(0, code))) as reserve:
        reserve.establish()
        for _ in range(3):
            reserve.require_room()
        assert [reserve.allows(need) for need in ReserveUse] == [True, True, True]
        assert reserve.disk_full_reason() is None
        assert reserve.spend(lambda: "done", StorageFull) == "done"
    with closing(Reserve(tmp_path / "reserve", QuotaSystem(0, code))) as another:
        another.require_room()
    assert caplog.text.count("cannot reserve space") == 2, "one for each process"
