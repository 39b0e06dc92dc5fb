"""Prepares and opens the data directory for a command. A server may use the directory at the same time.

If root starts a command and another user runs the server, the command's process first becomes the server's user: the
server could not read, rename or remove files that belong to root.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from registry.cli.interrupts import INTERRUPTED, run_interruptible
from registry.config import Settings

if TYPE_CHECKING:
    from registry.backend import Backend
    from storage.content import Actor

T = TypeVar("T")
_CAP_DAC_READ_SEARCH = 1 << 2
"""The bit of the capability to read every file and search every directory (capabilities(7))."""
_CAPABILITY_VERSION = 0x20080522
"""`_LINUX_CAPABILITY_VERSION_3` of capset(2)."""
_PR_SET_KEEPCAPS = 8
"""The operation of prctl(2) after which the process keeps its capabilities when it changes from root to another
user."""

_operator_name: str | None = None
"""The name of the user who started the command. None until `become_owner` tries to switch this process to another
user."""


class OwnerError(Exception):
    """The kernel does not let this process become the server's user. The error's text is one line for people."""


def server_user(data: Path) -> tuple[int, int]:
    """Returns the uid and the gid with which a server uses the data directory `data`. Raises OSError. The first case
    that applies decides:

    - `data` does not belong to the user of this process. The user of this process is not root, and may write to
      `data`. The user of this process owns the database, or there is no database. If all of this is true, returns the
      uid and the gid of this process.
    - Root owns `data`, `data` contains a database, and all users or the group of `data` may write to `data`, as on a
      Kubernetes volume (`fsGroup`). Returns the uid of the database. If all users may write to `data`, returns the gid
      of the database, otherwise the gid of `data`.
    - In all other cases, returns the uid and the gid of `data`."""
    from storage.composition import layout_of

    directory = data.stat()
    database: os.stat_result | None = None
    with suppress(OSError):  # for example, `data` is a file; later checks report this
        # `lstat` returns the owner of a symbolic link, not of its target. So a user who may write to the directory
        # cannot choose the server's user with a link to another user's file.
        database = layout_of(data).metadata.lstat()
    all_may_write = bool(directory.st_mode & stat.S_IWOTH)
    user = os.geteuid()
    is_own = database is None or database.st_uid == user
    if is_own and user not in (0, directory.st_uid) and (all_may_write or may_write_as_group(directory)):
        return user, os.getegid()
    if directory.st_uid == 0 and database is not None and (all_may_write or directory.st_mode & stat.S_IWGRP):
        return database.st_uid, database.st_gid if all_may_write else directory.st_gid
    return directory.st_uid, directory.st_gid


def may_write_as_group(directory: os.stat_result) -> bool:
    """Returns whether this process is in the group of a directory, and the group may write to the directory."""
    return bool(directory.st_mode & stat.S_IWGRP) and directory.st_gid in {os.getegid(), *os.getgroups()}


def become_owner(data: Path) -> None:
    """Permanently switches this process from root to the user and group with which a server uses the directory `data`
    (`server_user`). The process leaves all other groups.

    Does nothing if the process is not root, if the server's user is root, or if `data` does not exist. Must be called
    while the process has only one thread, because capset(2) changes only the calling thread. If the kernel refuses the
    switch, as in some containers, and `data` does not belong to root, raises OwnerError. If `data` belongs to root, the
    process stays root."""
    if os.geteuid() != 0 or not os.path.exists(data):  # in contrast to `Path.exists`, this raises nothing
        return
    uid, gid = server_user(data)
    if uid == 0:
        return
    keep_read_access = not _can_read_program(uid, gid)
    global _operator_name
    _operator_name = _user_name()  # read before the switch: SUDO_USER counts only while the process is root
    try:
        _switch_user(uid, gid, keep_read_access=keep_read_access)
    except OSError as error:
        if data.stat().st_uid == 0:
            return
        raise OwnerError(
            f"{data} belongs to the user with uid {uid}, and this process may not become that user "
            f"({error.strerror}); run the command as that user"
        ) from None


def operator_actor() -> Actor:
    """Returns the actor of this command for the audit log, the history of tags and the jobs. The actor's name is `cli:`
    and the name of the user who started the command: the process's user or, for root under sudo, the user who called
    sudo. If that user has no name, the uid replaces it. The result is the same before and after `become_owner`."""
    from storage.content import Actor

    return Actor(name=f"cli:{_operator_name or _user_name()}")


def _user_name() -> str:
    """Returns the name of this process's user, or the uid of a user without a name. If the process is root under sudo,
    returns the name of the user who called sudo."""
    import pwd

    user = os.environ.get("SUDO_USER") if os.getuid() == 0 else None
    if user:
        return user
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _switch_user(uid: int, gid: int, *, keep_read_access: bool) -> None:
    """Switches this process to the user `uid` and the group `gid`. With `keep_read_access`, the process keeps root's
    right to read all files. Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if keep_read_access:
        _raise_on_error(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if keep_read_access:
        # The command imports modules later, and Python may be installed where only root can read, such as in /root.
        # This capability allows the process to read all files, but not to create or change them.
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)  # 0: this process
        # The lower 32 bits of the effective, permitted and inheritable capabilities, then the upper 32 bits of each.
        capability_sets = (ctypes.c_uint32 * 6)(_CAP_DAC_READ_SEARCH, _CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
        _raise_on_error(libc.capset(header, capability_sets))


def _raise_on_error(result: int) -> None:
    """Raises OSError if `result`, which a function of the C library returned, is not 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _can_read_program(uid: int, gid: int) -> bool:
    """Returns whether the user can read the directories from which Python imports modules. A child process becomes the
    user and asks the kernel, because permission bits do not show access control lists."""
    folders = [folder for folder in sys.path if os.path.isdir(folder)]
    child = os.fork()
    if child == 0:
        readable = False
        try:
            _switch_user(uid, gid, keep_read_access=False)
            readable = all(os.access(folder, os.R_OK | os.X_OK) for folder in folders)
        finally:
            os._exit(0 if readable else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def prepare_data_directory(settings: Settings, *, create_if_missing: bool) -> None:
    """Switches this process to the server's user (`become_owner`), and checks that this version of the program can use
    the data.

    With `create_if_missing`, creates the data directory if it does not exist or contains no registry yet. Never
    migrates data to a newer format, because a server may be using the data. Raises OwnerError if the kernel refuses the
    switch. Raises DataDirectoryError if there is no data directory, or if this version cannot use the data."""
    from storage.composition import check_version, has_data, prepare_data_dir
    from storage.data_dir.check import DataDirectoryError

    try:
        should_create = create_if_missing and not has_data(settings.data)
        is_directory = settings.data.is_dir()
    except OSError as error:  # for example, this user may not search a parent directory
        raise DataDirectoryError(
            f"the data directory {settings.data.absolute()} cannot be read: {error.strerror}; run the command as the "
            "user of the server, or name the right directory with --data"
        ) from None
    if should_create:
        become_owner(settings.data)
        prepare_data_dir(settings.data)
        return
    if not is_directory:
        raise DataDirectoryError(
            f"there is no data directory at {settings.data.absolute()}; name the right one with --data"
        )
    become_owner(settings.data)
    check_version(settings.data)


def run_on_backend(
    settings: Settings,
    work: Callable[[Backend], Awaitable[T]],
    *,
    create_if_missing: bool = False,
    interrupted_text: str = INTERRUPTED,
) -> T:
    """Calls `prepare_data_directory`, opens the *backend* (the store with the mirrors, see `registry.backend`), calls
    `work` with the backend, and returns the result of `work`. `interrupted_text`: what the command prints on stderr if
    SIGINT or SIGTERM ends it. Raises the errors of `prepare_data_directory` and of `work`, RegistryError, and
    OSError."""
    prepare_data_directory(settings, create_if_missing=create_if_missing)

    async def open_and_work() -> T:
        from registry.backend import open_backend

        async with open_backend(settings) as backend:
            return await work(backend)

    return run_interruptible(open_and_work(), interrupted_text)
