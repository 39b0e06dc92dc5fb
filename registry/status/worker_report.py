"""`WorkerReport`: what one worker process reports about itself. `WorkerReporter` writes the report to a file of the
process in the data directory. `read_worker_reports` reads the reports of all workers. `ServerRun` identifies one run of
the server."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from registry import __version__
from registry.asgi import ServerCounts
from registry.server.process.free_memory import resident_bytes
from storage.composition import layout_of
from storage.data_dir.report_files import ReportFile, open_report_file, read_all_reports
from storage.data_dir.system import System

if TYPE_CHECKING:
    from registry.mirror.upstream_client import EndpointHealth

INSTANCE_HEADER: Final = "x-entrepot-instance"
"""The header in responses of `/livez` that contains `ServerRun.instance`."""
REPORT_SECONDS: Final = 1.0
"""The process writes its report after this many seconds if the report has changed."""
HEARTBEAT_SECONDS: Final = 10.0
"""The process writes its report after this many seconds even if the report has not changed."""
LATE_SECONDS: Final = 30.0
"""If a report is older than this many seconds, its process hangs or cannot write to the disk."""
CLOSE_SECONDS: Final = 0.5
"""When the process ends, the reporter waits at most this many seconds for a report that is still being written."""
_MEMORY_STEP_BYTES: Final = 1 << 20
"""The memory in a report is rounded down to a multiple of this size, so that a small change causes no new report."""
log = logging.getLogger("registry.status")


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One run of `entrepot serve` with all of its worker processes. `instance`: a random id, by which `entrepot doctor`
    recognizes this server. `started`: when the run began, in seconds since 1970."""

    instance: str
    started: float


def new_server_run(clock: Callable[[], float] = time.time) -> ServerRun:
    """Returns a new run, which starts now. Call this function before the workers are forked."""
    return ServerRun(secrets.token_hex(16), clock())


class EndpointReport(BaseModel):
    """The health of an upstream's endpoint, as one worker has seen it."""

    upstream: str
    url: str
    breaker: Literal["closed", "open", "half-open"]
    failures: int
    retry_in_seconds: float | None
    last_error: str | None
    last_error_at: float | None


class WorkerReport(BaseModel):
    """What a worker process reports about itself. Times are in seconds since 1970, sizes in bytes."""

    pid: int
    version: str
    instance: str = Field(description="Id of the run of the server, the same for all of its workers")
    server_started: float
    started: float = Field(description="When this process began to serve")
    written: float = Field(description="When the process wrote this report")
    memory: int = Field(description="Memory that the process occupies (resident set size)")
    connections: int
    requests: int = Field(description="Requests in progress")
    max_connections: int | None = Field(description="How many connections it accepts at a time")
    answered: int = Field(description="Responses since the start of the process")
    loop_delay: float = Field(description="By how many seconds the event loop was late for this report")
    read_only: bool = Field(description="The store is open read-only: the disk was too full to open it for writing")
    endpoints: list[EndpointReport]


class _State(NamedTuple):
    """The part of a report that may change. The reporter creates a report only if the state has changed or the last
    report is old, because a state takes less time to create than a report."""

    memory: int
    counts: ServerCounts
    loop_delay: float
    is_read_only: bool
    endpoints: Sequence[tuple[str, EndpointHealth]]
    """The health of each endpoint, with the name of its upstream."""


ReadEndpointHealth = Callable[[], Mapping[str, "Sequence[EndpointHealth]"]]
"""A function that returns, by upstream, the health of the endpoints (URLs), as this process has observed it."""


