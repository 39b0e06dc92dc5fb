"""Starts servers and commands on a full disk, one scenario per call: `python -m tests.system.crash.full_disk_starts
FOLDER SCENARIO`. Each scenario is a function below.

Run this program in its own mount namespace (`unshare --mount`), because it mounts a tmpfs on FOLDER/data.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.server_process import ROOT, RegistryServer, ServerFailed, running_server, start_server
from tests.system.crash.full_disk import MIB, ask, assert_storage_full, free_bytes
from tests.system.crash.full_disk_emptied import (
    OneLayerImage,
    check_full_disk_is_reported,
    check_reads,
    delete,
    fill,
    health,
    make_image,
    mount,
    push_image,
    start_collecting_server,
    until,
)

PASSWORD = "correct horse battery staple"


def make_stored_images(folder: Path, count: int = 4) -> list[OneLayerImage]:
    """Makes a data directory with images, and stops the server that stored them."""
    images = [make_image(number) for number in range(count)]
    with running_server(folder) as server:
        for image in images:
            assert push_image(server, image) == 201
    return images


def release(filler: Path, count: int) -> None:
    """Frees `count` bytes of the disk."""
    os.truncate(filler, filler.stat().st_size - count)


def without_reserve(folder: Path) -> None:
    """The data directory comes from an earlier version: it has no reserve (the file whose space is used on a full
    disk), no lock files, and no write-ahead log of the database. Reads work. Deletes work once 1 MiB is free."""
    data = folder / "data"
    mount(data, "tmpfs", "24m")
    images = make_stored_images(folder)
    for file in [data / "reserve", data / "entrepot.db-wal", data / "entrepot.db-shm"]:
        file.unlink()
    for file in (data / "locks").glob("??"):
        file.unlink()
    filler = fill(data)
    with start_collecting_server(folder) as server:
        check_reads(server, images)
        check_full_disk_is_reported(server)
        assert ask(server, "GET", "/readyz")[0] == 503
        assert ask(server, "GET", "/readyz?exclude=disk")[0] == 200
        until(lambda: json.loads(command(folder, "status", "--json").stdout)["running"], "the status shows the server")
        assert_storage_full(ask(server, "DELETE", f"/v2/team/app/manifests/{images[0].tag}"))
        release(filler, MIB)
        until(lambda: ask(server, "DELETE", f"/v2/team/app/manifests/{images[0].tag}")[0] == 202, "deletes work again")
        check_reads(server, images[1:])
        release(filler, 8 * MIB)
        until(lambda: health(server, "ready")[1] == {"status": "ok"}, "there is free space again")
        until(lambda: push_image(server, images[0]) == 201, "pushes work again")
        check_reads(server, images)
        assert "Traceback" not in server.log_text(), server.log_text()


def killed(folder: Path) -> None:
    """The server was killed, so the next server has to recover the write-ahead log of the database first. Reads and
    deletes of images then work."""
    data = folder / "data"
    mount(data, "tmpfs", "24m")
    images = [make_image(number) for number in range(4)]
    server = start_server(folder)
    for image in images:
        assert push_image(server, image) == 201
    fill(data)
    server.kill()
    assert (data / "entrepot.db-wal").stat().st_size
    with start_collecting_server(folder) as server:
        check_reads(server, images)
        check_full_disk_is_reported(server)
        delete(server, images)
        until(lambda: free_bytes(data) > 3 * MIB, "the space of the deleted images is free")


def no_inodes(folder: Path) -> None:
    """The disk has free bytes, but no free inode, so no file can be created."""
    data = folder / "data"
    mount(data, "tmpfs", "48m", ",nr_inodes=2000")
    images = make_stored_images(folder)
    (data / "more").mkdir()
    number = 0
    while os.statvfs(data).f_favail:
        (data / "more" / str(number)).touch()
        number += 1
    with start_collecting_server(folder) as server:
        check_reads(server, images)
        check_full_disk_is_reported(server)
        delete(server, images)
        until(lambda: os.statvfs(data).f_favail >= 4, "the files of the deleted images are removed")
        for freed in range(100):
            (data / "more" / str(freed)).unlink()
        until(lambda: health(server, "ready")[1] == {"status": "ok"}, "there is free space again")
        until(lambda: push_image(server, images[0]) == 201, "pushes work again")


def command(folder: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` with these arguments on FOLDER/data."""
    words = [sys.executable, "-m", "registry", *args, "--data", str(folder / "data")]
    return subprocess.run(words, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60)


