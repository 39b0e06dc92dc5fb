"""The parent of the worker processes: forks them, restarts those that die, and stops all of them in a bounded time.

SIGHUP *renews* the workers: each is replaced by a new process, one after the other. A worker's *index* is a number from
0. At any time one worker serves under each index; a new process gets the index of the worker that it replaces.

Two kinds of pipes connect the processes. Each worker reports on its *status pipe* that it is ready, or why its start
failed. The *alive pipe* is shared by all workers: the parent never writes to it, but holds its only writing end, so
workers see the end of the pipe when the parent has ended.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from registry.asgi import AsgiApp
from registry.log_output import flush_output
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import die_with_parent
from registry.server.process.worker import CANCEL_SECONDS, CLOSE_SECONDS, Worker
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

_KILL_MARGIN_SECONDS = 2 * CANCEL_SECONDS + CLOSE_SECONDS + 2.0
"""Time between the end of the grace period and the SIGKILL for a worker that has not ended. It is longer than a worker
takes to cancel its requests and to shut down the application."""
_REAP_SECONDS = 5.0
"""How long to wait for killed workers to end. A process that is stuck in the kernel does not end."""
_RENEWAL_SECONDS = 60.0
"""Time for a new worker to become ready while SIGHUP renews the workers. After it the renewal is abandoned."""
_RESTART_PAUSES = (0.1, 10.0)
"""Shortest and longest back-off before a dead worker is restarted, in seconds."""
_ORDERLY_EXIT_SECONDS = 0.5
"""Pause before a worker that ended with exit code 0 is restarted. Such a worker has received SIGTERM. If the signal was
sent to the whole process group, the parent receives it within this time and stops instead."""
_STABLE_SECONDS = 10.0
"""A worker that was ready and ran for this long is restarted without a back-off when it dies."""


@dataclass(slots=True)
class _WorkerProcess:
    """A child process. Times are in seconds of `time.monotonic`."""

    pid: int
    index: int
    status_pipe: int
    """Reading end of the worker's status pipe."""
    started: float
    column: int | None
    """The worker's column in the table of the per-address connection limit; None: it has none."""
    output: bytearray = field(default_factory=bytearray)
    """What the worker has written to its status pipe, without the line "ready"."""
    ready: bool = False
    """The worker accepts connections."""
    exit_expected: bool = False
    """The parent has told the worker to stop, so its exit needs no restart."""
    kill_at: float = float("inf")
    """When the worker gets SIGKILL."""


