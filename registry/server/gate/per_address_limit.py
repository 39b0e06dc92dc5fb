"""Limits the number of connections from each client address, over all worker processes.

The server closes a connection beyond the limit immediately, without a response. To respond with 429, the server would
have to perform a TLS handshake and read a request. The limit saves this work. Log lines report how many connections
were closed.

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
"""Number of columns in the table for each configured worker. A worker that was replaced at a restart keeps its column
until its last connection has ended, so old and new workers need columns at the same time."""


class TooManyConnections(Exception):
    """The client address already has the maximum number of connections."""

    def __init__(self, *, is_logged: bool) -> None:
        """`is_logged`: whether this refusal has caused a log line. Most refusals cause no log line, so that a client
        cannot fill the log."""
        super().__init__()
        self.is_logged = is_logged


class AdmittedConnection:
    """A connection that counts against the limit of its client's address until `release` is called."""

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
    """Allows each client address `max_connections` connections at the same time. All IPv6 addresses of a /64 network
    count as one address, because one client can usually use the whole network."""

    def __init__(self, max_connections: int, workers: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Allocates the memory that the workers share, so it must be called before the fork. `workers` is the number of
        worker processes. `clock` returns seconds of a monotonic clock."""
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
        """Clears the column of a worker that has ended, and makes the column free for another worker. Does nothing if
        `column` is None: the worker had no column."""
        if column is not None:
            self._counts.clear(column)
            self._free_columns.append(column)

    # Called in a worker

    def set_own_column(self, column: int | None) -> None:
        """Makes this process count its connections in `column`. If `column` is None, the process counts no connections,
        and admits every connection."""
        self._own_column = column

    def admit(self, address: str) -> AdmittedConnection:
        """Counts a connection from `address`. Raises TooManyConnections if the address is at its limit."""
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
        """Counts a connection that is about to be closed. If the last log line is at least `_LOG_INTERVAL_SECONDS` old,
        logs how many connections were closed since then. Returns whether it has logged a line."""
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
