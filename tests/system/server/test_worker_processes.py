"""Tests of the server's processes: a parent that supervises the workers, their start, restart and renewal, and the stop
of the server."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.commands import has_received_signals
from tests.fakes.connection_owner import accepting_process
from tests.fakes.forked_process import ROOT
from tests.fakes.open_files import descriptor_targets
from tests.system.server.app_process import (
    TIMEOUT_SECONDS,
    AppProcess,
    Start,
    children,
    is_alive,
    read_response,
    wait_for,
)

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]


def begin_slow(running: AppProcess, seconds: float) -> socket.socket:
    """Sends a request to which the application responds after `seconds`. Returns the connection once the application
    has the request."""
    return begin_requests(running, f"seconds={seconds}")


def begin_requests(running: AppProcess, query: str, count: int = 1) -> socket.socket:
    """Sends `count` requests for `/slow` at once (see `EchoApp.slow`). Returns the connection once the application has
    the first one."""
    sock = running.connect()
    sock.sendall(f"GET /slow?{query} HTTP/1.1\r\nHost: test\r\n\r\n".encode() * count)
    running.wait_for_line("slow")
    return sock


def refuses(running: AppProcess) -> bool:
    """Returns whether the server refuses new connections."""
    try:
        running.connect().close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signal_number", STOP_SIGNALS)
def test_stop(start: Start, workers: int, signal_number: int) -> None:
    """On SIGTERM and SIGINT, an idle server shuts down the application in each worker and exits with code 0. No process
    is left."""
    running = start(workers=workers)
    children = running.children()
    assert len(children) == (workers if workers > 1 else 0)
    with running.connect() as idle:
        os.kill(running.pid, signal_number)
        assert running.wait_for_exit() == 0
        assert idle.recv(1) == b""
    for _ in range(workers):
        running.wait_for_line("closed")
    assert not any(is_alive(child) for child in children)
    assert running.errors == ""


def test_stop_of_the_group(start: Start) -> None:
    """Ctrl-C sends SIGINT to all processes of the group. SIGINT or SIGTERM to the whole group stops the server without
    errors, like a signal to the parent alone."""
    for signal_number in STOP_SIGNALS:
        running = start(workers=2)
        os.killpg(running.pid, signal_number)
        assert running.wait_for_exit() == 0
        assert running.errors == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_completes_requests_in_progress(start: Start, tmp_path: Path, workers: int) -> None:
    """During a stop, new connections are refused. A request in progress gets its response with `Connection: close`."""
    running = start(workers=workers, grace=60)
    gate = tmp_path / "gate"
    with begin_requests(running, f"until={gate}") as sock:
        os.kill(running.pid, signal.SIGTERM)
        wait_for(lambda: refuses(running))
        gate.touch()
        status, headers, body = read_response(sock)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert sock.recv(1) == b""
    assert running.wait_for_exit() == 0
    with pytest.raises(ConnectionRefusedError):
        running.connect()


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_are_cancelled_after_the_grace_period(start: Start, workers: int) -> None:
    """A request that does not end within the grace period of a stop is cancelled. The exit code is still 0."""
    running = start(workers=workers, grace=0.3)
    with begin_slow(running, 60) as sock:
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait_for_exit() == 0
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert "cut off 1 requests" in running.errors
    assert "Traceback" not in running.errors


@pytest.mark.parametrize("workers", [1, 2])
def test_second_interrupt(start: Start, workers: int) -> None:
    """A second Ctrl-C ends the server immediately, without waiting for the grace period."""
    running = start(workers=workers, grace=600)
    with begin_slow(running, 600):
        os.kill(running.pid, signal.SIGINT)
        wait_for(lambda: refuses(running))  # the first Ctrl-C was seen
        os.kill(running.pid, signal.SIGINT)
        assert running.wait_for_exit() == 130


@pytest.mark.parametrize("env", [{}, {"NO_UVLOOP": "1"}], ids=["uvloop", "asyncio"])
def test_second_interrupt_while_the_event_loop_is_blocked(start: Start, env: dict[str, str]) -> None:
    """A second Ctrl-C ends a server with one process immediately, even if its event loop is blocked."""
    running = start(workers=1, grace=600, env=env)
    with running.connect() as sock:
        sock.sendall(b"GET /held HTTP/1.1\r\nHost: test\r\n\r\n")
        running.wait_for_line("held")
        os.kill(running.pid, signal.SIGINT)
        wait_for(lambda: has_received_signals(running.process))
        os.kill(running.pid, signal.SIGINT)
        assert running.wait_for_exit() == 130


def test_second_interrupt_while_the_log_is_blocked() -> None:
    """Nobody reads the pipe to which the parent logs, so a write to its log blocks. A second Ctrl-C still ends the
    parent and its workers."""
    read_end, write_end = os.pipe()
    try:
        command = [sys.executable, "-m", "tests.system.server.echo_app", json.dumps({"workers": 2, "grace": 600})]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=write_end, start_new_session=True
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline().startswith(b"ready")
            fill(write_end)
            workers = children(parent.pid)
            os.kill(workers[0], signal.SIGKILL)
            wait_for(lambda: children(parent.pid) == workers[1:])
            wait_for(lambda: writes_its_log(parent.pid))
            os.kill(parent.pid, signal.SIGINT)
            wait_for(lambda: has_received_signals(parent))
            os.kill(parent.pid, signal.SIGINT)
            assert parent.wait(TIMEOUT_SECONDS) == 130
            assert not is_alive(workers[1])
    finally:
        os.close(read_end)
        os.close(write_end)


def fill(pipe: int) -> None:
    """Fills the pipe, so that the next write to it blocks."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"." * 512)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b".")
    os.set_blocking(pipe, True)


