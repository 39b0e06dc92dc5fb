"""Prepares the standard streams of a command for two cases: the parent process has closed some of them, or a write to
the standard output fails."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Final

STDOUT_NAME: Final = "standard output"
"""The attribute `filename` of an OSError that a write to the standard output raises. Callers recognize the error by
this name. A BrokenPipeError does not get this name, because a broken pipe is no failure: the reader of the pipe has
ended."""


def prepare_streams() -> None:
    """Opens those of the file descriptors 0, 1 and 2 that are closed, and sets `STDOUT_NAME` in the errors of stdout.
    Must be called before the process opens files. Otherwise a file such as the database could get the descriptor of a
    closed stream, and the process would print into the file.

    After the call, a stream that was closed behaves as follows:

    - A read from stdin finds nothing.
    - A write to stdout fails.
    - A write to stderr does nothing."""
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
    """Sends the content of stdout's buffer, and all later output, to /dev/null. Call this after a write to stdout has
    failed. Otherwise Python would try the write again at exit, and end with exit code 120."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)
    os.close(null_device)


class _Stdout(io.FileIO):
    """The standard output. Its OSErrors, except BrokenPipeError, have `STDOUT_NAME` as file name."""

    def write(self, data: Any, /) -> int:
        """Writes some of the bytes and returns how many it wrote. Raises OSError."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            error.filename = STDOUT_NAME
            raise
