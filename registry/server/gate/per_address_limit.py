"""Limits the connections of each client address, over all workers.

Connections beyond the limit are accepted and closed at once, without a response: a 429 would need the request, and over
TLS the handshake, which is the work that the limit is there to spare. A log line tells of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from registry.client_addresses import network_of, plain_address
from registry.server.server_log import log
from registry.server.shared_counters import SharedCounters

_QUIET_SECONDS = 10.0
"""The shortest time between two log lines."""
_GENERATIONS = 4
"""Columns for each worker: a worker that SIGHUP replaced goes on counting until its last connection ends."""


class TooManyConnections(Exception):
    """The address already has as many connections as it may."""


class CountedConnection:
    """A connection that is counted until `release`."""

    __slots__ = ("_key", "_limit")

    def __init__(self, limit: PerAddressLimit, key: str) -> None:
        self._limit: PerAddressLimit | None = limit
        self._key = key

    def release(self) -> None:
        """Counts the connection no longer. May be called repeatedly."""
        if self._limit is not None:
            self._limit.remove(self._key)
            self._limit = None


class PerAddressLimit:
    """Allows each address `most` connections at the same time. An IPv6 network of 64 bits counts as one address."""

    def __init__(self, most: int, workers: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """To be made before the fork. `clock` is in seconds."""
        self._most = most
        self._counts = SharedCounters(_GENERATIONS * workers)
        self._free = list(range(self._counts.columns))
        self._column: int | None = None
        self._clock = clock
        self._logged_at = -_QUIET_SECONDS
        self._closed = 0

    # Called in the parent

    def claim_column(self) -> int | None:
        """Reserves a column for a process to be started. None: no column is free since many processes are left; the new
        one admits every connection."""
        if not self._free:
            return None
        column = self._free.pop(0)
        self._counts.clear(column)
        return column

    def release_column(self, column: int | None) -> None:
        """Clears the column of a process that has ended: its connections are gone."""
        if column is not None:
            self._counts.clear(column)
            self._free.append(column)

    # Called in a worker

    def use_column(self, column: int | None) -> None:
        """Makes this process count in that column."""
        self._column = column

    def admit(self, address: str) -> CountedConnection:
        """Counts a connection. Raises TooManyConnections."""
        key = network_of(plain_address(address))
        if self._column is None:
            return CountedConnection(self, key)
        if self._counts.add(self._column, key) > self._most:
            self._counts.remove(self._column, key)
            self._log_closed(key)
            raise TooManyConnections
        return CountedConnection(self, key)

    def remove(self, key: str) -> None:
        """Counts one connection less."""
        if self._column is not None:
            self._counts.remove(self._column, key)

    def _log_closed(self, key: str) -> None:
        """Logs a line now and then: one for each connection would let a client fill the log."""
        self._closed += 1
        now = self._clock()
        if now - self._logged_at >= _QUIET_SECONDS:
            log.warning("closed %d connections beyond the limit of %d, the last from %s", self._closed, self._most, key)
            self._logged_at, self._closed = now, 0
