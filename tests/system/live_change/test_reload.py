"""Tests of `entrepot reload` and of SIGHUP, which put changed settings in force in a running server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot, has_received_signals
from tests.fakes.raw_http import RawConnection
from tests.system.live_change.conftest import LiveSite
from tests.system.server.app_process import wait_for

one_and_two_workers = pytest.mark.parametrize("site", [1, 2], indirect=True)


def refusal(site: LiveSite) -> str:
    """Runs `entrepot reload`, which must fail. Returns the reason, and checks that the log has the same reason."""
    process = site.run("reload")
    assert (process.returncode, process.stdout) == (1, "")
    reason = process.stderr.removeprefix("entrepot: ").strip()
    assert "\n" not in reason
    line = f"the configuration is not reloaded, the old one stays in force: {reason}\n"
    wait_for(lambda: line in site.server.log_text())  # a thread of the server writes the log
    return reason


@one_and_two_workers
def test_reload_changes_settings_in_all_workers(site: LiveSite) -> None:
    """When `entrepot reload` has ended, every worker uses the new settings. The workers are still the same
    processes."""
    workers = site.server.worker_pids()
    site.write('read_only = true\n[gc]\ngrace = "2h"\n')
    process = site.run("reload")
    assert (process.returncode, process.stdout, process.stderr) == (0, "reloaded: read_only, gc.grace\n", "")
    assert not any(site.may_push() for _ in range(10))
    site.write("")
    assert site.run("reload").stdout == "reloaded: read_only, gc.grace\n"
    assert all(site.may_push() for _ in range(10))
    assert site.server.worker_pids() == workers
    assert site.run("reload").stdout == "reloaded: no setting has changed\n"


@one_and_two_workers
def test_reload_applies_to_open_connections(site: LiveSite) -> None:
    """After a reload, the new settings apply to requests on connections that were opened before."""
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        assert connection.ask("POST", "/v2/live/a/blobs/uploads/").status == 202
        site.write("read_only = true\n")
        assert site.run("reload").returncode == 0
        assert connection.ask("POST", "/v2/live/a/blobs/uploads/").status == 405


@one_and_two_workers
def test_request_in_progress_keeps_the_old_settings(site: LiveSite) -> None:
    """A request in progress during a reload ends with the settings from its start. Its upload session can be continued
    later."""
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        location = connection.ask("POST", "/v2/live/a/blobs/uploads/")["location"]
        connection.send(f"PATCH {location} HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nhalf".encode())
        site.write("read_only = true\n")
        assert site.run("reload").returncode == 0
        connection.send(b"rest")
        answer = connection.answer("PATCH")
        assert (answer.status, answer["range"]) == (202, "0-7")
        site.write("")
        assert site.run("reload").returncode == 0
        assert connection.ask("GET", answer["location"]).status == 204


@one_and_two_workers
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gc]\ngrce = 1\n", "gc.grce: unknown setting; did you mean gc.grace?"),
        ("read_only =\n", "not TOML"),
        ("shutdown_grace = 1\nread_only = true\n", "shutdown_grace takes effect only at a restart"),
        ('[tls]\nkey = "k"\n', "tls.key takes effect only at a restart: run `entrepot restart`"),
        ('[auth]\nhtpasswd = "missing"\n', "missing"),
    ],
)
def test_invalid_configuration_is_refused(site: LiveSite, text: str, reason: str) -> None:
    """If the new configuration is invalid, or changes a setting that needs a restart, the reload fails and the old
    settings stay in force."""
    site.write(text)
    assert reason in refusal(site)
    assert site.may_push()


def test_values_of_changed_settings_are_not_shown(site: LiveSite) -> None:
    """The command and the log name the changed settings. They do not show the values, because these may be secret."""
    upstream = '[[upstream]]\nname = "ghcr.io"\nusername = "{}"\npassword_file = "{}"\n'
    site.write(upstream.format("somebody", "/one"))
    assert site.run("reload").stdout == "reloaded: upstream[ghcr.io]\n"
    site.write(upstream.format("anybody", "/two"))
    assert site.run("reload").stdout == "reloaded: upstream[ghcr.io].username, upstream[ghcr.io].password_file\n"
    assert "body" not in site.server.log_text()


def test_worker_killed_during_a_reload(site: LiveSite) -> None:
    """If a worker is killed before it has loaded the new configuration, the reload fails, and all workers keep the old
    configuration."""
    killed = site.server.worker_pids()[0]
    os.kill(killed, signal.SIGSTOP)
    site.write("read_only = true\n")
    wait = site.start("reload")
    wait_for(lambda: is_preparing(site, killed))
    os.kill(killed, signal.SIGKILL)
    process = wait()
    assert process.returncode == 1
    assert f"the worker {killed} was ended by SIGKILL before it had the new configuration" in process.stderr
    wait_for(lambda: len(site.server.worker_pids()) == 2 and killed not in site.server.worker_pids())
    assert all(site.may_push() for _ in range(10))
    assert site.run("reload").returncode == 0
    assert not any(site.may_push() for _ in range(10))


def is_preparing(site: LiveSite, stopped: int) -> bool:
    """Returns whether the worker that is not `stopped` prepares the new settings: it then has the store open twice, for
    the old and for the new settings."""
    other_worker = next(pid for pid in site.server.worker_pids() if pid != stopped)
    open_paths = [os.readlink(file) for file in Path(f"/proc/{other_worker}/fd").iterdir() if file.is_symlink()]
    return sum(file.endswith("/locks/turns") for file in open_paths) == 2  # each open store has this file open


def test_signals_during_a_reload(site: LiveSite) -> None:
    """Several SIGHUPs during a reload cause exactly one more reload."""
    stopped = site.server.worker_pids()[0]
    os.kill(stopped, signal.SIGSTOP)
    os.kill(site.server.pid, signal.SIGHUP)
    wait_for(lambda: is_preparing(site, stopped))
    for _ in range(3):
        os.kill(site.server.pid, signal.SIGHUP)
        wait_for(lambda: has_received_signals(site.server.process))
    os.kill(stopped, signal.SIGCONT)
    wait_for(lambda: site.server.log_text().count("reloaded: no setting has changed") == 2)
    assert site.run("reload").returncode == 0
    wait_for(lambda: site.server.log_text().count("reloaded: no setting has changed") == 3)


def test_replaced_worker_has_the_new_settings(site: LiveSite) -> None:
    """A worker that replaces a killed worker after a reload has the new settings."""
    site.write("read_only = true\n")
    assert site.run("reload").returncode == 0
    killed_workers = site.server.worker_pids()
    for pid in killed_workers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(site.server.worker_pids()) == 2 and not set(killed_workers) & set(site.server.worker_pids()))
    assert not any(site.may_push() for _ in range(10))


def test_reload_without_a_server(tmp_path: Path) -> None:
    """If no server uses the data directory, the command fails with a message."""
    (tmp_path / "data").mkdir()
    process = entrepot("reload", "--data", "data", folder=tmp_path)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"entrepot: no server uses the data directory {tmp_path}/data\n"


def test_only_the_owner_may_use_the_socket(site: LiveSite) -> None:
    """The control socket has mode 0600. It is deleted when the server stops."""
    control = site.server.data / "control"
    assert control.stat().st_mode & 0o777 == 0o600
    assert site.server.stop() == 0
    assert not control.exists()


@one_and_two_workers
def test_control_socket_during_a_stop(site: LiveSite) -> None:
    """A server that is stopping deletes its control socket, so commands fail. It still completes its requests in
    progress."""
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        location = connection.ask("POST", "/v2/live/a/blobs/uploads/")["location"]
        connection.send(f"PATCH {location} HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nhalf".encode())
        site.server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not (site.server.data / "control").exists())
        assert "no server uses" in site.run("reload").stderr
        connection.send(b"rest")
        assert connection.answer("PATCH").status == 202
