"""Forks, stops, kills and reaps the worker processes (`WorkerPool`). The *supervisor* is the parent process of the
workers; it calls the methods of the pool. The pool passes the workers' answers and exit codes to the supervisor.

- Each worker has a *status pipe*, on which it reports that it is ready, or why it failed.
- The *alive pipe* tells the workers when the supervisor has ended, even if it was killed. The supervisor holds the only
  writing end, and never writes. All workers wait for the end of file at the reading end.
- The supervisor sends commands to each worker over a pair of sockets (`registry.server.process.commands`).
- All workers share a table in which they count the connections of each client address. Each worker has its own *column*
  of the table.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from registry.log_output import flush_output
from registry.server.kernel import die_with_parent
from registry.server.process.commands import Answer, command_pair, receive_answer, send_command
from registry.server.process.worker import CANCEL_SECONDS, CLOSE_SECONDS, Worker
from registry.server.process.worker_options import WorkerOptions
from registry.server.process.worker_process import WorkerProcess, reap_if_ended, report_failure, report_ready

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
"""The signals that wake the supervisor's loop. SIGCHLD arrives when a worker has ended."""
KILL_MARGIN_SECONDS = CANCEL_SECONDS + CLOSE_SECONDS + CANCEL_SECONDS + 2.0
"""Time from the end of a worker's *grace period* to SIGKILL. In the grace period, a worker that was told to stop may
complete its requests. This time is the sum of the limits of what the worker does afterwards, and 2 seconds:

- It cancels the remaining requests and waits for them (`CANCEL_SECONDS`).
- It shuts the application down (`CLOSE_SECONDS`).
- It cancels all other tasks and waits for them (`CANCEL_SECONDS`).
"""
REAP_SECONDS = 5.0
"""How long the supervisor waits for killed workers to end. A process that is stuck in a system call may not end, even
after SIGKILL."""

OnAnswer = Callable[[WorkerProcess, Answer], None]
"""Called with a worker and the worker's answer to a command."""
OnExit = Callable[[WorkerProcess, int], None]
"""Called with a worker that has ended, and its exit code. If a signal ended the worker, the code is the negative number
of the signal."""


