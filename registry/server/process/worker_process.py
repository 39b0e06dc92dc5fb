"""The supervisor's record of a worker (`WorkerProcess`): when the worker started, what it has reported, and how it
ended. The *supervisor* is the process that starts and watches the workers. The workers are its child processes.

A worker reports on its *status pipe*, to which only the worker writes. Once it accepts connections, it writes the line
"ready". If it fails, it writes the reason, in one line.
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
    """A number from 0, different for each worker. A process that replaces a worker gets the same number."""
    status_pipe: int
    """Reading end of the worker's status pipe, a file descriptor that does not block."""
    started: float
    """When the process was forked."""
    column: int | None
    """The worker's column in the shared table of connection counts (see `PerAddressLimit`). None: the worker does not
    count its connections in this table."""
    commands: socket.socket
    """The supervisor's end of the channel for commands (`registry.server.process.commands`)."""
    is_adopted: bool = False
    """True if the worker runs the version and the settings from before an upgrade. The upgrade has replaced the program
    in the supervisor's process (`exec`), but not in this worker."""
    output: bytearray = field(default_factory=bytearray)
    """What the worker has written to its status pipe, without the line "ready"."""
    is_ready: bool = False
    """Whether the worker accepts connections."""
    exit_expected: bool = False
    """Whether the worker shall end for good. If so, the supervisor does not restart it."""
    kill_at: float = float("inf")
    """When the supervisor sends SIGKILL if the worker has not ended by then."""

    def read_status(self) -> bool:
        """Reads from the status pipe once. Returns False at the end of the pipe, when no process can write to it any
        more. Raises BlockingIOError if the pipe is empty."""
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
            pass  # the pipe is empty but open, because a process that the worker started holds its writing end

    def describe_failure(self) -> str:
        """Returns the reason that the worker has reported for its failure; empty if it has reported none."""
        return self.output.decode(errors="replace").strip()

    def describe_exit(self, code: int) -> str:
        """Returns how the worker ended, as the part of a sentence that follows "the worker". `code` is its exit code,
        or the negative number of the signal that ended it."""
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        reason = self.describe_failure()
        return f"ended with exit code {code}" + (f" ({reason})" if reason else "")


def report_ready(status_writer: int) -> None:
    """Reports that this worker accepts connections. `status_writer` is the writing end of its status pipe."""
    os.write(status_writer, _READY_LINE)


def report_failure(status_writer: int, reason: str) -> None:
    """Reports why this worker has failed. `reason` is one line."""
    os.write(status_writer, reason.encode() + b"\n")


def reap_if_ended(pid: int) -> bool:
    """Returns whether the child process has ended. If it has, also reaps it: then the system can give its pid to
    another process."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # the process was reaped before
        return True
