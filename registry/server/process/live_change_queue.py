"""`LiveChangeQueue`: queues the *changes* of a running server, which are reloads and restarts. The supervisor (the
parent process of the workers) runs one change at a time.

- A *reload* gives the workers a new configuration.
- A *restart* replaces the workers by new processes. The replacement of the workers is a *renewal*. If the queue has a
  `Successor`, a restart also replaces the program by a new version, in two steps before the renewal. In the *check*,
  another process finds out whether the new version can take over. Then the supervisor executes the new version, which
  does the renewal.

Requests for the same kind of change share one queued change.
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

_MAX_WAIT_SECONDS = 30.0
"""While a worker is starting, the queued changes wait. If a worker is still starting this long after a change was last
requested, all queued changes are refused."""


class ChangingSupervisor(Protocol):
    """The methods of the supervisor that `LiveChangeQueue` calls."""

    def begin_renewal(self) -> Renewal:
        """Returns a renewal that replaces all workers by forks of this process."""

    def execute_successor(self) -> None:
        """Executes the new version in this process. Raises ChangeRefused if this is not possible; otherwise does not
        return."""

    def watch_successor_check(self, check: SuccessorCheck) -> None:
        """Makes the supervisor's loop read the output of the check."""

    def end_successor_check(self, check: SuccessorCheck) -> None:
        """Stops reading the output of the check, and closes its pipe."""


