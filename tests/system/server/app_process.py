"""Runs the HTTP server with a small test application (`echo_app`) as a real process, and sends requests to it through
raw sockets."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.forked_process import ROOT, ForkedProcess

TIMEOUT_SECONDS = 60.0


class AppProcess:
    """A server process with the application `echo_app`, which prints a line to stdout for each event. `errors`: what
    the process has written to stderr so far."""

    def __init__(self, options: dict[str, Any], env: dict[str, str] | None = None) -> None:
        self.process = _start_app(json.dumps(options), {**os.environ, **(env or {})})
        self.pid = self.process.pid
        self.address = ("", 0)
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors = ""
        self._threads = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors += line

    @property
    def errors(self) -> str:
        return self._errors

    def wait_for_line(self, text: str) -> str:
        """Waits for a line of stdout that starts with `text`, and returns the line. Discards the lines before it."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            if line.startswith(text):
                return line

    def wait_until_ready(self) -> AppProcess:
        """Waits until the server listens, and stores its address."""
        host, _, port = self.wait_for_line("ready").split()[1].rpartition(":")
        self.address = (host, int(port))
        return self

    def children(self) -> list[int]:
        """Returns the process ids of the workers."""
        return children(self.pid)

    def has_replaced(self, workers: list[int]) -> bool:
        """Returns whether none of these two workers is left, and two other ones run."""
        now = set(self.children())  # read once, because it may change between two readings
        return len(now) == 2 and not now & set(workers)

    def connect(self) -> socket.socket:
        """Opens a connection to the server."""
        sock = socket.create_connection(self.address, timeout=TIMEOUT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def connect_with(self, request: bytes) -> socket.socket:
        """Opens a connection, and sends the bytes before the server accepts it. So no timeout of the server runs in
        between. The server must have one process."""
        stop(self.pid)
        try:
            sock = self.connect()
            sock.sendall(request)
        finally:
            os.kill(self.pid, signal.SIGCONT)
        return sock

    def send_and_read_all(self, request: bytes) -> bytes:
        """Sends the bytes over a new connection, and returns all that the server sends until it closes the
        connection."""
        with self.connect() as sock:
            sock.sendall(request)
            return read_all(sock)

    def get(self, path: str = "/echo") -> dict[str, Any]:
        """Sends a GET request over a new connection. Returns the JSON of the response."""
        with self.connect() as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            status, _, body = read_response(sock)
            assert status == 200
            return dict(json.loads(body))

    def wait_for_exit(self) -> int:
        """Waits for the process to end by itself. Returns its exit code."""
        code = self.process.wait(TIMEOUT_SECONDS)
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS)
        return code

    def close(self) -> None:
        """Kills the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait_for_exit()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


def _start_app(options: str, env: dict[str, str]) -> subprocess.Popen[str] | ForkedProcess:
    """Starts `echo_app`, usually as a fork of a prepared process, which is fast. With `NO_UVLOOP`, starts a new
    interpreter, because the event loop is chosen when the server is imported."""
    module = "tests.system.server.echo_app"
    if "NO_UVLOOP" not in env:
        return ForkedProcess(module, options, cwd=ROOT, env=env)
    return subprocess.Popen(
        [sys.executable, "-m", module, options],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        text=True,
        start_new_session=True,
    )


def read_all(sock: socket.socket) -> bytes:
    """Reads until the server closes the connection."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


class ExactReads(socket.SocketIO):
    """`read(size)` returns exactly `size` bytes, or fewer if the connection ends."""

    def read(self, size: int = -1) -> bytes:
        data = bytearray()
        while len(data) < size and (piece := super().read(size - len(data))):
            data += piece
        return bytes(data)


def read_response(sock: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Reads one response, and no byte after it. Returns its status, its headers with lower-case names, and its body."""
    response = http.client.HTTPResponse(sock, method=method)
    response.fp.close()
    response.fp = ExactReads(sock, "r")  # type: ignore[assignment]
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    body = response.read()
    response.close()
    return response.status, headers, body


def read_error(data: bytes) -> tuple[int, str]:
    """Returns the status and the error code of a response in the error format of the distribution spec. Checks that
    `data` is one response, with which the connection closes."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    for line in ("content-type: application/json", "connection: close", f"content-length: {len(body)}"):
        assert line in lines, data
    assert "docker-distribution-api-version: registry/2.0" in lines
    (error,) = json.loads(body)["errors"]
    assert error["message"]
    return int(lines[0].split()[1]), error["code"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Calls `condition` repeatedly until it returns True."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


class Pauses:
    """Measures the pauses of a client that must not be silent for long. `longest`: the longest time in seconds between
    two calls of `end`."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._started = time.monotonic()

    def end(self) -> None:
        """Called when the client has sent or received something."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self._started)
        self._started = now


def repeat_after_stalls(attempt: Callable[[Pauses], None], longest_pause: float) -> None:
    """Calls `attempt`. If it fails and had a pause of more than `longest_pause` seconds, because the machine has
    stalled, calls it again."""
    while True:
        pauses = Pauses()
        try:
            attempt(pauses)
            return
        except (AssertionError, OSError, http.client.HTTPException):
            pauses.end()
            if pauses.longest <= longest_pause:
                raise


def children(pid: int) -> list[int]:
    """Returns the process ids of the children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stop(pid: int) -> None:
    """Stops the process (SIGSTOP), and waits until it is stopped. SIGCONT continues it."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: _state(pid) == "T")


def is_alive(pid: int) -> bool:
    """Returns whether the process exists and is not a zombie."""
    return _state(pid) not in ("", "Z")


def _state(pid: int) -> str:
    """Returns the letter of the process's state (proc(5), stat); empty if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


Start = Callable[..., AppProcess]
"""The type of the fixture `start`, which starts a server with the given options."""
