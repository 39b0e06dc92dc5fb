"""The work that a worker repeats every second (`Maintenance`), and a function that visits all connections in steps.

A worker can have 16,384 connections. A loop over all of them in one go would delay the requests of all clients, so
`visit_in_steps` lets the event loop handle other events between two steps.
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
"""Number of connections that `visit_in_steps` visits before the event loop handles other events. The slowest visit is
one that refuses the request of a connection that has timed out. It takes about 80 microseconds, so a step takes at most
about 8 ms."""

_Connection = TypeVar("_Connection")


async def visit_in_steps(connections: Collection[_Connection], visit: Callable[[_Connection], None]) -> None:
    """Calls `visit` for each connection that is in `connections` now. Between two steps of `CONNECTIONS_PER_STEP`
    connections, the event loop handles other events. Skips a connection that was removed from `connections` before its
    step. A cancellation leaves the remaining connections unvisited."""
    to_visit = list(connections)
    for start in range(0, len(to_visit), CONNECTIONS_PER_STEP):
        if start:
            await asyncio.sleep(0)
        for connection in to_visit[start : start + CONNECTIONS_PER_STEP]:
            if connection in connections:
                visit(connection)


class Maintenance:
    """The repeated work of one worker. `start` it once; it runs until `stop`."""

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
        # The checks of the timeouts have a task of their own: if a busy worker has many connections, the checks can
        # take longer than a second, and they must not delay the Date header.
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
        - counts the open files that belong neither to a connection nor to a request. The more there are, the fewer
          connections are allowed.
        - returns free memory to the system if that is due.

        Every few seconds, checks whether the files of the certificate have changed."""
        certificates_checked_at = self._loop.time()
        memory = MemoryTrimmer(self._loop, self._state.connections)
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            now = self._loop.time()
            self._run_action(self._connection_limit.update_budget)
            self._run_action(partial(memory.release_if_due, now))
            if now - certificates_checked_at >= self._limits.certificate_check_seconds:
                certificates_checked_at = now
                if self._certificates is not None:
                    self._run_action(self._certificates.refresh)
            await asyncio.sleep(self._limits.timeout_check_seconds)

    def _run_action(self, action: Callable[[], None]) -> None:
        """Calls `action`. If it fails, reports the error to the event loop, which logs each different error once
        (`LoopErrors`). The error must not end the task: the Date header would stand still, and connections would have
        no timeouts."""
        try:
            action()
        except Exception as error:
            context = {"message": "an action of the worker's maintenance failed", "exception": error}
            self._loop.call_exception_handler(context)
