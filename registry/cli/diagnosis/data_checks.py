"""Checks of `entrepot doctor` on the data directory: its owner, its file system, its space, and the database."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from registry.cli.data_owner import may_write_as_group, server_user
from registry.cli.diagnosis.finding import CHECK_SECONDS, Check, Finding, in_thread, ok, problem, user_name, warning
from registry.cli.output import human_size
from registry.config import Settings
from registry.status.readiness import write_problem
from registry.upkeep.budgets import min_free_space
from storage.composition import check_version, has_data, layout_of
from storage.data_dir.check import (
    DataDirectoryError,
    NewerRegistry,
    NoRegistry,
    OlderRegistry,
    RestoreNotEnded,
    ensure_usable,
    file_system_type,
    read_only_reason,
)
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System

_MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
"""The types of file systems whose content is only in memory."""
_CONTAINER_FILE_SYSTEMS: Final = frozenset({"overlay", "aufs"})
"""The types of file systems that a container has for its own layer."""
SLOW_SYNC_SECONDS: Final = 0.1
"""If a sync takes longer than this, there is a warning, because pushes are noticeably slow."""
_SYNC_COUNT: Final = 5
"""How many syncs are measured."""
_FEW_INODES_FRACTION: Final = 0.02
"""If less than this fraction of the inodes is free, there is a warning."""
_FULL_FRACTION: Final = 0.05
"""If neither `disk.min_free` nor `disk.min_free_percent` is set, there is a warning when less than this fraction of the
disk is free."""


def data_checks(settings: Settings) -> dict[str, Check]:
    """Returns the checks by name. The checks create temporary files in the data directory and remove them at once. They
    change nothing else. Call `registry.cli.data_owner.become_owner` first."""
    checks: dict[str, Callable[[Settings], Sequence[Finding]]] = {
        "data directory": _check_directory,
        "disk": _check_space,
        "sync": _check_sync,
        "locks": _check_locks,
        "database": _check_database,
    }
    return {name: _async_check(check, settings) for name, check in checks.items()}


def _async_check(check: Callable[[Settings], Sequence[Finding]], settings: Settings) -> Check:
    """Returns a check that runs the blocking function `check` in a thread. If there is no data directory, only
    `_check_directory` runs; other checks return no findings."""

    def run_blocking() -> Sequence[Finding]:
        if check is not _check_directory and not _is_directory(settings.data):
            return []  # `_check_directory` has a finding about this
        return check(settings)

    async def run() -> Sequence[Finding]:
        return await in_thread(run_blocking)

    return run


def _is_directory(data: Path) -> bool:
    try:
        return data.is_dir()
    except OSError:
        return False


def disk_responds(data: Path, seconds: float = CHECK_SECONDS) -> bool:
    """Returns whether the disk of the path `data` responds to a system call within `seconds`. If the disk does not
    respond, a daemon thread continues to wait for it after the return."""
    thread = threading.Thread(target=lambda: os.access(data, os.F_OK), daemon=True, name="check")
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _check_directory(settings: Settings) -> list[Finding]:
    """Checks that the directory exists, belongs to the right user, and lies on a suitable file system."""
    name, data = "data directory", settings.data.absolute()
    try:
        mode = data.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        parent = next((path for path in data.parents if path.exists()), Path("/"))
        if not os.access(parent, os.W_OK):
            step = f"make the directory as root, and give it to the user of the server: mkdir -p {data}; chown … {data}"
            return [problem(name, f"there is no {data}, and {parent} cannot be written", "", step)]
        step = "start the server, which makes the directory, or name the right one with --data or --config"
        return [warning(name, f"there is no {data}", "", step)]
    except OSError as error:
        why = "if this user runs the server, the server cannot use the directory"
        step = "run the command as root or as the user of the server, or name the right directory with --data"
        return [problem(name, f"{data} cannot be accessed: {error.strerror}", why, step)]
    if not stat.S_ISDIR(mode):
        return [problem(name, f"{data} is not a directory", "", "name a directory with --data")]
    return [*_check_owner(name, data), *_check_file_system(name, data)] or [ok(name, f"{data} can be used")]


def _check_owner(name: str, data: Path) -> Iterator[Finding]:
    """Yields findings about the owners of the directory and of its files, and about the rights of other users."""
    status = data.stat()
    user = os.geteuid()
    server_uid, _ = server_user(data)
    if user not in (server_uid, 0):
        what = f"{data} belongs to {user_name(server_uid)}, and this command runs as {user_name(user)}"
        sudo_user = user_name(server_uid).replace("uid ", r"\#")
        yield problem(name, what, "", f"run the command as that user: sudo -u {sudo_user} entrepot doctor …")
    else:
        yield from _check_files(name, data, status.st_uid, server_uid)
    if status.st_mode & stat.S_IWOTH:
        why = "every user of this machine can delete or replace content"
        step = f"chmod o-w {data}"
        if server_uid != status.st_uid and not may_write_as_group(status):
            # The server may write to the directory only because everybody may. So the server must own the directory
            # before `chmod o-w`.
            step = f"chown {server_uid} {data} && {step}"
        yield problem(name, f"everybody may write to {data}", why, step)
    database = layout_of(data).metadata
    with suppress(OSError):  # there is no database, or this user may not access it
        if status.st_mode & stat.S_IXOTH and database.stat().st_mode & stat.S_IROTH:
            why = "the database has the hashes of passwords and the keys that sign tokens"
            path = data if server_uid == status.st_uid else database
            yield warning(name, f"every user of this machine can read {database}", why, f"chmod o-rwx {path}")


def _check_files(name: str, data: Path, directory_owner: int, server_uid: int) -> Iterator[Finding]:
    """Yields a finding about the first file that the server, which runs as the user `server_uid`, cannot change."""
    for path in _often_changed_files(data):
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_uid == server_uid or (server_uid != directory_owner and _may_read_and_change(path, status)):
            continue
        what = f"{path} belongs to {user_name(status.st_uid)}, and the directory to {user_name(directory_owner)}"
        why = "the server, which runs as the owner of the directory, cannot change this file"
        step = f"chown -R --reference={data} {data}"
        if server_uid != directory_owner:
            # The step above would give the file to `directory_owner`, and the server still could not change it.
            what = f"{path} belongs to {user_name(status.st_uid)}, and the server runs as {user_name(server_uid)}"
            why, step = "the server cannot change this file", f"chown -R {server_uid} {data}"
        yield problem(name, what, why, step)
        return


def _may_read_and_change(path: Path, status: os.stat_result) -> bool:
    """Returns whether this process may read and change the file or directory `path`. Changing a directory includes
    creating files there."""
    return os.access(path, os.R_OK | os.W_OK | (os.X_OK if stat.S_ISDIR(status.st_mode) else 0))


def _often_changed_files(data: Path) -> Iterator[Path]:
    """Yields the files and directories that the server changes most. If one of these has the wrong owner, the server
    cannot work."""
    layout = layout_of(data)
    for suffix in ("", "-wal", "-shm"):
        yield layout.metadata.with_name(layout.metadata.name + suffix)
    yield from (layout.reserve, layout.locks, layout.uploads, layout.partials, layout.trash, data / "blobs")
    yield from layout.lock_files()


def _check_file_system(name: str, data: Path) -> Iterator[Finding]:
    """Yields a finding in each of these cases:

    - The content of the file system is lost when the machine restarts, or when the container is removed.
    - The server does not start on this file system."""
    kind = file_system_type(data)
    if kind in _MEMORY_FILE_SYSTEMS:
        why = "all content is gone after a restart of the machine"
        yield warning(name, f"{data} lies in memory ({kind})", why, "use a directory on a disk, with --data")
    elif kind in _CONTAINER_FILE_SYSTEMS:
        why = "all content is gone when the container is removed, and writing is slow"
        yield warning(name, f"{data} lies in the layer of a container ({kind})", why, "mount a volume there")
    try:
        ensure_usable(data)
    except (DataDirectoryError, OSError) as error:
        yield problem(name, str(error), "", "solve this problem; until then, the server does not start")


def _check_space(settings: Settings) -> list[Finding]:
    """Checks that the disk has enough free inodes, room for new content, and as much free space as the settings in
    `[disk]` require. If these settings are not set, warns when less than `_FULL_FRACTION` of the disk is free."""
    name, data = "disk", settings.data.absolute()
    space = os.statvfs(data)
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    step = (
        "free some space: entrepot cache evict --to SIZE, entrepot retention apply, entrepot gc, or delete other files"
    )
    findings: list[Finding] = []
    if space.f_files and space.f_favail < space.f_files * _FEW_INODES_FRACTION:
        what = f"{data} has {space.f_favail} inodes left, of {space.f_files}"
        findings.append(warning(name, what, "each blob needs one inode, whatever its size", step))
    # `Reserve` keeps some disk space allocated, so that content can be deleted when the disk is full. `low_disk_reason`
    # returns a text if less space is free than the settings in [disk] require. `disk_full_reason` returns a text if
    # there is no room for new content.
    try:
        with closing(Reserve(layout_of(data).reserve, System(), min_free_space(settings))) as reserve:
            reason = reserve.low_disk_reason() or (reserve.disk_full_reason() if has_data(data) else None)
    except OSError:
        if write_problem(data) is None:
            raise
        return findings  # `_check_sync` has a finding about this
    if reason is not None:
        return [
            *findings,
            problem(name, f"{data}: {reason}", f"{human_size(free)} of {human_size(size)} are free", step),
        ]
    if free < size * _FULL_FRACTION and min_free_space(settings) is None:
        what = f"{human_size(free)} of {human_size(size)} are free at {data}"
        findings.append(
            warning(name, what, "", f"{step}; and set [disk] min_free, so that pushes stop before the disk is full")
        )
    return findings or [ok(name, f"{human_size(free)} of {human_size(size)} are free at {data}")]


def _check_sync(settings: Settings) -> list[Finding]:
    """Checks that a file can be written and synced, and that a sync is fast."""
    name, data = "sync", settings.data.absolute()
    if (reason := write_problem(data)) is not None:
        step = "look for disk errors in the log of the kernel (dmesg), and check the owner and the mount options"
        return [problem(name, reason, "clients cannot push, and mirrors cannot store content", step)]
    times = []
    with tempfile.TemporaryFile(dir=data, buffering=0) as file:
        for _ in range(_SYNC_COUNT):
            start = time.monotonic()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.monotonic() - start)
    median = sorted(times)[_SYNC_COUNT // 2]
    if median > SLOW_SYNC_SECONDS:
        why = "each push waits for several syncs, and all pushes wait for each other"
        step = "use a local disk, best an SSD; look for other programs that write much"
        return [warning(name, f"a sync of a small file takes {median * 1000:.0f} ms", why, step)]
    return [ok(name, f"a sync of a small file takes {median * 1000:.1f} ms")]


def _check_locks(settings: Settings) -> list[Finding]:
    """Checks that a lock on a file excludes a second lock on the same file. Every change of the store relies on
    this."""
    name, data = "locks", settings.data.absolute()
    step = "use a local file system for the data directory"
    try:
        with tempfile.NamedTemporaryFile(dir=data) as first_file, open(first_file.name, "rb") as second_file:
            fcntl.flock(first_file, fcntl.LOCK_EX)
            try:
                fcntl.flock(second_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return [ok(name, "locks between processes work")]
    except OSError as error:
        if write_problem(data) is not None:
            return []  # `_check_sync` has a finding about this
        return [problem(name, f"locks do not work at {data}: {error.strerror}", "", step)]
    return [problem(name, f"{data} gives the same lock twice", "two workers would destroy each other's changes", step)]


def _check_database(settings: Settings) -> list[Finding]:
    """Checks that the database opens and has the tables of this version."""
    name = "database"
    try:
        check_version(settings.data)
    except RestoreNotEnded:
        return []  # `_check_directory` has a finding about this
    except NoRegistry as error:
        step = "start the server, which makes the database; if the server has run before, correct the setting `data`"
        return [warning(name, str(error), "", step)]
    except (OlderRegistry, NewerRegistry) as error:
        is_older = isinstance(error, OlderRegistry)
        step = "run `entrepot serve` of this version once" if is_older else "use that version of entrepot"
        return [problem(name, str(error), "the database has the tables of another version", step)]
    except DataDirectoryError as error:
        if read_only_reason(settings.data) is not None:
            return []  # `_check_sync` has a finding about this
        database = layout_of(settings.data).metadata
        log_files = [database.with_name(database.name + suffix) for suffix in ("-wal", "-shm")]
        for path in (settings.data, database, *log_files):
            if path.exists() and not _may_read_and_change(path, path.stat()):
                step = "run the command as root or as the user of the server"
                if path in log_files:  # the command may run as the user of the server already
                    step = f"give the file to the user of the server: chown … {path}"
                return [problem(name, str(error), f"this user may not read and change {path}", step)]
        step = (
            "stop the server and restore a backup (entrepot restore), or ask for help with the output of this command"
        )
        return [problem(name, str(error), "the file is damaged", step)]
    return [ok(name, "the database opens, and has the tables of this version")]
