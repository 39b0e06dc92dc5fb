"""`entrepot reload` and SIGHUP."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot, has_received_signals
from tests.fakes.raw_http import RawConnection
from tests.system.live_change.conftest import LiveSite
from tests.system.server.app_process import wait_for

both = pytest.mark.parametrize("site", [1, 2], indirect=True)


def refusal(site: LiveSite) -> str:
    """Reloads, and returns the reason of the refusal. Checks that the log has it as well, and that the old settings are
    in force."""
    done = site.run("reload")
    assert (done.returncode, done.stdout) == (1, "")
    reason = done.stderr.removeprefix("entrepot: ").strip()
    assert "\n" not in reason
    log = site.server.log_text()
    assert f"the configuration is not reloaded, the old one stays in force: {reason}\n" in log
    return reason


@both
def test_change(site: LiveSite) -> None:
    """When the command has ended, every worker has the new settings, and the workers are the same processes."""
    workers = site.server.worker_pids()
    site.write('read_only = true\n[gc]\ngrace = "2h"\n')
    done = site.run("reload")
    assert (done.returncode, done.stdout, done.stderr) == (0, "reloaded: read_only, gc.grace\n", "")
    assert not any(site.may_push() for _ in range(10))
    site.write("")
    assert site.run("reload").stdout == "reloaded: read_only, gc.grace\n"
    assert all(site.may_push() for _ in range(10))
    assert site.server.worker_pids() == workers
    assert site.run("reload").stdout == "reloaded: no setting has changed\n"


@both
def test_kept_connections(site: LiveSite) -> None:
    """A connection from before the reload gets responses by the new settings."""
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        assert connection.ask("POST", "/v2/live/a/blobs/uploads/").status == 202
        site.write("read_only = true\n")
        assert site.run("reload").returncode == 0
        assert connection.ask("POST", "/v2/live/a/blobs/uploads/").status == 405


@both
def test_a_push_goes_on(site: LiveSite) -> None:
    """A request that runs during a reload ends by the settings at its start. Its upload session can continue after
    that."""
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


@both
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
def test_refused(site: LiveSite, text: str, reason: str) -> None:
    """A configuration that is invalid, or that a reload cannot put in force, changes nothing."""
    site.write(text)
    assert reason in refusal(site)
    assert site.may_push()


def test_only_names_are_shown(site: LiveSite) -> None:
    """The command and the log name the changed settings. They show no values, because these may be secret."""
    upstream = '[[upstream]]\nname = "ghcr.io"\nusername = "{}"\npassword_file = "{}"\n'
    site.write(upstream.format("somebody", "/one"))
    assert site.run("reload").stdout == "reloaded: upstream[ghcr.io]\n"
    site.write(upstream.format("anybody", "/two"))
    assert site.run("reload").stdout == "reloaded: upstream[ghcr.io].username, upstream[ghcr.io].password_file\n"
    assert "body" not in site.server.log_text()


def test_a_worker_that_is_killed(site: LiveSite) -> None:
    """If a worker dies before it has the new configuration, no worker gets it."""
    killed = site.server.worker_pids()[0]
    os.kill(killed, signal.SIGSTOP)
    site.write("read_only = true\n")
    wait = site.start("reload")
    wait_for(lambda: is_preparing(site, killed))
    os.kill(killed, signal.SIGKILL)
    done = wait()
    assert done.returncode == 1
    assert f"the worker {killed} was ended by SIGKILL before it had the new configuration" in done.stderr
    wait_for(lambda: len(site.server.worker_pids()) == 2 and killed not in site.server.worker_pids())
    assert all(site.may_push() for _ in range(10))
    assert site.run("reload").returncode == 0
    assert not any(site.may_push() for _ in range(10))


def is_preparing(site: LiveSite, stopped: int) -> bool:
    """Returns whether the other worker has opened a second store. The stopped worker cannot open one."""
    other = next(pid for pid in site.server.worker_pids() if pid != stopped)
    files = [os.readlink(file) for file in Path(f"/proc/{other}/fd").iterdir() if file.is_symlink()]
    return sum(file.endswith("/locks/turns") for file in files) == 2


def test_signals_during_a_reload(site: LiveSite) -> None:
    """Any number of SIGHUPs during a reload lead to exactly one more reload."""
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


def test_a_worker_that_starts_later(site: LiveSite) -> None:
    """A worker that replaces a dead one after a reload has the new settings."""
    site.write("read_only = true\n")
    assert site.run("reload").returncode == 0
    before = site.server.worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(site.server.worker_pids()) == 2 and not set(before) & set(site.server.worker_pids()))
    assert not any(site.may_push() for _ in range(10))


def test_no_server(tmp_path: Path) -> None:
    """If no server runs on the data directory, the command says so."""
    (tmp_path / "data").mkdir()
    done = entrepot("reload", "--data", "data", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"entrepot: no server uses the data directory {tmp_path}/data\n"


def test_only_the_owner_may_use_the_socket(site: LiveSite) -> None:
    """The control socket has mode 0600. It is deleted when the server stops."""
    control = site.server.data / "control"
    assert control.stat().st_mode & 0o777 == 0o600
    assert site.server.stop() == 0
    assert not control.exists()


@both
def test_the_socket_during_a_stop(site: LiveSite) -> None:
    """A server that is stopping accepts no more commands. The next server can open the socket while the old one still
    answers requests."""
    with RawConnection(("127.0.0.1", site.server.port)) as connection:
        location = connection.ask("POST", "/v2/live/a/blobs/uploads/")["location"]
        connection.send(f"PATCH {location} HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nhalf".encode())
        site.server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not (site.server.data / "control").exists())
        assert "no server uses" in site.run("reload").stderr
        connection.send(b"rest")
        assert connection.answer("PATCH").status == 202
