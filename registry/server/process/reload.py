"""`Reload`: gives a new configuration either to all workers or to none of them (see
`registry.server.process.live_change`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from registry.server.process.commands import Answer
from registry.server.process.live_change import ConfigurationSource, Outcome, Proposal, reloaded
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_log import log

_PREPARE_SECONDS = 60.0
"""Time for all workers to prepare. If one takes longer, the reload is refused."""
_SWITCH_SECONDS = 20.0
"""Time for all workers to switch. A worker that takes longer is ended, and starts again with the new configuration."""


def command_numbers() -> Iterator[int]:
    """Returns an iterator over the numbers for commands, from 1 on. The number 0 is for commands whose answer is
    ignored."""
    return itertools.count(1)


class Reload:
    """One reload. While it runs, the supervisor must not fork workers: a new worker would have the old
    configuration.

    Workers that a restart has replaced do not get the new configuration, because their version of the program may not
    be able to read it. When the other workers switch, they end their idle connections, and complete their requests."""

    def __init__(
        self, pool: WorkerPool, source: ConfigurationSource, proposal: Proposal, numbers: Iterator[int]
    ) -> None:
        self.outcome: Outcome | None = None
        """How the reload has ended; None: it still runs."""
        self._pool = pool
        self._source = source
        self._proposal = proposal
        self._prepare_number = next(numbers)
        self._switch_number = next(numbers)
        self._is_switching = False
        self._deadline = time.monotonic() + _PREPARE_SECONDS
        self._workers = {worker.pid: worker for worker in pool.serving}
        """The workers that get commands of this reload. From the switch on, also those that retire."""
        self._waiting = dict(self._workers)
        """The workers whose answer is missing."""
        for worker in list(self._workers.values()):
            if not pool.command(worker, self._prepare_number, "prepare", proposal.configuration):
                self._refuse(f"the worker {worker.pid} does not answer")
                return
        self._switch_when_prepared()  # needed here if there are no workers, because then no answer will arrive

    @property
    def deadline(self) -> float:
        """When `step` must be called at the latest, in seconds of `time.monotonic`."""
        return self._deadline

    def on_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        """Called with a worker's answer to a command. Ignores answers to commands that are not of this reload."""
        if self.outcome is not None or worker.pid not in self._waiting:
            return
        if not self._is_switching and answer.number == self._prepare_number:
            if answer.failure is not None:
                self._refuse(answer.failure)
                return
            del self._waiting[worker.pid]
            self._switch_when_prepared()
        elif self._is_switching and answer.number == self._switch_number:
            del self._waiting[worker.pid]
            if answer.failure is not None:
                log.error("the worker %d cannot switch to the new configuration: %s", worker.pid, answer.failure)
                self._end_worker(worker)
            self._end_when_switched()

    def on_exit(self, worker: WorkerProcess, how: str) -> None:
        """Called when a worker has ended. `how` is the part of a sentence that follows "the worker"."""
        if self.outcome is not None or self._workers.pop(worker.pid, None) is None:
            return
        self._waiting.pop(worker.pid, None)
        if self._is_switching:
            self._end_when_switched()  # the worker starts again with the new configuration
        else:
            self._refuse(f"the worker {worker.pid} {how} before it had the new configuration")

    def step(self, now: float) -> None:
        """Ends a phase that takes too long."""
        if self.outcome is not None or now < self._deadline:
            return
        if not self._is_switching:
            pids = ", ".join(map(str, self._waiting))
            self._refuse(f"the workers {pids} did not prepare the new configuration within {_PREPARE_SECONDS:g} s")
            return
        for worker in list(self._waiting.values()):
            log.error("ending the worker %d: it does not switch to the new configuration", worker.pid)
            self._end_worker(worker)
        self._waiting.clear()
        self._end_when_switched()

    def _switch_when_prepared(self) -> None:
        if self._waiting:
            return
        try:
            self._source.accept(self._proposal)  # from here on, a worker that starts again uses the proposal
        except Exception as error:
            log.error("the new configuration cannot be put in force", exc_info=error)
            self._refuse(str(error) or type(error).__name__)
            return
        self._is_switching = True
        self._deadline = time.monotonic() + _SWITCH_SECONDS
        self._workers |= {worker.pid: worker for worker in self._pool.retiring}
        self._waiting = dict(self._workers)
        for worker in self._workers.values():
            name = "end_connections" if worker.exit_expected else "switch"
            if not self._pool.command(worker, self._switch_number, name):
                self._end_worker(worker)
        self._end_when_switched()

    def _end_worker(self, worker: WorkerProcess) -> None:
        """Ends a worker that may still use the old configuration. A worker that retires gets the grace period for its
        requests; it accepts no new requests meanwhile."""
        if worker.exit_expected:
            self._waiting.pop(worker.pid, None)
            self._pool.stop(worker)
        else:
            self._pool.kill(worker)

    def _end_when_switched(self) -> None:
        if not self._waiting:
            self.outcome = reloaded(self._proposal)

    def _refuse(self, reason: str) -> None:
        for worker in self._workers.values():
            self._pool.command(worker, 0, "discard")
        self.outcome = Outcome(False, reason)