class Supervisor:
    """Runs the workers, and handles signals: SIGTERM and SIGINT stop the server in order, a second SIGINT kills it at
    once, and SIGHUP renews the workers. In a renewal, each old worker is told to stop when its replacement is ready; it
    may then complete its requests within the grace period. All processes share the parent's process group.
    """

    def __init__(
        self,
        make_app: Callable[[], AsgiApp],
        sockets: Sequence[socket.socket],
        workers: int,
        grace_seconds: float,
        limits: ServerLimits,
        on_ready: Callable[[], None] | None,
        listener_options: ListenerOptions,
    ) -> None:
        """`workers` is the number of worker processes. `grace_seconds` is how long requests in progress may continue
        after a stop. `on_ready` is called once, when all workers accept connections. The sockets listen already."""
        self._make_app = make_app
        self._sockets = sockets
        self._workers = workers
        self._grace_seconds = grace_seconds
        self._limits = limits
        self._on_ready = on_ready
        self._listener_options = listener_options
        self._children: dict[int, _WorkerProcess] = {}
        self._start_times: dict[int, float] = {}  # index -> when to start its worker, which does not run
        self._restart_pauses: dict[int, float] = {}  # index -> back-off before the next restart after a crash, seconds
        self._exit_reasons: dict[int, str] = {}  # index -> how its worker ended, until a new one is started
        self._to_replace: list[_WorkerProcess] = []  # workers that the renewal has not replaced yet
        self._replacement: _WorkerProcess | None = None  # the process that is to replace the first of `_to_replace`
        self._has_served = False  # all workers have been ready at the same time
        self._stopping = False
        self._interrupted = False  # a first SIGINT has arrived
        self._give_up_at = float("inf")
        self._exit_code = 0
        self._failure: str | None = None
        self._parent = os.getpid()
        self._signal_reader, self._signal_writer = os.pipe()
        self._alive_pipe, self._alive_pipe_writer = os.pipe()
        os.set_blocking(self._signal_reader, False)
        os.set_blocking(self._signal_writer, False)
        # With epoll instead of poll, a forked child would share the parent's set of descriptors.
        self._selector = selectors.PollSelector()

    def run(self) -> tuple[int, str | None]:
        """Runs until all workers have ended. Returns the exit code and, after a failed start, the reason in one line;
        otherwise None in its place.

        Call it in the main thread, because the kernel kills the workers when the thread that forked them ends.
        """
        self._selector.register(self._signal_reader, selectors.EVENT_READ)
        handlers_before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        wakeup_before = signal.set_wakeup_fd(self._signal_writer, warn_on_full_buffer=False)
        try:
            self._start_times = dict.fromkeys(range(self._workers), 0.0)
            self._loop()
        finally:
            self._kill_all()
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
            self._selector.close()
            for end in (self._signal_reader, self._signal_writer, self._alive_pipe, self._alive_pipe_writer):
                os.close(end)
        return self._exit_code, self._failure

    def _loop(self) -> None:
        while not self._stopping or self._children:
            now = time.monotonic()
            if now > self._give_up_at:
                log.error("the workers %s did not end after SIGKILL; exiting without them", sorted(self._children))
                return
            self._start_due_workers(now)
            self._kill_overdue(now)
            for key, _ in self._selector.select(self._seconds_to_next_action(now)):
                if key.fd == self._signal_reader:
                    self._handle_signals()
                else:
                    self._read_status(key.data)
            self._reap()
            self._continue_start_or_renewal()

    def _seconds_to_next_action(self, now: float) -> float | None:
        """Returns how long the loop may wait for signals and pipes; None: without a limit."""
        times = [*self._start_times.values(), *(child.kill_at for child in self._children.values()), self._give_up_at]
        if self._replacement is not None:
            times.append(self._replacement.started + _RENEWAL_SECONDS)
        next_time = min(times)
        return None if next_time == float("inf") else max(0.0, next_time - now) + 0.001

    def _start_due_workers(self, now: float) -> None:
        for index in [index for index, when in self._start_times.items() if when <= now]:
            del self._start_times[index]
            if index in self._exit_reasons:
                log.warning(self._exit_reasons.pop(index))
            self._fork(index)

    def _fork(self, index: int) -> _WorkerProcess:
        limit = self._listener_options.per_address_limit
        column = None if limit is None else limit.claim_column()
        status, status_writer = os.pipe()
        flush_output()  # otherwise the child has a copy of the buffered output and writes it a second time
        # Signals stay blocked in the child until it has set its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(self._run_worker(status, status_writer, column))
        except OSError:
            os.close(status)
            raise
        finally:
            os.close(status_writer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.set_blocking(status, False)
        child = _WorkerProcess(pid, index, status, time.monotonic(), column)
        self._children[pid] = child
        self._selector.register(status, selectors.EVENT_READ, child)
        return child

    def _run_worker(self, status: int, status_writer: int, column: int | None) -> int:
        """Runs the worker in the child process, and returns its exit code. Closes the parent's ends of the pipes, and
        changes nothing that the parent could notice."""
        code = 1
        try:
            if not die_with_parent(self._parent):
                return 1
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            ends = [child.status_pipe for child in self._children.values()]
            for end in (self._signal_reader, self._signal_writer, self._alive_pipe_writer, status, *ends):
                os.close(end)
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.use_column(column)
            worker = Worker(
                self._make_app,
                self._sockets,
                self._grace_seconds,
                self._limits,
                lambda: _write_line(status_writer, "ready"),
                listener_options=self._listener_options,
                alive_pipe=self._alive_pipe,
            )
            code, failure = worker.run()
            if failure is not None:
                _write_line(status_writer, failure)
        except BaseException:
            traceback.print_exc()
        finally:
            logging.shutdown()
            flush_output()
        return code

    def _handle_signals(self) -> None:
        """Acts on the signals whose numbers the interpreter has written to the signal pipe."""
        for number in os.read(self._signal_reader, 4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGHUP and self._has_served and not self._stopping and not self._to_replace:
                self._to_replace = list(self._children.values())

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Kills all workers and exits at the second SIGINT, or at one that comes during a stop. The interpreter calls
        this handler even while a write to the log blocks the loop. `_handle_signals` acts on all other signals."""
        if number != signal.SIGINT:
            return
        if self._interrupted or self._stopping:
            self._kill_in_signal_handler()
            os._exit(128 + number)
        self._interrupted = True

    def _read_status(self, child: _WorkerProcess) -> None:
        text = os.read(child.status_pipe, 65536)
        child.output += text
        if not text:
            self._selector.unregister(child.status_pipe)
        if not child.ready and child.output.startswith(b"ready\n"):
            child.ready = True
            del child.output[: len(b"ready\n")]

    def _reap(self) -> None:
        """Handles all workers that have ended."""
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            if child.status_pipe in self._selector.get_map():
                self._drain_status(child)
                self._selector.unregister(child.status_pipe)
            os.close(child.status_pipe)
            del self._children[pid]
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.release_column(child.column)
            self._on_exit(child, os.waitstatus_to_exitcode(status))

    def _drain_status(self, child: _WorkerProcess) -> None:
        try:
            while text := os.read(child.status_pipe, 65536):
                child.output += text
        except BlockingIOError:
            pass  # the pipe is empty but open, because a process that the worker started holds its writing end

    def _on_exit(self, child: _WorkerProcess, code: int) -> None:
        """Decides what follows after a worker has ended: nothing if the exit was expected, a stop of the server if its
        start failed, otherwise a restart."""
        is_being_replaced = self._replacement is not None and child is self._to_replace[0]
        if child in self._to_replace:
            self._to_replace.remove(child)
        if self._stopping or child.exit_expected:
            return
        if is_being_replaced:
            self._replacement = None  # the worker ended before its replacement was ready, which serves in its place now
            return
        if child is self._replacement:
            self._abandon_renewal(f"the new worker {_describe_exit(child, code)}")
            return
        if not self._has_served:
            self._exit_code = 1
            self._failure = child.output.decode(errors="replace").strip() or f"a worker {_describe_exit(child, code)}"
            self._stop()
            return
        now = time.monotonic()
        pause = self._restart_pauses.get(child.index, 0.0)
        if code == 0 or (child.ready and now - child.started >= _STABLE_SECONDS):
            pause = 0.0
        self._restart_pauses[child.index] = min(max(pause * 2, _RESTART_PAUSES[0]), _RESTART_PAUSES[1])
        if code == 0:
            pause = _ORDERLY_EXIT_SECONDS
        self._start_times[child.index] = now + pause
        self._exit_reasons[child.index] = (
            f"the worker {child.pid} {_describe_exit(child, code)}; starting it again after {pause:g} s"
        )

    def _continue_start_or_renewal(self) -> None:
        """Calls `on_ready` once all workers are ready. In a renewal, stops a worker whose replacement is ready, and
        forks the next replacement."""
        if self._stopping:
            return
        if (
            not self._has_served
            and len(self._children) == self._workers
            and all(c.ready for c in self._children.values())
        ):
            self._has_served = True
            if self._on_ready is not None:
                self._on_ready()
        if self._replacement is not None:
            if self._replacement.ready:
                self._stop_worker(self._to_replace.pop(0))
                self._replacement = None
            elif time.monotonic() - self._replacement.started > _RENEWAL_SECONDS:
                self._replacement.exit_expected = True
                os.kill(self._replacement.pid, signal.SIGKILL)
                self._abandon_renewal(f"the new worker was not ready within {_RENEWAL_SECONDS:g} s")
        if self._replacement is None and self._to_replace:
            self._replacement = self._fork(self._to_replace[0].index)

    def _abandon_renewal(self, why: str) -> None:
        log.error("the workers are not renewed: %s", why)
        self._to_replace.clear()
        self._replacement = None

    def _stop_worker(self, child: _WorkerProcess) -> None:
        """Sends SIGTERM, and plans a SIGKILL for the case that the worker has not ended after the grace period."""
        child.exit_expected = True
        child.kill_at = time.monotonic() + self._grace_seconds + _KILL_MARGIN_SECONDS
        os.kill(child.pid, signal.SIGTERM)

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._start_times.clear()
            self._to_replace.clear()
            self._replacement = None
            for sock in self._sockets:
                # When the workers have closed their copies too, the system refuses new connections at once.
                sock.close()
            for child in self._children.values():
                self._stop_worker(child)
            self._give_up_at = time.monotonic() + self._grace_seconds + _KILL_MARGIN_SECONDS + _REAP_SECONDS

    def _kill_overdue(self, now: float) -> None:
        for child in self._children.values():
            if child.kill_at <= now:
                child.kill_at = float("inf")
                os.kill(child.pid, signal.SIGKILL)  # the pid is still the child's, because it was not reaped yet

    def _kill_all(self) -> None:
        """Kills all workers that still run, and waits for their end for a bounded time. There are such workers only if
        the loop ended with an error or gave up."""
        deadline = time.monotonic() + _REAP_SECONDS
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        while self._children and time.monotonic() < deadline:
            self._stopping = True
            self._reap()
            time.sleep(0.005)

    def _kill_in_signal_handler(self) -> None:
        """Kills all workers, and waits for their end for a bounded time. Changes no attributes, because the signal
        handler may interrupt any other method."""
        running = [pid for pid in self._children if not _has_ended(pid)]
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _REAP_SECONDS
        while running and time.monotonic() < deadline:
            running = [pid for pid in running if not _has_ended(pid)]
            time.sleep(0.005)


def _has_ended(pid: int) -> bool:
    """Returns whether the child process has ended, and reaps it if so."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _write_line(pipe: int, text: str) -> None:
    os.write(pipe, text.encode() + b"\n")


def _describe_exit(child: _WorkerProcess, code: int) -> str:
    """Returns how the worker ended, as the end of a sentence about it. A negative `code` is the number of a signal."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    reason = child.output.decode(errors="replace").strip()
    return f"ended with exit code {code}" + (f" ({reason})" if reason else "")