def account_commands(folder: Path) -> None:
    """The command that disables an account works, whether a server runs or not. After ten failed logins, the next ones
    get 429."""
    data = folder / "data"
    mount(data, "tmpfs", "24m")
    for name in ("admin", "anna", "bert"):
        flags = ["--admin"] if name == "admin" else []
        result = command(folder, "user", "add", name, *flags, "--password-file", "-", stdin=f"{PASSWORD}\n")
        assert result.returncode == 0, result.stderr
    fill(data)
    result = command(folder, "user", "disable", "anna")
    assert result.returncode == 0, result.stderr
    with start_collecting_server(folder) as server:
        assert _login(server, "anna") == 401
        assert _login(server, "bert") == 200
        result = command(folder, "user", "disable", "bert")
        assert result.returncode == 0, result.stderr
        assert _login(server, "bert") == 401
        answers = [_login(server, "admin", f"guess {number}") for number in range(12)]
        assert answers == [401] * 10 + [429] * 2, "failed logins are counted"
        assert "Traceback" not in server.log_text(), server.log_text()


def _login(server: RegistryServer, name: str, password: str = PASSWORD) -> int:
    basic = b64encode(f"{name}:{password}".encode()).decode()
    return ask(server, "GET", "/v2/", Authorization=f"Basic {basic}")[0]


def log_on_full_disk(folder: Path) -> None:
    """The output of the server goes to a file on the full disk. The server starts, serves, and exits with 0."""
    data = folder / "data"
    mount(data, "tmpfs", "24m")
    images = make_stored_images(folder)
    output = data / "server.log"
    for workers in (1, 2):
        with output.open("ab", buffering=0) as log, socket.socket() as reserved_port:
            fill(data)
            # This socket reserves a free port without listening on it, so that no other process takes the port.
            reserved_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved_port.bind(("127.0.0.1", 0))
            port = reserved_port.getsockname()[1]
            flags = ["--data", str(data), "--listen", f"127.0.0.1:{port}", "--workers", str(workers)]
            process = subprocess.Popen(
                [sys.executable, "-m", "registry", "serve", *flags], cwd=ROOT, stdout=log, stderr=log, text=True
            )
            server = RegistryServer(process, data, output, f"http://127.0.0.1:{port}")
            try:
                until(lambda server=server: _answers(server), "the server answers")  # type: ignore[misc]
                check_reads(server, images)
                until(lambda server=server: _reports_full_disk(server, data), "a report of the full disk")  # type: ignore[misc]
                delete(server, images[:1])
                images = images[1:]
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0


def _reports_full_disk(server: RegistryServer, data: Path) -> bool:
    """Returns whether the server reports a full disk. If not, fills the disk again, because garbage collection may have
    freed space."""
    if health(server, "ready")[1]["status"] == "disk full":
        return True
    fill(data)
    return False


def _answers(server: RegistryServer) -> bool:
    assert server.process.poll() is None, f"the server exited with {server.process.returncode}"
    try:
        return health(server, "live")[0] == 200
    except OSError:
        return False


def empty_directory(folder: Path) -> None:
    """The first start on an empty data directory fails with an error of one line. The server starts once there is
    space."""
    data = folder / "data"
    mount(data, "tmpfs", "24m")
    filler = fill(data)
    with pytest.raises(ServerFailed) as failed:
        start_server(folder)
    assert "Traceback" not in str(failed.value)
    assert "free some space" in next(line for line in str(failed.value).splitlines() if line.startswith("entrepot: "))
    filler.unlink()
    with start_collecting_server(folder) as server:
        until(lambda: push_image(server, make_image(0)) == 201, "pushes work")
        assert json.loads(ask(server, "GET", "/v2/_catalog")[1]) == {"repositories": ["team/app"]}


SCENARIOS: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (without_reserve, killed, no_inodes, account_commands, log_on_full_disk, empty_directory)
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[2]](Path(sys.argv[1]))
