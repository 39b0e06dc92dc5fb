"""How log lines get to stderr: a line each, cheap enough for one per request.

A write for every line costs a request more than all else it does. So what merely informs is gathered for a moment while
an event loop runs; what warns is written at once, after what was gathered before it. A kill loses that moment's
information, never a warning.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

BUFFER_BYTES = 16 * 1024
FLUSH_SECONDS = 0.2


_UNUSED_FIELDS = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), "unknown"),
    **dict.fromkeys(("thread", "threadName", "processName", "taskName", "exc_text")),
    "lineno": 0,
    "relativeCreated": 0.0,
}
"""What other formatters than ours may ask of a record."""


def mark_logged(error: BaseException) -> None:
    """Whoever catches it further up has nothing to log any more."""
    error.__dict__["logged"] = True


def was_logged(error: BaseException | None) -> bool:
    """Whether `mark_logged` was called."""
    return error is not None and "logged" in error.__dict__


class LineRecord(logging.LogRecord):
    """A record with what a line shows. Finding out the rest, and that on every request, costs more than the line."""

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
    """`2026-01-31 12:00:00,123 INFO registry.calls[77] what happened`: local time; the calendar is asked once a
    second."""

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
    """Writes lines to `stream` in portions."""

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
        """Whether an event loop of this thread will flush soon."""
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
                with suppress(OSError):  # the log's own disk is full: what does not fit is lost
                    self._stream.write("\n".join(lines) + "\n")
                    self._stream.flush()
        finally:
            self.release()


def flush_output() -> None:
    """Writes what is buffered for stdout and stderr. Where their disk is full, it stays buffered."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def end_output() -> None:
    """For the end of the process: drops what cannot be written. The interpreter would turn that into exit code 120."""
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
    """Every log line of this process, and of those it forks, goes to stderr; stdout is the greeting's alone."""
    # What our lines do not show need not be found out for each (the logging documentation, "Optimization").
    for fact, off in (("_srcfile", None), ("logThreads", False), ("logMultiprocessing", False)):
        setattr(logging, fact, off)
    logging.setLogRecordFactory(LineRecord)
    handler = BufferedHandler(sys.stderr)
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Their lines hold whole addresses, and that of a redirect can be a key to what it leads to.
    for library in ("httpx2", "httpcore2", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
