"""Writes log lines to stderr.

While an event loop runs, lines below WARNING stay in a buffer for up to `FLUSH_SECONDS`, because a system call for each
line would take more time than the rest of a request. If the process is killed, the buffered lines are lost. A line of
level WARNING or higher is written immediately, after the buffered lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Final, Literal, TextIO

from registry.printable import printable_json, printable_line, printable_text

BUFFER_CHARACTERS: Final = 16 * 1024
"""The buffered lines are written when they have this many characters in total."""
FLUSH_SECONDS: Final = 0.2
"""Seconds between the first line in the buffer and the write of the buffer. A full buffer is written immediately."""

_DeferredLine = tuple[float, str, Callable[..., str], tuple[Any, ...]]
"""A *deferred* line, which `write_later` adds to the buffer. Its text is made when the buffer is written. The tuple has
the time of the call (seconds since 1970) and the parameters `name`, `make_message` and `arguments` of `write_later`."""
_DEFERRED_LINE_CHARACTERS: Final = 256
"""Assumed number of characters in a deferred line."""

_UNUSED_FIELDS = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), "unknown"),
    **dict.fromkeys(("thread", "threadName", "processName", "taskName", "exc_text")),
    "lineno": 0,
    "relativeCreated": 0.0,
}
"""Fixed values for the fields of a log record that this module's formatters do not use."""


def mark_logged(error: BaseException) -> None:
    """Marks an error as logged, so that code which catches it later does not log it again."""
    error.__dict__["logged"] = True


def was_logged(error: BaseException | None) -> bool:
    """Returns whether `mark_logged` was called for `error`. Returns False for None."""
    return error is not None and "logged" in error.__dict__


class LineRecord(logging.LogRecord):
    """A log record that has real values only in the fields that this module's formatters use. The other fields, such as
    the name of the thread, have fixed values to save time."""

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
        # As in `logging.LogRecord`: if the only argument is a mapping, the message refers to its keys as `%(key)s`.
        self.args = args[0] if args and len(args) == 1 and isinstance(args[0], Mapping) and args[0] else args
        self.exc_info = exc_info
        self.stack_info = sinfo
        self.created = time.time()
        self.msecs = self.created % 1 * 1000
        self.process = os.getpid()


class LineFormatter(logging.Formatter):
    """Formats records as `2026-01-31 12:00:00,123 INFO registry.calls[77] what happened`: local time, level, logger,
    process id, message. Messages contain text of clients and upstreams, so `?` replaces control characters, including
    line breaks. The formatter caches the start of the last line: time, level and logger."""

    def __init__(self) -> None:
        super().__init__()
        self._formatted_second = -1
        self._second_text = ""
        self._formatted_start: tuple[int, str, str] | None = None
        self._start_text = ""

    def format(self, record: logging.LogRecord) -> str:
        line = self.format_line(record.created, record.levelname, record.name, record.process, record.getMessage())
        if not record.exc_info and not record.stack_info:
            return line
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        return "\n".join((line, *(printable_text(part) for part in (trace, stack) if part)))

    def format_line(self, created: float, level: str, name: str, process: int | None, message: str) -> str:
        """Returns the line of a message. `created` is the time in seconds since 1970."""
        start = int(created * 1000), level, name
        if start != self._formatted_start:
            self._formatted_start = start
            second, milliseconds = divmod(start[0], 1000)
            if second != self._formatted_second:
                self._formatted_second = second
                self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._start_text = f"{self._second_text},{milliseconds:03d} {level} {name}["
        return f"{self._start_text}{process}] {printable_line(message)}"


