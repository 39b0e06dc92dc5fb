"""Reading the config of an image for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from registry.browse.bounded_text import MAX_ENTRIES, MAX_TEXT_CHARACTERS, MAX_TOTAL_CHARACTERS
from registry.browse.image_config import MAX_STEPS, ImageConfig, parse_config, parse_time, readable_command
from storage.content import digest_of

DIGEST = digest_of(b"config")


def parsed(document: Any) -> ImageConfig:
    config = parse_config(DIGEST, json.dumps(document).encode())
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("created_by", "command"),
    [
        ('/bin/sh -c #(nop)  CMD ["bash"]', 'CMD ["bash"]'),
        ("/bin/sh -c apt-get update", "RUN apt-get update"),
        ("RUN /bin/sh -c apt-get update # buildkit", "RUN apt-get update"),
        ("RUN |1 A=1 /bin/sh -c make # buildkit", "RUN |1 A=1 make"),
        ("COPY . /app # buildkit", "COPY . /app"),
        ("WORKDIR /app", "WORKDIR /app"),
        ("bazel build ...", "bazel build ..."),
        ("RUNNING", "RUNNING"),
        ("", ""),
    ],
)
def test_commands_look_as_in_the_dockerfile(created_by: str, command: str) -> None:
    assert readable_command(created_by) == command


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123456789+01:00", datetime(2026, 1, 2, 2, 4, 5, 123456, tzinfo=UTC)),
        ("2026-01-02T03:04:05", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+23:00", None),
        ("yesterday", None),
        ("2" * 1000, None),
        (1767322800, None),
        (None, None),
    ],
)
def test_times(text: object, time: datetime | None) -> None:
    assert parse_time(text) == time


def test_what_is_shown() -> None:
    config = parsed(
        {
            "os": "linux",
            "architecture": "arm64",
            "variant": "v8",
            "author": "me",
            "config": {
                "User": "app",
                "WorkingDir": "/app",
                "Entrypoint": ["/app/run"],
                "Cmd": [],
                "Env": ["PATH=/bin"],
                "ExposedPorts": {"80/tcp": {}},
                "Volumes": {"/data": {}},
                "Labels": {"a": "<script>"},
                "StopSignal": "SIGINT",
                "Healthcheck": {"Test": ["CMD", "true"]},
            },
        }
    )
    view = config.view
    assert config.platform == "linux/arm64/v8"
    assert (view.user, view.working_dir, view.author, view.stop_signal) == ("app", "/app", "me", "SIGINT")
    assert (view.entrypoint, view.cmd, view.healthcheck) == (["/app/run"], [], ["CMD", "true"])
    assert (view.env, view.exposed_ports, view.volumes) == (["PATH=/bin"], ["80/tcp"], ["/data"])
    assert (view.labels, view.truncated) == ({"a": "<script>"}, False)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'"text"', b"[" * 100_000, b"{" + b"[]," * 60_000])
def test_what_is_no_config(data: bytes) -> None:
    assert parse_config(DIGEST, data) is None


def test_members_of_any_type() -> None:
    """A member of a wrong type counts as missing. A lone surrogate becomes a question mark, so that the result can be
    encoded in UTF-8."""
    wrong: list[Any] = [None, 1, "text", [], {}, [[1]], {"a": {"b": []}}]
    for value in wrong:
        names = ("Env", "Labels", "Cmd", "ExposedPorts", "Volumes", "User", "Healthcheck")
        config = parsed({"config": dict.fromkeys(names, value), "history": value, "os": value, "created": value})
        config.view.model_dump_json()
    assert parsed({"config": 1}).view.env == []
    half = parse_config(DIGEST, rb'{"author": "\ud800", "config": {"Labels": {"\udfff": "\ud800x"}}}')
    assert half is not None
    assert (half.view.author, half.view.labels) == ("?", {"?": "?x"})


def test_large_configs_are_cut() -> None:
    """Long labels, many labels, and texts that are too long together are cut."""
    long = parsed({"config": {"Labels": {"big": "x" * 1_000_000, "small": "y"}}}).view
    assert (len(long.labels["big"]), long.labels["small"], long.truncated) == (MAX_TEXT_CHARACTERS + 1, "y", True)
    many = parsed({"config": {"Labels": {f"l{n}": "v" for n in range(1000)}}}).view
    assert (len(many.labels), many.truncated) == (MAX_ENTRIES, True)
    much = parsed({"config": {"Env": ["x" * 4000] * 150, "Labels": {"a": "b"}}, "author": "me"}).view
    assert sum(map(len, much.env)) <= MAX_TOTAL_CHARACTERS + MAX_ENTRIES
    assert (much.labels, much.truncated) == ({}, True)
    steps = parsed({"history": [{"created_by": "x" * 4096}] * (MAX_STEPS + 5)})
    assert (len(steps.history), steps.more_history) == (MAX_STEPS, 5)
