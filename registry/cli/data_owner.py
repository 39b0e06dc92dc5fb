"""Root, at work on a data directory that belongs to somebody else, becomes that somebody first.

Otherwise the files it makes there could not be read, renamed or removed by the server that runs as the owner.

The data directory of a command that works beside a running server, or before there is one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from registry.cli.options import fail
from registry.config import Settings

_CAP_DAC_READ_SEARCH = 1 << 2
_CAPABILITY_VERSION = 0x20080522
_PR_SET_KEEPCAPS = 8


class OwnerError(Exception):
    """Root may not become the data directory's owner; the text is one line for a person."""


def become_owner(data: Path) -> None:
    """Gives up root for the owner and group of `data`, for good, with no group beside them. Does nothing when this is
    not root, or `data` is root's or does not exist yet. Call it while there is one thread. Raises OwnerError."""
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
            f"{data} belongs to uid {status.st_uid}, and this process may not become that user ({error.strerror}); "
            "run it as that user"
        ) from None


def _become(uid: int, gid: int, *, keep_reading: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if keep_reading:
        _checked(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if keep_reading:
        # Python loads modules late, and root's Python may lie where only root can look (its home): this
        # one capability stays, to read; it makes and changes no file.
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        sets = (ctypes.c_uint32 * 6)(_CAP_DAC_READ_SEARCH, _CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
        _checked(libc.capset(header, sets))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _can_read_program(uid: int, gid: int) -> bool:
    """Whether that user can read this program's modules. Asked of a child that is that user: only the kernel knows."""
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


def prepare_data_directory(settings: Settings, *, make: bool) -> None:
    """A data directory of this version, made where `make` says so and there is none. A server that runs on an older one
    is not disturbed."""
    from storage.composition import check_version, has_data, prepare_data_dir

    if make and not has_data(settings.data):
        become_owner(settings.data)
        prepare_data_dir(settings.data)
        return
    if not settings.data.is_dir():
        fail(f"there is no data directory at {settings.data.absolute()}; name it with --data")
    become_owner(settings.data)
    check_version(settings.data)
