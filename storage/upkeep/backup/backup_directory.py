"""The directory that contains the backups of a registry (`BackupDirectory`), and its format.

    TARGET/
      backup.json                              marks TARGET as a directory of backups, and has the format's version
      lock                                     locked by the process that makes a backup, or reads one
      blobs/sha256/ab/abcdef…                  the blobs of all snapshots; each is stored once
      incoming/                                blobs that are being copied
      snapshots/2026-01-31T09-30-00Z/
        entrepot.db                            a copy of the metadata database, one file
        manifest.json                          written last: a snapshot without it is not complete

A *snapshot* is the state of the registry at one moment: a copy of the metadata, and the blobs that the copy names.
The name of a snapshot is a time in UTC. `manifest.json` is an object with these fields:

- `version`: the version of the format.
- `time`: when the database was copied, in ISO 8601.
- `database`: an object with `sha256`, `size` in bytes, and `table_version` (the version of the database's tables).
- `repositories`, `manifests`, `tags`, `blobs`: the numbers of repositories, manifests, tags and blobs.
- `size`: the total size of the blobs, in bytes.
- `missing`: the digests of the blobs that could not be copied. Normally empty.

The database contains password hashes and signing keys. So `BackupDirectory.create` denies other users access to the
snapshots and blobs.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from storage.backups import BackupFailed, SnapshotTotals
from storage.data_dir.durable_files import make_directories, make_directory_and_parents, sync_directory, write_fully
from storage.data_dir.locks import try_flock, unlock_flock
from storage.data_dir.system import DISK_FULL_ERRNOS, System
from storage.future_times import is_future
from storage.names import ALGORITHMS, Digest

T = TypeVar("T")
FORMAT_VERSION: Final = 1
"""Version of the format of the directory that this program writes."""
_MARKER: Final = "backup.json"
_KIND: Final = "entrepot backup"
"""The text in `backup.json` that identifies a directory of backups."""
_MAX_LOCK_TEXT_BYTES: Final = 400
"""Largest size of the text in the lock file, which names the holder of the lock."""


def as_backup_error(error: OSError, what: str) -> BackupFailed:
    """Returns the BackupFailed for an OSError. `what`: the first part of the message, which says what failed."""
    if error.errno in DISK_FULL_ERRNOS:
        reason = "the disk is full; free some space there and run the same command again to continue from here"
    elif isinstance(error, PermissionError):
        reason = f"{error.strerror}; this process runs as the user with uid {os.geteuid()}, who needs access"
    else:
        reason = error.strerror or str(error)
    return BackupFailed(f"{what}: {reason}")


def with_backup_errors(what: str, call: Callable[[], T]) -> T:
    """Calls `call` and returns its result. If `call` raises OSError, raises BackupFailed instead, with `what` as the
    first part of the message."""
    try:
        return call()
    except OSError as error:
        raise as_backup_error(error, what) from error


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """The content of `manifest.json`. `name`: the name of the snapshot's directory. `time`: in seconds since 1970. The
    other fields are described at the top of this module."""

    name: str
    time: float
    database_sha256: str
    database_size: int
    table_version: int
    totals: SnapshotTotals
    missing: tuple[Digest, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return {
            "version": FORMAT_VERSION,
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(),
            "database": {
                "sha256": self.database_sha256,
                "size": self.database_size,
                "table_version": self.table_version,
            },
            **asdict(self.totals),
            "missing": list(self.missing),
        }

    @classmethod
    def from_json(cls, name: str, fields: Any) -> SnapshotManifest:
        """Parses the content of the file. Raises KeyError, TypeError, ValueError, DigestInvalid."""
        database = fields["database"]
        totals = (int(fields[key]) for key in ("repositories", "manifests", "tags", "blobs", "size"))
        return cls(
            name,
            datetime.fromisoformat(fields["time"]).timestamp(),
            str(database["sha256"]),
            int(database["size"]),
            int(database["table_version"]),
            SnapshotTotals(*totals),
            tuple(Digest(digest) for digest in fields["missing"]),
        )


def by_age(snapshots: Iterable[SnapshotManifest], now: float) -> list[SnapshotManifest]:
    """Returns the snapshots, oldest first. Puts snapshots whose times are in the future (`storage.future_times`) first,
    because their age is unknown. `now`: in seconds since 1970."""
    return sorted(snapshots, key=lambda snapshot: (not is_future(snapshot.time, now), snapshot.name))


def _make_private(path: Path) -> None:
    """Removes all permissions of other users on the directory `path`. Raises OSError."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)


