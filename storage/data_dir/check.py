"""Checks whether the data directory can be used. The registry calls `ensure_usable` before it opens files in it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from storage.data_dir.layout import Layout
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import ALGORITHMS

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.glusterfs"}
)

_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
"""The form in which /proc/self/mountinfo writes space, tab, newline and backslash in a path (proc(5))."""


class DataDirectoryError(Exception):
    """The data directory cannot be used. The message says why and what to do, in one line."""


class NoRegistry(DataDirectoryError):
    """The data directory holds no registry yet."""


class RestoreNotEnded(DataDirectoryError):
    """A restore from a backup has begun in the data directory, and has not ended."""


class DatabaseMissing(DataDirectoryError):
    """The data directory has blob files, but no database."""


class OlderRegistry(DataDirectoryError):
    """An older version of this program wrote the data directory, and no server has migrated it yet."""


class NewerRegistry(DataDirectoryError):
    """A newer version of this program wrote the data directory."""


def file_system_type(path: Path, mountinfo: str | None = None) -> str:
    """Returns the type of the file system of `path`, such as `ext4`, or an empty string if the type is not known.
    `mountinfo`: the content of /proc/self/mountinfo (proc(5)); None: this function reads the file."""
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape") if mountinfo is None else mountinfo
    except OSError:
        return ""
    real_path = os.path.realpath(path)
    longest_mount, file_system = "", ""
    for line in text.splitlines():
        mount_part, _, file_system_part = line.partition(" - ")
        mount_fields, file_system_fields = mount_part.split(" "), file_system_part.split(" ")
        if len(mount_fields) < 5 or not file_system_fields[0]:  # the fifth field is the mount point
            continue
        mount = _OCTAL_ESCAPE.sub(lambda escape: chr(int(escape[1], 8)), mount_fields[4]).rstrip("/")
        # The longest mount point above the path counts. If several lines have this mount point, the last line counts,
        # because its mount hides the others.
        if (real_path == mount or real_path.startswith(mount + "/")) and len(mount) >= len(longest_mount):
            longest_mount, file_system = mount, file_system_fields[0]
    return file_system


def describe_error(error: OSError) -> str:
    """Returns the error's text, with advice to the user if the error means that the disk is full."""
    advice = (
        "; free some space there, or choose another data directory with --data"
        if error.errno in DISK_FULL_ERRNOS
        else ""
    )
    return f"{error.strerror}{advice}"


def find_separate_directories(root: Path) -> tuple[Path, Path] | None:
    """Checks whether files can be renamed between the directories below the data directory `root`. Pushes and garbage
    collection need such renames. A rename fails with EXDEV between different file systems, mounts, or subvolumes of
    btrfs.

    Returns two directories between which a rename fails, the directory of blob files first. Returns None if all renames
    work. In place of a missing directory, checks its nearest parent that exists. Ignores errors other than EXDEV."""
    layout = Layout(root)
    non_blob_directories = (layout.uploads, layout.partials, layout.trash, layout.quarantine)
    others = dict.fromkeys(_nearest_existing(directory) for directory in non_blob_directories)
    for blobs in dict.fromkeys(_nearest_existing(root / "blobs" / algorithm) for algorithm in ALGORITHMS):
        for other in others:
            if not _can_rename(blobs, other):
                return blobs, other
    return None


def _nearest_existing(directory: Path) -> Path:
    """Returns the directory; if it is missing, its nearest parent that exists."""
    while not os.path.exists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory


