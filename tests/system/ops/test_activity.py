"""Tests of `/api/v1/activity`, which counts pulls and pushes, with a running server of two workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.fakes.event_site import push
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

TIMEOUT_SECONDS = 60.0


def expect_total(server: RegistryServer, pulls: int, pushes: int) -> None:
    """Waits until the API returns these counts. A worker counts a request only after it has sent the response."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        total: dict[str, Any] = plain_request("GET", f"{server.url}/api/v1/activity").json()["month"]["total"]
        if (total["pulls"], total["pushes"]) == (pulls, pushes):
            return
        assert time.monotonic() < deadline, total


def test_activity_survives_restarts(tmp_path: Path) -> None:
    """The counts include the requests of all workers. No count is lost when a worker is killed or the server stops, and
    no request is counted twice."""

    def pull() -> None:
        assert plain_request("GET", f"{server.url}/v2/team/app/manifests/v1").status_code == 200

    with running_server(tmp_path, workers=2) as server:
        assert push(server, "team/app", "v1", "one").status_code == 201
        for _ in range(6):
            pull()
        expect_total(server, 6, 1)
        killed, _ = server.worker_pids()
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while killed in server.worker_pids():
            assert time.monotonic() < deadline
        pull()
        expect_total(server, 7, 1)
    with running_server(tmp_path, workers=2) as server:
        expect_total(server, 7, 1)
        pull()
        expect_total(server, 8, 1)
