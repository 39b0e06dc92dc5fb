"""Writes log lines to stderr, cheaply enough for one line per request.

One write for each line would cost a request more time than everything else it does. So while an event loop runs, lines
below WARNING are buffered for a fraction of a second. A line of WARNING or above is written at once, together with the
lines before it. If the process is killed, the buffered lines are lost, but no warning is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, TextIO

BUFFER_BYTES: Final = 16 * 1024
"""The buffer is written when its lines have this many characters."""
FLUSH_SECONDS: Final = 0.2
"""The buffer is written this long after its first line."""

_UNUSED_FIELDS = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), "unknown"),
    **dict.fromkeys(("thread", "threadName", "processName", "taskName", "exc_text")),
    "lineno": 0,
    "relativeCreated": 0.0,
}
"""Values for the fields of a log record that `LineFormatter` does not use."""


def mark_logged(error: BaseException) -> None:
    """Marks an error as logged, so that code which catches it later does not log it again."""
    error.__dict__["logged"] = True


def was_logged(error: BaseException | None) -> bool:
    """Returns whether `mark_logged` was called for `error`. Returns False for None."""
    return error is not None and "logged" in error.__dict__


class LineRecord(logging.LogRecord):
    """A log record with only the fields that `LineFormatter` uses. Finding the values of the other fields, such as the
    caller's file name, would cost more time than writing the line."""

    def __init__(
        self,
        name: str,
        level: int,
        pathname: str,
        lineno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        sinfo: str | None = None,
        **_: Any,
    ) -> None:
        self.__dict__.update(_UNUSED_FIELDS)
        self.name = name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.msg = msg
        self.args = args[0] if args and len(args) == 1 and isinstance(args[0], Mapping) and args[0] else args
        self.exc_info = exc_info
        self.stack_info = sinfo
        self.created = time.time()
        self.msecs = self.created % 1 * 1000
        self.process = os.getpid()


class LineFormatter(logging.Formatter):
    """Formats records as `2026-01-31 12:00:00,123 INFO registry.calls[77] what happened`: local time, level, logger,
    process id, message. Formats date and time only once for all records of the same second."""

    def __init__(self) -> None:
        super().__init__()
        self._formatted_second = -1
        self._second_text = ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}[{record.process}] {record.getMessage()}"
        if not record.exc_info and not record.stack_info:
            return line
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        return "\n".join(part for part in (line, trace, stack) if part)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._formatted_second:
            self._formatted_second = second
            self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._second_text},{int(record.msecs):03d}"


class BufferedHandler(logging.Handler):
    """Writes log lines to `stream`, several with one write."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []
        self._size = 0  # characters of the buffered lines
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Buffers the record's line. Writes the buffer at once for a warning or error, if the buffer is full, and if no
        event loop runs in this thread."""
        try:
            line = self.format(record)
            self._lines.append(line)
            self._size += len(line)
            if record.levelno >= logging.WARNING or self._size >= BUFFER_BYTES or not self._schedule_flush():
                self.flush()
        except Exception:
            self.handleError(record)

    def _schedule_flush(self) -> bool:
        """Makes this thread's event loop write the buffer soon. Returns False if the thread has no running loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if len(self._lines) == 1:
            loop.call_later(FLUSH_SECONDS, self.flush)
        return True

    def flush(self) -> None:
        """Writes all buffered lines. Drops them if they cannot be written."""
        self.acquire()
        try:
            lines, self._lines, self._size = self._lines, [], 0
            if lines:
                with suppress(OSError):  # such as a full disk: lines that do not fit are lost
                    self._stream.write("\n".join(lines) + "\n")
                    self._stream.flush()
        finally:
            self.release()


def flush_output() -> None:
    """Flushes stdout and stderr. If that fails, as on a full disk, the text stays in their buffers."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def end_output() -> None:
    """Flushes stdout and stderr at the end of the process. Drops text that cannot be written, because the interpreter
    would otherwise try again at its exit, fail, and end with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                null_device = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null_device, stream.fileno())
                os.close(null_device)
                stream.flush()


def log_to_stderr(level: str) -> None:
    """Sets up logging to stderr, for this process and the processes that it forks. Writes nothing to stdout, which is
    for the banner at the start. `level`: the lowest level that is logged, such as "info"."""
    # Switches off finding values that our lines do not show (Python's logging documentation, "Optimization").
    for switch, value in (("_srcfile", None), ("logThreads", False), ("logMultiprocessing", False)):
        setattr(logging, switch, value)
    logging.setLogRecordFactory(LineRecord)
    handler = BufferedHandler(sys.stderr)
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # The log lines of these libraries show whole URLs, and the URL of a redirect may contain a secret.
    for library in ("httpx2", "httpcore2", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
