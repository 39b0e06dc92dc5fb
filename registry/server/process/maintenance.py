"""The work that a worker repeats every second (`Maintenance`), and a loop over all connections of a worker that does
not block the event loop for long (`visit_in_steps`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from email.utils import formatdate
from functools import partial
from typing import Final, TypeVar

from registry.server.connection.context import WorkerState
from registry.server.gate.certificates import Certificates
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.process.free_memory import MemoryTrimmer
from registry.server.server_limits import ServerLimits

CONNECTIONS_PER_STEP: Final = 100
"""Number of connections that `visit_in_steps` visits before the event loop handles other events. A visit takes at most
about 80 microseconds, so these visits block the event loop for at most about 8 ms."""

_Connection = TypeVar("_Connection")


async def visit_in_steps(connections: Collection[_Connection], visit: Callable[[_Connection], None]) -> None:
    """Calls `visit` for each connection that is in `connections` at the time of the call. After each step of
    `CONNECTIONS_PER_STEP` connections, lets the event loop handle other events. Skips connections that have been
    removed from `connections` by then. A cancellation leaves the remaining connections unvisited."""
    to_visit = list(connections)
    for start in range(0, len(to_visit), CONNECTIONS_PER_STEP):
        if start:
            await asyncio.sleep(0)
        for connection in to_visit[start : start + CONNECTIONS_PER_STEP]:
            if connection in connections:
                visit(connection)


class Maintenance:
    """The repeated work of one worker. Call `start` once. The work ends at `stop`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        state: WorkerState,
        limits: ServerLimits,
        connection_limit: ConnectionLimit,
        certificates: Certificates | None,
    ) -> None:
        self._loop = loop
        self._state = state
        self._limits = limits
        self._connection_limit = connection_limit
        self._certificates = certificates
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        # The timeout checks have a task of their own: with many connections, they can take longer than a second, and
        # they must not delay the Date header.
        self._tasks = [self._loop.create_task(self._check_timeouts()), self._loop.create_task(self._maintain())]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _check_timeouts(self) -> None:
        """Checks the timeouts of each connection once a second."""
        while True:
            await visit_in_steps(
                self._state.connections,
                lambda connection: self._run_action(partial(connection.check_timeouts, self._loop.time())),
            )
            await asyncio.sleep(self._limits.timeout_check_seconds)

    async def _maintain(self) -> None:
        """Once a second:

        - updates the Date header.
        - counts the open files and adjusts the number of allowed connections (`ConnectionLimit.update_budget`).
        - returns free memory to the system, if `MemoryTrimmer` finds this due.

        Every `certificate_check_seconds`, checks whether the files of the certificate have changed."""
        certificates_checked_at = self._loop.time()
        memory = MemoryTrimmer(self._loop, self._state.connections)
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            now = self._loop.time()
            self._run_action(self._connection_limit.update_budget)
            self._run_action(partial(memory.trim_if_due, now))
            if now - certificates_checked_at >= self._limits.certificate_check_seconds:
                certificates_checked_at = now
                if self._certificates is not None:
                    self._run_action(self._certificates.refresh)
            await asyncio.sleep(self._limits.timeout_check_seconds)

    def _run_action(self, action: Callable[[], None]) -> None:
        """Calls `action`. If the action raises an error, reports the error to the event loop, which logs it. The error
        does not end the task."""
        try:
            action()
        except Exception as error:
            context = {"message": "an action of the worker's maintenance failed", "exception": error}
            self._loop.call_exception_handler(context)
