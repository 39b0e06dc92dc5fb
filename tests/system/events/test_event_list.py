"""The list and the stream of events in a registry with accounts: over HTTP and with `entrepot events`."""

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

from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.outbox import LIST_READER, MAX_ADDED_EVENTS, EventAction, EventReader, NewEvent
from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, Auth, code_of
from tests.fakes.commands import command_environment, entrepot, entrepot_output
from tests.fakes.event_site import digest_named, event_site, push
from tests.fakes.forked_process import ForkedProcess
from tests.fakes.plain_client import plain_client

KEPT = '[events]\nkeep = "1h"\n'
ESTABLISHED = b"\x01"
"""The state of a connection in TCP_INFO (tcp(7))."""
MIB = 1024 * 1024
ROOT = (ADMIN, PASSWORD)
SETTINGS = ("--config", "entrepot.toml", "--data", "data")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    folder = tmp_path_factory.mktemp("events")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    with event_site(folder, KEPT) as server:
        yield AdminSite(server, folder)


def pushed(site: AdminSite, repo: str, tag: str, name: str, auth: tuple[str, str] = ROOT) -> None:
    assert push(site.server, repo, tag, name, auth=auth).status_code == 201


def reader_of(site: AdminSite, repo: str, *actions: str) -> tuple[str, str]:
    user = site.user()
    site.done("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": repo, "actions": actions or ["pull"]})
    return user


