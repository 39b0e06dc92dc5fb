"""The supervisor's record of a worker process (`WorkerProcess`). The *supervisor* is the process that starts and
watches the workers, which are its child processes.

A worker reports to the supervisor on its own *status pipe*. When the worker can accept connections, it writes the line
"ready". If it fails, it writes the reason in one line.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field

_READY_LINE = b"ready\n"


@dataclass(slots=True)
class WorkerProcess:
    """A child process of the supervisor. Times are in seconds of `time.monotonic`."""

    pid: int
    index: int
    """The worker's number, from 0. No two workers have the same number, but a replacement gets the number of the worker
    that it replaces."""
    status_pipe: int
    """Reading end of the worker's status pipe: a non-blocking file descriptor."""
    started: float
    """When the process was forked."""
    column: int | None
    """The worker's column in the shared table of connection counts (see `PerAddressLimit`). None: the worker does not
    count its connections in this table."""
    commands: socket.socket
    """The supervisor's end of the channel for commands (`registry.server.process.commands`)."""
    runs_old_version: bool = False
    """Whether the worker runs an old version of the program, with old settings. An upgrade replaces the program in the
    supervisor's process (`exec`), but not in the workers that already run."""
    output: bytearray = field(default_factory=bytearray)
    """The bytes that were read from the worker's status pipe, without the line "ready"."""
    is_ready: bool = False
    """Whether the worker accepts connections."""
    exit_expected: bool = False
    """Whether the end of the worker is intended. If True, the supervisor does not restart the worker."""
    kill_at: float = float("inf")
    """If the worker has not ended by this time, the supervisor sends SIGKILL. Infinity: it sends none."""

    def read_status(self) -> bool:
        """Reads from the status pipe once. Returns False when every process has closed the writing end, otherwise True.
        Raises BlockingIOError if the pipe is empty but still open."""
        data = os.read(self.status_pipe, 65536)
        self.output += data
        if not self.is_ready and self.output.startswith(_READY_LINE):
            self.is_ready = True
            del self.output[: len(_READY_LINE)]
        return bool(data)

    def read_remaining_status(self) -> None:
        """Reads the rest of the status pipe. Call this after the worker has ended."""
        try:
            while self.read_status():
                pass
        except BlockingIOError:
            pass  # a process that the worker has started still holds the writing end

    def describe_failure(self) -> str:
        """Returns the reason that the worker has reported for its failure, or '' if it has reported none."""
        return self.output.decode(errors="replace").strip()

    def describe_exit(self, code: int) -> str:
        """Returns how the worker ended, in words that can follow "the worker". `code`: the exit code, or the negative
        number of the signal that ended the worker."""
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        reason = self.describe_failure()
        return f"ended with exit code {code}" + (f" ({reason})" if reason else "")


def report_ready(status_writer: int) -> None:
    """Reports that this worker accepts connections. `status_writer`: the writing end of the worker's status pipe."""
    os.write(status_writer, _READY_LINE)


def report_failure(status_writer: int, reason: str) -> None:
    """Reports why this worker has failed. `status_writer`: see `report_ready`. `reason`: one line."""
    os.write(status_writer, reason.encode() + b"\n")


def reap_if_ended(pid: int) -> bool:
    """Returns whether the child process has ended. If it has ended, also reaps it. The system can then give its pid to
    another process."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # the process was reaped before
        return True
