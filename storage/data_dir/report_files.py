"""Files through which each process of a server reports its state to other processes (`ReportFile`).

Each process has a file of its own, and keeps it locked. The kernel releases the lock when the process ends, even if it
is killed. Readers ignore unlocked files, because their processes have ended.

A process writes each report over its previous report, because most file systems allow this even on a full disk. Each
report has a checksum. If the checksum is wrong, the report is half-written, and the reader reads the file again. The
files are not synced, because nobody needs the reports after a power cut.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from storage.data_dir.layout import Layout
from storage.data_dir.locks import lock_flock, try_flock, unlock_flock
from storage.data_dir.system import DISK_FULL_ERRNOS, System

MAX_REPORT_BYTES: Final = 64 * 1024 - 8
"""Largest size of a report. A report with its header has at most 64 KiB."""
_INITIAL_FILE_BYTES: Final = 16 * 1024
"""Disk space that is allocated for a new file. A longer report needs more space, which a full disk may not have."""
_HEADER_BYTES: Final = 8
"""Size of the header at the start of the file: the length of the report and its checksum, 4 bytes each."""
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags to open a file that another user may have created. The call must not block at a pipe, and must not follow a
symbolic link."""
_READ_ATTEMPTS: Final = 5
"""A reader tries this many times to read a report that is being written."""
_ABANDONED_SECONDS: Final = 60.0
"""An unlocked file is deleted if it was last written longer ago than this. A newer file may belong to a process that
has not locked it yet."""


class ReportFile:
    """The file of this process. Only one thread at a time may use it."""

    def __init__(self, directory: Path, system: System, *, is_in_memory: bool = False) -> None:
        """Deletes the files of ended processes in `directory`, and creates a file for this process. Creates `directory`
        if it is missing. Raises OSError, for example on a full disk.

        `is_in_memory`: whether `directory` is the directory in memory that `open_report_file` uses on a full disk.
        Because any user can create this directory, PermissionError is raised if it belongs to another user, or if other
        users may write in it. The last process that closes its file deletes the directory."""
        with suppress(FileExistsError):
            system.mkdir(directory)
        if is_in_memory:
            _ensure_own(directory)
        _delete_abandoned(directory, system)
        self._system = system
        self._is_in_memory = is_in_memory
        self._path = directory / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._fd = system.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            # This call may have to wait a moment. When another process checks whether the file is locked
            # (`_is_locked`), that process itself locks the file for a moment.
            lock_flock(self._fd)
            system.allocate(self._fd, _INITIAL_FILE_BYTES)
        except OSError:
            self.close()
            raise

    def write(self, report: bytes) -> None:
        """Replaces the report. Raises ValueError if `report` is longer than `MAX_REPORT_BYTES`. Raises OSError if it
        cannot be written completely, for example on a full disk; readers may then get no report of this process until
        `write` succeeds."""
        if len(report) > MAX_REPORT_BYTES:
            raise ValueError(f"the report has {len(report)} bytes; {MAX_REPORT_BYTES} are allowed")
        header = len(report).to_bytes(4, "big") + zlib.crc32(report).to_bytes(4, "big")
        if self._system.write(self._fd, [header + report], 0) < len(header) + len(report):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Closes the file and deletes it, if it still exists."""
        with suppress(OSError):
            self._system.unlink(self._path)
        if self._is_in_memory:
            with suppress(OSError):  # other processes have files in the directory
                self._system.rmdir(self._path.parent)
        os.close(self._fd)


def open_report_file(layout: Layout, system: System) -> ReportFile:
    """Creates the file of this process in the data directory. If the disk is full, creates it in memory instead. Raises
    OSError."""
    try:
        return ReportFile(layout.workers, system)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
    return ReportFile(layout.workers_in_memory, system, is_in_memory=True)


def read_all_reports(layout: Layout) -> list[bytes]:
    """Returns the last report of each running process that serves the data directory, in no particular order. Raises
    OSError."""
    reports = read_reports_in(layout.workers)
    with suppress(OSError):
        # Any user may have created this directory, because all users may write in its parent.
        if layout.workers_in_memory.lstat().st_uid in (layout.root.stat().st_uid, os.geteuid()):
            reports += read_reports_in(layout.workers_in_memory)
    return reports


def read_reports_in(directory: Path) -> list[bytes]:
    """Returns the last report of each running process that has a file in `directory`, in no particular order. Returns
    an empty list if `directory` does not exist. Raises OSError if the directory cannot be read."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    reports = []
    for name in names:
        with suppress(OSError):  # the process has just ended
            fd = os.open(directory / name, _READ_FLAGS)
            try:
                if _is_locked(fd) and (report := _read(fd)) is not None:
                    reports.append(report)
            finally:
                os.close(fd)
    return reports


def _read(fd: int) -> bytes | None:
    """Returns the report in the file. Returns None if `_READ_ATTEMPTS` attempts find no complete report."""
    for _ in range(_READ_ATTEMPTS):
        data = os.pread(fd, _HEADER_BYTES + MAX_REPORT_BYTES, 0)
        length, checksum = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        report = data[_HEADER_BYTES : _HEADER_BYTES + length]
        if length and len(report) == length and zlib.crc32(report) == checksum:
            return report
        time.sleep(0.001)
    return None


def _is_locked(fd: int) -> bool:
    """Returns whether another process holds the file's lock. `fd`: a descriptor that does not hold the lock."""
    if not try_flock(fd, shared=True):
        return True
    unlock_flock(fd)
    return False


def _ensure_own(directory: Path) -> None:
    """Raises PermissionError unless `directory` is a directory of this user in which no other user may write."""
    status = directory.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "the path is not a directory of this user, or other users may write in it; remove it"
        raise PermissionError(errno.EPERM, reason, str(directory))


def _delete_abandoned(directory: Path, system: System) -> None:
    """Deletes the files of processes that have ended."""
    for name in os.listdir(directory):
        path = directory / name
        with suppress(OSError):
            fd = os.open(path, _READ_FLAGS)
            try:
                is_old = time.time() - os.fstat(fd).st_mtime > _ABANDONED_SECONDS
                if is_old and not _is_locked(fd):
                    system.unlink(path)
            finally:
                os.close(fd)
