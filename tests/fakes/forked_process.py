"""Runs Python programs as separate processes without starting an interpreter: as forks of `fork_server`.

`ForkedProcess` replaces `subprocess.Popen` for `python -m MODULE …`, as far as tests use it. Each process has its own
process tree, session, environment and files. It shares with other forks the memory that was written before the fork,
and the random seed of `hash`. A test that measures the memory of a process, sets its limits, or checks how a command
starts must use `subprocess` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.fakes.fork_server import ForkRequest

ROOT = Path(__file__).resolve().parents[2]
NO_CERTIFICATES = {"SSL_CERT_FILE": "", "SSL_CERT_DIR": str(ROOT)}
"""Environment of programs that need no certificates of the system. Reading these certificates would take 55 ms of CPU
time in each process."""
_UMASK = re.compile(r"^Umask:\t(\d+)$", re.MULTILINE)


class ForkedProcess:
    """A running `python -m module *args` with text streams. `stdin`, `stdout`, `stderr`: a file descriptor, PIPE or
    DEVNULL, as for Popen; `stderr` may also be STDOUT. `env`: the whole environment. `site`: a Python file that the
    process runs first."""

    def __init__(
        self,
        module: str,
        *args: str,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        site: str = "",
    ) -> None:
        self.args = ["python", "-m", module, *args]
        self.returncode: int | None = None
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self._readers: list[tuple[threading.Thread, list[str]]] = []
        self._lock = threading.Lock()
        child_files: list[int] = []
        try:
            child_in, self.stdin = _open_end(stdin, child_files, writing=True)
            child_out, self.stdout = _open_end(stdout, child_files)
            child_err, self.stderr = (
                (child_out, None) if stderr == subprocess.STDOUT else _open_end(stderr, child_files)
            )
            request = ForkRequest(module, list(args), str(cwd.resolve()), dict(env), _current_umask(), site)
            self._state = _fork_server().fork(request, [child_in, child_out, child_err])
        finally:
            for file in child_files:
                os.close(file)
        message, (self._pidfd,), _, _ = socket.recv_fds(self._state, 100, 1)
        self.pid = int(message)

    def poll(self) -> int | None:
        """Returns the exit code; None while the process runs."""
        with self._lock:
            if self.returncode is None:
                self._state.settimeout(0)
                self._receive_code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code. Raises subprocess.TimeoutExpired."""
        with self._lock:
            if self.returncode is None:
                self._state.settimeout(timeout)
                self._receive_code()
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal. Does nothing if the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # the process may have ended since the check
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, stdin_text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Writes `stdin_text` to stdin, reads stdout and stderr to their ends, and waits for the end of the process.
        Raises subprocess.TimeoutExpired; a later call then continues to read and wait."""
        if not self._readers:
            self._readers = [_read_in_thread(self.stdout), _read_in_thread(self.stderr)]
            if self.stdin is not None:
                try:
                    with self.stdin:
                        self.stdin.write(stdin_text or "")
                except BrokenPipeError:
                    pass  # the process has ended without reading its stdin
        for thread, _ in self._readers:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        (_, (out,)), (_, (err,)) = self._readers
        return out, err

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    def _receive_code(self) -> None:
        try:
            message = self._state.recv(100)
        except (TimeoutError, BlockingIOError):
            return
        assert message, "the fork server has ended"
        self.returncode = int(message)
        self._state.close()
        os.close(self._pidfd)


class ForkServer:
    """A running `fork_server`. It ends when this process ends."""

    def __init__(self) -> None:
        self._control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.fork_server", str(server_end.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                pass_fds=[server_end.fileno()],
                start_new_session=True,
            )

    def fork(self, request: ForkRequest, files: list[int]) -> socket.socket:
        """Requests a child with these files as its stdin, stdout and stderr. Returns a socket that receives the pid and
        later the exit code of the child."""
        our_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            socket.send_fds(self._control, [request.to_message()], [*files, server_end.fileno()])
        return our_end

    def close(self) -> None:
        """Ends the fork server and its remaining children."""
        self._control.close()
        self._process.wait()


@functools.cache
def _fork_server() -> ForkServer:
    """Returns the fork server of this process. The first call starts it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def _open_end(kind: int, child_files: list[int], *, writing: bool = False) -> tuple[int, IO[str] | None]:
    """Returns the child's end of a stream and, for a pipe, this process's end. If it opens a file for the child, adds
    it to `child_files`: this process closes these files once the child has them."""
    if kind == subprocess.PIPE:
        reader, writer = os.pipe()
        child, our_end = (reader, writer) if writing else (writer, reader)
        child_files.append(child)
        return child, open(our_end, "w" if writing else "r", encoding="utf-8", errors="replace")
    if kind == subprocess.DEVNULL:
        child = os.open(os.devnull, os.O_RDWR)
        child_files.append(child)
        return child, None
    return kind, None


def _current_umask() -> int:
    found = _UMASK.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1), 8)


def _read_in_thread(stream: IO[str] | None) -> tuple[threading.Thread, list[str]]:
    """Starts a thread that reads the stream to its end. Returns the thread, and a list to which the thread appends the
    text."""
    text: list[str] = []

    def read() -> None:
        text.append(stream.read() if stream is not None else "")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, text
