"""The data directory: creation, migration, and what is refused."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import Actor, digest_of
from storage.data_dir.check import DataDirectoryError, ensure_usable, filesystem_of
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.database import migrations
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.names import RepositoryName
from tests.fakes.server_process import ROOT

pytestmark = pytest.mark.full_store

APP = RepositoryName("team/app")


def _version(data: Path) -> int:
    db = apsw.Connection(str(data / "entrepot.db"))
    try:
        return int(db.pragma("user_version"))
    finally:
        db.close()


async def _push(data: Path, body: bytes) -> None:
    async with open_registry(data) as registry:
        writer = await registry.start_upload(APP)
        await writer.write(body)
        await writer.commit(digest_of(body))
        await writer.aclose()


async def test_prepare_can_be_repeated_and_keeps_what_is_there(tmp_path: Path) -> None:
    """A second prepare changes nothing. Content that was pushed between the two stays."""
    prepare_data_dir(tmp_path / "data")
    await _push(tmp_path / "data", b"hello")
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as registry:
        assert (await registry.resolve_blob(APP, digest_of(b"hello"))).size == 5
    assert _version(tmp_path / "data") == migrations()[-1][0]


@pytest.mark.slow
def test_prepare_may_run_in_several_processes_at_once(tmp_path: Path) -> None:
    """Four processes that prepare the same data directory at the same time all succeed."""
    script = "import sys; from pathlib import Path; from storage.composition import prepare_data_dir\n"
    script += "sys.stdin.readline(); prepare_data_dir(Path(sys.argv[1]))"
    for turn in range(3):
        data = tmp_path / f"data {turn}"
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(data)], cwd=ROOT, stdin=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.close()
        assert [process.wait(60) for process in processes] == [0] * 4
        assert _version(data) == migrations()[-1][0]


def test_the_migrations_are_numbered_without_a_gap() -> None:
    """The migrations have the numbers 1, 2, 3 and so on."""
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))


def _schema(data: Path) -> list[str]:
    with closing(apsw.Connection(str(data / "entrepot.db"))) as db:
        return [sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]


@pytest.mark.parametrize("earlier", [0, 7], ids=["new", "of version 7"])
def test_other_programs_can_open_the_database(tmp_path: Path, earlier: int) -> None:
    """Programs with an older SQLite can open the database, such as the `sqlite3` of Debian 12. Before version 3.47,
    `raise` accepts only a constant message, and one trigger that SQLite cannot parse makes the whole database
    unreadable."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    if earlier:
        _made_older(data / "entrepot.db", earlier)
        prepare_data_dir(data)
    messages = [message for sql in _schema(data) for message in re.findall(r"raise\s*\(\s*\w+\s*,([^)]*)\)", sql)]
    assert messages
    assert [message for message in messages if not re.fullmatch(r"\s*'[^']*'\s*", message)] == []
    with closing(sqlite3.connect(f"file:{data / 'entrepot.db'}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT count(*) FROM tag").fetchone() == (0,)
        assert db.execute("PRAGMA user_version").fetchone() == (migrations()[-1][0],)


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    """The error says in one line what to do. The database does not change."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    db = apsw.Connection(str(data / "entrepot.db"))
    db.pragma("user_version", 999)
    db.close()
    with pytest.raises(DataDirectoryError, match="newer Entrepot") as caught:
        prepare_data_dir(data)
    assert "\n" not in str(caught.value)
    assert _version(data) == 999


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """The error is one line, and the file does not change."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "entrepot.db").write_bytes(b"this is something else altogether" * 100)
    with pytest.raises(DataDirectoryError, match="cannot be used"):
        prepare_data_dir(data)
    assert (data / "entrepot.db").read_bytes() == b"this is something else altogether" * 100


class _Interrupted(System):
    """Stops before the sync of directory `number`. Records which directories were synced."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number
        self.synced: set[str] = set()

    def sync(self, fd: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise OSError(5, "stopped by the test")
        self.synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        super().sync(fd)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_prepare_that_was_broken_off_is_made_good_by_the_next(number: int, tmp_path: Path) -> None:
    """If a prepare stopped after it had created directories and before it had synced them, the next prepare syncs
    them."""
    data = tmp_path / "data"
    first, second = _Interrupted(number), _Interrupted(0)
    try:
        prepare_data_dir(data, first)
    except DataDirectoryError:
        assert number
    prepare_data_dir(data, second)
    wanted = {tmp_path, data, data / "blobs", data / "blobs/sha256", data / "blobs/sha512"}
    assert {str(path) for path in wanted} <= second.synced


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ext4", "tmpfs", "overlay"])
@pytest.mark.parametrize("name", ["plain", "with space", "Bücher", "back\\slash"])
def test_the_file_system_is_told_from_mountinfo(kind: str, name: str, tmp_path: Path) -> None:
    """The innermost mount of a path is found, with its optional fields and escaped characters, on whichever line it
    is."""
    inner = str(tmp_path / name).replace("\\", "\\134").replace(" ", "\\040")
    lines = [
        "22 1 8:1 / / rw,relatime shared:1 - xfs /dev/sda1 rw",
        f"30 22 0:40 / {inner} rw,relatime shared:2 master:3 propagate_from:4 - {kind} server:/export rw,vers=4.2",
        f"31 22 0:41 / {inner}-other rw - btrfs /dev/sdb rw",
        "a line that is none",
        "",
    ]
    for text in ("\n".join(lines), "\n".join(reversed(lines))):
        assert filesystem_of(tmp_path / name / "data", text) == kind
        assert filesystem_of(tmp_path, text) == "xfs"
        assert filesystem_of(tmp_path / f"{name}s", text) == "xfs"


def test_a_file_system_that_is_mounted_over_counts(tmp_path: Path) -> None:
    """Of two mounts at the same path, the later one is found."""
    text = f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:1 / {tmp_path} rw - nfs b rw\n3 1 0:2 / {tmp_path} rw - tmpfs c rw"
    assert filesystem_of(tmp_path, text) == "tmpfs"


def _file(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda tmp: _file(tmp / "file"), "is not a directory"),
        (lambda tmp: _file(tmp / "file") / "below", "cannot make the data directory"),
        (lambda _: Path("/proc/self/data"), "cannot make the data directory"),
        (lambda _: Path("/proc/self"), "cannot write to the data directory"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_in_one_line(
    make: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    """The error names the directory and says what is wrong with it."""
    path = make(tmp_path)
    with pytest.raises(DataDirectoryError, match=says) as caught:
        ensure_usable(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    """A directory that this user may not write is refused before anything is created in it."""
    data = tmp_path / "data"
    data.mkdir(mode=0o555)
    data.chmod(0o555)
    tmp_path.chmod(0o755)
    script = "import os, sys; from pathlib import Path; from storage.data_dir.check import ensure_usable\n"
    script += "os.geteuid() or os.setuid(65534)\nensure_usable(Path('.'))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=data,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    data.chmod(0o755)
    assert "DataDirectoryError: cannot write to the data directory" in run.stderr
    assert not list(data.iterdir())


CONFIRMED = 5
"""The version from which on links say whether the repository itself brought its blob."""


def _made_older(database: Path, version: int) -> None:
    """Returns a database with the tables of an earlier version and with the same rows, as far as that version has
    them."""
    old = database.with_suffix(".old")
    db = apsw.Connection(str(old))
    for _, sql in migrations()[:version]:
        db.execute(sql)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    db.execute("ATTACH ? AS new", (str(database),))
    for table in tables:
        columns = ", ".join(name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table,)))
        db.execute(f"DELETE FROM {table}")  # what a migration itself puts there
        db.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM new.{table}")
    db.execute("DETACH new")
    db.pragma("user_version", version)
    db.pragma("journal_mode", "wal")
    db.close()
    for name in (f"{database}-wal", f"{database}-shm"):
        Path(name).unlink(missing_ok=True)
    old.rename(database)


@pytest.mark.parametrize("version", range(1, len(migrations())))
@pytest.mark.slow
async def test_a_data_directory_of_an_earlier_version_becomes_one_of_this(tmp_path: Path, version: int) -> None:
    """After the migration, pushed content is there, an upload session can continue, new features work, and other users
    of the machine can no longer read the database."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    await _push(data, b"hello")
    async with open_registry(data, boot="one") as registry:
        writer = await registry.start_upload(APP)
        await writer.write(b"half")
        await writer.aclose()
    if version == 1:
        (data / "partials").rmdir()
    (data / "blobs").chmod(0o755)
    _made_older(data / "entrepot.db", version)
    (data / "entrepot.db").chmod(0o644)
    prepare_data_dir(data)
    async with open_registry(data, boot="one") as registry:
        assert (await registry.resolve_blob(APP, digest_of(b"hello"))).size == 5
        assert await registry.upload_offset(APP, writer.id, by=Actor("somebody")) == 4
        assert not registry.accounts.has_had_account()
        pushed = await registry.records.is_confirmed(APP, digest_of(b"hello"))
        assert pushed == (version >= CONFIRMED)  # links of older versions have to be asked about
        partial = await registry.partials.claim(digest_of(b"far"), 3)
        partial.write_at(0, b"far")
        await partial.commit(APP)
        partial.close()
        assert await registry.records.is_confirmed(APP, digest_of(b"far"))
        await registry.records.save_token("key", "token", 2e9)
        modes = {file.name: file.stat().st_mode & 0o007 for file in data.glob("entrepot.db*")}
    assert modes == {"entrepot.db": 0, "entrepot.db-wal": 0, "entrepot.db-shm": 0}
    assert [found.name for found in data.iterdir() if found.is_dir() and _others(found)] == []


async def test_others_on_the_machine_read_nothing(tmp_path: Path) -> None:
    """Other users of the machine cannot read the data, whatever umask the server has."""
    data = tmp_path / "data"
    umask = os.umask(0)
    try:
        prepare_data_dir(data)
        async with open_registry(data) as registry:
            writer = await registry.start_upload(APP)
            await writer.write(b"hello")
            await writer.commit(digest_of(b"hello"))
            await writer.aclose()
            left = await registry.start_upload(APP)
            await left.write(b"half")
            await left.aclose()
            open_to_others = [found for found in data.iterdir() if found.is_dir() and _others(found)]
            files = [found for found in (data / "blobs").rglob("*") if found.is_file()]
            assert (len(files), [found for found in files if _others(found)], open_to_others) == (1, [], [])
    finally:
        os.umask(umask)


def _others(path: Path) -> int:
    """Returns the permission bits of other users on a path."""
    return path.stat().st_mode & 0o007


class _NoTurns(System):
    """A system that cannot open the file of the leases."""

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        if path.name == "turns":
            raise OSError(24, "refused by the test")
        return super().open(path, flags, mode)


async def test_what_cannot_be_opened_leaves_nothing_open(data: Path) -> None:
    """If the last part of the registry cannot be opened, the other parts are closed: no file stays open and no thread
    runs."""

    def held() -> tuple[list[str], list[str]]:
        fds = [os.readlink(found) for found in Path("/proc/self/fd").iterdir() if found.is_symlink()]
        threads = [thread.name for thread in threading.enumerate() if thread.name == "metadata"]
        return [name for name in fds if name.startswith(str(data))], threads

    kept = []
    with pytest.raises(StorageFailed) as caught:
        async with open_registry(data, system=_NoTurns()):
            pass
    kept.append(caught)  # and with it every frame of the attempt
    assert held() == ([], [])


def test_a_frozen_database_is_not_read_once_it_thawed(data: Path) -> None:
    """A frozen database is opened read-only on a full disk. Once other processes may write again, the cached pages of
    its connection are out of date. So the connection raises an error, and never returns old or broken rows."""
    with closing(ImmutableDatabase(layout_of(data))) as frozen:
        assert frozen.db.execute("SELECT count(*) FROM repository").get == 0
        frozen.retire()
        for sql in ("SELECT count(*) FROM repository", "SELECT name FROM sqlite_schema"):
            with pytest.raises(StorageFull):
                frozen.db.execute(sql)