def writes_its_log(pid: int) -> bool:
    """Returns whether the main thread of the process is in a system call on its stderr (proc(5), syscall)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[1:2] == ["0x2"]


def test_killed_parent(start: Start) -> None:
    """If the parent is killed, its workers end and the port is free again."""
    running = start(workers=2)
    children = running.children()
    with begin_slow(running, 60):
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        wait_for(lambda: not any(is_alive(child) for child in children))
    assert start(listen="{}:{}".format(*running.address)).address == running.address


def test_killed_worker(start: Start) -> None:
    """If a worker is killed, the other worker serves requests until the parent has started a new worker. The parent
    logs the restart."""
    running = start(workers=2)
    old_workers = running.children()
    os.kill(old_workers[0], signal.SIGKILL)
    assert running.get()["size"] == 0
    wait_for(lambda: len({*running.children()} - {*old_workers}) == 1)
    (new_worker,) = {*running.children()} - {*old_workers}
    wait_for(lambda: running.get()["pid"] == new_worker)
    wait_for(lambda: f"the worker {old_workers[0]} was ended by SIGKILL; starting it again" in running.errors)


def test_parent_retries_if_no_process_can_be_started(start: Start) -> None:
    """While the parent cannot start a new worker, the other worker continues, and the parent tries again later."""
    running = start(workers=2)
    killed, other_worker = running.children()
    used_descriptors = {int(name) for name in os.listdir(f"/proc/{running.pid}/fd")}
    lowest_free_descriptor = next(
        number for number in range(len(used_descriptors) + 1) if number not in used_descriptors
    )
    limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    # The parent can open no more descriptors, and needs two for the start of a worker.
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor, limits[1]))
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: "no process can be started: Too many open files" in running.errors)
    assert running.children() == [other_worker]
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)
    wait_for(lambda: len(running.children()) == 2)


def test_failing_worker_is_restarted_with_growing_pauses(start: Start, tmp_path: Path) -> None:
    """A worker that cannot start is started again after growing pauses. Meanwhile the other worker serves, and the
    server can be stopped."""
    mark_file = tmp_path / "mark"
    running = start({"MARK": str(mark_file)}, workers=2)
    mark_file.touch()
    killed = running.children()[0]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: "again after 0.4 s" in running.errors)
    assert "exit code 1 ([Errno 13] Permission denied: '/data'); starting it again after 0.1 s" in running.errors
    assert running.get()["size"] == 0
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait_for_exit() == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("oserror", "error: [Errno 13] Permission denied: '/data'\n"),
        ("message", "error: the data directory is full\n"),
    ],
)
def test_failed_start(start: Start, workers: int, fault: str, message: str) -> None:
    """If the start fails because of the environment, such as a missing permission or a full disk, the server exits with
    code 1 and one line that states the reason."""
    running = start(ready=False, workers=workers, start=fault)
    assert running.wait_for_exit() == 1
    assert running.errors == message


@pytest.mark.parametrize("workers", [1, 2])
def test_start_with_a_bug(start: Start, workers: int) -> None:
    """If the start fails because of a bug, the server exits with code 1 and logs the traceback."""
    running = start(ready=False, workers=workers, start="bug")
    assert running.wait_for_exit() == 1
    assert "Traceback" in running.errors
    assert running.errors.endswith("error: the server could not start: ZeroDivisionError: a bug\n")


def test_worker_that_dies_while_stopping(start: Start) -> None:
    """During a stop, a worker is killed while it waits for a request in progress. The parent ends without waiting for
    the grace period."""
    running = start(workers=2, grace=600)
    with begin_slow(running, 600):
        os.kill(running.pid, signal.SIGTERM)
        wait_for(lambda: len(running.children()) == 1)  # the idle worker has ended
        os.kill(running.children()[0], signal.SIGKILL)
        assert running.wait_for_exit() == 0


def test_worker_that_dies_during_its_renewal(start: Start) -> None:
    """If a worker dies during a renewal while its successor starts, it is replaced only once."""
    running = start(workers=2)
    old_workers = running.children()
    os.kill(old_workers[0], signal.SIGSTOP)  # so that the worker does not end by itself before it is killed
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: running.children() != old_workers)
    os.kill(old_workers[0], signal.SIGKILL)
    wait_for(lambda: running.has_replaced(old_workers))
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait_for_exit() == 0


def test_stuck_worker_and_second_interrupt(start: Start) -> None:
    """A second Ctrl-C ends the server immediately, even if a worker does not react."""
    running = start(workers=2, grace=600)
    stuck = running.children()[0]
    os.kill(stuck, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGINT)
    wait_for(lambda: running.children() == [stuck])
    os.kill(running.pid, signal.SIGINT)
    assert running.wait_for_exit() == 130
    assert not is_alive(stuck)


def test_stuck_worker_is_killed(start: Start) -> None:
    """During a stop, a worker that does not react is killed a short time after the grace period. The exit code is 0."""
    running = start(workers=2, grace=0)
    stuck = running.children()[0]
    os.kill(stuck, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait_for_exit() == 0
    assert not is_alive(stuck)


def test_renewal(start: Start) -> None:
    """On SIGUSR2 the server replaces its workers (a renewal). An old worker still answers its request in progress."""
    running = start(workers=2)
    old_workers = running.children()
    with begin_slow(running, 0.5) as sock:
        os.kill(running.pid, signal.SIGUSR2)
        assert read_response(sock)[2] == b"slow"
    wait_for(lambda: running.has_replaced(old_workers))
    assert running.get()["pid"] in running.children()
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait_for_exit() == 0


def test_stop_just_before_the_new_version_is_executed(start: Start) -> None:
    """A new version has checked that it can start. SIGTERM arrives after the last signals were handled, just before the
    new version is executed. The server stops, and the new version is not executed. It would not get this signal."""
    # A shell script plays the new version. The server calls it once with `check`, to find out if it can start.
    is_check = """case "$_ENTREPOT_HANDOVER" in *'"check": true'*) exit 0;; esac"""
    running = start(workers=2, successor=["/bin/sh", "-c", f"{is_check}; echo executed; exit 3"])
    os.kill(running.pid, signal.SIGUSR2)
    assert running.wait_for_exit() == 0
    assert "the workers are not renewed: the server stops" in running.errors


def test_failed_renewal(start: Start, tmp_path: Path) -> None:
    """If a new worker cannot start during a renewal, the old workers stay."""
    mark_file = tmp_path / "mark"
    running = start({"MARK": str(mark_file)}, workers=2)
    old_workers = running.children()
    mark_file.touch()
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: "the workers are not renewed: the new worker ended with exit code 1" in running.errors)
    wait_for(lambda: running.children() == old_workers)
    assert running.get()["pid"] in old_workers


def test_port_in_use(start: Start) -> None:
    """A second server on the same port exits with code 1 and one error line."""
    running = start()
    second = start(ready=False, listen="{}:{}".format(*running.address))
    assert second.wait_for_exit() == 1
    assert "in use" in second.errors
    assert second.errors.count("\n") == 1


def _sockets(running: AppProcess) -> dict[int, int]:
    """Returns how many sockets each worker has open."""
    return {
        worker: sum(target.startswith("socket:") for target in descriptor_targets(worker).values())
        for worker in running.children()
    }


def test_connections_are_shared(start: Start) -> None:
    """Both workers accept connections. The kernel decides which worker gets a connection, so the test opens more
    connections until each worker has some."""
    running = start(workers=2)
    sockets_before = _sockets(running)
    socks: list[socket.socket] = []

    def each_worker_has_some() -> bool:
        opened = [running.connect() for _ in range(64)]
        socks.extend(opened)
        for sock in opened:
            sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert all(read_response(sock)[0] == 200 for sock in opened)
        new_sockets = {worker: sockets - sockets_before[worker] for worker, sockets in _sockets(running).items()}
        assert len(new_sockets) == 2
        assert sum(new_sockets.values()) == len(socks)
        return min(new_sockets.values()) > 0

    try:
        assert any(each_worker_has_some() for _ in range(8))
    finally:
        for sock in socks:
            sock.close()


# Limits of the server with which idle connections stay open during a test.
LONG_TIMEOUTS = {"keep_alive_seconds": 3600, "head_seconds": 3600}


def is_accepted(sock: socket.socket, workers: list[int]) -> bool:
    """Returns whether one of the workers has accepted the connection."""
    return accepting_process(sock.getpeername()[1], sock.getsockname()[1], workers) is not None


def test_renewal_waits_for_idle_connections(start: Start) -> None:
    """After a renewal, idle connections stay open in their old worker, even connections on which no request was sent
    yet. The old worker closes a connection after its next response, which has `Connection: close`."""
    running = start(workers=2, limits=LONG_TIMEOUTS)
    old_workers = running.children()
    socks = [running.connect() for _ in range(8)]
    for sock in socks[:6]:
        sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert "connection" not in read_response(sock)[1]
    wait_for(lambda: all(is_accepted(sock, old_workers) for sock in socks))
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: "all workers were replaced" in running.errors)
    for sock in socks:
        headers: dict[str, str] = {}
        # A second request is needed if the old worker does not know about the renewal yet.
        while "connection" not in headers:
            sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
            status, headers, body = read_response(sock)
            assert (status, body) == (200, b"slow")
        assert headers["connection"] == "close"
        assert sock.recv(1) == b""
        sock.close()
    wait_for(lambda: running.has_replaced(old_workers))


def test_renewal_during_a_response(start: Start) -> None:
    """If the headers of a response were sent before a renewal, the connection stays open after this response. It closes
    after the next response."""
    running = start(workers=2, limits=LONG_TIMEOUTS)
    size = 50_000_000  # more than the buffers of both ends hold
    with running.connect() as sock:
        sock.sendall(f"GET /big?size={size} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1)
        assert b"connection" not in head.lower()
        os.kill(running.pid, signal.SIGUSR2)
        wait_for(lambda: "all workers were replaced" in running.errors)
        while size:
            size -= len(sock.recv(min(size, 1 << 20)))
        headers: dict[str, str] = {}
        while "connection" not in headers:
            sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
            status, headers, body = read_response(sock)
            assert (status, body) == (200, b"slow")
        assert headers["connection"] == "close"


def test_pipelined_requests_in_a_renewal(start: Start, tmp_path: Path) -> None:
    """An old worker answers the pipelined requests that it had received before the renewal, and then closes the
    connection."""
    running = start(workers=2, limits=LONG_TIMEOUTS)
    old_workers, gate = running.children(), tmp_path / "gate"
    with begin_requests(running, f"until={gate}", count=3) as sock:
        os.kill(running.pid, signal.SIGUSR2)
        wait_for(lambda: not any(listens(running, worker) for worker in old_workers))
        gate.touch()
        have_close_header: list[bool] = []
        for _ in range(3):
            status, headers, body = read_response(sock)
            assert (status, body) == (200, b"slow")
            have_close_header.append("connection" in headers)
        assert have_close_header == [False, False, True]
        assert sock.recv(1) == b""


def listens(running: AppProcess, worker: int) -> bool:
    """Returns whether the worker has the listening socket open, the only socket that it shares with its parent."""
    shared_files = set(descriptor_targets(running.pid).values()) & set(descriptor_targets(worker).values())
    return any(target.startswith("socket:") for target in shared_files)