class WorkerPool:
    """The running workers. `workers` maps their pids to them.

    A forked worker closes its copies of the files that only the supervisor uses. Each of these files must be registered
    with `selector`, or `unregistered_files` must return it."""

    def __init__(
        self,
        options: WorkerOptions,
        selector: selectors.BaseSelector,
        alive_pipe: tuple[int, int],
        on_answer: OnAnswer,
        on_exit: OnExit,
        unregistered_files: Callable[[], list[int | socket.socket]],
    ) -> None:
        self.workers: dict[int, WorkerProcess] = {}
        self._unregistered_files = unregistered_files
        self._options = options
        self._selector = selector
        self._alive_pipe, self._alive_pipe_writer = alive_pipe
        self._on_answer = on_answer
        self._on_exit = on_exit
        self._supervisor_pid = os.getpid()

    @property
    def serving(self) -> list[WorkerProcess]:
        """The workers, without those that were told to stop or to retire."""
        return [worker for worker in self.workers.values() if not worker.exit_expected]

    def fork(self, index: int) -> WorkerProcess:
        """Forks the worker with the number `index`. In the child process, runs the worker and exits; does not return.
        Raises OSError."""
        limit = self._options.listener_options.per_address_limit
        column = None if limit is None else limit.claim_column()
        try:
            return self._fork(index, column)
        except OSError:
            if limit is not None:
                limit.release_column(column)
            raise

    def _fork(self, index: int, column: int | None) -> WorkerProcess:
        """Forks a worker that counts its connections in `column`. Raises OSError."""
        status_reader, status_writer = os.pipe()
        try:
            commands, worker_commands = command_pair()
        except OSError:
            os.close(status_reader)
            os.close(status_writer)
            raise
        flush_output()  # otherwise the child inherits the buffered output, and writes it a second time
        # In the child the signals stay blocked until it has set its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                commands.close()
                os.close(status_reader)
                os._exit(self._run_worker(status_writer, worker_commands, column))
        except OSError:
            os.close(status_reader)
            commands.close()
            raise
        finally:
            os.close(status_writer)
            worker_commands.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.set_blocking(status_reader, False)
        worker = WorkerProcess(pid, index, status_reader, time.monotonic(), column, commands)
        self.adopt(worker)
        return worker

    def adopt(self, worker: WorkerProcess) -> None:
        """Adds a running worker, and registers its status pipe and its command socket with the selector."""
        self.workers[worker.pid] = worker
        self._selector.register(worker.status_pipe, selectors.EVENT_READ, lambda: self._read_status(worker))
        self._selector.register(worker.commands, selectors.EVENT_READ, lambda: self._read_answer(worker))

    def _run_worker(self, status_writer: int, commands: socket.socket, column: int | None) -> int:
        """Runs the worker in the child process until it has ended, and returns the exit code. Before this, closes the
        child's copies of the files that only the supervisor uses. `status_writer` is the writing end of the worker's
        status pipe."""
        code = 1
        try:
            if not die_with_parent(self._supervisor_pid):
                return 1  # the supervisor has ended already
            signal.set_wakeup_fd(-1)  # otherwise the child's signals would be written to the supervisor's pipe
            for signal_number in SIGNALS:
                signal.signal(signal_number, signal.SIG_DFL)
            registered = [key.fileobj for key in list(self._selector.get_map().values())]
            for file in [*self._unregistered_files(), *registered, self._alive_pipe_writer]:
                _close(file)
            options = self._options
            if options.listener_options.per_address_limit is not None:
                options.listener_options.per_address_limit.set_own_column(column)
            worker = Worker(
                options, on_ready=lambda: report_ready(status_writer), alive_pipe=self._alive_pipe, commands=commands
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

    def _read_status(self, worker: WorkerProcess) -> None:
        with suppress(BlockingIOError):
            if not worker.read_status():
                self._selector.unregister(worker.status_pipe)

    def _read_answer(self, worker: WorkerProcess) -> None:
        with suppress(BlockingIOError):
            answer = receive_answer(worker.commands)
            if answer is None:
                self._selector.unregister(worker.commands)
            else:
                self._on_answer(worker, answer)

    def send(self, worker: WorkerProcess, number: int, name: str, payload: bytes | None = None) -> bool:
        """Sends a command to the worker. `number` identifies the command in the worker's answer. It is 0 if nothing
        waits for the answer. Returns False if the command cannot be sent: the worker has ended or does not read."""
        try:
            send_command(worker.commands, number, name, payload)
        except OSError:
            return False
        return True

    def reap(self) -> None:
        """Removes the workers that have ended. Calls `on_exit` for each of them."""
        for worker in list(self.workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid == 0:
                continue
            files = self._selector.get_map()
            if worker.status_pipe in files:
                worker.read_remaining_status()
                self._selector.unregister(worker.status_pipe)
            if worker.commands in files:
                self._selector.unregister(worker.commands)
            os.close(worker.status_pipe)
            worker.commands.close()
            del self.workers[pid]
            if (limit := self._options.listener_options.per_address_limit) is not None:
                limit.release_column(worker.column)
            self._on_exit(worker, os.waitstatus_to_exitcode(status))

    def stop(self, worker: WorkerProcess) -> None:
        """Tells the worker to stop (SIGTERM), and sets the time from which `kill_overdue` kills it."""
        worker.exit_expected = True
        worker.kill_at = time.monotonic() + self._options.grace_seconds + KILL_MARGIN_SECONDS
        os.kill(worker.pid, signal.SIGTERM)

    def retire(self, worker: WorkerProcess) -> None:
        """Tells the worker to accept no more connections and to end when its work is done. Sets the time from which
        `kill_overdue` kills it. If the command `retire` cannot be sent to the worker, calls `stop` instead."""
        if not self.send(worker, 0, "retire"):
            self.stop(worker)
            return
        options = self._options
        worker.exit_expected = True
        worker.kill_at = time.monotonic() + options.retire_seconds + options.grace_seconds + KILL_MARGIN_SECONDS

    def kill(self, worker: WorkerProcess) -> None:
        """Kills the worker (SIGKILL)."""
        os.kill(worker.pid, signal.SIGKILL)  # no other process can get this pid before the worker is reaped

    def kill_overdue(self, now: float) -> None:
        """Kills the workers whose `kill_at` has passed. `now`: the value of `time.monotonic`."""
        for worker in self.workers.values():
            if worker.kill_at <= now:
                worker.kill_at = float("inf")
                self.kill(worker)

    def kill_all(self) -> None:
        """Kills all workers, and waits up to `REAP_SECONDS` until they have ended."""
        deadline = time.monotonic() + REAP_SECONDS
        for worker in self.workers.values():
            self.kill(worker)
        while self.workers and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.005)

    def kill_in_signal_handler(self) -> None:
        """Does the same as `kill_all` in a signal handler, but leaves the ended workers in `workers`, and does not call
        `on_exit`. Changes no attributes, because the signal handler can interrupt any other method."""
        running = [pid for pid in self.workers if not reap_if_ended(pid)]
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + REAP_SECONDS
        while running and time.monotonic() < deadline:
            running = [pid for pid in running if not reap_if_ended(pid)]
            time.sleep(0.005)


def _close(file: Any) -> None:
    """Closes a descriptor or a socket."""
    if isinstance(file, int):
        os.close(file)
    else:
        file.close()
