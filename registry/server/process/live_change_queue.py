"""`LiveChangeQueue`: the queue of the requested reloads and restarts of a server. A *reload* gives the workers a new
configuration. A *restart* replaces the workers by new processes; this replacement is a *renewal*. If `LiveChangeQueue`
was created with a `Successor`, a restart first executes a new version of the program, which then does the renewal. The
supervisor (the parent process of the workers) runs one such change at a time.

If a change of the same kind is waiting already, a request joins that change. So any number of requests during a reload
leads to exactly one more reload.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol

from registry.server.process.commands import Answer
from registry.server.process.live_change import ChangeOutcome, ChangeRefused, ConfigurationSource, Reply
from registry.server.process.reload import Reload, command_numbers
from registry.server.process.renewal import Renewal
from registry.server.process.successor import Successor, SuccessorCheck
from registry.server.process.systemd import Notifier
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_log import log

_READY_SECONDS = 30.0
"""How long a change waits for workers that are starting."""


class ChangingSupervisor(Protocol):
    """The methods of the supervisor that `LiveChangeQueue` calls."""

    def begin_renewal(self) -> Renewal:
        """Starts to replace all workers by forks of this process."""

    def execute_successor(self) -> None:
        """Executes the new version. Raises ChangeRefused if that is not possible, otherwise does not return."""

    def watch_successor_check(self, check: SuccessorCheck) -> None:
        """Makes the supervisor's loop read the output of the check: a process of the new version that checks whether it
        can take over."""

    def end_successor_check(self, check: SuccessorCheck) -> None:
        """Stops reading the output of the check, and closes its pipe."""


class LiveChangeQueue:
    """The changes of one supervisor, whose loop calls `step`."""

    def __init__(
        self,
        supervisor: ChangingSupervisor,
        pool: WorkerPool,
        source: ConfigurationSource,
        successor: Successor | None,
        notifier: Notifier,
    ) -> None:
        self._supervisor = supervisor
        self._pool = pool
        self._source = source
        self._successor = successor
        self._notifier = notifier
        self._command_numbers = command_numbers()
        self._reloads: list[Reply] = []  # for the requests that wait for the next reload
        self._restarts: list[Reply] = []  # for the requests that wait for the next restart
        self._last_request_at = 0.0  # when a change was last requested, in seconds of `time.monotonic`
        self._replies: list[Reply] = []  # for the requests that the running change fulfils
        self._is_reload = False  # which failure `_end` logs: True: that of a reload; False: that of a restart
        self._reload: Reload | None = None
        self._check: SuccessorCheck | None = None
        self._renewal: Renewal | None = None

    # Requests

    def request_reload(self, reply: Reply) -> None:
        """Queues a reload. `reply` is called with the outcome of the reload."""
        self._last_request_at = time.monotonic()
        self._reloads.append(reply)

    def request_restart(self, reply: Reply) -> None:
        """Queues a restart, which replaces all workers. If this object has a `Successor`, a new version of the program
        takes over first. `reply` is called with the outcome of the restart."""
        self._last_request_at = time.monotonic()
        self._restarts.append(reply)

    def continue_renewal(self, renewal: Renewal, replies: list[Reply]) -> None:
        """Continues a restart that the old version of the program has begun."""
        self._renewal = renewal
        self._replies = replies

    # Called by the supervisor

    @property
    def forbids_forks(self) -> bool:
        """Whether no worker may be forked now, because a new worker would have the old configuration."""
        return self._reload is not None

    @property
    def running(self) -> str:
        """The name of the running change; empty if there is none."""
        if self._reload is not None:
            return "reload"
        return "restart" if self._check is not None or self._renewal is not None else ""

    def deadline(self) -> float:
        """Returns when `step` must be called at the latest, in seconds of `time.monotonic`."""
        running = (self._reload, self._check, self._renewal)
        times = [change.deadline for change in running if change is not None]
        if (self._reloads or self._restarts) and not times:
            times.append(self._last_request_at + _READY_SECONDS)
        return min(times, default=float("inf"))

    def on_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        """Called with a worker's answer to a command."""
        if self._reload is not None:
            self._reload.on_answer(worker, answer)

    def on_exit(self, worker: WorkerProcess, how: str) -> bool:
        """Called when a worker has ended. `how`: a text that says how it has ended. Returns True if the supervisor must
        not start the worker again."""
        if self._reload is not None:
            self._reload.on_exit(worker, how)
        return self._renewal is not None and self._renewal.on_exit(worker, how)

    def step(self, now: float) -> None:
        """Continues the running change, or starts the next one."""
        if self._reload is not None:
            self._reload.step(now)
            self._end(self._reload.outcome)
        elif self._check is not None:
            self._step_check(now)
        elif self._renewal is not None:
            self._step_renewal(self._renewal, now)
        while not self.running and (self._reloads or self._restarts):
            if not self._start_next(now):
                return

    def cancel(self) -> None:
        """Ends the running change, and refuses all queued ones, because the server stops."""
        if self._check is not None:
            self._check.kill()
            self._supervisor.end_successor_check(self._check)
        outcome = ChangeOutcome(False, "the server stops")
        for reply in [*self._replies, *self._reloads, *self._restarts]:
            reply(outcome)
        self._replies, self._reloads, self._restarts = [], [], []
        self._reload = self._check = self._renewal = None

    # Steps

    def _start_next(self, now: float) -> bool:
        """Starts the next change in the queue, reloads before restarts. Returns False if it has to wait for workers
        that are starting, or if it has refused all queued changes because they waited too long."""
        self._is_reload = bool(self._reloads)
        if any(not worker.is_ready for worker in self._pool.serving):
            if now >= self._last_request_at + _READY_SECONDS:
                self._replies, self._reloads, self._restarts = [*self._reloads, *self._restarts], [], []
                self._end(ChangeOutcome(False, f"a worker has been starting for more than {_READY_SECONDS:g} s"))
            return False
        self._notifier.reloading()
        try:
            if self._reloads:
                self._replies, self._reloads = self._reloads, []
                self._refuse_mixed_settings()
                self._reload = Reload(self._pool, self._source, self._source.propose(), self._command_numbers)
                self._end(self._reload.outcome)
            elif self._successor is None:
                self._replies, self._restarts = self._restarts, []
                self._renewal = self._supervisor.begin_renewal()
            else:
                self._replies, self._restarts = self._restarts, []
                self._check = self._successor.start_check()
                self._supervisor.watch_successor_check(self._check)
        except ChangeRefused as error:
            self._end(ChangeOutcome(False, error.message))
        except Exception as error:
            self._fail(error)
        return True

    def _refuse_mixed_settings(self) -> None:
        """Raises ChangeRefused if workers of an old version still serve, because a restart was abandoned. Their
        settings differ from the settings of this process, so it is unknown which settings a reload would change in
        these workers."""
        old_workers = sum(worker.is_adopted for worker in self._pool.serving)
        if old_workers:
            raise ChangeRefused(
                f"{old_workers} old {'worker serves' if old_workers == 1 else 'workers serve'} with old settings, "
                "because the last restart was not completed: run `entrepot restart`"
            )

    def _step_renewal(self, renewal: Renewal, now: float) -> None:
        try:
            renewal.step(now)
        except OSError as error:
            self._end(ChangeOutcome(False, f"no process can be started: {error.strerror or error}"))
        except Exception as error:
            self._fail(error)
        else:
            self._end(renewal.outcome)

    def _step_check(self, now: float) -> None:
        """Continues a restart whose check is running. If the check succeeds, executes the new version, and then does
        not return."""
        assert self._check is not None
        try:
            outcome = self._check.outcome(now)
            if outcome is None:
                return
            self._supervisor.end_successor_check(self._check)
            self._check = None
            if outcome.ok:
                self._supervisor.execute_successor()
            else:
                self._end(outcome)
        except ChangeRefused as error:
            self._end(ChangeOutcome(False, error.message))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends the running change because of an unexpected error. The server continues without the change."""
        log.error("a change of the server failed", exc_info=error)
        if self._check is not None:
            with suppress(Exception):
                self._check.kill()
                self._supervisor.end_successor_check(self._check)
        message = getattr(error, "message", None) or str(error) or type(error).__name__
        self._end(ChangeOutcome(False, " ".join(str(message).split())))

    def _end(self, outcome: ChangeOutcome | None) -> None:
        """Ends the running change, and replies to all requests that wait for it. Does nothing if `outcome` is None."""
        if outcome is None:
            return
        self._reload = self._check = self._renewal = None
        replies, self._replies = self._replies, []
        if outcome.ok:
            log.info("%s", outcome.message)
        elif self._is_reload:
            log.error("the configuration is not reloaded, the old one stays in force: %s", outcome.message)
        else:
            log.error("the workers are not renewed: %s", outcome.message)
        self._notifier.ready(outcome.message if outcome.ok else "running; the last change was refused")
        for reply in replies:
            with suppress(OSError):
                reply(outcome)


def no_reply(outcome: ChangeOutcome) -> None:
    """A `Reply` that does nothing, for a change that a signal has requested: there is no client to answer, and the
    outcome is in the log."""
