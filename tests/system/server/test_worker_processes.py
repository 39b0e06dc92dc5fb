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
from tests.fakes.forked_process import ROOT
from tests.system.server.app_process import (
    TIMEOUT_SECONDS,
    AppProcess,
    Start,
    children,
    is_alive,
    read_response,
    wait_for,
)

STOPS = [signal.SIGTERM, signal.SIGINT]


def begin_slow(running: AppProcess, seconds: float) -> socket.socket:
    sock = running.connect()
    sock.sendall(f"GET /slow?seconds={seconds} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    running.said("slow")
    return sock


def refuses(running: AppProcess) -> bool:
    try:
        running.connect().close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", STOPS)
def test_stop(start: Start, workers: int, number: int) -> None:
    """SIGTERM and SIGINT end an idle server with exit code 0, its databases closed and no process left."""
    running = start(workers=workers)
    children = running.children()
    assert len(children) == (workers if workers > 1 else 0)
    with running.connect() as idle:
        os.kill(running.pid, number)
        assert running.end() == 0
        assert idle.recv(1) == b""
    for _ in range(workers):
        running.said("closed")
    assert not any(is_alive(child) for child in children)
    assert running.errors == ""


def test_stop_of_the_group(start: Start) -> None:
    """Ctrl-C and a SIGTERM to the whole group end the server in the same orderly way."""
    for number in STOPS:
        running = start(workers=2)
        os.killpg(running.pid, number)
        assert running.end() == 0
        assert running.errors == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_drain(start: Start, workers: int) -> None:
    """A request in flight is answered, with Connection: close, while new connections are refused."""
    running = start(workers=workers)
    with begin_slow(running, 0.5) as sock:
        os.kill(running.pid, signal.SIGTERM)
        status, headers, body = read_response(sock)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert sock.recv(1) == b""
    assert running.end() == 0
    with pytest.raises(ConnectionRefusedError):
        running.connect()


@pytest.mark.parametrize("workers", [1, 2])
def test_grace_is_bounded(start: Start, workers: int) -> None:
    """A request that does not end within the grace period is cancelled; the exit code is 0 all the same."""
    running = start(workers=workers, grace=0.3)
    with begin_slow(running, 60) as sock:
        os.kill(running.pid, signal.SIGTERM)
        assert running.end() == 0
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert "cut 1 requests" in running.errors
    assert "Traceback" not in running.errors


@pytest.mark.parametrize("workers", [1, 2])
def test_second_interrupt(start: Start, workers: int) -> None:
    """A second Ctrl-C ends the server at once, whatever the grace period."""
    running = start(workers=workers, grace=600)
    with begin_slow(running, 600):
        os.kill(running.pid, signal.SIGINT)
        wait_for(lambda: refuses(running))  # the first Ctrl-C was seen
        os.kill(running.pid, signal.SIGINT)
        assert running.end() == 130


@pytest.mark.parametrize("env", [{}, {"NO_UVLOOP": "1"}], ids=["uvloop", "asyncio"])
def test_second_interrupt_while_the_loop_is_held_up(start: Start, env: dict[str, str]) -> None:
    """A second Ctrl-C ends a single worker at once even if its event loop is blocked."""
    running = start(workers=1, grace=600, env=env)
    with running.connect() as sock:
        sock.sendall(b"GET /held HTTP/1.1\r\nHost: test\r\n\r\n")
        running.said("held")
        os.kill(running.pid, signal.SIGINT)
        wait_for(lambda: has_received_signals(running.process))
        os.kill(running.pid, signal.SIGINT)
        assert running.end() == 130


def test_second_interrupt_while_nobody_reads_the_log() -> None:
    """A second Ctrl-C ends a parent whose log is blocked, and its workers with it."""
    log, full = os.pipe()
    try:
        command = [sys.executable, "-m", "tests.system.server.echo_app", json.dumps({"workers": 2, "grace": 600})]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, start_new_session=True) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline().startswith(b"ready")
            fill(full)
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
        os.close(log)
        os.close(full)


def fill(pipe: int) -> None:
    """Fills the pipe."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"." * 512)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b".")
    os.set_blocking(pipe, True)


def writes_its_log(pid: int) -> bool:
    """Returns whether the process's main thread is in a system call whose first argument is stderr (proc(5),
    syscall)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[1:2] == ["0x2"]


