"""The supervisor: the parent process that forks the workers, restarts those that die, and stops them in a bounded time.

SIGHUP *renews* the workers: the supervisor replaces them by new processes, one after the other. A worker's *index* is a
number from 0. A new process gets the index of the worker whose place it takes.

Each worker reports on a *status pipe* of its own that it is ready, or why it failed. All workers read from the *alive
pipe*. The supervisor never writes to it, but holds its only writing end. So the workers get an end of file from the
pipe when the supervisor has ended, however it ended.

A worker's *column* is its part of the shared table in which the workers count the connections of each client address.
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
from types import FrameType

from registry.asgi import AsgiApp
from registry.log_output import flush_output
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import die_with_parent
from registry.server.process.worker import CANCEL_SECONDS, CLOSE_SECONDS, Worker
from registry.server.process.worker_process import WorkerProcess, reap, report_failure, report_ready
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
"""The signals that wake the supervisor's loop. SIGCHLD arrives when a worker has ended."""
_KILL_MARGIN_SECONDS = CANCEL_SECONDS + CLOSE_SECONDS + CANCEL_SECONDS + 2.0
"""Time from the end of a worker's grace period to SIGKILL. The first three numbers are how long the worker waits at
most: for its cancelled requests, for the shutdown of the application, and for all other tasks, which it cancels last.
The rest is a reserve."""
_REAP_SECONDS = 5.0
"""How long the supervisor waits for killed workers to end. A process that is stuck in a system call does not end."""
_RENEWAL_SECONDS = 60.0
"""Time for a new worker to become ready in a renewal. If it takes longer, the supervisor abandons the renewal."""
_FIRST_BACKOFF_SECONDS = 0.1
"""The *back-off* (pause) before the second restart of a worker that dies repeatedly. The first restart has no back-off.
From the third restart on, the back-off doubles each time."""
_MAX_BACKOFF_SECONDS = 10.0
_STABLE_SECONDS = 10.0
"""If a worker was ready and has run for this long when it dies, its restart counts as the first one again."""
_STOPPED_WORKER_PAUSE_SECONDS = 0.5
"""Pause before the restart of a worker that ended with exit code 0, because another process had sent it SIGTERM. If
SIGTERM was sent to the whole process group, the supervisor receives it in this time, and stops the server."""


