"""`Reload`: gives a new configuration either to all workers or to none of them.

A reload has two phases. First all workers *prepare* the new configuration, while the old configuration is still in use.
If all workers succeed, all of them *switch* to the new configuration. Otherwise all of them *discard* it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from registry.server.process.commands import Answer
from registry.server.process.live_change import ChangeOutcome, ConfigurationSource, Proposal, reload_outcome
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_log import log

_PREPARE_SECONDS = 60.0
"""Time for the first phase. If a worker takes longer to prepare, the reload is refused."""
_SWITCH_SECONDS = 20.0
"""Time for the second phase. A worker that takes longer to switch is killed, and starts again with the new
configuration."""


def command_numbers() -> Iterator[int]:
    """Returns an iterator over the numbers 1, 2, 3, … for the commands to workers. The number 0 is for commands whose
    answers are ignored."""
    return itertools.count(1)


class Reload:
    """One reload. `proposal`: the new configuration, already checked. `source`: puts the proposal in force. `numbers`:
    gives the numbers for the commands to the workers. While the reload runs, the supervisor must not fork workers,
    because a new worker would have the old configuration."""

    def __init__(
        self, pool: WorkerPool, source: ConfigurationSource, proposal: Proposal, numbers: Iterator[int]
    ) -> None:
        self.outcome: ChangeOutcome | None = None
        """How the reload has ended; None while it runs."""
        self._pool = pool
        self._source = source
        self._proposal = proposal
        self._prepare_number = next(numbers)
        self._switch_number = next(numbers)
        self._is_switching = False
        self._deadline = time.monotonic() + _PREPARE_SECONDS
        self._workers = {worker.pid: worker for worker in pool.serving}
        self._unanswered = dict(self._workers)
        """The workers, by pid, that have not answered the current command yet."""
        for worker in list(self._workers.values()):
            if not pool.send(worker, self._prepare_number, "prepare", proposal.configuration):
                self._refuse(f"the worker {worker.pid} does not answer")
                return
        self._switch_when_prepared()  # if there are no workers, no answer arrives

    @property
    def deadline(self) -> float:
        """The time by which the current phase must end, in seconds of `time.monotonic` (`end_late_phase`)."""
        return self._deadline

    def on_answer(self, worker: WorkerProcess, answer: Answer) -> None:
        """Called with a worker's answer to a command. Ignores answers to commands that this reload has not sent."""
        if self.outcome is not None or worker.pid not in self._unanswered:
            return
        if not self._is_switching and answer.number == self._prepare_number:
            if answer.failure is not None:
                self._refuse(answer.failure)
                return
            del self._unanswered[worker.pid]
            self._switch_when_prepared()
        elif self._is_switching and answer.number == self._switch_number:
            del self._unanswered[worker.pid]
            if answer.failure is not None:
                log.error("the worker %d cannot switch to the new configuration: %s", worker.pid, answer.failure)
                self._pool.kill(worker)
            self._end_when_switched()

    def on_exit(self, worker: WorkerProcess, how: str) -> None:
        """Called when a worker has ended. `how`: how it ended, such as "ended with exit code 1"."""
        if self.outcome is not None or self._workers.pop(worker.pid, None) is None:
            return
        self._unanswered.pop(worker.pid, None)
        if self._is_switching:
            self._end_when_switched()  # the worker starts again with the new configuration
        else:
            self._refuse(f"the worker {worker.pid} {how} before it had the new configuration")

    def end_late_phase(self, now: float) -> None:
        """Ends the current phase if its deadline has passed. `now` is in seconds of `time.monotonic`."""
        if self.outcome is not None or now < self._deadline:
            return
        if not self._is_switching:
            pids = ", ".join(map(str, self._unanswered))
            self._refuse(f"the workers {pids} did not prepare the new configuration within {_PREPARE_SECONDS:g} s")
            return
        for worker in self._unanswered.values():
            log.error("killing the worker %d: it does not switch to the new configuration", worker.pid)
            self._pool.kill(worker)
        self._unanswered.clear()
        self._end_when_switched()

    def _switch_when_prepared(self) -> None:
        """If all workers have prepared the proposal, puts it in force and tells the workers to switch."""
        if self._unanswered:
            return
        try:
            self._source.accept(self._proposal)  # a worker that starts after this call uses the proposal
        except Exception as error:
            log.error("the new configuration cannot be put in force", exc_info=error)
            self._refuse(str(error) or type(error).__name__)
            return
        self._is_switching = True
        self._deadline = time.monotonic() + _SWITCH_SECONDS
        self._unanswered = dict(self._workers)
        for worker in self._workers.values():
            if not self._pool.send(worker, self._switch_number, "switch"):
                self._pool.kill(worker)
        self._end_when_switched()

    def _end_when_switched(self) -> None:
        if not self._unanswered:
            self.outcome = reload_outcome(self._proposal)

    def _refuse(self, reason: str) -> None:
        """Ends the reload, and tells the workers to discard the proposal. Their answers are ignored."""
        for worker in self._workers.values():
            self._pool.send(worker, 0, "discard")
        self.outcome = ChangeOutcome(False, reason)
