"""Records the durable steps of a run (such as writes, syncs and commits), and computes the disks that a power cut after
any of these steps could leave.

Assumptions about a disk: a sync of a file makes durable all bytes that were written to it so far, and nothing else. A
sync of a directory makes durable the entries that were created, moved and removed in it so far, and nothing else.
Without a sync, each entry and each byte may or may not be there afterwards, in any combination. For example, a rename
may leave both the old and the new entry, a file may be empty, or it may have its length but contain only zeros. ext4,
XFS and Btrfs promise more than this. The metadata database keeps SQLite's promise: after a power cut it has the state
after some commit, but not one before the last durable commit.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from storage.data_dir.system import System
from tests.fakes.second_connection import second_connection
from tests.system.crash.durable_steps import kind_of_place
from tests.system.crash.workload import Request, RequestLog

Entry = tuple[Any, ...]
"""An entry of the recorded log: the name of a step and its arguments (`ReplayedDisk.follow` lists all kinds)."""


class RecordingSystem(System):
    """Performs every step, and records in order the steps below `data` and the announcements of requests. Some files
    are not written through this class, such as a copy of the database. Such a file is recorded completely when it is
    synced."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self.log: list[Entry] = []
        self._data = data
        self._files: dict[int, int] = {}  # the number of each recorded file, by inode
        self._synced: set[int] = set()  # the inodes of files outside `data` whose bytes are durable
        self._written: set[int] = set()  # the inodes of files whose writes are recorded
        self._made = 0  # the number of the newest recorded file
        self._lock = threading.RLock()

    def announce(self, kind: str, request: Request) -> None:
        """Adds an entry `announced` to the log: the request `request` has begun or ended (`RequestLog`)."""
        with self._lock:
            self.log.append(("announced", kind, request))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._data))

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        with self._lock:
            is_new = bool(flags & os.O_CREAT) and not path.exists()
            fd = super().open(path, flags, mode)
            inode = os.fstat(fd).st_ino
            if is_new:
                self._create(inode, self._name(path))
            elif flags & os.O_TRUNC:
                self.log.append(("truncate", self._files[inode], 0))
            return fd

    def _create(self, inode: int, name: str) -> None:
        self._made += 1
        self._files[inode] = self._made
        self._written.discard(inode)
        self.log.append(("create", name, self._made))

    def record_existing(self) -> None:
        """Records that everything below `data` is durable now."""
        for folder, folders, names in os.walk(self._data):
            here = Path(folder)
            for name in names:
                file = here / name
                if not _is_left_out(self._name(file)):
                    self._create(file.stat().st_ino, self._name(file))
                    self._record_whole_file(file.stat().st_ino, file)
            self.log += [("mkdir", self._name(here / name)) for name in folders]
            self.log.append(("sync directory", self._name(here)))

    def trust(self, folder: Path) -> None:
        """Treats the bytes of all files in `folder`, which is outside `data`, as durable."""
        self._synced.update(file.stat().st_ino for file in folder.rglob("*") if file.is_file())

    def _record_whole_file(self, inode: int, file: Path) -> None:
        """Records that the file was written with its current bytes and synced."""
        body = file.read_bytes()
        number = self._files[inode]
        self.log += [("truncate", number, 0), ("write", number, 0, body), ("sync", number)]

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        with self._lock:
            written_bytes = super().write(fd, chunks, offset)
            self._written.add(os.fstat(fd).st_ino)
            self.log.append(("write", self._files[os.fstat(fd).st_ino], offset, b"".join(chunks)[:written_bytes]))
            return written_bytes

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            super().truncate(fd, size)
            self.log.append(("truncate", self._files[os.fstat(fd).st_ino], size))

    def sync(self, fd: int) -> None:
        with self._lock:
            super().sync(fd)
            found, path = os.fstat(fd), Path(os.readlink(f"/proc/self/fd/{fd}"))
            if not path.is_relative_to(self._data) and found.st_ino not in self._files:
                self._synced.add(found.st_ino)  # a file outside `data`, which may be linked next
            elif stat.S_ISDIR(found.st_mode):
                self.log.append(("sync directory", self._name(path)))
            elif found.st_ino in self._written:
                self.log.append(("sync", self._files[found.st_ino]))
            else:
                if found.st_ino not in self._files:
                    self._create(found.st_ino, self._name(path))
                self._record_whole_file(found.st_ino, path)

    def link(self, fd: int, target: Path) -> None:
        with self._lock:
            super().link(fd, target)
            inode = os.stat(target).st_ino
            if inode in self._files:
                self.log.append(("link", self._name(target), self._files[inode]))
                return
            self._create(inode, self._name(target))
            self.log.append(("write", self._made, 0, target.read_bytes()))
            self._written.add(inode)
            if inode in self._synced:
                self.log.append(("sync", self._made))

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            is_same = target.exists() and target.samefile(source)
            super().rename(source, target)
            if not is_same:  # a rename of a file onto itself changes nothing
                self.log.append(("rename", self._name(source), self._name(target)))

    def unlink(self, path: Path) -> None:
        with self._lock:
            super().unlink(path)
            self.log.append(("unlink", self._name(path)))

    def mkdir(self, path: Path) -> None:
        with self._lock:
            super().mkdir(path)
            self.log.append(("mkdir", self._name(path)))

    def rmdir(self, path: Path) -> None:
        with self._lock:
            super().rmdir(path)
            self.log.append(("rmdir", self._name(path)))

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        with self._lock:
            super().commit(commit, durable=durable)
            self.log.append(("commit", self.snapshot(), durable))

    def snapshot(self) -> bytes:
        """Returns the bytes of the current metadata database, or no bytes if there is none."""
        if not (self._data / "entrepot.db").exists():
            return b""
        db = second_connection(self._data / "entrepot.db")
        try:
            return db.serialize("main")
        finally:
            db.close()


