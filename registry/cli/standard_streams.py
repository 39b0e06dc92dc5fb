"""Prepares the standard streams of a command. Its parent process may have closed some of them, and a write to the
standard output may fail."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Final

STDOUT_NAME: Final = "standard output"
"""The file name in an OSError of a write to the standard output, except a BrokenPipeError. Python itself sets no file
name in this error, so that callers could not tell which file the error is about."""


def prepare_streams() -> None:
    """Opens those of the file descriptors 0, 1 and 2 that are closed, and makes the errors of stdout recognizable. Must
    be called before the process opens files.

    Otherwise the next file that the process opens, such as the database, would get the lowest closed descriptor, and
    the process would print into this file. After the call, a read of a stdin that was closed finds nothing, a write to
    a stdout that was closed fails, and a write to a stderr that was closed does nothing."""
    # Opens descriptor 1 read-only, so that writes to it fail.
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    old_stdout = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "w", closefd=False)),
        encoding=old_stdout.encoding if old_stdout else "utf-8",
        errors=old_stdout.errors if old_stdout else "surrogateescape",
        line_buffering=bool(old_stdout and old_stdout.line_buffering),
        write_through=bool(old_stdout and getattr(old_stdout, "write_through", False)),
    )


def discard_stdout() -> None:
    """Sends what is still in the buffer of stdout, and all later output, to /dev/null. Otherwise Python would try to
    write the buffer again at exit. This would fail, and the process would end with exit code 120."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)
    os.close(null_device)


class _Stdout(io.FileIO):
    """The standard output. Its OSErrors, except BrokenPipeError, have `STDOUT_NAME` as file name."""

    def write(self, data: Any, /) -> int:
        """Writes some of the bytes and returns how many. Raises OSError. A BrokenPipeError gets no file name, because
        it is the normal end of a pipe."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            error.filename = STDOUT_NAME
            raise
