"""The access log. If possible, a line is written without a `logging.LogRecord`, which is faster. Its text is the same
as with a record."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from registry.asgi import Scope
from registry.http.answer_cache import CachedAnswer
from registry.log_output import BufferedHandler, JsonFormatter, direct_handler
from registry.telemetry.access_log import log, write_cached_answer, write_request

TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Returns the stream to which the only log handler writes. pytest adds handlers to the root logger before each
    test, so the access logger gets a root logger of its own."""
    stream = io.StringIO()
    handler = BufferedHandler(stream)
    own_root = logging.RootLogger(logging.INFO)
    own_root.addHandler(handler)
    monkeypatch.setattr(log, "root", own_root)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    monkeypatch.setattr(log, "_cache", {})
    yield stream
    handler.close()


def scope_with(*headers: tuple[bytes, bytes]) -> Scope:
    return {
        "method": "GET",
        "path": "/v2/team/app/manifests/1.0",
        "raw_path": b"/v2/team/app/manifests/1.0",
        "headers": [(b"host", b"registry.test"), *headers],
        "client": ("192.0.2.7", 40000),
    }


SCOPES = [
    scope_with(),
    scope_with((b"user-agent", b"docker/29")),
    scope_with((b"user-agent", b"evil\r\nagent\xff"), (b"traceparent", TRACE)),
    scope_with((b"traceparent", b"no trace")),
    {**scope_with(), "client": None, "raw_path": b"/v2/" + b"x" * 2000},
]


def answer_for(scope: Scope, *, repo: str = "team/app", resource_id: str = "1.0") -> CachedAnswer:
    return CachedAnswer([], [], b"body", "alice", True, None, "manifests", repo, resource_id)


def text_of(stream: io.StringIO) -> str:
    """Returns the message of the only line that was written since the last call, and empties the stream."""
    (line,) = stream.getvalue().splitlines()
    stream.seek(0)
    stream.truncate()
    return line.partition("] ")[2]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("repo", "resource_id"), [("team/app", "1.0"), ("", "")])
def test_a_line_without_a_record(
    scope: Scope, repo: str, resource_id: str, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line without a log record has the same text as a line with a record. This holds for cached answers and for
    other responses."""
    answer = answer_for(scope, repo=repo, resource_id=resource_id)
    lines = []
    assert direct_handler(log) is not None
    for _ in range(2):  # the second line uses text that the cached answer has stored
        write_cached_answer(scope, answer, "r1")
        lines.append(text_of(stream))
    write_request(scope, 200, "", 4, 0, 0.0, "alice", repo, resource_id, "answer", "r1")
    lines.append(text_of(stream))
    monkeypatch.setattr(log, "filters", [lambda record: True])  # with a filter, the logger has to make records
    assert direct_handler(log) is None
    write_cached_answer(scope, answer, "r1")
    lines.append(text_of(stream))
    assert len(set(lines)) == 1
    assert "bytes=4 received=0 ms=0.0 principal=alice" in lines[0]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("status", "note", "reason"), [(0, "(cut off)", ""), (431, "", 'a "long"\nhead'), (404, "", "")]
)
def test_a_line_of_a_refused_or_failed_request(
    scope: Scope, status: int, note: str, reason: str, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text with and without a record is also the same if the response was cut off, or if the server has refused the
    request."""
    lines = []
    for is_direct in (True, False):
        if not is_direct:
            monkeypatch.setattr(log, "filters", [lambda record: True])
        write_request(scope, status, note, 4, 5, 0.0126, "", "team/app", "a b", "hit", "r1", reason)
        lines.append(text_of(stream))
    assert lines[0] == lines[1]
    assert f"status={status}{note} bytes=4 received=5 ms=12.6 principal=-" in lines[0]
    assert ("reason=\"a 'long'?head\" agent=" in lines[0]) == bool(reason)


def text_fields(line: str) -> dict[str, str]:
    """Returns the fields of a line in the text format."""
    request, _, agent = line.partition("] ")[2].partition(" agent=")
    method, path, *_ = request.split(" ")
    values = {name: value.strip('"') for name, value in re.findall(r' (\w+)=("[^"]*"|\S+)', request)}
    return {"method": method, "path": path, **values, "agent": agent}


def json_fields(line: str) -> dict[str, str]:
    """Returns the fields of a line in the JSON format, without those that each line of the log has."""
    fields = json.loads(line)
    for name in ("time", "level", "logger", "process"):
        del fields[name]
    return {name: f"{value:.1f}" if name == "ms" else str(value) for name, value in fields.items()}


def test_json_lines_have_the_same_fields(stream: io.StringIO) -> None:
    """In the log format `json`, a line has the same fields as in the text format."""

    def write_lines() -> list[str]:
        stream.seek(0)
        stream.truncate()
        write_cached_answer(SCOPES[1], answer_for(SCOPES[1]), "r1")
        for reason in ("", "the headers are too large"):
            write_request(SCOPES[2], 431, "", 4, 5, 0.0126, "alice", "team/app", "1.0", "hit", "r1", reason)
        return stream.getvalue().splitlines()

    expected = [text_fields(line) for line in write_lines()]
    logging.getLogger().handlers[0].setFormatter(JsonFormatter())
    assert [json_fields(line) for line in write_lines()] == expected
    assert [fields["agent"] for fields in expected] == ["docker/29", "evil??agent\xff", "evil??agent\xff"]
    assert [len(fields) for fields in expected] == [14, 14, 15]


def test_a_handler_for_warnings_only(stream: io.StringIO) -> None:
    """If the log handler accepts only warnings, no line is written."""
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    write_cached_answer(SCOPES[1], answer_for(SCOPES[1]), "r1")
    assert stream.getvalue() == ""


def test_a_line_that_cannot_be_written(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    """If a line cannot be written, no exception is raised, so the request still gets its response. The error is written
    to stderr, as for other log lines."""
    stream.close()
    write_cached_answer(SCOPES[1], answer_for(SCOPES[1]), "r1")
    assert "I/O operation on closed file" in capsys.readouterr().err


async def test_a_line_that_cannot_be_formatted(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    """If the text of a line cannot be formatted, the line is not written, and the error is written to stderr. The lines
    before and after it are written."""
    handler = direct_handler(log)
    assert handler is not None
    for message in ("{}: first", "{1}", "{}: last"):
        handler.write_later("registry.access", message.format, "line")
    handler.flush()
    assert [line.partition("] ")[2] for line in stream.getvalue().splitlines()] == ["line: first", "line: last"]
    assert "Replacement index 1 out of range" in capsys.readouterr().err
