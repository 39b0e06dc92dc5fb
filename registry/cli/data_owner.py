"""Prepares the data directory for a command, which may run next to a server that uses the same directory.

A command that root starts on another user's data directory becomes that user first. Otherwise it would create files
there that the server, which runs as that user, cannot read, rename or remove.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from registry.config import Settings

_CAP_DAC_READ_SEARCH = 1 << 2
_CAPABILITY_VERSION = 0x20080522
_PR_SET_KEEPCAPS = 8


class OwnerError(Exception):
    """Root is not allowed to become the owner of the data directory. The message is one line for people."""


def become_owner(data: Path) -> None:
    """Switches this process from root to the owner and group of `data`, for good, and drops all other groups.

    Does nothing when the process is not root, or when `data` belongs to root or does not exist. Must be called while
    the process has one thread. Raises OwnerError."""
    if os.geteuid() != 0 or not data.exists():
        return
    status = data.stat()
    if status.st_uid == 0:
        return
    keep = not _can_read_program(status.st_uid, status.st_gid)
    try:
        _become(status.st_uid, status.st_gid, keep_reading=keep)
    except OSError as error:
        raise OwnerError(
            f"{data} belongs to the user with uid {status.st_uid}, and this process may not become that user "
            f"({error.strerror}); run the command as that user"
        ) from None


def _become(uid: int, gid: int, *, keep_reading: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if keep_reading:
        _checked(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if keep_reading:
        # Python imports modules late, and root's Python may be installed where only root can read, such as its home.
        # This one capability stays. It allows reading, and neither creates nor changes a file.
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        sets = (ctypes.c_uint32 * 6)(_CAP_DAC_READ_SEARCH, _CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
        _checked(libc.capset(header, sets))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _can_read_program(uid: int, gid: int) -> bool:
    """Returns whether that user can read this program's modules. A child process becomes the user and tries, since only
    the kernel knows all that decides about access."""
    folders = [folder for folder in sys.path if os.path.isdir(folder)]
    child = os.fork()
    if child == 0:
        readable = False
        try:
            _become(uid, gid, keep_reading=False)
            readable = all(os.access(folder, os.R_OK | os.X_OK) for folder in folders)
        finally:
            os._exit(0 if readable else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def prepare_data_directory(settings: Settings, *, create: bool) -> None:
    """Becomes the directory's owner and checks that this version can use what is in it.

    `create`: creates a data directory where there is none. An existing one is not migrated, since a server may be
    running on it. Raises DataDirectoryError and OwnerError."""
    from storage.composition import check_version, has_data, prepare_data_dir
    from storage.data_dir.check import DataDirectoryError

    if create and not has_data(settings.data):
        become_owner(settings.data)
        prepare_data_dir(settings.data)
        return
    if not settings.data.is_dir():
        raise DataDirectoryError(
            f"there is no data directory at {settings.data.absolute()}; name the right one with --data"
        )
    become_owner(settings.data)
    check_version(settings.data)
