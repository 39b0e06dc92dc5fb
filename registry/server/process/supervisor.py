"""The supervisor: the parent process that starts the workers, restarts workers that die, and stops all workers within a
limited time.

- A *reload*, requested by SIGHUP, gives all workers the changed configuration.
- A *restart* of the server, requested by SIGUSR2, has two steps. First a new version of the program takes over: the
  supervisor's process executes this version (`LiveChangeOptions.successor`). If no successor is given, this step is
  left out. Then the *renewal* replaces all workers by new processes, one after the other.
- The *restart of a worker* starts a new process in the place of one worker that has died.

A worker's *index* is a number from 0. A new process gets the index of the worker whose place it takes.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from registry.server.process.commands import Answer
from registry.server.process.control_socket import Action, ControlSocket, listen_for_control
from registry.server.process.live_change import ChangeOutcome, Reply
from registry.server.process.live_change_options import LiveChangeOptions
from registry.server.process.live_change_queue import LiveChangeQueue, no_reply
from registry.server.process.renewal import Renewal
from registry.server.process.successor import Handover, SuccessorCheck, describe_worker
from registry.server.process.worker_options import WorkerOptions
from registry.server.process.worker_pool import KILL_MARGIN_SECONDS, REAP_SECONDS, SIGNALS, WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_log import log

_FIRST_BACKOFF_SECONDS = 0.1
"""The shortest *back-off*. A back-off is a pause before the restart of a worker that dies repeatedly. The first restart
has no back-off. The second restart has this back-off. The back-off then doubles with each further restart."""
_MAX_BACKOFF_SECONDS = 10.0
"""The longest back-off."""
_STABLE_SECONDS = 10.0
"""If a worker that was ready dies after it has run for at least this time, its restart counts as a first restart."""
_SIGNAL_PIPE_BYTES = 1 << 16
"""At least the capacity of the signal pipe (pipe(7)), so that one read empties the pipe."""
_STOPPED_WORKER_PAUSE_SECONDS = 0.5
"""Pause before the restart of a worker that has ended with exit code 0 although the supervisor had not told it to stop.
Such a worker has received SIGTERM from another process. If SIGTERM was sent to the whole process group, the supervisor
receives it during this pause, and stops the server."""


class Supervisor:
    """Runs the workers, and handles signals. SIGTERM and SIGINT stop the server gracefully. A SIGINT during such a
    stop kills all processes immediately. SIGHUP reloads the configuration, and SIGUSR2 restarts the server. The control
    socket accepts requests for a reload and for a restart.

    A worker that is told to stop accepts no more connections, but may complete its requests within the grace period.
    All processes are in the supervisor's process group.
    """

    def __init__(
        self,
        options: WorkerOptions,
        workers: int,
        change_options: LiveChangeOptions,
        on_ready: Callable[[], None] | None,
    ) -> None:
        """- `options`: the options of the workers, with the listening sockets. A stop closes these sockets.
        - `workers`: the number of worker processes.
        - `change_options`: the options for reloads and restarts of the running server.
        - `on_ready` is called once, in the supervisor, when all workers accept connections."""
        self._options = options
        self._worker_count = workers
        self._change_options = change_options
        self._on_ready = on_ready
        self._starts_due: dict[int, float] = {}  # index of a worker that does not run -> when to start it
        self._next_backoffs: dict[int, float] = {}  # index -> back-off before the next restart, in seconds
        self._exit_messages: dict[int, str] = {}  # index -> how the worker ended, for the log line at its restart
        self._start_succeeded = False  # whether all workers have been ready at the same time
        self._is_stopping = False
        self._was_interrupted = False  # whether a SIGINT has arrived
        self._give_up_at = float("inf")  # when to exit even if killed workers have not ended
        self._exit_code = 0
        self._failure: str | None = None  # why the start of the server failed
        self._signal_reader, self._signal_writer = os.pipe()
        os.set_blocking(self._signal_reader, False)
        os.set_blocking(self._signal_writer, False)
        self._alive_pipe = os.pipe() if change_options.handover is None else change_options.handover.alive_pipe
        """The reading and the writing end of a pipe to which nothing is written. Only the supervisor keeps the writing
        end. When the supervisor dies, the kernel closes the writing end. The workers watch the reading end, and notice
        that no writing end is open any more."""
        # Not epoll: a forked child would share the parent's set of descriptors.
        self._selector = selectors.PollSelector()
        self._pool = WorkerPool(
            options, self._selector, self._alive_pipe, self._on_answer, self._on_exit, self._unregistered_files
        )
        self._changes = LiveChangeQueue(
            self, self._pool, change_options.configuration_source, change_options.successor, change_options.notifier
        )
        self._control: ControlSocket | None = None

    def run(self) -> tuple[int, str | None]:
        """Runs the workers until the server has stopped and all workers have ended. Returns two values: the exit code,
        and one line that says why the start of the server failed. The second value is None if the start did not fail.

        Call this method in the main thread, for two reasons: only the main thread can set signal handlers, and the
        kernel kills the workers when the thread that forked them ends.
        """
        self._selector.register(self._signal_reader, selectors.EVENT_READ, self._handle_signals)
        handlers_before = {signal_number: signal.signal(signal_number, self._on_signal) for signal_number in SIGNALS}
        wakeup_before = signal.set_wakeup_fd(self._signal_writer, warn_on_full_buffer=False)
        # An old version of the program blocks the signals before it executes this one (`Successor.execute`).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            self._listen_for_control()
            if self._change_options.handover is None:
                self._starts_due = dict.fromkeys(range(self._worker_count), 0.0)  # start all workers now
            else:
                self._take_over(self._change_options.handover)
            self._loop()
        finally:
            self._is_stopping = True  # so that no worker is restarted
            self._pool.kill_all()
            self._close_control()
            signal.set_wakeup_fd(wakeup_before)
            for signal_number, handler in handlers_before.items():
                signal.signal(signal_number, handler)
            self._selector.close()
            for end in (self._signal_reader, self._signal_writer, *self._alive_pipe):
                os.close(end)
        return self._exit_code, self._failure

    def _loop(self) -> None:
        """Waits for events and handles them. Returns when the server is stopping and no worker is left, or at
        `_give_up_at`."""
        while not self._is_stopping or self._pool.workers:
            now = time.monotonic()
            if now > self._give_up_at:
                pids = sorted(self._pool.workers)
                log.error("the worker processes %s did not end after SIGKILL; exiting all the same", pids)
                return
            self._start_due_workers(now)
            self._pool.kill_overdue(now)
            for key, _ in self._selector.select(self._seconds_to_next_action(now)):
                if key.fd in self._selector.get_map():  # another callback may have unregistered it
                    key.data()
            self._pool.reap()
            self._report_start()
            if self._start_succeeded and not self._is_stopping:
                self._changes.step(time.monotonic())

    def _seconds_to_next_action(self, now: float) -> float | None:
        """Returns the number of seconds that the loop may wait for signals and pipes; None: there is no limit."""
        times = [worker.kill_at for worker in self._pool.workers.values()]
        if not self._changes.forbids_forks:
            times += self._starts_due.values()
        if self._start_succeeded and not self._is_stopping:
            times.append(self._changes.deadline())
        next_time = min([*times, self._give_up_at])
        # The added millisecond avoids a wake-up that is too early.
        return None if next_time == float("inf") else max(0.0, next_time - now) + 0.001

    def _start_due_workers(self, now: float) -> None:
        """Starts the workers that are due, unless a reload is running."""
        if self._changes.forbids_forks:
            return
        for index in [index for index, when in self._starts_due.items() if when <= now]:
            del self._starts_due[index]
            if index in self._exit_messages:
                log.warning(self._exit_messages.pop(index))
            try:
                self._pool.fork(index)
            except OSError as error:
                self._on_failed_fork(index, now, error)
                if self._is_stopping:
                    return

    # Signals

    def _handle_signals(self) -> None:
        """Acts on the signals that have arrived. The interpreter has written their numbers to the signal pipe."""
        for signal_number in os.read(self._signal_reader, 4096):
            if signal_number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif signal_number == signal.SIGHUP and not self._is_stopping:
                self._changes.request_reload(no_reply)
            elif signal_number == signal.SIGUSR2 and not self._is_stopping:
                self._changes.request_restart(no_reply)

    def _on_signal(self, signal_number: int, _: FrameType | None) -> None:
        """If this is the second SIGINT, or a SIGINT during a stop, kills all workers and exits. This works even while
        the loop is blocked, for example by a write to the log. For all other signals, the loop calls
        `_handle_signals`."""
        if signal_number != signal.SIGINT:
            return
        if self._was_interrupted or self._is_stopping:
            self._pool.kill_in_signal_handler()
            os._exit(128 + signal_number)
        self._was_interrupted = True

    # Workers

    def _on_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        self._changes.on_answer(worker, answer)

    def _on_exit(self, worker: WorkerProcess, code: int) -> None:
        """Decides what to do when a worker has ended. `code` is its exit code, or the negative number of a signal.

        - Does nothing if the supervisor has told the worker to stop.
        - Does nothing if a renewal is running and needs no new process in the worker's place, for example because it
          has already started the worker's replacement.
        - Stops the server if not all workers have been ready yet. The start of the server has then failed.
        - In all other cases, plans the restart of the worker.
        """
        must_not_restart = self._changes.on_exit(worker, worker.describe_exit(code))
        if self._is_stopping or worker.exit_expected or must_not_restart:
            return
        if not self._start_succeeded:
            self._exit_code = 1
            self._failure = worker.describe_failure() or f"a worker {worker.describe_exit(code)}"
            self._stop()
        else:
            self._plan_restart(worker, code)

    def _plan_restart(self, worker: WorkerProcess, code: int) -> None:
        """Plans the restart of a worker that has ended. `code` is its exit code, or the negative number of a signal. If
        `code` is 0, the pause before the restart is `_STOPPED_WORKER_PAUSE_SECONDS`. Otherwise the pause is the
        worker's back-off, which is 0 for the first restart."""
        now = time.monotonic()
        pause = self._next_backoffs.get(worker.index, 0.0)
        if code == 0 or (worker.is_ready and now - worker.started >= _STABLE_SECONDS):
            pause = 0.0
        self._next_backoffs[worker.index] = min(max(pause * 2, _FIRST_BACKOFF_SECONDS), _MAX_BACKOFF_SECONDS)
        if code == 0:
            pause = _STOPPED_WORKER_PAUSE_SECONDS
        self._starts_due[worker.index] = now + pause
        self._exit_messages[worker.index] = (
            f"the worker {worker.pid} {worker.describe_exit(code)}; starting it again after {pause:g} s"
        )

    def _on_failed_fork(self, index: int, now: float, error: OSError) -> None:
        """Handles an error of the system call that starts a worker. If not all workers have been ready yet, stops the
        server, because its start has failed. Otherwise plans the next attempt."""
        reason = f"no process can be started: {error.strerror or error}"
        if not self._start_succeeded:
            self._exit_code, self._failure = 1, reason
            self._stop()
            return
        pause = max(self._next_backoffs.get(index, 0.0), _FIRST_BACKOFF_SECONDS)
        self._next_backoffs[index] = min(pause * 2, _MAX_BACKOFF_SECONDS)
        self._starts_due[index] = now + pause
        log.error("%s; the next attempt is after %g s", reason, pause)

    def _report_start(self) -> None:
        """Calls `on_ready` when all workers are ready for the first time."""
        if self._start_succeeded or self._is_stopping:
            return
        workers = self._pool.workers.values()
        if len(workers) == self._worker_count and all(worker.is_ready for worker in workers):
            self._start_succeeded = True
            self._change_options.notifier.report_ready(f"{self._worker_count} workers serve")
            if self._on_ready is not None:
                self._on_ready()

    def _stop(self) -> None:
        """Tells all workers to stop. From now on, no worker is started or replaced."""
        if not self._is_stopping:
            self._is_stopping = True
            self._change_options.notifier.report_stopping()
            self._starts_due.clear()
            self._changes.cancel()
            self._close_control()  # the next server can then open its own control socket before this process ends
            for sock in self._options.sockets:
                sock.close()  # the system refuses new connections when the workers have closed their copies too
            for worker in self._pool.workers.values():
                self._pool.stop(worker)
            self._give_up_at = time.monotonic() + self._options.grace_seconds + KILL_MARGIN_SECONDS + REAP_SECONDS

    # Changes while the server runs

    def _listen_for_control(self) -> None:
        """Opens the control socket, or takes over the control socket of the old version."""
        path, handover = self._change_options.control, self._change_options.handover
        if path is None:
            return
        if handover is not None and handover.control is not None:
            listener: socket.socket | None = socket.socket(fileno=handover.control)
        else:
            listener = listen_for_control(path)
        if listener is None:
            return
        self._control = ControlSocket(
            listener,
            path,
            {
                "reload": self._control_action(self._changes.request_reload),
                "restart": self._control_action(self._changes.request_restart),
            },
            self._watch,
            self._unwatch,
        )

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _watch(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, callback)

    def _unwatch(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)

    def _unregistered_files(self) -> list[int | socket.socket]:
        """Returns the files that only the supervisor uses and that are not registered with its selector, except the
        alive pipe, which `WorkerPool` closes itself. A forked worker closes its copies of these files."""
        return [self._signal_writer, *([] if self._control is None else self._control.waiting_connections)]

    def _control_action(self, request_change: Callable[[Reply], None]) -> Action:
        """Returns an action for the control socket. The action calls `request_change`, or refuses the request if the
        server is stopping."""

        def act(reply: Reply) -> None:
            if self._is_stopping:
                reply(ChangeOutcome(False, "the server stops"))
            else:
                request_change(reply)

        return act

    # Called by `LiveChangeQueue` (its protocol `ChangingSupervisor` describes these methods)

    def begin_renewal(self) -> Renewal:
        return Renewal(self._pool, self._pool.serving, self._pool.fork)

    def watch_successor_check(self, check: SuccessorCheck) -> None:
        def read() -> None:
            with suppress(BlockingIOError):
                if not check.read():
                    self._selector.unregister(check.output_pipe)

        self._selector.register(check.output_pipe, selectors.EVENT_READ, read)

    def end_successor_check(self, check: SuccessorCheck) -> None:
        if check.output_pipe in self._selector.get_map():
            self._selector.unregister(check.output_pipe)
        check.close()

    def execute_successor(self) -> None:
        successor, control = self._change_options.successor, self._control
        assert successor is not None
        successor.execute(
            Handover(
                sockets=[sock.fileno() for sock in self._options.sockets],
                alive_pipe=self._alive_pipe,
                control=None if control is None else control.listener.fileno(),
                waiting=[] if control is None else [sock.fileno() for sock in control.waiting_connections],
                workers=[describe_worker(worker) for worker in self._pool.workers.values()],
                facts=successor.facts,  # about this version, such as its data directory; the new version checks them
                counts=self._change_options.counts_memory,  # the shared memory with the application's counters
            ),
            self._must_stop,
        )

    def _must_stop(self) -> bool:
        """Returns whether SIGTERM or SIGINT waits in the signal pipe. Leaves all signals in the pipe, so that the loop
        can handle them. Call this method only while `SIGNALS` are blocked."""
        try:
            arrived = os.read(self._signal_reader, _SIGNAL_PIPE_BYTES)
        except BlockingIOError:
            return False
        os.write(self._signal_writer, arrived)
        return signal.SIGTERM in arrived or signal.SIGINT in arrived

    def _take_over(self, handover: Handover) -> None:
        """Adopts the workers of the old version, and starts to replace them."""
        self._start_succeeded = True
        for worker in handover.adopted_workers():
            self._pool.adopt(worker)
        serving = self._pool.serving
        # The renewal replaces `kept_workers`, and keeps their indexes. It ends `surplus_workers` without replacement.
        kept_workers = [worker for worker in serving if worker.index < self._worker_count]
        surplus_workers = [worker for worker in serving if worker.index >= self._worker_count]
        missing_indexes = set(range(self._worker_count)) - {worker.index for worker in kept_workers}
        self._starts_due = dict.fromkeys(sorted(missing_indexes), 0.0)
        replies = (
            []
            if self._control is None
            else [self._control.add_waiting_connection(socket.socket(fileno=file)) for file in handover.waiting]
        )
        self._changes.continue_renewal(Renewal(self._pool, kept_workers, self._pool.fork, surplus_workers), replies)
