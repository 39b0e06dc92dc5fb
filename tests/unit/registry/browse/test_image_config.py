"""`parse_config` reads the config of an image and makes a view of it for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from registry.browse.bounded_text import MAX_ENTRIES, MAX_TEXT_CHARACTERS, MAX_TOTAL_CHARACTERS
from registry.browse.image_config import MAX_STEPS, ImageConfig, parse_config, readable_command
from storage.content import digest_of
from storage.image_times import parse_time

DIGEST = digest_of(b"config")


def parse(document: Any) -> ImageConfig:
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
        (" COPY . /app  # buildkit \n", "COPY . /app"),
        ("# buildkit", ""),
        (f"a{' ' * 4000}b", f"a{' ' * 4000}b"),
        ("bazel build ...", "bazel build ..."),
        ("RUNNING", "RUNNING"),
        ("", ""),
    ],
)
def test_commands_look_as_in_the_dockerfile(created_by: str, command: str) -> None:
    """The command of a history entry is shown as in the Dockerfile. Build arguments stay before it."""
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
def test_times_are_parsed(text: object, time: datetime | None) -> None:
    """Times are converted to UTC. The zero time of Go, and a value that is not a time, become None."""
    assert parse_time(text) == time


def test_the_view_of_a_config() -> None:
    """The view has all settings of the config that people look for."""
    config = parse(
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
def test_data_that_is_not_a_config(data: bytes) -> None:
    """For data that is not a JSON object, or has too many levels or too many elements to parse safely, there is no
    config."""
    assert parse_config(DIGEST, data) is None


def test_members_of_wrong_types_are_ignored() -> None:
    """A member of a wrong type counts as missing. A lone surrogate becomes a question mark, so that the result can be
    encoded in UTF-8."""
    wrong_values: list[Any] = [None, 1, "text", [], {}, [[1]], {"a": {"b": []}}]
    for value in wrong_values:
        names = ("Env", "Labels", "Cmd", "ExposedPorts", "Volumes", "User", "Healthcheck")
        config = parse({"config": dict.fromkeys(names, value), "history": value, "os": value, "created": value})
        config.view.model_dump_json()
    assert parse({"config": 1}).view.env == []
    with_surrogates = parse_config(DIGEST, rb'{"author": "\ud800", "config": {"Labels": {"\udfff": "\ud800x"}}}')
    assert with_surrogates is not None
    assert (with_surrogates.view.author, with_surrogates.view.labels) == ("?", {"?": "?x"})


def test_large_configs_are_cut() -> None:
    """Long labels are cut, and so is a large number of labels. Texts that are together too long, and a long history,
    are cut as well."""
    long_labels = parse({"config": {"Labels": {"big": "x" * 1_000_000, "small": "y"}}}).view
    assert (len(long_labels.labels["big"]), long_labels.labels["small"], long_labels.truncated) == (
        MAX_TEXT_CHARACTERS + 1,
        "y",
        True,
    )
    many_labels = parse({"config": {"Labels": {f"l{n}": "v" for n in range(1000)}}}).view
    assert (len(many_labels.labels), many_labels.truncated) == (MAX_ENTRIES, True)
    long_env = parse({"config": {"Env": ["x" * 4000] * 150, "Labels": {"a": "b"}}, "author": "me"}).view
    assert sum(map(len, long_env.env)) <= MAX_TOTAL_CHARACTERS + MAX_ENTRIES
    assert (long_env.labels, long_env.truncated) == ({}, True)
    long_history = parse({"history": [{"created_by": "x" * 4096}] * (MAX_STEPS + 5)})
    assert (len(long_history.history), long_history.omitted_history) == (MAX_STEPS, 5)
