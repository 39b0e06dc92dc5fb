"""Log lines and how they are written to stderr."""

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


def test_a_line_without_a_loop_is_written_at_once(log: logging.Logger, stream: io.StringIO) -> None:
    """Without a running event loop, each line is written at once, so a command loses no line when it ends."""
    log.info("one %s", "fact")
    assert stream.getvalue().endswith(f" INFO a.logger[{os.getpid()}] one fact\n")


async def test_information_is_gathered_and_a_warning_is_not(log: logging.Logger, stream: io.StringIO) -> None:
    """Lines below WARNING are buffered. A warning is written at once, together with all buffered lines before it, in
    order."""
    log.info("first")
    log.info("second")
    assert stream.getvalue() == ""
    log.warning("third")
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["first", "second", "third"]


async def test_gathered_lines_are_written_soon(log: logging.Logger, stream: io.StringIO) -> None:
    """Buffered lines are written soon, even if no other line follows."""
    written = asyncio.Event()
    stream.flush = written.set  # type: ignore[method-assign]
    log.info("alone")
    async with asyncio.timeout(60):
        await written.wait()
    assert stream.getvalue().endswith(" alone\n")


async def test_many_lines_do_not_pile_up(log: logging.Logger, stream: io.StringIO) -> None:
    """The buffer has a largest size, however many lines are added before the event loop continues."""
    for number in range(3000):
        log.info("line %04d", number)
    line = len(stream.getvalue().splitlines()[0])
    assert (3000 - stream.getvalue().count("\n")) * line <= BUFFER_CHARACTERS + line


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
def test_a_short_record_gives_the_line_of_a_whole_one(text: object, args: Any, more: dict[str, Any]) -> None:
    """A short log record gives the same line as a full one: the fields that it leaves out are not in the line."""
    exception, stack = _raised() if more.get("exc_info") else None, more.get("sinfo")
    lines = []
    for kind in (logging.LogRecord, LineRecord):
        record = kind("a.logger", logging.INFO, "file.py", 1, text, args, exception, "function", stack)
        record.created, record.msecs = 1.5, 500.0
        lines.append(LineFormatter().format(record))
    assert lines[0] == lines[1]


def test_other_formatters_find_what_they_ask_for() -> None:
    """If the handler of a library shows a field that a short record leaves out, it gets a placeholder, and no error."""
    record = LineRecord("a.logger", logging.INFO, "path", 7, "one %s", ("fact",), None)
    asked = "%(filename)s %(funcName)s %(lineno)d %(threadName)s %(relativeCreated)d %(message)s"
    assert logging.Formatter(asked).format(record) == "unknown unknown 0 None 0 one fact"


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
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_json_line_has_time_level_logger_process_and_message() -> None:
    """The time is in UTC, in the format of RFC 3339."""
    found = json_line("said %s", 'a "quote" \x1b')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    expected = {"level": "info", "logger": "a.logger", "process": os.getpid(), "message": 'said a "quote" \x1b'}
    assert found == expected


def test_a_json_line_has_the_fields_of_a_mapping() -> None:
    """If the argument is a mapping, its fields take the place of the message. Numbers stay numbers, and values that
    JSON does not know become text."""
    found = json_line("%(status)s %(path)s", {"status": 200, "ms": 1.5, "path": Path("/v2")})
    assert (found["status"], found["ms"], found["path"], "message" in found) == (200, 1.5, "/v2", False)


def test_a_json_line_holds_an_exception() -> None:
    """An exception with all its lines is in one line of the log."""
    assert "ValueError: a\nb" in json_line("failed", error=True)["exception"]