class Supervisor:
    """Runs the workers, and handles signals. SIGTERM and SIGINT stop the server gracefully. A second SIGINT kills it
    immediately. SIGHUP renews the workers: each old worker is told to stop when its replacement is ready.

    A worker that is told to stop accepts no more connections, but may complete its requests within the grace period.
    All processes are in the supervisor's process group.
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
        """`make_app` is called in each worker, and returns the application. The workers accept connections from
        `sockets`, which must be listening; `run` closes them. `workers` is the number of worker processes.
        `grace_seconds` is how long requests in progress may continue after a worker is told to stop. `on_ready` is
        called once, in the supervisor, when all workers accept connections."""
        self._make_app = make_app
        self._sockets = sockets
        self._workers = workers
        self._grace_seconds = grace_seconds
        self._limits = limits
        self._on_ready = on_ready
        self._listener_options = listener_options
        self._children: dict[int, WorkerProcess] = {}  # pid -> process
        self._starts_due: dict[int, float] = {}  # index of a worker that does not run -> when to start it
        self._next_backoffs: dict[int, float] = {}  # index -> back-off before the next restart, in seconds
        self._exit_messages: dict[int, str] = {}  # index -> how the worker ended, for the log line at its restart
        self._to_replace: list[WorkerProcess] = []  # workers that the renewal has not replaced yet
        self._replacement: WorkerProcess | None = None  # the process that is to replace the first of `_to_replace`
        self._start_succeeded = False  # all workers have been ready at the same time
        self._stopping = False
        self._interrupted = False  # a first SIGINT has arrived
        self._give_up_at = float("inf")  # when to exit although killed workers have not ended
        self._exit_code = 0
        self._failure: str | None = None  # why the start of the server failed
        self._supervisor_pid = os.getpid()
        self._signal_reader, self._signal_writer = os.pipe()
        self._alive_pipe, self._alive_pipe_writer = os.pipe()
        os.set_blocking(self._signal_reader, False)
        os.set_blocking(self._signal_writer, False)
        # With epoll instead of poll, a forked child would share the parent's set of descriptors.
        self._selector = selectors.PollSelector()

    def run(self) -> tuple[int, str | None]:
        """Starts the workers, and returns after a stop, when all of them have ended. Returns the exit code, and in one
        line why the start of the server failed; None if it did not fail.

        Call it in the main thread: only this thread can set signal handlers, and the kernel kills the workers when the
        thread that forked them ends.
        """
        self._selector.register(self._signal_reader, selectors.EVENT_READ)
        handlers_before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        wakeup_before = signal.set_wakeup_fd(self._signal_writer, warn_on_full_buffer=False)
        try:
            self._starts_due = dict.fromkeys(range(self._workers), 0.0)  # start all of them now
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
                pids = sorted(self._children)
                log.error("the worker processes %s did not end after SIGKILL; exiting all the same", pids)
                return
            self._start_due_workers(now)
            self._kill_overdue(now)
            for key, _ in self._selector.select(self._seconds_to_next_action(now)):
                if key.fd == self._signal_reader:
                    self._handle_signals()
                else:
                    self._read_status(key.data)
            self._reap_ended()
            self._report_start()
            self._continue_renewal()

    def _seconds_to_next_action(self, now: float) -> float | None:
        """Returns for how many seconds the loop may wait for signals and status pipes; None: without a limit."""
        times = [*self._starts_due.values(), *(child.kill_at for child in self._children.values()), self._give_up_at]
        if self._replacement is not None:
            times.append(self._replacement.started + _RENEWAL_SECONDS)
        next_time = min(times)
        return None if next_time == float("inf") else max(0.0, next_time - now) + 0.001  # never a moment too early

    def _start_due_workers(self, now: float) -> None:
        for index in [index for index, when in self._starts_due.items() if when <= now]:
            del self._starts_due[index]
            if index in self._exit_messages:
                log.warning(self._exit_messages.pop(index))
            self._fork(index)

    def _fork(self, index: int) -> WorkerProcess:
        """Forks a worker. Returns only in the supervisor; the child runs the worker and exits."""
        limit = self._listener_options.per_address_limit
        column = None if limit is None else limit.claim_column()
        status_reader, status_writer = os.pipe()
        flush_output()  # otherwise the child inherits the buffered output, and writes it a second time
        # In the child the signals stay blocked until it has set its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(self._run_worker(status_reader, status_writer, column))
        except OSError:
            os.close(status_reader)
            raise
        finally:
            os.close(status_writer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.set_blocking(status_reader, False)
        child = WorkerProcess(pid, index, status_reader, time.monotonic(), column)
        self._children[pid] = child
        self._selector.register(status_reader, selectors.EVENT_READ, child)
        return child

    def _run_worker(self, status_reader: int, status_writer: int, column: int | None) -> int:
        """Runs in the child process: serves until the worker stops, and returns the exit code. Closes the child's
        copies of the descriptors that only the supervisor uses. `status_reader` and `status_writer` are the two ends of
        the worker's status pipe."""
        code = 1
        try:
            if not die_with_parent(self._supervisor_pid):
                return 1  # the supervisor has ended already
            signal.set_wakeup_fd(-1)  # otherwise this process's signals would be written to the supervisor's pipe
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            ends = [child.status_pipe for child in self._children.values()]
            for end in (self._signal_reader, self._signal_writer, self._alive_pipe_writer, status_reader, *ends):
                os.close(end)
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.use_column(column)
            worker = Worker(
                self._make_app,
                self._sockets,
                self._grace_seconds,
                self._limits,
                on_ready=lambda: report_ready(status_writer),
                listener_options=self._listener_options,
                alive_pipe=self._alive_pipe,
            )
            code, failure = worker.run()
            if failure is not None:
                report_failure(status_writer, failure)
        except BaseException:
            traceback.print_exc()
        finally:
            logging.shutdown()
            flush_output()
        return code

    def _handle_signals(self) -> None:
        """Acts on the signals that have arrived. The interpreter has written their numbers to the signal pipe."""
        for number in os.read(self._signal_reader, 4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGHUP and self._start_succeeded and not self._stopping and not self._to_replace:
                self._to_replace = list(self._children.values())  # the loop starts the renewal

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """At a second SIGINT, or a SIGINT during a stop: kills all workers and exits. The interpreter calls this
        function even while the loop is blocked, for example by a write to the log. All other signals are left to
        `_handle_signals`, which the loop calls."""
        if number != signal.SIGINT:
            return
        if self._interrupted or self._stopping:
            self._kill_in_signal_handler()
            os._exit(128 + number)
        self._interrupted = True

    def _read_status(self, child: WorkerProcess) -> None:
        if not child.read_status():
            self._selector.unregister(child.status_pipe)

    def _reap_ended(self) -> None:
        """Removes the workers that have ended, and decides for each what follows."""
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            if child.status_pipe in self._selector.get_map():
                child.read_remaining_status()
                self._selector.unregister(child.status_pipe)
            os.close(child.status_pipe)
            del self._children[pid]
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.release_column(child.column)
            self._on_exit(child, os.waitstatus_to_exitcode(status))

    def _on_exit(self, child: WorkerProcess, code: int) -> None:
        """Decides what follows after a worker has ended. `code` is its exit code, or the negative number of a signal.

        - Nothing follows if the supervisor has told the worker to stop.
        - Nothing follows if the worker's replacement is starting: it takes the worker's place as soon as it is ready.
        - If the worker was itself a replacement, the supervisor abandons the renewal.
        - If not all workers have been ready yet, the start of the server has failed, and the server stops.
        - In all other cases the supervisor restarts the worker.
        """
        is_being_replaced = self._replacement is not None and child is self._to_replace[0]
        if child in self._to_replace:
            self._to_replace.remove(child)
        if self._stopping or child.exit_expected:
            return
        if is_being_replaced:
            self._replacement = None  # from now on it is a worker like the others
        elif child is self._replacement:
            self._abandon_renewal(f"the new worker {child.describe_exit(code)}")
        elif not self._start_succeeded:
            self._exit_code = 1
            self._failure = child.describe_failure() or f"a worker {child.describe_exit(code)}"
            self._stop()
        else:
            self._plan_restart(child, code)

    def _plan_restart(self, child: WorkerProcess, code: int) -> None:
        """Plans the restart of a worker that has ended with the exit code `code`: after a fixed pause if the code is 0,
        otherwise after a back-off, which is 0 for the first restart."""
        now = time.monotonic()
        pause = self._next_backoffs.get(child.index, 0.0)
        if code == 0 or (child.ready and now - child.started >= _STABLE_SECONDS):
            pause = 0.0
        self._next_backoffs[child.index] = min(max(pause * 2, _FIRST_BACKOFF_SECONDS), _MAX_BACKOFF_SECONDS)
        if code == 0:
            pause = _STOPPED_WORKER_PAUSE_SECONDS
        self._starts_due[child.index] = now + pause
        self._exit_messages[child.index] = (
            f"the worker {child.pid} {child.describe_exit(code)}; starting it again after {pause:g} s"
        )

    def _report_start(self) -> None:
        """Calls `on_ready` when all workers are ready for the first time."""
        if self._start_succeeded or self._stopping:
            return
        if len(self._children) == self._workers and all(child.ready for child in self._children.values()):
            self._start_succeeded = True
            if self._on_ready is not None:
                self._on_ready()

    def _continue_renewal(self) -> None:
        """Does the next step of a renewal: stops the worker whose replacement is ready, or forks a replacement.
        Abandons the renewal if the replacement takes too long. Does nothing if there is no renewal."""
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
        """Ends the renewal. The workers that were not replaced yet go on serving."""
        log.error("the workers are not renewed: %s; %d old workers go on serving", why, len(self._to_replace))
        self._to_replace.clear()
        self._replacement = None

    def _stop_worker(self, child: WorkerProcess) -> None:
        """Tells the worker to stop (SIGTERM), and plans SIGKILL for a worker that does not end in time."""
        child.exit_expected = True
        child.kill_at = time.monotonic() + self._grace_seconds + _KILL_MARGIN_SECONDS
        os.kill(child.pid, signal.SIGTERM)

    def _stop(self) -> None:
        """Tells all workers to stop. Starts and replaces none from now on."""
        if not self._stopping:
            self._stopping = True
            self._starts_due.clear()
            self._to_replace.clear()
            self._replacement = None
            for sock in self._sockets:
                sock.close()  # once the workers have closed their copies as well, the system refuses new connections
            for child in self._children.values():
                self._stop_worker(child)
            self._give_up_at = time.monotonic() + self._grace_seconds + _KILL_MARGIN_SECONDS + _REAP_SECONDS

    def _kill_overdue(self, now: float) -> None:
        for child in self._children.values():
            if child.kill_at <= now:
                child.kill_at = float("inf")
                os.kill(child.pid, signal.SIGKILL)  # the pid belongs to the child until the supervisor reaps it

    def _kill_all(self) -> None:
        """Kills all workers that still run, and waits up to `_REAP_SECONDS` until they have ended. There are such
        workers only if the loop was stopped by an error or gave up."""
        deadline = time.monotonic() + _REAP_SECONDS
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        while self._children and time.monotonic() < deadline:
            self._stopping = True  # so that no worker is restarted
            self._reap_ended()
            time.sleep(0.005)

    def _kill_in_signal_handler(self) -> None:
        """Kills all workers, and waits up to `_REAP_SECONDS` until they have ended. Changes no attributes, because the
        signal handler can interrupt any other method."""
        running = [pid for pid in self._children if not reap(pid)]
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _REAP_SECONDS
        while running and time.monotonic() < deadline:
            running = [pid for pid in running if not reap(pid)]
            time.sleep(0.005)
