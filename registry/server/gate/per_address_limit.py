"""Limits the connections of each client address, over all worker processes.

The server accepts a connection beyond the limit and immediately closes it, without a response. To respond with 429, the
server would have to read a request and, with TLS, perform a handshake first. The limit exists to save this work. A log
line reports how many connections were closed.

Each worker counts its connections in a *column*: its own part of a table of counters in shared memory. The count of an
address is the sum over all columns. The parent process assigns a column to each worker, and clears the column when the
worker has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from registry.client_addresses import network_of, plain_address
from registry.server.server_log import log
from registry.server.shared_counters import SharedCounters

_LOG_INTERVAL_SECONDS = 10.0
"""Shortest time between two log lines about closed connections."""
_COLUMNS_PER_WORKER = 4
"""The table has this many columns for each configured worker. One would not be enough: a restart replaces the workers,
and a replaced worker keeps its column until its last connection has ended."""


class TooManyConnections(Exception):
    """The client address already has the maximum number of connections."""

    def __init__(self, *, is_logged: bool) -> None:
        """`is_logged`: whether the log has a line about this connection. Most closed connections have no line, so that
        a client cannot fill the log."""
        super().__init__()
        self.is_logged = is_logged


class AdmittedConnection:
    """An admitted connection counts against the limit of its client's address until `release` is called."""

    __slots__ = ("_limit", "_network")

    def __init__(self, limit: PerAddressLimit, network: str) -> None:
        """`network` is the client's IPv4 address, or the /64 network of its IPv6 address."""
        self._limit: PerAddressLimit | None = limit
        self._network = network

    def release(self) -> None:
        """Stops counting the connection. May be called repeatedly."""
        if self._limit is not None:
            self._limit.remove(self._network)
            self._limit = None


class PerAddressLimit:
    """Allows each client address `max_connections` connections at the same time. All IPv6 addresses of one /64 network
    are counted as one address, because a client with one of them can usually use all of them."""

    def __init__(self, max_connections: int, workers: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Create it before the fork, because it allocates the memory that the workers share. `workers` is the number of
        worker processes. `clock` returns seconds."""
        self._max_connections = max_connections
        self._counts = SharedCounters(_COLUMNS_PER_WORKER * workers)
        self._free_columns = list(range(self._counts.columns))
        self._own_column: int | None = None  # the column in which this process counts
        self._clock = clock
        self._logged_at = -_LOG_INTERVAL_SECONDS
        self._closed_since_log = 0  # connections closed since the last log line

    # Called in the parent process

    def claim_column(self) -> int | None:
        """Returns a column for a worker that is about to be started. Returns None if no column is free because many
        replaced workers still run. A worker without a column admits every connection."""
        if not self._free_columns:
            return None
        column = self._free_columns.pop(0)
        self._counts.clear(column)
        return column

    def release_column(self, column: int | None) -> None:
        """Clears the column of a worker that has ended, and makes the column free for another worker. Does nothing for
        None, a worker without a column."""
        if column is not None:
            self._counts.clear(column)
            self._free_columns.append(column)

    # Called in a worker

    def use_column(self, column: int | None) -> None:
        """Makes this process count its connections in `column`. If `column` is None, the process counts no connections,
        and admits every connection."""
        self._own_column = column

    def admit(self, address: str) -> AdmittedConnection:
        """Counts a connection of the client at `address`. Raises TooManyConnections if the address is at its limit."""
        network = network_of(plain_address(address))
        if self._own_column is None:
            return AdmittedConnection(self, network)
        if self._counts.add(self._own_column, network) > self._max_connections:
            self._counts.remove(self._own_column, network)
            raise TooManyConnections(is_logged=self._log_closed(network))
        return AdmittedConnection(self, network)

    def remove(self, network: str) -> None:
        """Stops counting one connection from `network` that `admit` has counted."""
        if self._own_column is not None:
            self._counts.remove(self._own_column, network)

    def _log_closed(self, network: str) -> bool:
        """Counts a connection that is about to be closed. Logs how many were closed since the last line, unless that
        line is less than `_LOG_INTERVAL_SECONDS` old. Returns whether it has logged a line."""
        self._closed_since_log += 1
        now = self._clock()
        if now - self._logged_at < _LOG_INTERVAL_SECONDS:
            return False
        log.warning(
            "closed %d connections beyond the limit of %d, the last from %s",
            self._closed_since_log,
            self._max_connections,
            network,
        )
        self._logged_at, self._closed_since_log = now, 0
        return True
