"""`Renewal`: replaces workers by new processes, one after another.

Each old worker accepts connections until its replacement is ready. Then the old worker *retires*: it answers one more
request on each connection, and ends when its last connection is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from registry.server.process.live_change import ChangeOutcome
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess

_START_SECONDS = 60.0
"""Longest time that a new worker may need to become ready. After this time, the renewal fails."""


class Renewal:
    """One renewal.

    - `to_replace`: the workers to replace, in this order.
    - `fork`: starts a worker with the given index.
    - `surplus`: workers that get no replacement, because the number of workers is reduced. They retire last."""

    def __init__(
        self,
        pool: WorkerPool,
        to_replace: Iterable[WorkerProcess],
        fork: Callable[[int], WorkerProcess],
        surplus: Iterable[WorkerProcess] = (),
    ) -> None:
        self.outcome: ChangeOutcome | None = None
        """How the renewal has ended; None: the renewal still runs."""
        self._pool = pool
        self._fork = fork
        self._to_replace = list(to_replace)
        self._surplus = list(surplus)
        self._replacement: WorkerProcess | None = None  # the new process for the first of `_to_replace`

    @property
    def deadline(self) -> float:
        """The latest time at which `step` must be called, in seconds of `time.monotonic`; 0: immediately."""
        return 0.0 if self._replacement is None else self._replacement.started + _START_SECONDS

    def on_exit(self, worker: WorkerProcess, how: str) -> bool:
        """Called when a worker has ended. `how`: how it ended, such as "ended with exit code 1". Returns True if the
        supervisor must not start this worker again:

        - The worker is surplus.
        - The replacement of the worker has already been started.
        - The worker is itself a replacement, and the old worker has not retired yet. The renewal then fails."""
        is_being_replaced = self._replacement is not None and bool(self._to_replace) and worker is self._to_replace[0]
        if worker in self._to_replace:
            self._to_replace.remove(worker)
        if worker in self._surplus:
            self._surplus.remove(worker)
            return True
        if is_being_replaced:
            self._replacement = None  # from now on, the new process is an ordinary worker
            return True
        if worker is self._replacement:
            self._abandon(f"the new worker {how}")
            return True
        return False

    def step(self, now: float) -> None:
        """If the replacement of a worker is ready, retires the worker. Then starts the next replacement, or ends the
        renewal if all workers are replaced. If the replacement does not become ready in time, kills it and fails the
        renewal. `now` is in seconds of `time.monotonic`. Raises OSError if no process can be started."""
        if self.outcome is not None:
            return
        if self._replacement is not None:
            if self._replacement.is_ready:
                self._pool.retire(self._to_replace.pop(0))
                self._replacement = None
            elif now - self._replacement.started > _START_SECONDS:
                self._replacement.exit_expected = True
                self._pool.kill(self._replacement)
                self._abandon(f"the new worker was not ready within {_START_SECONDS:g} s")
                return
        if self._replacement is None and self._to_replace:
            self._replacement = self._fork(self._to_replace[0].index)
        elif not self._to_replace:
            while self._surplus:
                self._pool.retire(self._surplus.pop())
            self.outcome = ChangeOutcome(True, "all workers were replaced")

    def _abandon(self, reason: str) -> None:
        """Ends the renewal as failed. The remaining old workers continue to serve."""
        old_worker_count = len(self._to_replace) + len(self._surplus)
        self.outcome = ChangeOutcome(False, f"{reason}; {old_worker_count} old workers go on serving")
        self._to_replace.clear()
        self._replacement = None
