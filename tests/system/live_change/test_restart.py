"""Tests of `entrepot restart` and of SIGUSR2, which replace all workers without lost requests, and of socket activation
by systemd."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.commands import command_environment, entrepot
from tests.fakes.forked_process import ROOT, ForkedProcess
from tests.fakes.metrics_reader import scrape
from tests.fakes.raw_http import RawConnection
from tests.system.live_change.conftest import LiveSite
from tests.system.server.app_process import children, wait_for


def is_replaced(site: LiveSite, old_workers: list[int]) -> bool:
    """Returns whether two workers run, and none of them is in `old_workers`."""
    workers = site.server.worker_pids()
    return len(workers) == 2 and not set(workers) & set(old_workers)


def test_restart(site: LiveSite) -> None:
    """A restart executes the program again in the same parent process, and replaces all workers. It applies a changed
    setting that a reload has refused. The metrics keep their counts. SIGUSR2 does the same."""
    old_workers, parent = site.server.worker_pids(), site.server.pid
    site.write('restart_grace = 60\nmetrics.allow = ["127.0.0.0/8"]\n')
    assert site.run("reload").returncode == 1
    process = site.run("restart")
    assert (process.returncode, process.stdout, process.stderr) == (0, "all workers were replaced\n", "")
    wait_for(lambda: is_replaced(site, old_workers))
    assert site.server.pid == parent
    assert not site.server.ended
    assert site.run("reload").stdout == "reloaded: no setting has changed\n"
    old_workers = site.server.worker_pids()
    os.kill(parent, signal.SIGUSR2)
    wait_for(lambda: is_replaced(site, old_workers))
    assert site.may_push()
    metrics = scrape(site.server.url)
    assert metrics.total("entrepot_worker_starts_total") == 6  # two workers at the start and after each restart
    assert metrics.total("entrepot_workers") == 2


def test_push_in_progress_is_completed(site: LiveSite) -> None:
    """During a restart, the old worker completes its request of a push. The new workers can continue the upload
    session."""
    data = b"half" + b"rest"
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        location = connection.ask("POST", "/v2/live/a/blobs/uploads/")["location"]
        connection.send(f"PATCH {location} HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\n".encode() + data[:4])
        assert site.run("restart").returncode == 0
        connection.send(data[4:])
        answer = connection.answer("PATCH")
        assert (answer.status, answer["range"], answer.closes) == (202, "0-7", True)
    digest = hashlib.sha256(data).hexdigest()
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        target = f"{answer['location']}{'&' if '?' in answer['location'] else '?'}digest=sha256:{digest}"
        assert connection.ask("PUT", target).status == 201


def test_restart_fails_if_the_new_version_cannot_start(site: LiveSite) -> None:
    """If the new version refuses its settings, the restart fails, and the old workers continue."""
    old_workers = site.server.worker_pids()
    site.write("[gc]\ngrce = 1\n")
    process = site.run("restart")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"entrepot: {site.file}: gc.grce: unknown setting; did you mean gc.grace?\n"
    assert site.server.worker_pids() == old_workers
    assert site.may_push()


def test_restart_fails_if_a_port_is_in_use(site: LiveSite) -> None:
    """If the new version cannot open its port for the metrics, the restart fails, and the old workers continue."""
    old_workers = site.server.worker_pids()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        site.write(f'[metrics]\nlisten = "{address}"\n')
        process = site.run("restart")
        assert (process.returncode, process.stdout) == (1, "")
        assert address in process.stderr
    assert site.server.worker_pids() == old_workers
    assert site.may_push()


@pytest.mark.parametrize("site", [1], indirect=True)
def test_restart_with_one_worker_is_refused(site: LiveSite) -> None:
    """A server with one worker refuses a restart, because no other worker could serve requests in the meantime. The
    message names the setting to change."""
    process = site.run("restart")
    assert process.returncode == 1
    assert "set workers = 2 or more" in process.stderr
    assert site.may_push()


# A program that opens a port, as systemd does for a socket unit, and then executes the server.
SOCKET_UNIT = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="entrepot.socket")
if metrics_host := os.environ.pop("METRICS_HOST", ""):
    os.environ["ENTREPOT_METRICS__LISTEN"] = f"{metrics_host}:{listener.getsockname()[1]}"
os.execv(sys.executable, [sys.executable, "-m", "registry", "serve", "--data", "data", "--workers", "2"])
"""


