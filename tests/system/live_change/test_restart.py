"""`entrepot restart` and SIGUSR2, and the takeover of a port that systemd has opened."""

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


def is_replaced(site: LiveSite, before: list[int]) -> bool:
    """Returns whether two new workers run, and none of those in `before`."""
    now = site.server.worker_pids()
    return len(now) == 2 and not set(now) & set(before)


def test_restart(site: LiveSite) -> None:
    """A restart executes the program again in the same process and replaces all workers. A setting that a reload
    refuses takes effect. The counts of the metrics continue."""
    before, parent = site.server.worker_pids(), site.server.pid
    site.write('restart_grace = 60\nmetrics.allow = ["127.0.0.0/8"]\n')
    assert site.run("reload").returncode == 1
    done = site.run("restart")
    assert (done.returncode, done.stdout, done.stderr) == (0, "all workers were replaced\n", "")
    wait_for(lambda: is_replaced(site, before))
    assert site.server.pid == parent
    assert not site.server.ended
    assert site.run("reload").stdout == "reloaded: no setting has changed\n"
    before = site.server.worker_pids()
    os.kill(parent, signal.SIGUSR2)
    wait_for(lambda: is_replaced(site, before))
    assert site.may_push()
    found = scrape(site.server.url)
    assert found.total("entrepot_worker_starts_total") == 6
    assert found.total("entrepot_workers") == 2


def test_a_push_goes_on(site: LiveSite) -> None:
    """A push that runs during a restart is completed: its request by the old worker, its session by the new ones."""
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


def test_a_version_that_cannot_start(site: LiveSite) -> None:
    """If the new version refuses its settings, nothing changes."""
    before = site.server.worker_pids()
    site.write("[gc]\ngrce = 1\n")
    done = site.run("restart")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"entrepot: {site.file}: gc.grce: unknown setting; did you mean gc.grace?\n"
    assert site.server.worker_pids() == before
    assert site.may_push()


def test_a_port_that_is_taken(site: LiveSite) -> None:
    """If the new version cannot open its port for the metrics, nothing changes."""
    before = site.server.worker_pids()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        site.write(f'[metrics]\nlisten = "{address}"\n')
        done = site.run("restart")
        assert (done.returncode, done.stdout) == (1, "")
        assert address in done.stderr
    assert site.server.worker_pids() == before
    assert site.may_push()


@pytest.mark.parametrize("site", [1], indirect=True)
def test_a_single_worker(site: LiveSite) -> None:
    """A server with one worker refuses a restart and says so, because no other worker could serve meanwhile."""
    done = site.run("restart")
    assert done.returncode == 1
    assert "set workers = 2 or more" in done.stderr
    assert site.may_push()


SOCKET_UNIT = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="entrepot.socket")
os.execv(sys.executable, [sys.executable, "-m", "registry", "serve", "--data", "data", "--workers", "2"])
"""


def test_socket_activation(tmp_path: Path) -> None:
    """The server listens on a socket that systemd has opened, and tells systemd when it is ready, restarts and stops.
    Clients that connect before the start wait for it. Only this machine can connect to the socket, so the registry may
    be open, whatever address the settings have."""
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
                with RawConnection(("127.0.0.1", port), timeout=60) as early:
                    assert early.ask("GET", "/v2/").status == 200
                assert f"listens on http://127.0.0.1:{port}\n" in process.stdout.readline()
                assert manager.recv(4096).decode().split("\n")[::2] == ["READY=1", f"MAINPID={process.pid}"]
                process.send_signal(signal.SIGUSR2)
                assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
                assert manager.recv(4096).startswith(b"READY=1\nSTATUS=all workers were replaced")
                with RawConnection(("127.0.0.1", port), timeout=60) as later:
                    assert later.ask("GET", "/v2/").status == 200
            finally:
                process.terminate()
            assert manager.recv(4096) == b"STOPPING=1"
            process.stdout.read()
            assert process.wait(60) == 0


def test_parent_is_killed_after_a_restart(site: LiveSite) -> None:
    """The workers of the new version end with their parent, like those of the old version."""
    assert site.run("restart").returncode == 0
    site.server.kill_parent()


def test_stop_during_a_restart(site: LiveSite) -> None:
    """A server that is told to stop while a new version checks its start stops cleanly. The restart command fails."""
    wait = site.start("restart")
    wait_for(lambda: len(site.server.worker_pids()) > 2)  # the check is one more child
    assert site.server.stop() == 0
    assert wait().returncode == 1


def test_number_of_workers(tmp_path: Path) -> None:
    """A restart puts another number of workers in force."""
    file, data = tmp_path / "settings.toml", tmp_path / "data"
    file.write_text("workers = 2\n")
    arguments = ["serve", "--config", str(file), "--data", str(data), "--listen", "127.0.0.1:0"]
    with ForkedProcess("registry", *arguments, cwd=tmp_path, env=command_environment()) as process:
        try:
            assert process.stdout is not None
            assert "listens on" in process.stdout.readline()
            for count in (3, 2):
                before = children(process.pid)
                file.write_text(f"workers = {count}\n")
                done = entrepot("restart", "--data", data, folder=tmp_path)
                assert (done.returncode, done.stderr) == (0, "")
                wait_for(partial(is_renewed, process.pid, count, before))
            file.write_text("workers = 1\n")
            done = entrepot("restart", "--data", data, folder=tmp_path)
            assert (done.returncode, done.stdout) == (1, "")
            assert "workers cannot become 1 in a restart" in done.stderr
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def is_renewed(parent: int, count: int, before: list[int]) -> bool:
    """Returns whether the parent has `count` workers, and none of those in `before`."""
    now = children(parent)
    return len(now) == count and not set(now) & set(before)
