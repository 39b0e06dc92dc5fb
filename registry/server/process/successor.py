"""Replaces a running server by a new version of its program.

First, the supervisor (the parent process of the workers) starts a process of the new version for the *check*: this
process checks whether the new version can take over. If the check fails, the old version continues unchanged. If it
succeeds, the supervisor executes the new version in the supervisor's own process (execve(2)).

The supervisor's process keeps its pid, its child processes, and the open files that the old version hands over. So a
service manager, container or terminal that watches the process notices no change. The workers of the old version
continue to serve until the new version has replaced them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from registry.log_output import flush_output
from registry.server.process.live_change import ChangeOutcome, ChangeRefused
from registry.server.process.worker_pool import SIGNALS
from registry.server.process.worker_process import WorkerProcess

HANDOVER_VARIABLE: Final = "_ENTREPOT_HANDOVER"
"""The environment variable with the `Handover` or the `CheckTask`, as JSON."""
_HANDOVER_FORMAT: Final = 2
"""Format number of a handover. A version that does not know the format refuses to take over."""
_CHECK_SECONDS: Final = 60.0
"""The longest time for the check."""
_KEPT_OUTPUT_BYTES: Final = 4096
"""How many bytes of the check's output are kept, counted from its end."""


@dataclass(frozen=True)
class Handover:
    """The data that the old version hands over to the new version. Except in `workers`, each integer is a file
    descriptor."""

    sockets: list[int]
    """The listening sockets."""
    alive_pipe: tuple[int, int]
    """The reading and the writing end of the pipe by which the workers notice that the supervisor has ended."""
    control: int | None
    """The control socket; None if the server has no control socket."""
    waiting: list[int]
    """Connections of clients of the control socket that wait for the result of the restart."""
    workers: list[dict[str, Any]]
    """The workers of the old version: the fields of `WorkerProcess` that the new version needs."""
    facts: dict[str, str]
    """Facts about the old version that the new one checks, such as its data directory."""
    counts: tuple[int, str] | None = None
    """The shared memory with the application's counters: its file descriptor, and a text that identifies its layout.
    None if there is no shared memory."""

    def descriptors(self) -> list[int]:
        """Returns all file descriptors that the new version gets."""
        descriptors = [*self.sockets, *self.alive_pipe, *self.waiting]
        descriptors += [] if self.control is None else [self.control]
        descriptors += [] if self.counts is None else [self.counts[0]]
        return [*descriptors, *(worker[end] for worker in self.workers for end in ("status_pipe", "commands"))]

    def adopted_workers(self) -> list[WorkerProcess]:
        """Returns the workers of the old version. `WorkerProcess.column` is the worker's column in a table of
        connection counts (`PerAddressLimit`). The new version does not have the old version's table, so `column` is
        None here."""
        return [
            WorkerProcess(
                pid=worker["pid"],
                index=worker["index"],
                status_pipe=worker["status_pipe"],
                started=worker["started"],
                column=None,
                commands=socket.socket(fileno=worker["commands"]),
                runs_old_version=True,
                is_ready=worker.get("ready", True),
                exit_expected=worker["exit_expected"],
                kill_at=worker["kill_at"] or float("inf"),
            )
            for worker in self.workers
        ]


def describe_worker(worker: WorkerProcess) -> dict[str, Any]:
    """Returns a worker's entry in `Handover.workers`."""
    return {
        "pid": worker.pid,
        "index": worker.index,
        "status_pipe": worker.status_pipe,
        "started": worker.started,
        "commands": worker.commands.fileno(),
        "ready": worker.is_ready,
        "exit_expected": worker.exit_expected,
        "kill_at": None if worker.kill_at == float("inf") else worker.kill_at,
    }


@dataclass(frozen=True)
class CheckTask:
    """Tells a process of the new version to make the check. `facts`: the facts about the old version
    (`Handover.facts`)."""

    facts: dict[str, str]