@contextlib.contextmanager
def stream(site: AdminSite, auth: Auth, after: int | None = None, **query: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Opens a stream and yields its messages, each as a dictionary of its fields."""
    headers = {"accept": "text/event-stream"} | ({} if after is None else {"last-event-id": str(after)})
    with (
        plain_client(site.server.url, timeout=60) as client,
        client.stream("GET", "/api/v1/events", auth=auth, headers=headers, params=query) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith("retry: ")  # the stream has begun
        assert next(lines) == ""
        yield _messages(lines)


def _messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    fields: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            continue  # a comment
        if line:
            name, _, value = line.partition(": ")
            fields[name] = json.loads(value) if name == "data" else value
        elif fields:
            yield fields
            fields = {}


def last_number(site: AdminSite) -> int:
    items = site.done("GET", "/events", limit=1)["items"]
    return int(items[0]["number"]) if items else 0


def test_an_admin_lists_all_and_a_reader_what_it_may_pull(site: AdminSite) -> None:
    """An account gets the events of repositories from which it may pull, without the address of the client. If it may
    push, the events have the address."""
    mine, other = f"team/{site.name('repo')}", f"team/{site.name('repo')}"
    pushed(site, mine, "v1", "first")
    pushed(site, other, "v1", "second")
    reader, pusher = reader_of(site, mine), reader_of(site, mine, "pull", "push")
    every = site.done("GET", "/events")["items"]
    assert [(event["action"], event["repository"]) for event in every[:2]] == [("push", other), ("push", mine)]
    assert (every[0]["digest"], every[0]["tag"], every[0]["actor"]) == (digest_named("second"), "v1", ADMIN)
    (seen,) = site.done("GET", "/events", auth=reader)["items"]
    assert (seen["repository"], seen["address"], seen["user_agent"]) == (mine, None, None)
    (seen,) = site.done("GET", "/events", auth=pusher)["items"]
    assert seen["address"] == "127.0.0.1"
    assert site.done("GET", "/events", auth=site.user())["items"] == []


def test_pages_and_filters(site: AdminSite) -> None:
    """The pages have every event once. Filters select an action and a repository."""
    repo = f"team/{site.name('repo')}"
    for number in range(5):
        pushed(site, repo, "v1", f"{repo} {number}")
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"repository": repo, "limit": 2}
    while True:
        page = site.done("GET", "/events", **query)
        found += page["items"]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    numbers = [event["number"] for event in found]
    assert len(numbers) == 5
    assert numbers == sorted(numbers, reverse=True)
    assert site.done("GET", "/events", repository=repo, action="delete")["items"] == []
    for wrong in ({"after": "x"}, {"action": "other"}, {"limit": 0}):
        assert site.call("GET", "/events", **wrong).status_code in (400, 422)


def test_a_stream_sends_what_happens_next_and_goes_on_after_a_break(site: AdminSite) -> None:
    """A stream begins with the next event. A stream that names the last event that the client got misses none."""
    repo = f"team/{site.name('repo')}"
    with stream(site, ROOT) as messages:
        pushed(site, repo, "v1", f"{repo} 1")
        pushed(site, repo, "v1", f"{repo} 2")
        first, second = next(messages), next(messages)
    assert (first["event"], first["data"]["repository"], first["data"]["digest"]) == (
        *("push", repo, digest_named(f"{repo} 1")),
    )
    assert second["data"]["previous"] == first["data"]["digest"]
    pushed(site, repo, "v1", f"{repo} 3")
    with stream(site, ROOT, after=int(first["id"])) as messages:
        assert [next(messages)["data"]["digest"] for _ in range(2)] == [digest_named(f"{repo} {n}") for n in (2, 3)]


def test_a_stream_has_what_the_reader_may_pull_and_ends_with_its_account(site: AdminSite) -> None:
    """A stream has only events of repositories from which the account may pull. It ends when the account is
    disabled."""
    mine, other = f"team/{site.name('repo')}", f"team/{site.name('repo')}"
    reader = reader_of(site, mine)
    with stream(site, reader) as messages:
        pushed(site, other, "v1", "not yours")
        pushed(site, mine, "v1", "yours")
        assert next(messages)["data"]["repository"] == mine
        site.done("PATCH", f"/users/{reader[0]}", {"enabled": False})
        assert list(messages) == []


@pytest.mark.slow
async def test_a_reader_that_stops_reading_is_cut_off(tmp_path: Path) -> None:
    """If a client stops reading a stream of 20 MB, the server does not keep it in memory. It closes the connection, and
    answers other clients meanwhile."""
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as store:
        await store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
        by = Actor("somebody", user_agent="x" * 256)
        for _ in range(60):
            events = [NewEvent(EventAction.PULL, "team/app", time.time(), by, reason="x" * 256)] * MAX_ADDED_EVENTS
            await store.outbox.add(events)
    with event_site(tmp_path, KEPT, workers=1) as server, socket.socket() as sock:
        (worker,) = server.worker_pids()
        memory = resident_bytes(worker)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"GET /api/v1/events?after=0 HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n")
        deadline = time.monotonic() + 120
        with plain_client(server.url) as client:
            while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == ESTABLISHED:
                assert time.monotonic() < deadline
                assert client.get("/api/v1/events?limit=1").status_code == 200
                assert resident_bytes(worker) < memory + 16 * MIB
                await asyncio.sleep(1)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_server_that_stops_ends_its_streams(tmp_path: Path) -> None:
    """A stop of the server ends the streams, and so takes less time than running requests would be given."""
    with event_site(tmp_path, KEPT, workers=1) as server:
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
        assert "cut 1 requests" not in server.log_text()


def test_without_kept_events(tmp_path: Path) -> None:
    """If the registry keeps no events, the error names the setting that keeps them."""
    with event_site(tmp_path, 'log_level = "info"\n', workers=1) as server, plain_client(server.url) as client:
        answer = client.get("/api/v1/events")
        assert (answer.status_code, code_of(answer)) == (405, "UNSUPPORTED")
        assert "events.keep" in answer.text
        for command in ("list", "tail"):
            done = entrepot("events", command, *SETTINGS, folder=tmp_path)
            assert done.returncode == 1
            assert "events.keep" in done.stderr


def test_the_command_lists_events(site: AdminSite) -> None:
    """`events list` prints a table. With --json, it prints the fields of the API."""
    repo = f"team/{site.name('repo')}"
    pushed(site, repo, "v1", f"{repo} 1")
    table = entrepot_output("events", "list", "--repository", repo, *SETTINGS, folder=site.folder)
    assert "push" in table
    assert f"{repo}:v1" in table
    as_json = entrepot_output("events", "list", "--repository", repo, "--json", *SETTINGS, folder=site.folder)
    assert json.loads(as_json) == site.done("GET", "/events", repository=repo)["items"]
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
    """Without dead letters, `events retry` sends nothing. It needs to be told which ones to send."""
    assert site.done("POST", "/events/retry", {}) == {"retried": 0}
    assert entrepot("events", "retry", "--all", *SETTINGS, folder=site.folder).returncode == 1
    assert entrepot("events", "retry", *SETTINGS, folder=site.folder).returncode == 2


def test_bad_stream_requests(site: AdminSite) -> None:
    """A position that is no number is refused; so is a stream without a login."""
    headers = {"accept": "text/event-stream", "last-event-id": "x"}
    with httpx2.Client(base_url=site.server.url, trust_env=False, verify=False) as client:
        assert client.get("/api/v1/events", headers=headers, auth=ROOT).status_code == 400
        assert client.get("/api/v1/events", headers=headers).status_code == 401