def _can_rename(source: Path, target: Path) -> bool:
    """Returns False if the rename of a file from the directory `source` to the directory `target` fails with EXDEV.
    Returns True if it succeeds or fails with another error, for example on a full disk."""
    name = f"tmp{os.urandom(8).hex()}"
    try:
        # No such file exists, but rename(2) first compares the mounts of the two directories.
        os.rename(source / name, target / name)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
    try:
        if os.stat(source).st_dev == os.stat(target).st_dev:
            return True
        # The directories are on the same mount, but on different devices, for example on two subvolumes of btrfs. Only
        # the rename of an existing file shows whether renames between them work.
        os.close(os.open(source / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            os.rename(source / name, target / name)
        finally:
            for directory in (source, target):
                with suppress(FileNotFoundError):
                    os.unlink(directory / name)
    except OSError as error:
        return error.errno != errno.EXDEV
    return True


def read_only_reason(root: Path) -> str | None:
    """Returns a sentence for the operator if the file system of the data directory is mounted read-only. Returns None
    if it is writable, or if its state cannot be read."""
    with suppress(OSError):
        if os.statvfs(root).f_flag & os.ST_RDONLY:
            return (
                f"cannot write to the data directory {root}: Read-only file system; it was mounted read-only, or the "
                "system has made it read-only after errors of the disk. To save the content, copy the directory to "
                "another disk with `cp -a`, and name the copy with --data"
            )
    return None


def check_restore_ended(layout: Layout, root: Path) -> None:
    """Raises RestoreNotEnded if a restore from a backup has begun and not ended. `root`: the path of the data
    directory, as the message shows it."""
    if layout.restore_marker.exists():
        raise RestoreNotEnded(
            f"a restore from a backup has not ended in {root}; run the same `entrepot restore` again to go on with it"
        )


def check_database_not_lost(layout: Layout, root: Path) -> None:
    """Raises DatabaseMissing if the data directory has blob files, but its database is missing or empty. With a new
    database, which does not list the blob files, garbage collection would delete them. `root`: the path of the data
    directory, as the message shows it. Raises OSError."""
    database = layout.metadata
    write_ahead_log = database.with_name(f"{database.name}-wal")
    if _size(database) > 0 or (database.exists() and _size(write_ahead_log) > 0):
        return
    if any(_has_entries(shard) for shard in layout.shards()):
        raise DatabaseMissing(
            f"{root} has blobs, but its database {database.name} is missing or empty: put the database back, or "
            "restore a backup into another directory with `entrepot restore`; for a new registry, name an empty "
            "directory with --data"
        )


def _size(file: Path) -> int:
    """Returns the size of the file in bytes; 0 if it does not exist. Raises OSError."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _has_entries(directory: Path) -> bool:
    """Returns whether the directory exists and is not empty. Raises OSError."""
    try:
        with os.scandir(directory) as entries:
            return any(True for _ in entries)
    except FileNotFoundError:
        return False


def ensure_usable(root: Path) -> None:
    """Creates the directory `root` if it is missing. Raises DataDirectoryError in these cases:

    - `root` is not a directory, or cannot be created or written. A full disk is no error if `root` exists.
    - `root` is on a network file system, where file locks and SQLite's WAL are unreliable.
    - A restore from a backup has not ended in `root`.
    - `root` has blobs but no database (`check_database_not_lost`).
    - Directories below `root` are on different file systems or mounts (`find_separate_directories`).
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise DataDirectoryError(f"{root} is not a directory; choose another one with --data") from None
    except OSError as error:
        raise DataDirectoryError(f"cannot make the data directory {root}: {describe_error(error)}") from None
    if (file_system := file_system_type(root)) in _NETWORK_FILE_SYSTEMS:
        raise DataDirectoryError(
            f"{root} lies on a network file system ({file_system}), where locks and SQLite are not safe; "
            "choose a local disk with --data"
        )
    check_restore_ended(Layout(root), root)
    try:
        check_database_not_lost(Layout(root), root)
    except OSError as error:
        raise DataDirectoryError(f"cannot read {error.filename}: {error.strerror}") from None
    if (pair := find_separate_directories(root)) is not None:
        raise DataDirectoryError(
            f"{pair[0]} and {pair[1]} are on different file systems or mounts, so no blob can be stored; put the "
            f"whole data directory on one file system: mount the disk at {root}, or name a directory on it with --data"
        )
    if (reason := read_only_reason(root)) is not None:
        raise DataDirectoryError(reason)
    try:
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:  # the registry can serve reads and deletes from a full disk
            raise DataDirectoryError(f"cannot write to the data directory {root}: {error.strerror}") from None
