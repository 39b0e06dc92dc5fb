"""Checks a data directory before anything is opened in it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from storage.data_dir.system import FULL

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.glusterfs"}
)

_ESCAPED = re.compile(r"\\([0-7]{3})")
"""Escapes in mountinfo for space, tab, newline and backslash (proc(5))."""


class DataDirectoryError(Exception):
    """The data directory cannot be used. The message says why and what to do, in one line."""


def filesystem_of(path: Path, mountinfo: str | None = None) -> str:
    """Returns the type of the file system of `path`, as /proc/self/mountinfo names it; empty if unknown."""
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape") if mountinfo is None else mountinfo
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, after = left.split(" "), right.split(" ")
        if len(fields) < 5 or not after[0]:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), fields[4]).rstrip("/")
        if (real == point or real.startswith(point + "/")) and len(point) >= len(best):
            best, kind = point, after[0]
    return kind


def describe_error(error: OSError) -> str:
    """Returns the error's text, with advice if the disk is full."""
    advice = "; free some space there, or choose another data directory with --data" if error.errno in FULL else ""
    return f"{error.strerror}{advice}"


def check_writable(root: Path) -> None:
    """Creates the directory if it is missing. Raises DataDirectoryError if it is no directory, cannot be written, or
    lies on a network file system (locks are unreliable there, and SQLite's WAL needs shared memory). A full disk is
    accepted."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise DataDirectoryError(f"{root} is not a directory; choose another one with --data") from None
    except OSError as error:
        raise DataDirectoryError(f"cannot make the data directory {root}: {describe_error(error)}") from None
    if (kind := filesystem_of(root)) in _NETWORK:
        raise DataDirectoryError(
            f"{root} lies on a network file system ({kind}), where locks and SQLite are not safe; "
            "choose a local disk with --data"
        )
    try:
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        if error.errno not in FULL:  # a disk without free space or inodes can still serve
            raise DataDirectoryError(f"cannot write to the data directory {root}: {error.strerror}") from None
