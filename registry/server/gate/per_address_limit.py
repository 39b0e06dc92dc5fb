"""How many connections one address may have, over all workers.

Those beyond are accepted and closed at once, without a word. A word would have to be a 429 on a connection whose
request has not come yet, over TLS after a handshake: the very work that the limit is there to spare. What leaves a
trace is a line in the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from registry.client_addresses import network_of, plain_address
from registry.server.server_log import log
from registry.server.shared_counters import SharedCounters

_QUIET_SECONDS = 10.0
_GENERATIONS = 4
"""Columns for each worker: those that SIGHUP replaced go on counting until their last connection ends."""


class TooManyConnections(Exception):
    """The address has as many connections as it may have."""


class CountedConnection:
    """One connection that is counted, until `leave`."""

    __slots__ = ("_key", "_limit")

    def __init__(self, limit: PerAddressLimit, key: str) -> None:
        self._limit: PerAddressLimit | None = limit
        self._key = key

    def release(self) -> None:
        """May come again."""
        if self._limit is not None:
            self._limit.remove(self._key)
            self._limit = None


class PerAddressLimit:
    """The connections of each address: at most `most` at the same time. Of IPv6, a network of 64 bits is an address."""

    def __init__(self, most: int, workers: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """To be made before the fork."""
        self._most = most
        self._counts = SharedCounters(_GENERATIONS * workers)
        self._free = list(range(self._counts.columns))
        self._column: int | None = None
        self._clock = clock
        self._said = -_QUIET_SECONDS
        self._closed = 0

    # In the parent

    def claim_column(self) -> int | None:
        """A column for a process that is to be started. None: so many are still there that none is left, and that
        process lets everybody in."""
        if not self._free:
            return None
        column = self._free.pop(0)
        self._counts.clear(column)
        return column

    def release_column(self, column: int | None) -> None:
        """The process that counted there has ended, however it did: its connections are gone."""
        if column is not None:
            self._counts.clear(column)
            self._free.append(column)

    # In a worker

    def use_column(self, column: int | None) -> None:
        """This process counts in that column."""
        self._column = column

    def admit(self, address: str) -> CountedConnection:
        """Counts a connection. Raises Crowded."""
        key = network_of(plain_address(address))
        if self._column is None:
            return CountedConnection(self, key)
        if self._counts.add(self._column, key) > self._most:
            self._counts.remove(self._column, key)
            self._say(key)
            raise TooManyConnections
        return CountedConnection(self, key)

    def remove(self, key: str) -> None:
        if self._column is not None:
            self._counts.remove(self._column, key)

    def _say(self, key: str) -> None:
        """Not a line for each: that would be a way to fill the log."""
        self._closed += 1
        now = self._clock()
        if now - self._said >= _QUIET_SECONDS:
            log.warning("closed %d connections beyond the limit of %d, the last from %s", self._closed, self._most, key)
            self._said, self._closed = now, 0
