"""Writes log lines to stderr, cheaply enough for one line per request.

A write per line would cost a request more than everything else it does. So while an event loop runs, lines below
WARNING are buffered for a moment; a warning is written at once, after the lines buffered before it. A kill loses the
buffered lines, never a warning.
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
FLUSH_SECONDS: Final = 0.2

_UNUSED_FIELDS = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), "unknown"),
    **dict.fromkeys(("thread", "threadName", "processName", "taskName", "exc_text")),
    "lineno": 0,
    "relativeCreated": 0.0,
}
"""Fields of a record that only other formatters use."""


def mark_logged(error: BaseException) -> None:
    """Marks an error as logged, so that callers further up do not log it again."""
    error.__dict__["logged"] = True


def was_logged(error: BaseException | None) -> bool:
    """Returns whether `mark_logged` was called for the error."""
    return error is not None and "logged" in error.__dict__


class LineRecord(logging.LogRecord):
    """A record with only the fields that a line shows. To find out the others, for every request, would cost more than
    the line."""

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
    """`2026-01-31 12:00:00,123 INFO registry.calls[77] what happened`: in local time, which is
    formatted once a second."""

    def __init__(self) -> None:
        super().__init__()
        self._second = -1
        self._text = ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}[{record.process}] {record.getMessage()}"
        if not record.exc_info and not record.stack_info:
            return line
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        return "\n".join(part for part in (line, trace, stack) if part)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._text},{int(record.msecs):03d}"


class BufferedHandler(logging.Handler):
    """Writes lines to `stream`, several at a time."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []
        self._size = 0
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            self._lines.append(line)
            self._size += len(line)
            if record.levelno >= logging.WARNING or self._size >= BUFFER_BYTES or not self._flush_later():
                self.flush()
        except Exception:
            self.handleError(record)

    def _flush_later(self) -> bool:
        """Returns whether an event loop of this thread will flush the buffer soon."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if len(self._lines) == 1:
            loop.call_later(FLUSH_SECONDS, self.flush)
        return True

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines, self._size = self._lines, [], 0
            if lines:
                with suppress(OSError):  # the disk of the log is full: lines that do not fit are lost
                    self._stream.write("\n".join(lines) + "\n")
                    self._stream.flush()
        finally:
            self.release()


def flush_output() -> None:
    """Flushes stdout and stderr. Where their disk is full, the text stays buffered."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def end_output() -> None:
    """Flushes stdout and stderr at the end of the process and drops text that cannot be written: the interpreter would
    end with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()


def log_to_stderr(level: str) -> None:
    """Sends the log lines of this process, and of those it forks, to stderr; stdout is for the start banner alone."""
    # Our lines do not show these fields (the logging documentation, "Optimization").
    for fact, off in (("_srcfile", None), ("logThreads", False), ("logMultiprocessing", False)):
        setattr(logging, fact, off)
    logging.setLogRecordFactory(LineRecord)
    handler = BufferedHandler(sys.stderr)
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Their lines hold whole URLs, and the URL of a redirect can hold a secret.
    for library in ("httpx2", "httpcore2", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