def test_killed_parent(start: Start) -> None:
    """SIGKILL of the parent ends the workers and frees the port."""
    running = start(workers=2)
    children = running.children()
    with begin_slow(running, 60):
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        wait_for(lambda: not any(is_alive(child) for child in children))
    assert start(listen="{}:{}".format(*running.address)).address == running.address


def test_killed_worker(start: Start) -> None:
    """A worker that dies is restarted while the other one serves; one log line tells of it."""
    running = start(workers=2)
    before = running.children()
    os.kill(before[0], signal.SIGKILL)
    assert running.get()["size"] == 0
    wait_for(lambda: len(running.children()) == 2 and running.children() != before)
    new = next(child for child in running.children() if child not in before)
    wait_for(lambda: running.get()["pid"] == new)
    assert f"the worker {before[0]} was ended by SIGKILL; starting it again" in running.errors


def test_no_process_can_be_started(start: Start) -> None:
    """While no worker can be started, the supervisor goes on with the others, and tries again."""
    running = start(workers=2)
    killed, other = running.children()
    used = {int(name) for name in os.listdir(f"/proc/{running.pid}/fd")}
    lowest_free = next(number for number in range(len(used) + 1) if number not in used)
    limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))  # a worker needs two files more
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: "no process can be started: Too many open files" in running.errors)
    assert running.children() == [other]
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)
    wait_for(lambda: len(running.children()) == 2)


def test_dying_workers_back_off(start: Start, tmp_path: Path) -> None:
    """A worker that cannot start is restarted with growing pauses; the server can still be stopped."""
    mark = tmp_path / "mark"
    running = start({"MARK": str(mark)}, workers=2)
    mark.touch()
    first = running.children()[0]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: "again after 0.4 s" in running.errors)
    assert "exit code 1 ([Errno 13] Permission denied: '/data'); starting it again after 0.1 s" in running.errors
    assert running.get()["size"] == 0
    os.kill(running.pid, signal.SIGTERM)
    assert running.end() == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("oserror", "error: [Errno 13] Permission denied: '/data'\n"),
        ("message", "error: the data directory is full\n"),
    ],
)
def test_failed_start(start: Start, workers: int, fault: str, line: str) -> None:
    """A start that fails for a reason outside the program ends with exit code 1 and the reason in one line."""
    running = start(ready=False, workers=workers, start=fault)
    assert running.end() == 1
    assert running.errors == line


@pytest.mark.parametrize("workers", [1, 2])
def test_start_with_a_bug(start: Start, workers: int) -> None:
    """A bug during the start ends the command too, with its traceback in the log."""
    running = start(ready=False, workers=workers, start="bug")
    assert running.end() == 1
    assert "Traceback" in running.errors
    assert running.errors.endswith("error: the server could not start: ZeroDivisionError: a bug\n")


def test_worker_that_dies_while_stopping(start: Start) -> None:
    """A worker that is killed while it drains does not delay the parent."""
    running = start(workers=2, grace=600)
    with begin_slow(running, 600):
        os.kill(running.pid, signal.SIGTERM)
        wait_for(lambda: len(running.children()) == 1)  # the idle one has ended
        os.kill(running.children()[0], signal.SIGKILL)
        assert running.end() == 0


def test_worker_that_dies_during_its_renewal(start: Start) -> None:
    """A worker that dies while its successor starts is replaced once, not twice."""
    running = start(workers=2)
    before = running.children()
    os.kill(before[0], signal.SIGSTOP)  # so that it cannot end in order before it is killed
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: running.children() != before)
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: not set(running.children()) & set(before) and len(running.children()) == 2)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end() == 0


def test_stuck_worker_and_second_interrupt(start: Start) -> None:
    """A second Ctrl-C ends the server at once even if a worker does not react."""
    running = start(workers=2, grace=600)
    stuck = running.children()[0]
    os.kill(stuck, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGINT)
    wait_for(lambda: running.children() == [stuck])
    os.kill(running.pid, signal.SIGINT)
    assert running.end() == 130
    assert not is_alive(stuck)


