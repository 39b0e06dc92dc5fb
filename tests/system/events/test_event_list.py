"""Tests of the list and the stream of events in a registry with accounts, over the API and with `entrepot events`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.admin.event_stream import MAX_STREAMS_PER_VISITOR
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.outbox import LIST_READER, MAX_ADDED_EVENTS, EventAction, EventReader, NewEvent
from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, Auth, code_of
from tests.fakes.commands import command_environment, entrepot, entrepot_output
from tests.fakes.event_site import digest_named, event_site, push
from tests.fakes.forked_process import ForkedProcess
from tests.fakes.plain_client import plain_client

KEEP_EVENTS = '[events]\nkeep = "1h"\n'
MIB = 1024 * 1024
ADMIN_LOGIN = (ADMIN, PASSWORD)
SETTINGS = ("--config", "entrepot.toml", "--data", "data")
"""The options with which commands use the settings and the data directory of the server."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """A server with accounts that keeps its events for an hour."""
    folder = tmp_path_factory.mktemp("events")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with event_site(folder, KEEP_EVENTS) as server:
        yield AdminSite(server, folder)


def pushed(site: AdminSite, repo: str, tag: str, name: str, auth: tuple[str, str] = ADMIN_LOGIN) -> None:
    """Pushes an image, which must succeed."""
    assert push(site.server, repo, tag, name, auth=auth).status_code == 201


def reader_of(site: AdminSite, repo: str, *actions: str) -> tuple[str, str]:
    """Adds a user who has these actions (by default only pull) on the repository. Returns the login."""
    user = site.user()
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": repo, "actions": actions or ["pull"]})
    return user


@contextlib.contextmanager
def stream(site: AdminSite, auth: Auth, after: int | None = None, **query: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Opens a stream of events, and yields an iterator over its messages. Each message is a dictionary of its fields.
    `after`: the number of the last event that the client has got."""
    headers = {"accept": "text/event-stream"} | ({} if after is None else {"last-event-id": str(after)})
    with (
        plain_client(site.server.url, timeout=60) as client,
        client.stream("GET", "/api/v1/events", auth=auth, headers=headers, params=query) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith("retry: ")  # the first line of every stream
        assert next(lines) == ""
        yield _messages(lines)


def _messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Parses the lines of a server-sent event stream. Skips comments."""
    fields: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = json.loads(value) if name == "data" else value
        elif fields:
            yield fields
            fields = {}


def last_number(site: AdminSite) -> int:
    """Returns the number of the newest event, or 0 if there is none."""
    items = site.call_ok("GET", "/events", limit=1)["items"]
    return int(items[0]["number"]) if items else 0


def test_list_depends_on_the_rights_of_the_account(site: AdminSite) -> None:
    """The list for an admin has all events. The list for another account has the events of repositories from which the
    account may pull. The events have the address of the client only if the account may push."""
    readable_repo, other_repo = f"team/{site.name('repo')}", f"team/{site.name('repo')}"
    pushed(site, readable_repo, "v1", "first")
    pushed(site, other_repo, "v1", "second")
    reader, pusher = reader_of(site, readable_repo), reader_of(site, readable_repo, "pull", "push")
    all_events = site.call_ok("GET", "/events")["items"]
    assert [(event["action"], event["repository"]) for event in all_events[:2]] == [
        ("push", other_repo),
        ("push", readable_repo),
    ]
    assert (all_events[0]["digest"], all_events[0]["tag"], all_events[0]["actor"]) == (
        digest_named("second"),
        "v1",
        ADMIN,
    )
    (event,) = site.call_ok("GET", "/events", auth=reader)["items"]
    assert (event["repository"], event["address"], event["user_agent"]) == (readable_repo, None, None)
    (event,) = site.call_ok("GET", "/events", auth=pusher)["items"]
    assert event["address"] == "127.0.0.1"
    assert site.call_ok("GET", "/events", auth=site.user())["items"] == []


def test_pages_and_filters(site: AdminSite) -> None:
    """The pages of the list have every event once. The list can be filtered by repository and action."""
    repo = f"team/{site.name('repo')}"
    for number in range(5):
        pushed(site, repo, "v1", f"{repo} {number}")
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"repository": repo, "limit": 2}
    while True:
        page = site.call_ok("GET", "/events", **query)
        found += page["items"]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    numbers = [event["number"] for event in found]
    assert len(numbers) == 5
    assert numbers == sorted(numbers, reverse=True)
    assert site.call_ok("GET", "/events", repository=repo, action="delete")["items"] == []
    for wrong in ({"after": "x"}, {"action": "other"}, {"limit": 0}):
        assert site.call("GET", "/events", **wrong).status_code in (400, 422)


def test_stream_continues_after_the_last_event_id(site: AdminSite) -> None:
    """A stream begins with the next event. If the client sends the number of the last event that it has got, the stream
    continues after this event."""
    repo = f"team/{site.name('repo')}"
    with stream(site, ADMIN_LOGIN) as messages:
        pushed(site, repo, "v1", f"{repo} 1")
        pushed(site, repo, "v1", f"{repo} 2")
        first, second = next(messages), next(messages)
    assert (first["event"], first["data"]["repository"], first["data"]["digest"]) == (
        *("push", repo, digest_named(f"{repo} 1")),
    )
    assert second["data"]["previous"] == first["data"]["digest"]
    pushed(site, repo, "v1", f"{repo} 3")
    with stream(site, ADMIN_LOGIN, after=int(first["id"])) as messages:
        assert [next(messages)["data"]["digest"] for _ in range(2)] == [digest_named(f"{repo} {n}") for n in (2, 3)]


def test_stream_depends_on_the_rights_of_the_account(site: AdminSite) -> None:
    """A stream has only the events of repositories from which the account may pull. It ends when the account is
    disabled."""
    readable_repo, other_repo = f"team/{site.name('repo')}", f"team/{site.name('repo')}"
    reader = reader_of(site, readable_repo)
    with stream(site, reader) as messages:
        pushed(site, other_repo, "v1", "not yours")
        pushed(site, readable_repo, "v1", "yours")
        assert next(messages)["data"]["repository"] == readable_repo
        site.call_ok("PATCH", f"/users/{reader[0]}", {"enabled": False})
        assert list(messages) == []


@pytest.mark.slow
async def test_client_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    """If a client does not read a stream of 20 MB, the server does not load the stream into memory, and closes the
    connection after a while. Other clients are served meanwhile."""
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as store:
        await store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
        by = Actor("somebody", user_agent="x" * 256)
        for _ in range(60):
            events = [NewEvent(EventAction.PULL, "team/app", time.time(), by, reason="x" * 256)] * MAX_ADDED_EVENTS
            await store.outbox.add(events)
    with event_site(tmp_path, KEEP_EVENTS, workers=1) as server, socket.socket() as sock:
        (worker,) = server.worker_pids()
        memory = resident_bytes(worker)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"GET /api/v1/events?after=0 HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 120
        with plain_client(server.url) as client:
            while "GET /api/v1/events status=200(cut off)" not in server.log_text():
                assert time.monotonic() < deadline
                assert client.get("/api/v1/events?limit=1").status_code == 200
                assert resident_bytes(worker) < memory + 16 * MIB
                await asyncio.sleep(1)


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_closed_streams_leave_their_places_at_once(tmp_path: Path) -> None:
    """A client that closes its streams, such as a browser that reloads a page, gets new ones at once, although no event
    happens in the meantime. Nothing is logged about the closed streams: they are no failures."""
    with event_site(tmp_path, KEEP_EVENTS, workers=1) as server:

        def open_stream(stack: contextlib.ExitStack) -> int:
            """Requests a stream, receives its first message or an error, and returns the status. The connection stays
            open until `stack` is closed."""
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            host = f"127.0.0.1:{server.port}"
            sock.sendall(f"GET /api/v1/events HTTP/1.1\r\nhost: {host}\r\naccept: text/event-stream\r\n\r\n".encode())
            received = b""
            while b"\n\n" not in received and b"errors" not in received:
                received += sock.recv(4096)
            return int(received.split()[1])

        for _ in range(3):
            closed_at = time.monotonic()
            with contextlib.ExitStack() as stack:
                statuses: list[int] = []
                while statuses.count(200) < MAX_STREAMS_PER_VISITOR:
                    statuses.append(open_stream(stack))
                    assert statuses[-1] in (200, 429)
                    assert time.monotonic() < closed_at + 4  # the timeout of a half-closed connection is 5 s
                assert open_stream(stack) == 429
        text = server.log_text()
    assert "Traceback" not in text
    assert "ERROR" not in text


def test_streams_end_when_the_server_stops(tmp_path: Path) -> None:
    """When the server stops, it ends its streams at once. So the stop takes less time than `shutdown_grace`, the time
    that running requests are given."""
    with event_site(tmp_path, KEEP_EVENTS, workers=1) as server:
        with plain_client(server.url, timeout=60) as client:
            headers = {"accept": "text/event-stream"}
            with client.stream("GET", "/api/v1/events", headers=headers) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("retry: ")
                started = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line] == []
        assert server.stop() == 0
        assert time.monotonic() - started < 25  # `shutdown_grace` is 30 s
        assert "cut off 1 requests" not in server.log_text()


def test_without_kept_events(tmp_path: Path) -> None:
    """If the registry keeps no events, the API and the commands fail, and the error names the setting `events.keep`."""
    with event_site(tmp_path, 'log_level = "info"\n', workers=1) as server, plain_client(server.url) as client:
        answer = client.get("/api/v1/events")
        assert (answer.status_code, code_of(answer)) == (405, "UNSUPPORTED")
        assert "events.keep" in answer.text
        for command in ("list", "tail"):
            result = entrepot("events", command, *SETTINGS, folder=tmp_path)
            assert result.returncode == 1
            assert "events.keep" in result.stderr


def test_the_command_lists_events(site: AdminSite) -> None:
    """`events list` prints a table. With --json, it prints the same document as the API."""
    repo = f"team/{site.name('repo')}"
    pushed(site, repo, "v1", f"{repo} 1")
    table = entrepot_output("events", "list", "--repository", repo, *SETTINGS, folder=site.folder)
    assert "push" in table
    assert f"{repo}:v1" in table
    as_json = entrepot_output("events", "list", "--repository", repo, "--json", *SETTINGS, folder=site.folder)
    assert json.loads(as_json) == site.call_ok("GET", "/events", repository=repo)["items"]
    assert entrepot("events", "list", "--action", "other", *SETTINGS, folder=site.folder).returncode == 2


def test_the_command_follows_events(site: AdminSite) -> None:
    """`events tail` prints each event as it happens, until Ctrl-C."""
    repo = f"team/{site.name('repo')}"
    after = last_number(site)
    command = ["events", "tail", "--json", "--after", str(after), "--repository", repo, *SETTINGS]
    with ForkedProcess(
        "registry", *command, cwd=site.folder, env=command_environment(), stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        for number in range(2):
            pushed(site, repo, "v1", f"{repo} {number}")
            event = json.loads(process.stdout.readline())
            assert (event["action"], event["digest"]) == ("push", digest_named(f"{repo} {number}"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_retry_without_dead_letters(site: AdminSite) -> None:
    """Without dead letters (events whose delivery was given up), `events retry` has nothing to send again. The command
    needs the numbers of events, or --all."""
    assert site.call_ok("POST", "/events/retry", {}) == {"retried": 0}
    assert entrepot("events", "retry", "--all", *SETTINGS, folder=site.folder).returncode == 1
    assert entrepot("events", "retry", *SETTINGS, folder=site.folder).returncode == 2


def test_bad_stream_requests(site: AdminSite) -> None:
    """A stream with a Last-Event-ID that is no number gets 400. A stream without a login gets 401."""
    headers = {"accept": "text/event-stream", "last-event-id": "x"}
    with httpx2.Client(base_url=site.server.url, trust_env=False, verify=False) as client:
        assert client.get("/api/v1/events", headers=headers, auth=ADMIN_LOGIN).status_code == 400
        assert client.get("/api/v1/events", headers=headers).status_code == 401
