"""The data directory of a registry: how it is created and migrated, and which directories are refused."""

from __future__ import annotations

import itertools
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
from storage.data_dir.check import DataDirectoryError, ensure_usable, file_system_type
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.database import migrations
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.names import RepositoryName
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import ROOT

pytestmark = pytest.mark.full_store

APP = RepositoryName("team/app")


def _schema_version(data: Path) -> int:
    db = second_connection(data / "entrepot.db")
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


async def test_prepare_can_be_repeated_and_keeps_content(tmp_path: Path) -> None:
    """If a data directory is prepared twice, the second call changes nothing. Content that was pushed between the two
    calls stays."""
    prepare_data_dir(tmp_path / "data")
    await _push(tmp_path / "data", b"hello")
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as registry:
        assert (await registry.resolve_blob(APP, digest_of(b"hello"))).size == 5
    assert _schema_version(tmp_path / "data") == migrations()[-1][0]


@pytest.mark.slow
def test_prepare_may_run_in_several_processes_at_once(tmp_path: Path) -> None:
    """Four processes that prepare the same data directory at the same time all succeed."""
    script = "import sys; from pathlib import Path; from storage.composition import prepare_data_dir\n"
    script += "sys.stdin.readline(); prepare_data_dir(Path(sys.argv[1]))"
    for attempt in range(3):
        data = tmp_path / f"data {attempt}"
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(data)], cwd=ROOT, stdin=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.close()
        assert [process.wait(60) for process in processes] == [0] * 4
        assert _schema_version(data) == migrations()[-1][0]


def test_the_migrations_are_numbered_without_a_gap() -> None:
    """The migrations are numbered from 1, without a gap."""
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))


def _schema(data: Path) -> list[str]:
    with closing(second_connection(data / "entrepot.db")) as db:
        return [sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]


@pytest.mark.parametrize("earlier_version", [0, 7], ids=["new", "of version 7"])
def test_other_programs_can_open_the_database(tmp_path: Path, earlier_version: int) -> None:
    """Programs with an older SQLite, such as the `sqlite3` of Debian 12, can open the database. Before version 3.47,
    `raise` in a trigger accepts only a constant message. One trigger that SQLite cannot parse would make the whole
    database unreadable."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    if earlier_version:
        _downgrade(data / "entrepot.db", earlier_version)
        prepare_data_dir(data)
    messages = [message for sql in _schema(data) for message in re.findall(r"raise\s*\(\s*\w+\s*,([^)]*)\)", sql)]
    assert messages
    assert [message for message in messages if not re.fullmatch(r"\s*'[^']*'\s*", message)] == []
    with closing(sqlite3.connect(f"file:{data / 'entrepot.db'}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT count(*) FROM tag").fetchone() == (0,)
        assert db.execute("PRAGMA user_version").fetchone() == (migrations()[-1][0],)


def test_a_database_of_a_newer_version_is_refused_and_unchanged(tmp_path: Path) -> None:
    """A database of a newer version of Entrepot is refused. The error is one line, and the database does not change."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    db = second_connection(data / "entrepot.db")
    db.pragma("user_version", 999)
    db.close()
    with pytest.raises(DataDirectoryError, match="newer Entrepot") as caught:
        prepare_data_dir(data)
    assert "\n" not in str(caught.value)
    assert _schema_version(data) == 999


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """If the database file is not a SQLite database, it is refused and does not change."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "entrepot.db").write_bytes(b"this is something else altogether" * 100)
    with pytest.raises(DataDirectoryError, match="cannot be used"):
        prepare_data_dir(data)
    assert (data / "entrepot.db").read_bytes() == b"this is something else altogether" * 100


class _Interrupted(System):
    """A system that raises an error instead of the sync number `number`. If `number` is 0, it raises none. `synced`:
    the paths that were synced."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._syncs_left = number
        self.synced: set[str] = set()

    def sync(self, fd: int) -> None:
        self._syncs_left -= 1
        if self._syncs_left == 0:
            raise OSError(5, "stopped by the test")
        self.synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        super().sync(fd)