def test_stuck_worker_is_killed(start: Start) -> None:
    """A worker that does not react is killed after the grace period and a margin; the exit code is 0."""
    running = start(workers=2, grace=0)
    stuck = running.children()[0]
    os.kill(stuck, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end() == 0
    assert not is_alive(stuck)


def test_renewal(start: Start) -> None:
    """SIGUSR2 replaces the workers one by one; a request in flight is answered by its old worker."""
    running = start(workers=2)
    before = running.children()
    with begin_slow(running, 0.5) as sock:
        os.kill(running.pid, signal.SIGUSR2)
        assert read_response(sock)[2] == b"slow"
    wait_for(lambda: len(running.children()) == 2 and not set(running.children()) & set(before))
    assert running.get()["pid"] in running.children()
    os.kill(running.pid, signal.SIGTERM)
    assert running.end() == 0


def test_failed_renewal(start: Start, tmp_path: Path) -> None:
    """When a new worker cannot start, the old ones stay."""
    mark = tmp_path / "mark"
    running = start({"MARK": str(mark)}, workers=2)
    before = running.children()
    mark.touch()
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: "the workers are not renewed: the new worker ended with exit code 1" in running.errors)
    wait_for(lambda: running.children() == before)
    assert running.get()["pid"] in before


def test_port_in_use(start: Start) -> None:
    """A second server on the port ends with exit code 1 and one line."""
    running = start()
    second = start(ready=False, listen="{}:{}".format(*running.address))
    assert second.end() == 1
    assert "in use" in second.errors
    assert second.errors.count("\n") == 1


def _sockets(running: AppProcess) -> dict[int, int]:
    """Returns how many sockets each worker has open."""
    return {
        worker: sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{worker}/fd").iterdir())
        for worker in running.children()
    }


def test_connections_are_shared(start: Start) -> None:
    """Each worker accepts some connections. How many is the scheduler's choice, so more are opened until both have
    some."""
    running = start(workers=2)
    before = _sockets(running)
    socks: list[socket.socket] = []

    def each_worker_has_some() -> bool:
        opened = [running.connect() for _ in range(64)]
        socks.extend(opened)
        for sock in opened:
            sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert all(read_response(sock)[0] == 200 for sock in opened)
        gained = {worker: sockets - before[worker] for worker, sockets in _sockets(running).items()}
        assert len(gained) == 2
        assert sum(gained.values()) == len(socks)
        return min(gained.values()) > 0

    try:
        assert any(each_worker_has_some() for _ in range(8))
    finally:
        for sock in socks:
            sock.close()


PATIENT = {"keep_alive_seconds": 3600, "header_seconds": 3600}


def test_renewal_waits_for_idle_connections(start: Start) -> None:
    """A connection without a request stays open in its old worker, also one that has sent nothing yet. It ends only
    after a response with `Connection: close`."""
    running = start(workers=2, limits=PATIENT)
    before = running.children()
    socks = [running.connect() for _ in range(8)]
    for sock in socks[:6]:
        sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert "connection" not in read_response(sock)[1]
    os.kill(running.pid, signal.SIGUSR2)
    wait_for(lambda: "all workers were replaced" in running.errors)
    for sock in socks:
        headers: dict[str, str] = {}
        while "connection" not in headers:  # more than once if the worker has not read the command to retire yet
            sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n")
            status, headers, body = read_response(sock)
            assert (status, body) == (200, b"slow")
        assert headers["connection"] == "close"
        assert sock.recv(1) == b""
        sock.close()
    wait_for(lambda: len(running.children()) == 2 and not set(running.children()) & set(before))


def test_renewal_during_a_response(start: Start) -> None:
    """A response whose head was sent before the renewal keeps its connection; the next response ends it."""
    running = start(workers=2, limits=PATIENT)
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


def test_pipelined_requests_in_a_renewal(start: Start) -> None:
    """The requests that a retiring worker has received before are all answered."""
    running = start(workers=2, limits=PATIENT)
    with running.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: test\r\n\r\n" * 3)
        running.said("slow")
        os.kill(running.pid, signal.SIGUSR2)
        closes: list[bool] = []
        while not closes or not closes[-1]:
            status, headers, body = read_response(sock)
            assert (status, body) == (200, b"slow")
            closes.append("connection" in headers)
        assert len(closes) <= 3
        assert sock.recv(1) == b""
