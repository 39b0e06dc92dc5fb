"""`entrepot status` and `/api/v1/status` beside a running server."""

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

DEADLINE = 30.0


def shown(server: RegistryServer, *args: str) -> dict[str, Any]:
    done = entrepot("status", "--data", server.data, "--json", *args, folder=server.data.parent)
    assert done.returncode in (0, 3), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def until(server: RegistryServer, pids: list[int]) -> dict[str, Any]:
    """Returns the status as soon as these workers have reported. Fails after a while."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = shown(server)
        if sorted(worker["pid"] for worker in found["workers"]) == sorted(pids):
            return found
        assert time.monotonic() < deadline, found


def test_status_of_a_server(tmp_path: Path) -> None:
    """The command and the API show the same workers. A killed worker disappears from both at once, and its replacement
    appears. Without a running server the command says what to do, and exits with 3."""
    with running_server(tmp_path, workers=2) as server:
        before = until(server, server.worker_pids())
        assert before["running"]
        assert before["disk"]["free"] > 0
        assert plain_request("POST", f"{server.url}/v2/team/app/blobs/uploads/").status_code == 202
        over_http = plain_request("GET", f"{server.url}/api/v1/status").json()
        assert over_http["uploads"]["open"] == 1
        assert over_http["started"] == before["started"]
        killed, other = server.worker_pids()
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE
        while killed in server.worker_pids():
            assert time.monotonic() < deadline
        assert killed not in [worker["pid"] for worker in shown(server)["workers"]]
        while len(pids := server.worker_pids()) < 2:
            assert time.monotonic() < deadline
        after = until(server, pids)
        assert other in pids
        assert after["started"] == before["started"]
        text = entrepot("status", "--data", server.data, folder=tmp_path).stdout
        assert all(str(pid) in text for pid in pids)
        assert "1 upload open" in text
    done = entrepot("status", "--data", server.data, folder=tmp_path)
    assert done.returncode == 3
    assert "start it with: entrepot serve" in done.stderr
    assert not shown(server)["running"]


def test_status_of_a_dead_upstream(tmp_path: Path) -> None:
    """After several requests have failed, the status shows that the circuit breaker of the upstream's endpoint is open,
    the last error, and when the endpoint is tried again."""
    settings = tmp_path / "entrepot.toml"
    settings.write_text(
        '[[upstream]]\nname = "dead.test"\ndefault = true\nendpoints = ["http://127.0.0.1:9"]\nconnect_timeout = 1\n'
    )
    with running_server(tmp_path, "--config", str(settings), workers=1) as server:
        deadline = time.monotonic() + DEADLINE
        while True:
            assert plain_request("GET", f"{server.url}/v2/library/app/manifests/1").status_code >= 500
            (upstream,) = shown(server, "--config", str(settings))["upstreams"]
            (endpoint,) = upstream["endpoints"]
            if endpoint["breaker"] == "open":
                break
            assert time.monotonic() < deadline, endpoint
        assert "127.0.0.1:9 cannot be reached" in endpoint["last_error"]
        assert 0 < endpoint["retry_in"] <= 60
        text = entrepot("status", "-c", settings, "--data", server.data, folder=tmp_path).stdout
        assert "left alone after failures" in text


def test_watch_in_a_terminal(tmp_path: Path) -> None:
    """In a terminal `--watch` redraws the status every second, until Ctrl-C."""
    with running_server(tmp_path, workers=1) as server:
        until(server, server.worker_pids())
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "registry", "status", "--watch", "--data", str(server.data)]
        process = subprocess.Popen(command, cwd=tmp_path, env=command_environment(), stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown_text = b""
        try:
            while shown_text.count(b"runs for") < 3:
                shown_text += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            while True:
                try:
                    if not (more := os.read(ours, 65536)):
                        break
                except OSError:  # the other end is closed
                    break
                shown_text += more
            assert process.wait(DEADLINE) == 128 + signal.SIGINT
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert b"a second" in shown_text
        assert b"entrepot: interrupted" in shown_text
        assert b"\x1b[?25h" in shown_text  # the cursor is shown again


def test_watch_needs_a_terminal(tmp_path: Path) -> None:
    """`--watch` into a pipe is refused, and the message says what to do instead."""
    with running_server(tmp_path, workers=1) as server:
        done = entrepot("status", "--watch", "--data", server.data, folder=tmp_path)
        assert done.returncode == 2
        assert "with --json" in done.stderr
