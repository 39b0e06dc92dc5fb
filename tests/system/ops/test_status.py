"""Tests of `entrepot status` and `/api/v1/status` with a running server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.fakes.commands import command_environment, entrepot
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

TIMEOUT_SECONDS = 60.0


def status_of(server: RegistryServer, *args: str) -> dict[str, Any]:
    """Runs `entrepot status --json`. Returns its output."""
    command = entrepot("status", "--data", server.data, "--json", *args, folder=server.data.parent)
    assert command.returncode in (0, 3), command.stderr
    output: dict[str, Any] = json.loads(command.stdout)
    return output


def wait_for_workers(server: RegistryServer, pids: list[int]) -> dict[str, Any]:
    """Waits until the status contains exactly these workers. Returns the status."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        status = status_of(server)
        if sorted(worker["pid"] for worker in status["workers"]) == sorted(pids):
            return status
        assert time.monotonic() < deadline, status


def test_status_of_a_server(tmp_path: Path) -> None:
    """The command shows the workers of a running server, and the API shows the same start time. A killed worker
    disappears at once, and its replacement appears. Without a running server, the command explains how to start one,
    and exits with 3."""
    with running_server(tmp_path, workers=2) as server:
        first_status = wait_for_workers(server, server.worker_pids())
        assert first_status["running"]
        assert first_status["disk"]["free"] > 0
        assert plain_request("POST", f"{server.url}/v2/team/app/blobs/uploads/").status_code == 202
        over_http = plain_request("GET", f"{server.url}/api/v1/status").json()
        assert over_http["uploads"]["open"] == 1
        assert over_http["started"] == first_status["started"]
        killed, other_worker = server.worker_pids()
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while killed in server.worker_pids():
            assert time.monotonic() < deadline
        assert killed not in [worker["pid"] for worker in status_of(server)["workers"]]
        while len(pids := server.worker_pids()) < 2:
            assert time.monotonic() < deadline
        last_status = wait_for_workers(server, pids)
        assert other_worker in pids
        assert last_status["started"] == first_status["started"]
        text = entrepot("status", "--data", server.data, folder=tmp_path).stdout
        assert all(str(pid) in text for pid in pids)
        assert "1 upload open" in text
    command = entrepot("status", "--data", server.data, folder=tmp_path)
    assert command.returncode == 3
    assert "start a server with `entrepot serve`" in command.stderr
    assert not status_of(server)["running"]


def test_status_of_an_unreachable_upstream(tmp_path: Path) -> None:
    """After several failed requests, the status shows that the circuit breaker of the upstream's endpoint is open, so
    that no requests are sent to it. The status also shows the last error and the time until the next attempt."""
    settings = tmp_path / "entrepot.toml"
    settings.write_text(
        '[[upstream]]\nname = "dead.test"\ndefault = true\nendpoints = ["http://127.0.0.1:9"]\nconnect_timeout = 1\n'
    )
    with running_server(tmp_path, "--config", str(settings), workers=1) as server:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:  # the breaker is open for five seconds at first, and longer after each further failure
            for _ in range(3):
                assert plain_request("GET", f"{server.url}/v2/library/app/manifests/1").status_code >= 500
            (upstream,) = status_of(server, "--config", str(settings))["upstreams"]
            (endpoint,) = upstream["endpoints"]
            text = entrepot("status", "-c", settings, "--data", server.data, folder=tmp_path).stdout
            if endpoint["breaker"] == "open" and endpoint["retry_in"] > 0 and "left alone after failures" in text:
                break
            assert time.monotonic() < deadline, (endpoint, text)
        assert "127.0.0.1:9 cannot be reached" in endpoint["last_error"]
        assert endpoint["retry_in"] <= 60


def test_watch_in_a_terminal(tmp_path: Path) -> None:
    """In a terminal `--watch` redraws the status every second, until Ctrl-C."""
    with running_server(tmp_path, workers=1) as server:
        wait_for_workers(server, server.worker_pids())
        terminal, process_terminal = pty.openpty()
        command = [sys.executable, "-m", "registry", "status", "--watch", "--data", str(server.data)]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=command_environment(), stdout=process_terminal, stderr=process_terminal
        )
        os.close(process_terminal)
        output = b""
        try:
            while output.count(b"runs for") < 3:
                output += os.read(terminal, 65536)
            process.send_signal(signal.SIGINT)
            while True:
                try:
                    if not (data := os.read(terminal, 65536)):
                        break
                except OSError:  # the process has closed the terminal
                    break
                output += data
            assert process.wait(TIMEOUT_SECONDS) == 128 + signal.SIGINT
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
        assert b"a second" in output
        assert b"entrepot: interrupted" in output
        assert b"\x1b[?25h" in output  # the cursor is shown again


def test_watch_needs_a_terminal(tmp_path: Path) -> None:
    """`--watch` is refused if the output is a pipe, and the message names the alternative."""
    with running_server(tmp_path, workers=1) as server:
        command = entrepot("status", "--watch", "--data", server.data, folder=tmp_path)
        assert command.returncode == 2
        assert "with --json" in command.stderr