@dataclass
class ReplayedFile:
    """The bytes of a file: `durable_bytes` on the disk, and `visible_bytes` as seen by running processes."""

    durable_bytes: bytes = b""
    visible_bytes: bytes = b""

    def bytes_after_cut(self, rng: random.Random | None, *, zeros: bool) -> bytes:
        """Returns the bytes of the file after a power cut. With `rng`, they include a random part of the unsynced
        bytes. Without `rng`, they are only the synced bytes. With `zeros`, zeros follow up to the length that processes
        saw."""
        if rng is None:
            return self.durable_bytes.ljust(len(self.visible_bytes), b"\0") if zeros else self.durable_bytes
        all_bytes = self.durable_bytes + self.visible_bytes[len(self.durable_bytes) :]
        cut_bytes = all_bytes[: rng.randint(len(self.durable_bytes), max(len(all_bytes), len(self.durable_bytes)))]
        return rng.choice(
            (self.durable_bytes, self.visible_bytes, cut_bytes, cut_bytes.ljust(len(self.visible_bytes), b"\0"))
        )


@dataclass
class DiskAfterCut:
    """The content of a disk after a power cut. `how`: how it was computed. `names`: the bytes of each file, by name
    (None for a directory). `metadata`: the bytes of the database."""

    how: str
    names: dict[str, bytes | None]
    metadata: bytes

    def write_as_directory(self, root: Path) -> None:
        """Replaces `root` by a directory with the directories and files of this disk. `root` need not be a data
        directory: it may contain backups. So this method does not write `metadata`. A database below `root`, such as
        the copy in a backup, is one of the recorded files."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        self._make_names(root)

    def write_as_data_dir(self, data: Path) -> None:
        """Gives the prepared directory `data` the content of this disk."""
        for folder, _, names in os.walk(data):
            for name in names:
                if folder != str(data / "locks") and name != "reserve":
                    os.unlink(os.path.join(folder, name))
        for folder in os.listdir(data / "uploads"):
            os.rmdir(data / "uploads" / folder)
        (data / "entrepot.db").write_bytes(self.metadata)
        self._make_names(data)

    def _make_names(self, root: Path) -> None:
        for name in sorted(self.names):
            body = self.names[name]
            if body is None:
                (root / name).mkdir(exist_ok=True)
            else:
                (root / name).write_bytes(body)


@dataclass
class ReplayedDisk:
    """Replays the log of a `RecordingSystem`, and computes the disks that a power cut at this point could leave."""

    metadata: bytes
    not_durable: list[bytes] = field(default_factory=list)
    """The database after each commit since the last durable commit. A power cut may leave any of these states."""
    files: dict[int, ReplayedFile] = field(default_factory=dict)
    visible_names: dict[str, int] = field(default_factory=dict)
    """The number of the file behind each name, as running processes see the disk. 0: the name is that of a
    directory."""
    durable_names: dict[str, int] = field(default_factory=dict)
    """Like `visible_names`, but only the names that syncs of directories have made durable."""
    unsynced_names: list[tuple[str, int | None]] = field(default_factory=list)
    """Names that were added or removed since the last sync of their directory. None: the name was removed."""
    made_directories: set[str] = field(default_factory=set)
    """All directories that were ever made, including those that were removed."""
    request_log: RequestLog = field(default_factory=RequestLog)

    def follow(self, entry: Entry) -> None:
        """Applies the next entry of the log."""
        match entry:
            case ("announced", kind, request):
                self.request_log.note(kind, request)
            case ("create" | "link", name, number):
                self.files.setdefault(number, ReplayedFile())
                self._change_name(name, number)
            case ("mkdir", name):
                self.made_directories.add(name)
                self._change_name(name, 0)
            case ("write", number, offset, data):
                file = self.files[number]
                before, after = file.visible_bytes[:offset], file.visible_bytes[offset + len(data) :]
                file.visible_bytes = before.ljust(offset, b"\0") + data + after
            case ("truncate", number, size):
                self.files[number].visible_bytes = self.files[number].visible_bytes[:size]
            case ("sync", number):
                self.files[number].durable_bytes = self.files[number].visible_bytes
            case ("sync directory", folder):
                self._make_durable("" if folder == "." else folder)
            case ("rename", source, target):
                self._change_name(target, self.visible_names[source])
                self._change_name(source, None)
            case ("unlink", name) | ("rmdir", name):
                self._change_name(name, None)
            case ("commit", snapshot, True):
                self.metadata, self.not_durable = snapshot, []
            case ("commit", snapshot, False):
                self.not_durable.append(snapshot)
            case _:
                raise AssertionError(entry)

    def _change_name(self, name: str, number: int | None) -> None:
        """Makes `name` a name of the file with this number (0: of a directory), or removes it (None). Running processes
        see the change at once. It is durable after a sync of its directory."""
        self.unsynced_names.append((name, number))
        _change(self.visible_names, name, number)

    def _make_durable(self, folder: str) -> None:
        still_unsynced = []
        for name, number in self.unsynced_names:
            if os.path.dirname(name) == folder:
                _change(self.durable_names, name, number)
            else:
                still_unsynced.append((name, number))
        self.unsynced_names = still_unsynced

    def cuts(self, seed: int, mixtures: int) -> Iterator[DiskAfterCut]:
        """Returns disks that a power cut at this point could leave. The first has the least content. Two have all
        names, but only the synced bytes (followed by zeros on one of them). The others (`mixtures`) are random
        combinations."""
        latest = self.not_durable[-1] if self.not_durable else self.metadata
        yield self._disk_after_cut("least", self.durable_names, self.metadata, None, zeros=False)
        yield self._disk_after_cut("names without bytes", self.visible_names, latest, None, zeros=False)
        yield self._disk_after_cut("names with zeros", self.visible_names, self.metadata, None, zeros=True)
        for mixture in range(mixtures):
            rng = random.Random(f"{seed} {mixture}")
            names = dict(self.durable_names)
            for name, number in self.unsynced_names:
                if rng.random() < 0.6:
                    _change(names, name, number)
            metadata = rng.choice([self.metadata, *self.not_durable])
            yield self._disk_after_cut(f"mixture {mixture}", names, metadata, rng, zeros=False)

    def _disk_after_cut(
        self, how: str, names: dict[str, int], metadata: bytes, rng: random.Random | None, *, zeros: bool
    ) -> DiskAfterCut:
        """Returns the disk with these names and this database. `rng`, `zeros`: which bytes the files have, as in
        `ReplayedFile.bytes_after_cut`."""
        bytes_of = {number: file.bytes_after_cut(rng, zeros=zeros) for number, file in self.files.items()}
        kept = {name: bytes_of[number] if number else None for name, number in names.items()}
        missing = self.made_directories.difference(kept)
        if missing:  # the content of a missing directory is missing as well
            kept = {name: body for name, body in kept.items() if missing.isdisjoint(_directories_of(name))}
        return DiskAfterCut(how, kept, metadata)


@cache
def _directories_of(name: str) -> tuple[str, ...]:
    """Returns all directories above this name."""
    return tuple(str(folder) for folder in Path(name).parents[:-1])


def kinds_of(log: Sequence[Entry]) -> list[Hashable]:
    """Returns the kind of each entry of a log. Two entries are of the same kind if they are the same step with the same
    kind of file in the same kind of request. For a commit, it counts whether it is durable."""
    kinds, kind_of_file, request_kind = list[Hashable](), dict[int, Hashable](), None
    object_kind: Hashable
    for entry in log:
        match entry:
            case ("announced", event, request):
                # A request `right` is one of several changes of accounts and rights. Its second word names the change.
                request_kind = tuple(request[: 2 if request[0] == "right" else 1]) if event == "begin" else None
                object_kind = event
            case ("commit", _, durable):
                object_kind = durable
            case ("create" | "link", name, number):
                object_kind = kind_of_file[number] = kind_of_place(Path(name), Path())
            case (_, str(name), *_):
                object_kind = kind_of_place(Path(name), Path())
            case (_, number, *_):
                object_kind = kind_of_file[number]
            case _:
                raise AssertionError(entry)
        kinds.append((request_kind, entry[0], object_kind))
    return kinds


def _is_left_out(name: str) -> bool:
    """Returns whether a file of a data directory is left out of the replayed disk."""
    return name.startswith(("locks/", "entrepot.db")) or name == "reserve"


def _change(names: dict[str, int], name: str, number: int | None) -> None:
    """Makes one change in `names`, as `ReplayedDisk._change_name` describes it."""
    if number is None:
        names.pop(name, None)
    else:
        names[name] = number