class BackupDirectory:
    """The paths and files of a directory of backups. All methods block. All methods may raise OSError."""

    def __init__(self, root: Path, system: System) -> None:
        """`root`: the directory, which need not exist."""
        self.root = root.absolute()
        self._system = system

    @property
    def incoming(self) -> Path:
        """The directory of the blobs that are being copied."""
        return self.root / "incoming"

    def blob(self, digest: Digest) -> Path:
        """Returns the path of a blob."""
        return self.shard(digest.algorithm, digest.encoded[:2]) / digest.encoded

    def shard(self, algorithm: str, first_byte: str) -> Path:
        """Returns the path of a *shard*: the directory of the blobs whose digests begin with the same byte.
        `first_byte`: this byte in hex."""
        return self.root / "blobs" / algorithm / first_byte

    def database(self, name: str) -> Path:
        """Returns the path of the database of a snapshot."""
        return self.root / "snapshots" / name / "entrepot.db"

    def has_marker(self) -> bool:
        """Returns whether the directory contains `backup.json`."""
        return (self.root / _MARKER).exists()

    def has_snapshot_since(self, name: str) -> bool:
        """Returns whether the directory has a complete snapshot with the name `name` or a later name."""
        folder = self.root / "snapshots"
        names = os.listdir(folder) if folder.exists() else []
        return any(other >= name and (folder / other / "manifest.json").exists() for other in names)

    def create(self) -> None:
        """Creates the directory and its subdirectories if they are missing. Removes all permissions of other users on
        the subdirectories, and on the directory itself unless it belongs to another user. Raises the errors of `check`.
        Also raises BackupFailed in two cases:

        - The directory is not empty, and is no directory of backups.
        - Other users can enter a subdirectory, and this process may not change the permissions."""
        make_directory_and_parents(self._system, self.root)
        names = set(os.listdir(self.root)) - {"lost+found"}  # a new ext4 file system contains lost+found
        if _MARKER not in names and names - {f"{_MARKER}.new"}:
            raise BackupFailed(f"{self.root} is not empty and is no directory of backups; name a new directory")
        with suppress(PermissionError):  # the directory belongs to another user
            _make_private(self.root)
        if _MARKER not in names:
            self._write_json(self.root / _MARKER, {"kind": _KIND, "version": FORMAT_VERSION})
        self.check()
        shards = (self.shard(algorithm, f"{number:02x}") for algorithm in ALGORITHMS for number in range(256))
        blobs = [self.root / "blobs", *(self.root / "blobs" / algorithm for algorithm in ALGORITHMS)]
        paths = iter([self.incoming, self.root / "snapshots", *blobs, *shards])
        make_directories(self._system, self.root, paths)
        for path in (self.incoming, self.root / "snapshots", self.root / "blobs"):
            try:
                _make_private(path)
            except PermissionError:
                user = os.geteuid()
                raise BackupFailed(
                    f"other users can enter {path}, and the user with uid {user} may not change its permissions; make "
                    f"this user its owner, or mount the share with the options uid={user},dir_mode=0700"
                ) from None

    def check(self) -> None:
        """Raises BackupFailed if this is no directory of backups, or if a newer version of the program wrote it."""
        try:
            fields = json.loads((self.root / _MARKER).read_text())
            version = int(fields["version"]) if fields["kind"] == _KIND else 0
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            version = 0
        if version == 0:
            raise BackupFailed(f"{self.root} is no directory of backups of this registry")
        if version > FORMAT_VERSION:
            raise BackupFailed(f"{self.root} was written by a newer Entrepot; use the `entrepot` of that version")

    @contextmanager
    def locked(self, holder: str, *, shared: bool = False) -> Iterator[None]:
        """Context manager that holds the lock on the directory. Raises BackupFailed if another process holds the lock,
        unless both processes share it. The text of the error names the holder.

        - `holder`: the name of this process in the errors of other processes.
        - `shared`: False for a process that writes; the lock is then exclusive. True for a process that only reads;
          readers share the lock, and a reader works without the lock if there is no lock file."""
        path = self.root / "lock"
        flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        try:
            fd = self._system.open(path, flags, 0o600)
        except FileNotFoundError:
            if not shared:
                raise
            yield  # the directory may be a copy without the lock file; the next backup creates the file
            return
        try:
            if not try_flock(fd, shared=shared):
                current_holder = os.pread(fd, _MAX_LOCK_TEXT_BYTES, 0).decode(errors="replace") or "another process"
                raise BackupFailed(f"{current_holder} is using {self.root}; try again when it has ended")
            if not shared:
                os.ftruncate(fd, 0)
                os.pwrite(fd, holder.encode()[:_MAX_LOCK_TEXT_BYTES], 0)
            yield
        finally:
            unlock_flock(fd)
            os.close(fd)

    def add_snapshot(self, now: float) -> str:
        """Creates the directory of a new snapshot and returns its name. `now`: the time of the snapshot, in seconds
        since 1970. Raises BackupFailed if all names for this second are taken."""
        time_text = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        for number in range(1, 1000):
            name = time_text if number == 1 else f"{time_text}.{number:03d}"
            with suppress(FileExistsError):
                self._system.mkdir(self.root / "snapshots" / name)
                return name
        raise BackupFailed(f"{self.root} has too many snapshots of {time_text}")

    def remove_unfinished(self) -> int:
        """Removes the incomplete snapshots and incomplete copies of blobs that interrupted backups have left. Returns
        the number of removed snapshots. The caller must hold the lock."""
        for name in os.listdir(self.incoming):
            self._system.unlink(self.incoming / name)
        unfinished = [path for path in (self.root / "snapshots").iterdir() if not (path / "manifest.json").exists()]
        for path in unfinished:
            self._remove_folder(path)
        return len(unfinished)

    def complete_snapshot(self, manifest: SnapshotManifest) -> None:
        """Completes a snapshot: makes the names of its files durable, and then writes `manifest.json`. The contents of
        the files must be durable already."""
        for algorithm in ALGORITHMS:
            for number in range(256):
                sync_directory(self._system, self.shard(algorithm, f"{number:02x}"))
            sync_directory(self._system, self.root / "blobs" / algorithm)
        folder = self.root / "snapshots" / manifest.name
        for path in (self.root / "blobs", folder, self.root / "snapshots", self.root):
            sync_directory(self._system, path)
        self._write_json(folder / "manifest.json", manifest.as_json())

    def snapshots(self) -> list[SnapshotManifest]:
        """Returns the complete snapshots, in the order of their names. Returns an empty list if the directory is
        missing. Raises BackupFailed if a `manifest.json` cannot be read or parsed."""
        complete: list[SnapshotManifest] = []
        folder = self.root / "snapshots"
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            file = path / "manifest.json"
            try:
                complete.append(SnapshotManifest.from_json(path.name, json.loads(file.read_text())))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise BackupFailed(f"{file} cannot be read: {error}") from error
        return complete

    def remove_snapshot(self, name: str) -> None:
        """Removes a snapshot, but not its blobs."""
        folder = self.root / "snapshots" / name
        self._system.unlink(folder / "manifest.json")  # first, so that a partly removed snapshot is not complete
        sync_directory(self._system, folder)
        self._remove_folder(folder)

    def remove_blobs(self, algorithm: str, first_byte: str, names: Iterable[str]) -> None:
        """Removes the blobs with these names in one shard."""
        for name in names:
            self._system.unlink(self.shard(algorithm, first_byte) / name)

    def _remove_folder(self, path: Path) -> None:
        """Removes a directory that contains only files."""
        for name in os.listdir(path):
            self._system.unlink(path / name)
        self._system.rmdir(path)

    def _write_json(self, path: Path, value: object) -> None:
        """Writes a file durably and atomically: a crash leaves either the old or the new content."""
        new_path = path.with_name(f"{path.name}.new")
        fd = self._system.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_fully(self._system, fd, memoryview(json.dumps(value, indent=2).encode() + b"\n"), 0)
            self._system.sync(fd)
        finally:
            os.close(fd)
        self._system.rename(new_path, path)
        sync_directory(self._system, path.parent)
