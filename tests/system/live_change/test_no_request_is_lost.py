"""Tests that no request fails while the settings are reloaded and the workers are replaced under load."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.live_change.live_client import LiveConnection, push

CONNECTIONS = 64
REQUESTS = 5_000
PUSHES = 8
"""The number of clients that push at the same time."""
RELOADS = 10
RESTARTS = 2
PAUSE_SECONDS = 0.2
"""The pause between two requests on a connection, which leaves processor time for the reloads and restarts."""


def write_settings(folder: Path, number: int) -> Path:
    """Writes a settings file whose content differs for each number."""
    file = folder / "settings.toml"
    temporary = folder / "settings.toml.new"
    temporary.write_text(f"[gc]\ngrace = {1000 + number}\n")
    os.replace(temporary, file)
    return file


async def read(server: RegistryServer, requests: itertools.count[int], stop: asyncio.Event) -> int:
    """Sends requests, one after another, until all clients together have sent `REQUESTS` and `stop` is set. Returns the
    number of connections that it has opened."""
    async with LiveConnection(server.port) as connection:
        targets = itertools.cycle(["/v2/", "/v2/live/a/manifests/latest", "/v2/live/a/tags/list", "/livez-not-there"])
        while next(requests) < REQUESTS or not stop.is_set():
            target = next(targets)
            status, _, _ = await connection.ask("GET", target)
            assert status == (404 if target.endswith("there") else 200), target
            await asyncio.sleep(PAUSE_SECONDS)
        return connection.opened


async def push_until(server: RegistryServer, number: int, stop: asyncio.Event) -> int:
    """Pushes blobs and manifests until `stop` is set. Returns the number of pushes."""
    async with LiveConnection(server.port) as connection:
        for count in itertools.count(1):
            data = f"{number} {count}".encode().ljust(60_000, b".")
            await push(connection, f"live/push{number}", data, slow=0.05)
            if stop.is_set():
                return count
    raise AssertionError


async def change(server: RegistryServer, folder: Path) -> None:
    """Reloads the settings `RELOADS` times, and restarts the server `RESTARTS` times in between."""
    for number in range(RELOADS):
        write_settings(folder, number + 1)
        process = await asyncio.to_thread(entrepot, "reload", "--data", server.data, folder=folder)
        assert (process.returncode, process.stderr) == (0, "")
        assert process.stdout == "reloaded: gc.grace\n"
        if number % (RELOADS // RESTARTS) == 3:
            process = await asyncio.to_thread(entrepot, "restart", "--data", server.data, folder=folder)
            assert (process.returncode, process.stderr) == (0, "")


async def run_load(server: RegistryServer, folder: Path) -> None:
    """Runs the clients while `change` reloads and restarts. Raises an error if a request fails."""
    async with LiveConnection(server.port) as connection:
        await push(connection, "live/a", b"content")
    requests, stop = itertools.count(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(read(server, requests, stop)) for _ in range(CONNECTIONS)]
        pushes = [group.create_task(push_until(server, number, stop)) for number in range(PUSHES)]
        await change(server, folder)
        stop.set()
    assert next(requests) >= REQUESTS
    assert sum(task.result() for task in pushes) >= PUSHES
    assert all(task.result() > 1 for task in readers)  # the server has closed each connection at least once


@pytest.mark.slow
def test_no_request_is_lost(tmp_path: Path) -> None:
    """While the settings are reloaded 10 times and all workers are replaced twice, 5,000 requests on 64 persistent
    connections and the pushes of 8 clients all succeed."""
    settings = write_settings(tmp_path, 0)
    with running_server(tmp_path, "--config", str(settings), workers=2) as server:
        old_workers = set(server.worker_pids())
        asyncio.run(run_load(server, tmp_path))
        assert not old_workers & set(server.worker_pids())
    assert server.log_text().count("reloaded: gc.grace") == RELOADS
    assert server.log_text().count("all workers were replaced") == RESTARTS
    assert "Traceback" not in server.log_text()
