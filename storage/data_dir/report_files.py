"""Files in which the processes of a server report what they do, for other processes (`ReportFile`).

Each process has a file of its own, and keeps it locked. The kernel releases the lock when the process ends, even if it
is killed. `read_reports_in` ignores unlocked files, because their processes have ended.

A report overwrites the previous one at the same place on the disk, which works on most file systems even if the disk is
full. If a reader gets a half-written report, the checksum is wrong, and the reader reads again. The files are not
synced, because the reports are useless after a power cut.
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
from storage.data_dir.locks import lock_file, try_lock_file, unlock_file
from storage.data_dir.system import DISK_FULL_ERRNOS, System

MAX_REPORT_BYTES: Final = 64 * 1024 - 8
"""Largest size of a report. The report and its header together have at most 64 KiB."""
_FILE_BYTES: Final = 16 * 1024
"""Disk space that is allocated for a new file. A longer report needs more space, which a full disk may not have."""
_HEADER_BYTES: Final = 8
"""Size of the header, which comes before the report: the length and the checksum of the report, 4 bytes each."""
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags to open a file that another user may have created. It may be a pipe, which must not block, or a symbolic link,
which must not be followed."""
_READ_ATTEMPTS: Final = 5
"""Largest number of attempts to read a report that is being written."""
_ABANDONED_SECONDS: Final = 60.0
"""An unlocked file is deleted if it is older than this. The process of a younger file may not have locked it yet."""


class ReportFile:
    """The file of this process. Not for use in several threads at a time."""

    def __init__(self, directory: Path, system: System, *, is_in_memory: bool = False) -> None:
        """Creates the file, and deletes the files of processes that have ended. Creates `directory` if it is missing.
        Raises OSError, for example on a full disk.

        `is_in_memory`: whether `directory` is the directory in memory that `open_report_file` uses on a full disk. The
        last process that closes its file also deletes this directory. Another user may have created it, so this method
        raises PermissionError if it does not belong to this user, or if other users may write in it."""
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
            lock_file(self._fd)  # waits while `_is_locked` in another process holds a lock
            system.allocate(self._fd, _FILE_BYTES)
        except OSError:
            self.close()
            raise

    def write(self, report: bytes) -> None:
        """Replaces the report. Raises ValueError if the report is longer than `MAX_REPORT_BYTES`. Raises OSError if the
        report cannot be written completely, for example on a full disk. If a part of the report was written, readers
        see no report of this process until the next `write`."""
        if len(report) > MAX_REPORT_BYTES:
            raise ValueError(f"the report has {len(report)} bytes; {MAX_REPORT_BYTES} are allowed")
        header = len(report).to_bytes(4, "big") + zlib.crc32(report).to_bytes(4, "big")
        if self._system.write(self._fd, [header + report], 0) < len(header) + len(report):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Deletes and closes the file. Raises nothing if the file was deleted before."""
        with suppress(OSError):
            self._system.unlink(self._path)
        if self._is_in_memory:
            with suppress(OSError):  # other processes have files in the directory
                self._system.rmdir(self._path.parent)
        os.close(self._fd)


def open_report_file(layout: Layout, system: System) -> ReportFile:
    """Creates the file of this process in the data directory, or in memory if the disk is too full for it. Raises
    OSError."""
    try:
        return ReportFile(layout.workers, system)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
    return ReportFile(layout.workers_in_memory, system, is_in_memory=True)


def read_all_reports(layout: Layout) -> list[bytes]:
    """Returns the last report of each process that serves the data directory, in no particular order. Raises
    OSError."""
    reports = read_reports_in(layout.workers)
    with suppress(OSError):
        # Any user may have created this directory, because all users may write in its parent.
        if layout.workers_in_memory.lstat().st_uid in (layout.root.stat().st_uid, os.geteuid()):
            reports += read_reports_in(layout.workers_in_memory)
    return reports


def read_reports_in(directory: Path) -> list[bytes]:
    """Returns the last report of each running process that has a file in `directory`, in no particular order. Returns
    an empty list if `directory` does not exist. Raises OSError if it cannot be read."""
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
    """Returns the report in the file. Returns None if the file has no report yet, or if `_READ_ATTEMPTS` attempts find
    no complete report."""
    for _ in range(_READ_ATTEMPTS):
        data = os.pread(fd, _HEADER_BYTES + MAX_REPORT_BYTES, 0)
        length, checksum = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        report = data[_HEADER_BYTES : _HEADER_BYTES + length]
        if length and len(report) == length and zlib.crc32(report) == checksum:
            return report
        time.sleep(0.001)
    return None


def _is_locked(fd: int) -> bool:
    """Returns whether the file is locked, which means that its process is running. `fd` must not hold the lock."""
    if not try_lock_file(fd, shared=True):
        return True
    unlock_file(fd)
    return False


def _ensure_own(directory: Path) -> None:
    """Raises PermissionError if the path is not a directory of this user, or if other users may write in it."""
    status = directory.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "not a directory of this user, or other users may write in it; remove it"
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