@pytest.mark.slow
def test_interrupted_prepare_is_completed_by_the_next(tmp_path: Path) -> None:
    """If the preparation of a data directory stops after it has created directories and before it has synced them, the
    next preparation syncs them. The test interrupts the preparation at each sync."""
    for number in itertools.count(1):
        parent = tmp_path / str(number)
        parent.mkdir()
        data, next_system = parent / "data", _Interrupted(0)
        required_paths = {parent, data, data / "blobs", data / "blobs/sha256", data / "blobs/sha512"}
        try:
            prepare_data_dir(data, _Interrupted(number))
        except DataDirectoryError:
            prepare_data_dir(data, next_system)
            assert {str(path) for path in required_paths} <= next_system.synced
        else:
            break  # the preparation has fewer than `number` syncs
    assert number > len(required_paths)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ext4", "tmpfs", "overlay"])
@pytest.mark.parametrize("name", ["plain", "with space", "Bücher", "back\\slash"])
def test_file_system_type_is_read_from_mountinfo(kind: str, name: str, tmp_path: Path) -> None:
    """The type of a path's file system is that of the innermost mount in /proc/self/mountinfo. The mount is found on
    any line, with optional fields, and with escaped characters in its path."""
    mount = str(tmp_path / name).replace("\\", "\\134").replace(" ", "\\040")
    lines = [
        "22 1 8:1 / / rw,relatime shared:1 - xfs /dev/sda1 rw",
        f"30 22 0:40 / {mount} rw,relatime shared:2 master:3 propagate_from:4 - {kind} server:/export rw,vers=4.2",
        f"31 22 0:41 / {mount}-other rw - btrfs /dev/sdb rw",
        "a line that is none",
        "",
    ]
    for text in ("\n".join(lines), "\n".join(reversed(lines))):
        assert file_system_type(tmp_path / name / "data", text) == kind
        assert file_system_type(tmp_path, text) == "xfs"
        assert file_system_type(tmp_path / f"{name}s", text) == "xfs"


def test_the_last_mount_at_a_path_counts(tmp_path: Path) -> None:
    """If two file systems are mounted at the same path, the type is that of the later mount."""
    text = f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:1 / {tmp_path} rw - nfs b rw\n3 1 0:2 / {tmp_path} rw - tmpfs c rw"
    assert file_system_type(tmp_path, text) == "tmpfs"