def test_socket_activation(tmp_path: Path) -> None:
    """The server listens on a socket that systemd has opened, and notifies systemd when it is ready, restarts and
    stops. Clients that connect before the start get their responses after it. The server starts without accounts
    although the setting `listen` has a public address, because only this machine can connect to the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0entrepot-{tmp_path.name}-{os.getpid()}")
        manager.settimeout(60)
        environment = command_environment(
            NOTIFY_SOCKET=f"@entrepot-{tmp_path.name}-{os.getpid()}", PYTHONPATH=str(ROOT), ENTREPOT_LISTEN="0.0.0.0:1"
        )
        with subprocess.Popen(
            [sys.executable, "-c", SOCKET_UNIT], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline())
                with RawConnection(("127.0.0.1", port), timeout=60) as early_client:
                    assert early_client.ask("GET", "/v2/").status == 200
                assert f"listens on http://127.0.0.1:{port}\n" in process.stdout.readline()
                # The second line, which is left out here, is a text about the status.
                assert manager.recv(4096).decode().split("\n")[::2] == ["READY=1", f"MAINPID={process.pid}"]
                process.send_signal(signal.SIGUSR2)
                assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
                assert manager.recv(4096).startswith(b"READY=1\nSTATUS=all workers were replaced")
                with RawConnection(("127.0.0.1", port), timeout=60) as later_client:
                    assert later_client.ask("GET", "/v2/").status == 200
            finally:
                process.terminate()
            assert manager.recv(4096) == b"STOPPING=1"
            process.stdout.read()
            assert process.wait(60) == 0


def test_metrics_on_the_port_of_the_socket(tmp_path: Path) -> None:
    """If the metrics have the port of the socket that systemd has opened, on another host, the server does not start.
    Otherwise it would answer the registry's clients as those of the metrics."""
    environment = command_environment(PYTHONPATH=str(ROOT), METRICS_HOST="127.0.0.2")
    done = subprocess.run(
        [sys.executable, "-c", SOCKET_UNIT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"port {done.stdout.strip()} is the registry's own" in done.stderr


def test_parent_is_killed_after_a_restart(site: LiveSite) -> None:
    """If the parent is killed after a restart, the new workers end too."""
    assert site.run("restart").returncode == 0
    site.server.kill_parent()


def test_stop_during_a_restart(site: LiveSite) -> None:
    """During a restart, a child process checks whether the new version can start. If the server is stopped at this
    moment, it stops cleanly, and the restart command fails."""
    site.file.unlink()
    os.mkfifo(site.file)  # the child waits for somebody to write the settings
    wait = site.start("restart")
    wait_for(lambda: len(site.server.worker_pids()) > 2)  # the child that checks the start also counts
    assert site.server.stop() == 0
    assert wait().returncode == 1


def test_number_of_workers_and_address(tmp_path: Path) -> None:
    """A restart can change the number of workers, but not to one. It cannot change the address from one to all of the
    machine on the same port, because the old workers use the port meanwhile. A reload says so as well."""
    file, data = tmp_path / "settings.toml", tmp_path / "data"
    listen = 'listen = "127.0.0.1:0"\n'
    file.write_text(f"{listen}workers = 2\n")
    arguments = ["serve", "--config", str(file), "--data", str(data)]
    with ForkedProcess("registry", *arguments, cwd=tmp_path, env=command_environment()) as process:
        try:
            assert process.stdout is not None
            banner = process.stdout.readline()
            assert "listens on" in banner
            for count in (3, 2):
                old_workers = children(process.pid)
                file.write_text(f"{listen}workers = {count}\n")
                restart = entrepot("restart", "--data", data, folder=tmp_path)
                assert (restart.returncode, restart.stderr) == (0, "")
                wait_for(partial(is_renewed, process.pid, count, old_workers))
            file.write_text(f"{listen}workers = 1\n")
            restart = entrepot("restart", "--data", data, folder=tmp_path)
            assert (restart.returncode, restart.stdout) == (1, "")
            assert "the setting `workers` cannot become 1 in a restart" in restart.stderr
            port = banner.strip().rpartition(":")[2]
            file.write_text(f'listen = "0.0.0.0:{port}"\ninsecure_open = true\nworkers = 2\n')
            for command in ("reload", "restart"):
                refused = entrepot(command, "--data", data, folder=tmp_path)
                assert (refused.returncode, refused.stdout) == (1, "")
                assert "takes effect only if you stop the server and start it again" in refused.stderr
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def is_renewed(parent: int, count: int, old_workers: list[int]) -> bool:
    """Returns whether the parent has `count` workers, and none of them is in `old_workers`."""
    now = children(parent)
    return len(now) == count and not set(now) & set(old_workers)