class LiveChangeQueue:
    """The queue of one supervisor. The supervisor's loop calls `step`."""

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
        self._reload_replies: list[Reply] = []  # for the requests that wait for the next reload
        self._restart_replies: list[Reply] = []  # for the requests that wait for the next restart
        self._last_request_at = 0.0  # when a change was last requested, in seconds of `time.monotonic`
        self._running_replies: list[Reply] = []  # for the requests that wait for the end of the running change
        self._is_reload = False  # whether `_end` logs a failure as a failed reload; if False, as a failed restart
        self._reload: Reload | None = None
        self._check: SuccessorCheck | None = None
        self._renewal: Renewal | None = None

    # Requests

    def request_reload(self, reply: Reply) -> None:
        """Queues a reload. `reply` is called with the outcome of the reload."""
        self._last_request_at = time.monotonic()
        self._reload_replies.append(reply)

    def request_restart(self, reply: Reply) -> None:
        """Queues a restart. `reply` is called with the outcome of the restart."""
        self._last_request_at = time.monotonic()
        self._restart_replies.append(reply)

    def continue_renewal(self, renewal: Renewal, replies: list[Reply]) -> None:
        """Continues a restart that the old version of the program has begun. Each of `replies` is called with the
        outcome of the restart."""
        self._renewal = renewal
        self._running_replies = replies

    # Called by the supervisor

    @property
    def forbids_forks(self) -> bool:
        """Whether no worker may be forked now, because a new worker would have the old configuration."""
        return self._reload is not None

    @property
    def running_change(self) -> str:
        """The name of the running change; empty if no change is running."""
        if self._reload is not None:
            return "reload"
        return "restart" if self._check is not None or self._renewal is not None else ""

    def deadline(self) -> float:
        """Returns the latest time at which `step` must be called, in seconds of `time.monotonic`; infinity if `step`
        need not be called."""
        changes = (self._reload, self._check, self._renewal)
        times = [change.deadline for change in changes if change is not None]
        if (self._reload_replies or self._restart_replies) and not times:
            times.append(self._last_request_at + _MAX_WAIT_SECONDS)
        return min(times, default=float("inf"))

    def on_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        """Called with a worker's answer to a command."""
        if self._reload is not None:
            self._reload.on_answer(worker, answer)

    def on_exit(self, worker: WorkerProcess, how: str) -> bool:
        """Called when a worker has ended. `how`: how the worker has ended, such as "ended with exit code 1". Returns
        True if the supervisor must not start the worker again."""
        if self._reload is not None:
            self._reload.on_exit(worker, how)
        return self._renewal is not None and self._renewal.on_exit(worker, how)

    def step(self, now: float) -> None:
        """Continues the running change. If no change is running, starts the next queued change. `now`: the time, in
        seconds of `time.monotonic`."""
        if self._reload is not None:
            self._reload.end_late_phase(now)  # ends the reload's current phase if its deadline has passed
            self._end(self._reload.outcome)
        elif self._check is not None:
            self._step_check(now)
        elif self._renewal is not None:
            self._step_renewal(self._renewal, now)
        while not self.running_change and (self._reload_replies or self._restart_replies):
            if not self._start_next(now):
                return

    def cancel(self) -> None:
        """Ends the running change, and refuses all queued changes, because the server stops."""
        if self._check is not None:
            self._check.kill()
            self._supervisor.end_successor_check(self._check)
        outcome = ChangeOutcome(False, "the server stops")
        for reply in [*self._running_replies, *self._reload_replies, *self._restart_replies]:
            reply(outcome)
        self._running_replies, self._reload_replies, self._restart_replies = [], [], []
        self._reload = self._check = self._renewal = None

    # Steps

    def _start_next(self, now: float) -> bool:
        """Starts the next queued change: the reload if one is queued, otherwise the restart. Returns True, even if the
        change fails at once. While a worker is starting, starts no change and returns False; if the last request is at
        least `_MAX_WAIT_SECONDS` old, refuses all queued changes."""
        self._is_reload = bool(self._reload_replies)
        if any(not worker.is_ready for worker in self._pool.serving):
            if now >= self._last_request_at + _MAX_WAIT_SECONDS:
                self._running_replies = [*self._reload_replies, *self._restart_replies]
                self._reload_replies, self._restart_replies = [], []
                self._end(ChangeOutcome(False, f"a worker has been starting for more than {_MAX_WAIT_SECONDS:g} s"))
            return False
        self._notifier.report_reloading()
        try:
            if self._reload_replies:
                self._running_replies, self._reload_replies = self._reload_replies, []
                self._check_no_old_workers()
                self._reload = Reload(self._pool, self._source, self._source.propose(), self._command_numbers)
                self._end(self._reload.outcome)
            elif self._successor is None:
                self._running_replies, self._restart_replies = self._restart_replies, []
                self._renewal = self._supervisor.begin_renewal()
            else:
                self._running_replies, self._restart_replies = self._restart_replies, []
                self._check = self._successor.start_check()
                self._supervisor.watch_successor_check(self._check)
        except ChangeRefused as error:
            self._end(ChangeOutcome(False, error.message))
        except Exception as error:
            self._fail(error)
        return True

    def _check_no_old_workers(self) -> None:
        """Raises ChangeRefused if workers of an old version still serve after an incomplete restart. A reload must not
        change them, because this process does not know their settings."""
        old_workers = sum(worker.runs_old_version for worker in self._pool.serving)
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
        """Continues a restart whose check is running. If the check has succeeded, executes the new version. Returns
        only if the check is still running, or if the restart has failed."""
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
        """Ends the running change, and calls the replies of the change with `outcome`. Does nothing if `outcome` is
        None: the change still runs."""
        if outcome is None:
            return
        self._reload = self._check = self._renewal = None
        replies, self._running_replies = self._running_replies, []
        if outcome.ok:
            log.info("%s", outcome.message)
        elif self._is_reload:
            log.error("the configuration is not reloaded, the old one stays in force: %s", outcome.message)
        else:
            log.error("the workers are not renewed: %s", outcome.message)
        self._notifier.report_ready(outcome.message if outcome.ok else "running; the last change was refused")
        for reply in replies:
            with suppress(OSError):
                reply(outcome)


def no_reply(outcome: ChangeOutcome) -> None:
    """A `Reply` that does nothing, for changes that a signal requests. The log contains the outcome."""
