"""Lets work on many files skip the files that the disk cannot read (`skip_unreadable`, `is_readable`)."""

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
that its checksum is wrong."""
WARNING_SECONDS: Final = 600.0
"""Shortest time between two warnings about the same file. Some work meets the file every two seconds."""
MAX_WARNED_PATHS: Final = 1000
"""Largest number of files whose last warning is remembered."""
warned_at: Final[dict[str, float]] = {}
"""For each path, when this process last logged a warning about it (`time.monotonic`)."""
log = logging.getLogger("storage.damage")


@contextmanager
def skip_unreadable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Suppresses an OSError of the `with` block that means damage (`DAMAGE_ERRNOS`), and logs a warning instead, with
    the path that the error names; if it names none, with `path`. Logs it at most once in `WARNING_SECONDS` for each
    path. Raises other errors. The file stays where it is.

    Work on many files does not stop at such a file. Otherwise one damaged inode would stop garbage collection, for
    example, until an operator has repaired the file system."""
    try:
        yield
    except OSError as error:
        if error.errno not in DAMAGE_ERRNOS:
            raise
        name = str(error.filename or path)
        if _is_warning_due(name):
            log.warning("skipped %s, which the disk cannot read: %s; check the file system", name, error.strerror)


def _is_warning_due(name: str) -> bool:
    """Returns whether to log a warning about this path now, and remembers the time if so."""
    now = time.monotonic()
    last = warned_at.get(name)
    if last is not None and now - last < WARNING_SECONDS:
        return False
    if len(warned_at) >= MAX_WARNED_PATHS:
        warned_at.clear()
    warned_at[name] = now
    return True


def is_readable(path: Path) -> bool:
    """Returns whether the inode of a file can be read; if not, logs the warning of `skip_unreadable`. Returns True if
    there is no such file. Raises OSError. Code that deletes or moves the file calls this function first, and does not
    use `skip_unreadable`: an error of the deletion itself can mean that the disk refuses all changes."""
    with skip_unreadable(path):
        with suppress(FileNotFoundError):
            os.stat(path, follow_symlinks=False)
        return True
    return False
