"""Skips files that cannot be read, for code that works on many files (`skip_unreadable`, `has_unreadable_inode`). A
file cannot be read if the disk has lost the file, or if this process has no permission."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

DAMAGE_ERRNOS: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""Errors that mean that the disk has lost a file or a part of it: a sector cannot be read, or the file system has found
a wrong checksum."""
FORBIDDEN_ERRNOS: Final = frozenset({errno.EACCES, errno.EPERM})
"""Errors that mean that this process has no permission to read a file. The file need not be damaged."""
WARNING_SECONDS: Final = 600.0
"""Shortest time between two warnings about the same file. Some periodic work finds the same file every two seconds."""
MAX_WARNED_PATHS: Final = 1000
"""Largest number of files whose last warning is remembered."""
warned_at: Final[dict[str, float]] = {}
"""For each path, when this process last logged a warning about it (`time.monotonic`)."""
log = logging.getLogger("storage.damage")


@contextmanager
def skip_unreadable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Suppresses an OSError of the `with` block that means damage (`DAMAGE_ERRNOS`) or a lack of permission
    (`FORBIDDEN_ERRNOS`), and logs a warning instead (`warn_unreadable`). Raises other errors. Does not change the
    file. One unreadable file therefore does not stop work on many files, such as garbage collection."""
    try:
        yield
    except OSError as error:
        if error.errno not in DAMAGE_ERRNOS | FORBIDDEN_ERRNOS:
            raise
        warn_unreadable(path, error)


def warn_unreadable(path: str | os.PathLike[str], error: OSError) -> None:
    """Logs a warning that a file was skipped because of `error`. The warning names the path in `error`, or `path` if
    `error` has none. Logs nothing if the last warning about this path is less than `WARNING_SECONDS` old."""
    name = str(error.filename or path)
    if not _is_warning_due(name):
        return
    if error.errno in FORBIDDEN_ERRNOS:
        log.warning("skipped a file: %s", describe_forbidden(Path(name), error))
    else:
        log.warning("skipped %s, which the disk cannot read: %s; check the file system", name, error.strerror)


def describe_forbidden(path: Path, error: OSError) -> str:
    """Returns a text that says that this process may not read the file at `path`, and which command gives this process
    permission. If a directory above the file denies access, the text names this directory instead of the file.
    `error`: an error with one of `FORBIDDEN_ERRNOS`."""
    while path != path.parent and not os.access(path.parent, os.X_OK, effective_ids=True):
        path = path.parent
    user, group = os.geteuid(), os.getegid()
    try:
        is_own = os.stat(path).st_uid == user
    except OSError:
        is_own = False
    command = f"chmod u+rX {path}" if is_own else f"chown {user}:{group} {path}"
    return f"the server cannot read {path}: {error.strerror}; run as root: {command}"


def _is_warning_due(name: str) -> bool:
    """Returns whether to log a warning about this path now. If so, records the current time as the time of the
    warning."""
    now = time.monotonic()
    last = warned_at.get(name)
    if last is not None and now - last < WARNING_SECONDS:
        return False
    if len(warned_at) >= MAX_WARNED_PATHS:
        warned_at.clear()
    warned_at[name] = now
    return True


def has_unreadable_inode(path: Path) -> bool:
    """Returns whether there is a file at `path` whose inode cannot be read. If so, logs a warning (`warn_unreadable`).
    Raises OSError for other errors.

    Call this function before a deletion or move of the file. Run the deletion or move itself outside of
    `skip_unreadable`: an error of the deletion or move must not be skipped, because it can mean that the disk refuses
    all changes."""
    with skip_unreadable(path):
        with suppress(FileNotFoundError):
            os.stat(path, follow_symlinks=False)
        return False
    return True