class WorkerReporter:
    """Writes the reports of this process (`run`)."""

    def __init__(
        self,
        data: Path,
        server_run: ServerRun,
        *,
        counts: Callable[[], ServerCounts],
        endpoints: ReadEndpointHealth,
        is_read_only: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """- `data`: the data directory.
        - `server_run`: the run of the server to which this process belongs.
        - `counts`: returns the numbers of connections and requests of this process.
        - `endpoints`: returns the health of the upstreams' endpoints.
        - `is_read_only`: returns whether the store is open only for reading, because the disk was too full.
        - `clock`: returns seconds since 1970."""
        self._layout = layout_of(data)
        self._server_run = server_run
        self._counts = counts
        self._endpoints = endpoints
        self._is_read_only = is_read_only
        self._clock = clock
        self._started = clock()
        self._file: ReportFile | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        """Held while `_file` or `_is_closed` is used, so that the file is not closed during a write in a thread. Such a
        write could go to another file that has got the same descriptor."""
        self._last_state: _State | None = None
        """The state in the last report that was written."""
        self._last_written = 0.0
        """When the last report was written, in seconds since 1970."""
        self._has_logged = False

    async def run(self) -> None:
        """Writes reports until the call is cancelled, and then deletes the file. If a report cannot be created or
        written, for example because the disk is full, tries again after `REPORT_SECONDS`. Logs only the first error."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        try:
            while True:
                await self._report_or_log(delay)
                due = loop.time() + REPORT_SECONDS
                await asyncio.sleep(REPORT_SECONDS)
                delay = loop.time() - due
        finally:
            self._close()

    def _state(self, delay: float) -> _State:
        """Returns the present state. `delay`: by how many seconds the event loop was late."""
        return _State(
            resident_bytes() // _MEMORY_STEP_BYTES * _MEMORY_STEP_BYTES,
            self._counts(),
            round(max(0.0, delay), 1),
            self._is_read_only(),
            [(upstream, health) for upstream, healths in self._endpoints().items() for health in healths],
        )

    def _report(self, state: _State, now: float) -> WorkerReport:
        """Returns a report with this state. `now`: seconds since 1970."""
        return WorkerReport(
            pid=os.getpid(),
            version=__version__,
            instance=self._server_run.instance,
            server_started=self._server_run.started,
            started=self._started,
            written=now,
            memory=state.memory,
            connections=state.counts.connections,
            requests=state.counts.requests,
            max_connections=state.counts.max_connections,
            answered=state.counts.answered,
            loop_delay=state.loop_delay,
            read_only=state.is_read_only,
            endpoints=[_endpoint_report(upstream, health) for upstream, health in state.endpoints],
        )

    def _must_be_written(self, state: _State, now: float) -> bool:
        """Returns whether the state has changed since the last report, or the last report is old."""
        if state != self._last_state:
            return True
        # The difference is negative if the clock was set back.
        return not 0 <= now - self._last_written < HEARTBEAT_SECONDS

    async def _report_or_log(self, delay: float) -> None:
        """Writes a report if one must be written. Logs the first error, and ignores further errors."""
        try:
            state, now = self._state(delay), self._clock()
            if self._must_be_written(state, now):
                report = self._report(state, now)
                await asyncio.to_thread(self._write_blocking, report.model_dump_json().encode())
                self._last_state, self._last_written = state, now
        except Exception as error:  # for example RuntimeError, if no thread can be started
            if not self._has_logged:
                self._has_logged = True
                log.warning("this process cannot report its state for `entrepot status`: %s", error)

    def _write_blocking(self, data: bytes) -> None:
        """Writes `data`, a report as JSON, to the file, unless the reporter was closed."""
        with self._lock:
            if self._is_closed:
                return
            if self._file is None:
                self._file = open_report_file(self._layout, System())
            self._file.write(data)

    def _close(self) -> None:
        """Deletes the file, unless a write hangs. A file that remains does no harm: `read_worker_reports` ignores it
        after the process has ended."""
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            return
        try:
            self._is_closed = True
            if self._file is not None:
                self._file.close()
        finally:
            self._lock.release()


def read_worker_reports(data: Path) -> list[WorkerReport]:
    """Returns the last report of each worker process that serves the data directory, sorted by `started`. Blocks.
    Raises OSError.

    After a reload of the settings, a process can run two applications: one with the new settings, and one with the old
    settings, which finishes its requests. Each application writes a report. For such a process, returns only the report
    of the application with the new settings, which started later."""
    reports: dict[int, WorkerReport] = {}
    for report_json in read_all_reports(layout_of(data)):
        with suppress(ValidationError):  # another version of the program wrote this report
            report = WorkerReport.model_validate_json(report_json)
            if report.pid not in reports or reports[report.pid].started < report.started:
                reports[report.pid] = report
    return sorted(reports.values(), key=lambda report: (report.started, report.pid))


def _endpoint_report(upstream: str, health: EndpointHealth) -> EndpointReport:
    return EndpointReport(
        upstream=upstream,
        url=health.url,
        breaker=health.breaker,
        failures=health.failures,
        retry_in_seconds=None if health.retry_in_seconds is None else float(round(health.retry_in_seconds)),
        last_error=health.last_error,
        last_error_at=health.last_error_at,
    )