def take_handover(environment: MutableMapping[str, str]) -> Handover | CheckTask | None:
    """Removes HANDOVER_VARIABLE from `environment`, and returns the handover or the check task in it. Returns None if
    the variable is not set, that is, at an ordinary start. Raises ChangeRefused if this version does not know the
    format of the handover."""
    text = environment.pop(HANDOVER_VARIABLE, None)
    if text is None:
        return None
    value = json.loads(text)
    if value["format"] not in (1, _HANDOVER_FORMAT):  # format 1 has no field `counts`
        raise ChangeRefused("this version cannot take over from the running version; stop the server and start it")
    if value["check"]:
        return CheckTask(value["facts"])
    fields = value["handover"]
    counts = fields.get("counts")
    pairs = {"alive_pipe": tuple(fields["alive_pipe"]), "counts": None if counts is None else tuple(counts)}
    handover = Handover(**{**fields, **pairs})
    for descriptor in handover.descriptors():
        os.set_inheritable(descriptor, False)
    return handover


class Successor:
    """Starts the new version of the program. `command`: the path of the interpreter, and all its arguments. `facts`:
    the facts about the old version (`Handover.facts`)."""

    def __init__(self, command: Sequence[str], facts: Mapping[str, str]) -> None:
        self.facts = dict(facts)
        self._command = list(command)

    def start_check(self) -> SuccessorCheck:
        """Starts a process of the new version that checks whether it can take over. Raises ChangeRefused if no process
        can be started."""
        environment = self._environment({"check": True, "facts": self.facts})
        try:
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise ChangeRefused(f"the program cannot be started: {error}") from None
        return SuccessorCheck(process)

    def execute(self, handover: Handover, must_stop: Callable[[], bool]) -> None:
        """Executes the new version in this process. Never returns: if the execution fails or `must_stop` returns True,
        raises ChangeRefused.

        `must_stop` returns whether this process has received a signal to stop and has not handled the signal yet. The
        new version would lose the signal.

        Blocks `SIGNALS` (all signals that the supervisor handles) before it calls `must_stop`. The new version unblocks
        `SIGNALS` when it has set its handlers. If this method raises ChangeRefused, it unblocks `SIGNALS` first."""
        descriptors = handover.descriptors()
        environment = self._environment({"check": False, "handover": asdict(handover)})
        flush_output()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if must_stop():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            raise ChangeRefused("the server stops")
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        try:
            os.execve(self._command[0], self._command, environment)
        except OSError as error:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            raise ChangeRefused(f"the program cannot be executed: {error}") from None

    def _environment(self, value: dict[str, Any]) -> dict[str, str]:
        return {**os.environ, HANDOVER_VARIABLE: json.dumps({"format": _HANDOVER_FORMAT, **value})}


class SuccessorCheck:
    """A process of the new version that makes the check. If the check fails, the process writes the reason to
    stderr."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._output = b""
        self._output_has_ended = False
        assert process.stderr is not None
        self.output_pipe = process.stderr.fileno()
        """Descriptor of the pipe for the process's stderr. Call `read` when the pipe is readable."""
        os.set_blocking(self.output_pipe, False)
        self.deadline = time.monotonic() + _CHECK_SECONDS
        """The time by which the caller must call `outcome` again, in seconds of `time.monotonic`."""

    def read(self) -> bool:
        """Reads what the process has written to stderr. Returns False at the end of the output."""
        data = os.read(self.output_pipe, 65536)
        self._output = (self._output + data)[-_KEPT_OUTPUT_BYTES:]
        self._output_has_ended = self._output_has_ended or not data
        return bool(data)

    def outcome(self, now: float) -> ChangeOutcome | None:
        """Returns the result of the check; None if the check still runs. If `deadline` has passed, kills the process
        and returns a failure. `now`: the time in seconds of `time.monotonic`."""
        if not self._output_has_ended and now < self.deadline:
            return None
        if not self._output_has_ended:
            self.kill()
            return ChangeOutcome(
                False, f"the new version did not find out within {_CHECK_SECONDS:g} s whether it can start"
            )
        code = self._process.wait()
        if code == 0:
            return ChangeOutcome(True, "")
        lines = self._output.decode(errors="replace").strip().splitlines() or [f"the check ended with exit code {code}"]
        return ChangeOutcome(False, lines[-1].removeprefix("entrepot: ").removeprefix("error: "))

    def kill(self) -> None:
        """Kills the process of the check."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Closes the pipe for the process's stderr."""
        if self._process.stderr is not None:
            self._process.stderr.close()