def _make_file(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("make", "error_text"),
    [
        (lambda tmp: _make_file(tmp / "file"), "is not a directory"),
        (lambda tmp: _make_file(tmp / "file") / "below", "cannot make the data directory"),
        (lambda _: Path("/proc/self/data"), "cannot make the data directory"),
        (lambda _: Path("/proc/self"), "cannot write to the data directory"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_in_one_line(
    make: Callable[[Path], Path], error_text: str, tmp_path: Path
) -> None:
    """The error is one line, names the directory, and says what is wrong with it."""
    path = make(tmp_path)
    with pytest.raises(DataDirectoryError, match=error_text) as caught:
        ensure_usable(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_write_permission_is_refused(tmp_path: Path) -> None:
    """A directory to which the server's user may not write is refused before anything is created in it."""
    data = tmp_path / "data"
    data.mkdir(mode=0o555)
    data.chmod(0o555)
    tmp_path.chmod(0o755)
    script = "import os, sys; from pathlib import Path; from storage.data_dir.check import ensure_usable\n"
    script += "os.geteuid() or os.setuid(65534)\nensure_usable(Path('.'))"
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=data,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    data.chmod(0o755)
    assert "DataDirectoryError: cannot write to the data directory" in process.stderr
    assert not list(data.iterdir())


SPLIT_DIRECTORIES = {
    "blobs, in a new data directory": ("mkdir data/blobs && mount -t tmpfs none data/blobs", "blobs", "data"),
    "blobs": ("$prepare && mount -t tmpfs none data/blobs", "blobs", "data/uploads"),
    "blobs, the same file system": ("$prepare && mount --bind other data/blobs", "blobs", "data/uploads"),
    "blobs, a link": ("$prepare && rm -r data/blobs && ln -s ../disk data/blobs", "blobs", "data/uploads"),
    "the blobs of one algorithm": ("$prepare && mount -t tmpfs none data/blobs/sha512", "blobs/sha512", "data/uploads"),
    "uploads": ("$prepare && mount -t tmpfs none data/uploads", "blobs/sha256", "data/uploads"),
    "trash": ("$prepare && mount -t tmpfs none data/trash", "blobs/sha256", "data/trash"),
}
"""By name: commands after which two directories of the data directory `data` are on different mounts. The directory
`disk` is on another file system than `data`, and `other` on the same. Then the two directories that the error names."""
MOVED_TOGETHER = (
    "for name in blobs uploads partials trash quarantine; do mv data/$name disk && ln -s ../disk/$name data; done"
)
"""Moves all directories of blob files, and of files that become blobs, to another file system."""


def _ensure_usable_after(commands: str, folder: Path) -> str:
    """Runs the commands in a mount namespace of their own, and then `ensure_usable`. Returns what it prints on
    stderr."""
    imports = "from pathlib import Path; from storage.data_dir.check import ensure_usable"
    check = f"{imports}; ensure_usable(Path('data').absolute())"
    prepare = "from pathlib import Path; from storage.composition import prepare_data_dir as p; p(Path('data'))"
    commands = commands.replace("$prepare", f'"$0" -c "{prepare}"')
    script = f'mkdir data disk other && mount -t tmpfs none disk && {commands} && exec "$0" -c "{check}"'
    map_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    process = subprocess.run(
        ["unshare", "--mount", *map_root, "sh", "-c", script, sys.executable],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return process.stderr


@pytest.mark.parametrize("case", SPLIT_DIRECTORIES)
@pytest.mark.slow
def test_a_data_directory_on_two_file_systems_is_refused(case: str, tmp_path: Path) -> None:
    """If files cannot be moved between the directories of uploads, blobs and deleted blobs, every push would fail. So
    the data directory is refused, with an error that names the two directories."""
    commands, first, second = SPLIT_DIRECTORIES[case]
    error = _ensure_usable_after(commands, tmp_path)
    assert f"DataDirectoryError: {tmp_path}/data/{first} and {tmp_path}/{second} are on different" in error
    assert "put the whole data directory on one file system" in error


@pytest.mark.parametrize("commands", ["true", "$prepare", f"$prepare && {MOVED_TOGETHER}"])
@pytest.mark.slow
def test_a_data_directory_in_which_files_can_be_moved_is_accepted(commands: str, tmp_path: Path) -> None:
    """A data directory is accepted if a file can be moved between all directories in which blobs, and the files that
    become blobs, are. The check leaves no files behind."""
    assert _ensure_usable_after(f"{commands} && mkdir -p data/trash data/uploads data/blobs/sha256", tmp_path) == ""
    assert [path for path in tmp_path.rglob("*") if path.name.startswith("tmp")] == []


CONFIRMED_LINKS_VERSION = 5
"""The first schema version that records for each link whether its blob was pushed to this repository."""


def _downgrade(database: Path, version: int) -> None:
    """Replaces the database by one with the tables of an earlier version. The rows stay, as far as the earlier version
    has their tables and columns."""
    old_database = database.with_suffix(".old")
    db = apsw.Connection(str(old_database))
    for _, sql in migrations()[:version]:
        db.execute(sql)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    db.execute("ATTACH ? AS new", (str(database),))
    for table in tables:
        columns = ", ".join(name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table,)))
        db.execute(f"DELETE FROM {table}")  # deletes rows that a migration has inserted
        db.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM new.{table}")
    db.execute("DETACH new")
    db.pragma("user_version", version)
    db.pragma("journal_mode", "wal")
    db.close()
    for name in (f"{database}-wal", f"{database}-shm"):
        Path(name).unlink(missing_ok=True)
    old_database.rename(database)


@pytest.mark.parametrize("version", range(1, len(migrations())))
@pytest.mark.slow
async def test_a_data_directory_of_an_earlier_version_is_migrated(tmp_path: Path, version: int) -> None:
    """After the migration, pushed content can be read, an upload session can continue, and new features work. Other
    users of the machine can no longer read the database."""
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
    _downgrade(data / "entrepot.db", version)
    (data / "entrepot.db").chmod(0o644)
    prepare_data_dir(data)
    async with open_registry(data, boot="one") as registry:
        assert (await registry.resolve_blob(APP, digest_of(b"hello"))).size == 5
        assert await registry.upload_offset(APP, writer.id, by=Actor("somebody")) == 4
        assert not registry.accounts.has_had_account()
        is_confirmed = await registry.records.is_confirmed(APP, digest_of(b"hello"))
        # For links of older versions, the upstream has to confirm the blob.
        assert is_confirmed == (version >= CONFIRMED_LINKS_VERSION)
        partial = await registry.partials.claim(digest_of(b"far"), 3)
        partial.write_at(0, b"far")
        await partial.commit(APP)
        partial.close()
        assert await registry.records.is_confirmed(APP, digest_of(b"far"))
        await registry.records.save_token("key", "token", 2e9)
        modes = {file.name: file.stat().st_mode & 0o007 for file in data.glob("entrepot.db*")}
    assert modes == {"entrepot.db": 0, "entrepot.db-wal": 0, "entrepot.db-shm": 0}
    assert [path.name for path in data.iterdir() if path.is_dir() and _permissions_of_others(path)] == []


async def test_other_users_of_the_machine_cannot_read_the_data(tmp_path: Path) -> None:
    """Other users of the machine cannot read the data, even if the server's umask is 0."""
    data = tmp_path / "data"
    umask = os.umask(0)
    try:
        prepare_data_dir(data)
        async with open_registry(data) as registry:
            writer = await registry.start_upload(APP)
            await writer.write(b"hello")
            await writer.commit(digest_of(b"hello"))
            await writer.aclose()
            unfinished_upload = await registry.start_upload(APP)
            await unfinished_upload.write(b"half")
            await unfinished_upload.aclose()
            open_to_others = [path for path in data.iterdir() if path.is_dir() and _permissions_of_others(path)]
            files = [path for path in (data / "blobs").rglob("*") if path.is_file()]
            assert (len(files), [path for path in files if _permissions_of_others(path)], open_to_others) == (1, [], [])
    finally:
        os.umask(umask)


def _permissions_of_others(path: Path) -> int:
    """Returns the permission bits of other users on a path."""
    return path.stat().st_mode & 0o007


class _NoLeasesFile(System):
    """A system that cannot open the file of the leases."""

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        if path.name == "turns":
            raise OSError(24, "refused by the test")
        return super().open(path, flags, mode)


async def test_a_registry_that_cannot_be_opened_leaves_nothing_open(data: Path) -> None:
    """If the last part of the registry cannot be opened, the other parts are closed: no file stays open and no thread
    runs."""

    def open_resources() -> tuple[list[str], list[str]]:
        files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        threads = [thread.name for thread in threading.enumerate() if thread.name == "metadata"]
        return [name for name in files if name.startswith(str(data))], threads

    errors = []
    with pytest.raises(StorageFailed) as caught:
        async with open_registry(data, system=_NoLeasesFile()):
            pass
    errors.append(caught)  # also keeps every stack frame of the attempt alive
    assert open_resources() == ([], [])


def test_a_read_only_database_is_not_read_after_retire(data: Path) -> None:
    """On a full disk, the database is opened read-only. Once other processes may write again, the cached pages of this
    connection are out of date. So after `retire`, the connection raises an error and never returns old rows."""
    with closing(ImmutableDatabase(layout_of(data))) as database:
        assert database.db.execute("SELECT count(*) FROM repository").get == 0
        database.retire()
        for sql in ("SELECT count(*) FROM repository", "SELECT name FROM sqlite_schema"):
            with pytest.raises(StorageFull):
                database.db.execute(sql)
