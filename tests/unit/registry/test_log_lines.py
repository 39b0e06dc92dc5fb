"""The format of log lines, and how they are buffered and written to stderr."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.log_output import BUFFER_CHARACTERS, BufferedHandler, JsonFormatter, LineFormatter, LineRecord


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(stream: io.StringIO) -> Iterator[logging.Logger]:
    logger = logging.Logger("a.logger", logging.INFO)
    handler = BufferedHandler(stream)
    logger.addHandler(handler)
    yield logger
    handler.close()


def test_without_an_event_loop_lines_are_written_at_once(log: logging.Logger, stream: io.StringIO) -> None:
    """If no event loop runs, each line is written at once, so that a command loses no line when it ends."""
    log.info("one %s", "fact")
    assert stream.getvalue().endswith(f" INFO a.logger[{os.getpid()}] one fact\n")


async def test_only_lines_below_warning_are_buffered(log: logging.Logger, stream: io.StringIO) -> None:
    """Lines below WARNING are buffered. A warning is written at once, after the buffered lines."""
    log.info("first")
    log.info("second")
    assert stream.getvalue() == ""
    log.warning("third")
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["first", "second", "third"]


async def test_buffered_lines_are_written_soon(log: logging.Logger, stream: io.StringIO) -> None:
    """Buffered lines are written soon, even if no other line follows."""
    written = asyncio.Event()
    stream.flush = written.set  # type: ignore[method-assign]
    log.info("alone")
    async with asyncio.timeout(60):
        await written.wait()
    assert stream.getvalue().endswith(" alone\n")


async def test_the_buffer_is_limited_in_size(log: logging.Logger, stream: io.StringIO) -> None:
    """When the buffer is full, its lines are written, even if the event loop does not run in between."""
    for number in range(3000):
        log.info("line %04d", number)
    line_length = len(stream.getvalue().splitlines()[0])
    assert (3000 - stream.getvalue().count("\n")) * line_length <= BUFFER_CHARACTERS + line_length


async def test_an_error_shows_its_traceback(log: logging.Logger, stream: io.StringIO) -> None:
    """An error is written at once, with its traceback."""
    try:
        raise ValueError("what went wrong")
    except ValueError:
        log.exception("it failed")
    assert "Traceback" in stream.getvalue()
    assert stream.getvalue().endswith("ValueError: what went wrong\n")


def _raised() -> Any:
    try:
        raise ValueError("what went wrong")
    except ValueError as error:
        return type(error), error, error.__traceback__


@pytest.mark.parametrize(
    ("text", "args", "more"),
    [
        ("plain 100%", (), {}),
        ("plain", None, {}),
        ("%s and %d", ("one", 2), {}),
        ("%(name)s", ({"name": "by name"},), {}),
        ("%s", ({},), {}),
        (ValueError("no text"), (), {}),
        ("failed", (), {"exc_info": True}),
        ("stands", (), {"sinfo": "Stack (most recent call last):\n  here"}),
    ],
)
def test_a_short_record_gives_the_same_line_as_a_full_one(text: object, args: Any, more: dict[str, Any]) -> None:
    """A `LineRecord`, which has fewer fields than a `logging.LogRecord`, gives the same line, because the line does not
    have the missing fields."""
    exception, stack = _raised() if more.get("exc_info") else None, more.get("sinfo")
    lines = []
    for kind in (logging.LogRecord, LineRecord):
        record = kind("a.logger", logging.INFO, "file.py", 1, text, args, exception, "function", stack)
        record.created, record.msecs = 1.5, 500.0
        lines.append(LineFormatter().format(record))
    assert lines[0] == lines[1]


def test_lines_have_no_control_characters(log: logging.Logger, stream: io.StringIO) -> None:
    """A line of the log has no control characters of clients and upstreams, which could control the terminal of a
    person who reads the log, or add another line. JSON has escapes in their place."""
    log.warning("an answer of %s", "far\x1b[2J\x9b2J\n2026-01-01 INFO forged\ud800")
    assert stream.getvalue().endswith(" an answer of far?[2J?2J?2026-01-01 INFO forged?\n")
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        log.exception("failed")
    assert stream.getvalue().endswith("ValueError: ?[2J\n")
    record = logging.LogRecord("a.logger", logging.INFO, "", 0, "far\x9b2J\x7f", None, None)
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == "far\x9b2J\x7f"


def test_other_formatters_get_placeholders() -> None:
    """If a library's formatter uses a field that a `LineRecord` does not have, it gets a placeholder instead of an
    error."""
    record = LineRecord("a.logger", logging.INFO, "path", 7, "one %s", ("fact",), None)
    format_text = "%(filename)s %(funcName)s %(lineno)d %(threadName)s %(relativeCreated)d %(message)s"
    assert logging.Formatter(format_text).format(record) == "unknown unknown 0 None 0 one fact"


def json_line(message: str, *args: Any, error: bool = False) -> dict[str, Any]:
    """Returns the line of a record in the JSON format."""
    record = LineRecord("a.logger", logging.INFO, "", 0, message, args, None)
    if error:
        try:
            raise ValueError("a\nb")
        except ValueError as raised:
            record.exc_info = (ValueError, raised, raised.__traceback__)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_a_json_line_has_time_level_logger_process_and_message() -> None:
    """A line in the JSON format has the time in UTC in the format of RFC 3339, the level, the logger, the process and
    the message."""
    fields = json_line("said %s", 'a "quote" \x1b')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    expected = {"level": "info", "logger": "a.logger", "process": os.getpid(), "message": 'said a "quote" \x1b'}
    assert fields == expected


def test_a_json_line_has_the_fields_of_a_mapping() -> None:
    """If the argument of a log call is a mapping, the JSON line has its fields instead of a message. Numbers stay
    numbers. Values that have no JSON type become text."""
    fields = json_line("%(status)s %(path)s", {"status": 200, "ms": 1.5, "path": Path("/v2")})
    assert (fields["status"], fields["ms"], fields["path"], "message" in fields) == (200, 1.5, "/v2", False)


def test_a_json_line_holds_an_exception() -> None:
    """An exception with several lines of text is in one line of the log."""
    assert "ValueError: a\nb" in json_line("failed", error=True)["exception"]
