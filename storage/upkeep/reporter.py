"""The interface through which long-running work reports its steps and its progress (`Reporter`), whether or not it runs
as a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from storage.jobs import JSON, JobProgress


class Reporter(Protocol):
    """Receives the steps and the progress of long-running work. `storage.upkeep.job_runner.JobContext` implements this
    interface."""

    def step(self, event: str, /, **fields: JSON) -> None:
        """Reports one step of the work. `event`: what the work did, such as `removed`. The reported object has the key
        `event` first, followed by the `fields`."""
        ...

    async def report(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        unit: str | None = None,
        message: str | None = None,
    ) -> None:
        """Updates the progress. A part that is None stays unchanged. May raise JobStopped, which ends the work.

        - `done`: the number of units that are done. `total`: the number of all units.
        - `unit`: what is counted, in the plural, such as "blobs".
        - `message`: what the work does now, for people."""
        ...


class PlainReporter:
    """A `Reporter` for a command whose work is not a job."""

    def __init__(
        self, on_step: Callable[[Mapping[str, JSON]], None], on_progress: Callable[[JobProgress], None]
    ) -> None:
        """`on_step` is called with each step, `on_progress` with each update of the progress."""
        self._on_step = on_step
        self._on_progress = on_progress
        self._progress = JobProgress()

    def step(self, event: str, /, **fields: JSON) -> None:
        self._on_step({"event": event, **fields})

    async def report(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        unit: str | None = None,
        message: str | None = None,
    ) -> None:
        previous = self._progress
        fields: dict[str, Any] = {
            "done": previous.done if done is None else done,
            "total": previous.total if total is None else total,
            "unit": previous.unit if unit is None else unit,
            "message": previous.message if message is None else message,
        }
        self._progress = JobProgress(**fields)
        self._on_progress(self._progress)
