"""The reserve: room kept back for what frees room. The far edge here is a file system that says how much it has."""

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
    """Gives a file no more room than `most` bytes, and says no as `code` does."""

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
    """It is whole, and its blocks are allocated, not a hole in a file. Nothing is wrong with the disk."""
    assert reserve.is_whole
    assert allocated(tmp_path / "reserve") >= reserve.size == RESERVE_BYTES
    assert [reserve.allows(need) for need in ReserveUse] == [True, True, True]
    assert reserve.disk_full_reason() is None
    reserve.require_room()


def test_a_hole_in_its_place_is_filled(tmp_path: Path, quota: QuotaSystem) -> None:
    """Whoever copies a data directory may leave a file without blocks."""
    (tmp_path / "reserve").touch()
    os.truncate(tmp_path / "reserve", RESERVE_BYTES)
    with closing(Reserve(tmp_path / "reserve", quota)) as reserve:
        reserve.establish()
    assert allocated(tmp_path / "reserve") >= RESERVE_BYTES


def test_little_is_given_up_first_and_taken_back(tmp_path: Path, reserve: Reserve) -> None:
    """An attempt that needs little finds a small part given up, one that needs more a larger part, in the end all of
    it. What is free afterwards is taken back, also when the attempt fails."""
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
    """What is taken back is what there is. Until all of it is back, growth is refused; small changes may use one half,
    those that free room all of it. Once there is room it is taken back without anybody's help but a question."""
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
    """A process that gave it up and was killed leaves a short file: the next who looks takes the rest back."""
    os.truncate(tmp_path / "reserve", 0)
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        assert not other.is_whole
        assert other.restore()
    assert reserve.is_whole


def test_one_at_a_time_over_all_processes(tmp_path: Path, reserve: Reserve) -> None:
    """While one has given it up, another neither takes it back nor waits for that."""
    with closing(Reserve(tmp_path / "reserve", System())) as other:
        reserve.spend(lambda: _holds(not other.restore() and not other.is_whole), StorageFull)
        assert other.is_whole


def _holds(fact: bool) -> None:
    assert fact


class FullAt(System):
    """Finds no room for any commit while the reserve is whole."""

    def __init__(self, reserve: Path) -> None:
        super().__init__()
        self._reserve = reserve

    def commit(self, commit: object, *, durable: bool) -> None:
        if self._reserve.stat().st_size == RESERVE_BYTES:
            raise apsw.FullError("refused by the test")
        assert callable(commit)
        commit()


async def test_what_was_wrong_can_be_forgotten(tmp_path: Path) -> None:
    """`entrepot mirror refresh` works on a full disk: it deletes notes."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    digest = digest_of(b"x")
    async with open_registry(data) as registry:
        await registry.records.save_bad_senders("far.test", digest, ["https://far.test"], 60)
    async with open_registry(data, system=FullAt(data / "reserve")) as registry:
        assert await registry.records.forget_bad_senders("far.test", [digest]) == 1
        assert not await registry.records.bad_senders("far.test", digest, 60)


async def test_deletes_use_it_and_pushes_do_not(tmp_path: Path) -> None:
    """On a disk that has room for no commit but from the reserve, a manifest is refused and one that is there can be
    deleted; so can an account be disabled. The reserve is whole afterwards."""
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
    """As long as `full`, it gives the reserve nothing back; as long as `broken`, it cannot sync a directory. The next
    `strange` calls for room end in an error that nobody expects of a disk."""

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
    """What a change comes to. A step cannot be cancelled, so one that does not end is left."""
    await asyncio.wait([step], timeout=10)
    assert step.done(), "nobody ends the wait"
    return step.exception() or step.result()


def _insert(name: str) -> Callable[[apsw.Connection], object]:
    return lambda db: db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,)).fetchall()


async def test_a_refused_change_leaves_the_database_alone(data: Path) -> None:
    """On a full disk a change that stores something is refused before the database is touched. So a database that fails
    at that moment does no harm: later changes are made."""
    system = Broken()
    with writing(data, system) as writer:
        system.full = system.broken = True
        os.truncate(data / "reserve", 4096)
        assert isinstance(await came_to(writer.run(_insert("a"))), StorageFull)
        system.broken = False
        assert await came_to(writer.run(_insert("b"), reserve_use=ReserveUse.RELIEF)) == []


async def test_the_writer_survives_what_nobody_foresaw(data: Path) -> None:
    """Whoever waits for a change of that batch gets an error, and later changes are made."""
    system = Broken()
    with writing(data, system) as writer:
        system.strange = 1
        os.truncate(data / "reserve", 4096)
        assert isinstance(await came_to(writer.run(_insert("a"))), StorageFailed)
        assert await came_to(writer.run(_insert("a"))) == []


class FailsAfterwards(Broken):
    """Finds room for a commit at the second try, and nothing works once that one is made."""

    tries = 0

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self.tries += 1
        if self.tries == 1:
            raise apsw.FullError("refused by the test")
        super().commit(commit, durable=durable)
        self.strange = self.tries == 2


async def test_what_is_committed_succeeds_whatever_follows(data: Path) -> None:
    """An error after the commit, when room is taken back, does not make a failure of what is committed."""
    system = FailsAfterwards()
    with writing(data, system) as writer:
        assert await came_to(writer.run(_insert("a"), reserve_use=ReserveUse.RELIEF)) == []
        assert system.tries == 2
        assert not system.strange, "the error was not raised"
        assert await came_to(writer.run(_insert("b"))) == []


async def test_an_error_after_the_commit_is_not_the_changes(data: Path) -> None:
    """Nor are they made a second time, when the database's version cannot be read after the commit."""
    layout, marks = layout_of(data), iter([0])
    with (
        closing(Reserve(layout.reserve, System())) as reserve,
        closing(CommitThread(layout, System(), lambda: next(marks), reserve)) as writer,
    ):
        assert await came_to(writer.run(_insert("a"))) == []


async def test_what_adds_rights_leaves_half_of_the_reserve(data: Path) -> None:
    """With less than half of it left, nothing is added to accounts, groups and grants; rights can be taken away, and a
    password can be changed, since that shuts somebody out."""
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
    """A file system that cannot give a file room in advance has no reserve: what is stored is admitted, the log says so
    once, and nothing is wrong with the disk."""
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