class JsonFormatter(logging.Formatter):
    """Formats records as one JSON object per line, with the fields `time` (RFC 3339, in UTC), `level`, `logger`,
    `process` and `message`. If a record's only argument is a mapping, as in the record of a request, the fields of the
    mapping replace `message`. The field `exception` has the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
        }
        if isinstance(record.args, Mapping):
            fields.update(record.args)
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return printable_json(json.dumps(fields, ensure_ascii=False, default=str, separators=(",", ":")))


class BufferedHandler(logging.Handler):
    """A log handler that buffers lines and writes them to `stream`, several at a time."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str | _DeferredLine] = []
        self._size = 0  # approximate number of characters in the buffered lines
        self._text_formatter = LineFormatter()
        self.writes_text: bool
        """Whether the handler writes lines of text. If not, it writes JSON objects."""
        self.setFormatter(self._text_formatter)

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        super().setFormatter(fmt)
        self.writes_text = fmt is self._text_formatter

    def write_later(self, name: str, make_message: Callable[..., str], *arguments: Any) -> None:
        """Logs a message of level INFO for the logger `name` as a line of text, without a log record. When the buffer
        is written, calls `make_message(*arguments)`, which returns the message. Making all messages at once saves time.
        Raises nothing: errors go to `handleError`, as in `emit`."""
        try:
            with self.lock or nullcontext():
                self._lines.append((time.time(), name, make_message, arguments))
                self._size += _DEFERRED_LINE_CHARACTERS
                if len(self._lines) == 1 or self._size >= BUFFER_CHARACTERS:
                    self._flush_when_due()
        except Exception:
            self.handleError(logging.makeLogRecord({"name": name, "msg": "a line could not be added"}))

    def emit(self, record: logging.LogRecord) -> None:
        """Adds the record's line to the buffer. Writes the buffer immediately in these cases:

        - The record's level is WARNING or higher.
        - The buffer is full.
        - This thread has no running event loop, which could write the buffer later."""
        try:
            line = self.format(record)
            self._lines.append(line)
            self._size += len(line)
            if record.levelno >= logging.WARNING:
                self.flush()
            else:
                self._flush_when_due()
        except Exception:
            self.handleError(record)

    def _flush_when_due(self) -> None:
        """Writes the buffer if the buffer is full, or if this thread has no running event loop. Otherwise, if the
        buffer was empty before the newest line, schedules a write of the buffer. The caller holds the handler's
        lock."""
        if self._size >= BUFFER_CHARACTERS or (loop := _running_loop()) is None:
            self.flush()
        elif len(self._lines) == 1:
            loop.call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes all buffered lines. Discards the lines if the stream cannot be written."""
        self.acquire()
        try:
            lines, self._lines, self._size = self._lines, [], 0
            if lines:
                process = os.getpid()
                text = "".join(
                    [line + "\n" if isinstance(line, str) else self._make_line(process, *line) for line in lines]
                )
                with suppress(OSError):  # for example if stderr is a file on a full disk
                    self._stream.write(text)
                    self._stream.flush()
        finally:
            self.release()

    def _make_line(
        self, process: int, created: float, name: str, make_message: Callable[..., str], arguments: tuple[Any, ...]
    ) -> str:
        """Returns the text of a deferred line, with the line break; an empty text if `make_message` fails. `process`:
        the id of this process."""
        try:
            return self._text_formatter.format_line(created, "INFO", name, process, make_message(*arguments)) + "\n"
        except Exception:
            self.handleError(logging.makeLogRecord({"name": name, "msg": "a line could not be made"}))
            return ""


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Returns this thread's running event loop. Returns None if no event loop runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def direct_handler(logger: logging.Logger) -> BufferedHandler | None:
    """Returns the handler whose `write_later` the caller may call instead of logging to `logger`. Returns None in these
    cases, in which the caller must log to `logger`:

    - Other handlers or filters process the records as well.
    - The handler does not write the level INFO.
    - The handler writes JSON objects."""
    root = logger.root
    if len(root.handlers) != 1 or logger.handlers or logger.filters or not logger.propagate:
        return None
    handler = root.handlers[0]
    if not isinstance(handler, BufferedHandler) or not handler.writes_text or handler.filters:
        return None
    return handler if handler.level <= logging.INFO else None


def flush_output() -> None:
    """Flushes stdout and stderr. If a stream cannot be written, for example to a full disk, its text stays buffered."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def end_output() -> None:
    """Flushes stdout and stderr at the end of the process. Discards text that cannot be written, because Python would
    otherwise end the process with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # sends the text to /dev/null
                null_device = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null_device, stream.fileno())
                os.close(null_device)
                stream.flush()


def log_to_stderr(level: str, form: Literal["text", "json"] = "text") -> None:
    """Sets up logging to stderr, for this process and the processes that it forks. Logging does not use stdout, where
    the server prints its banner. `level` is the lowest level that is logged, such as "info". With the `form` "json",
    each line is a JSON object."""
    # Python's logging then does not look up values that the lines do not show, such as the caller's file name and the
    # thread (Python's logging documentation, "Optimization").
    for switch, value in (("_srcfile", None), ("logThreads", False), ("logMultiprocessing", False)):
        setattr(logging, switch, value)
    logging.setLogRecordFactory(LineRecord)
    handler = BufferedHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter())
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # These libraries log whole URLs, and the URL of a redirect may contain a secret.
    for library in ("httpx2", "httpcore2", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)


def set_log_level(level: str) -> None:
    """Changes the lowest level that this process logs to stderr, such as "info". Does nothing if `log_to_stderr` was
    not called."""
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, BufferedHandler):
            handler.setLevel(level.upper())
            root.setLevel(level.upper())
