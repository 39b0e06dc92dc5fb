"""Limits the memory of a worker's TLS connections.

The event loop's TLS transport has two buffers for each connection, both for encrypted bytes from the client. The
transport reads bytes from the socket into the *read buffer*. The *encrypted buffer* then keeps the bytes until the
transport decrypts them for the connection's protocol object. The buffers grow when a client sends much at once, such as
the body of a push. Together they can grow to 0.75 MiB, and they do not shrink before the connection is closed. A client
needs no login to make them grow.

So each worker limits the number of its TLS connections, and the number of its TLS connections with large buffers.
`tls_limits` computes both limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Final

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import MAX_CONNECTIONS, EvictableConnection
from registry.server.server_log import log

KIB: Final = 1024
TLS_CONNECTION_BYTES: Final = 128 * KIB
"""Approximately the largest amount of memory that a TLS connection with small buffers takes. A new connection takes 45
KiB. After the server has sent a blob or another large response, the connection takes about 130 KiB."""
LARGE_CONNECTION_BYTES: Final = 768 * KIB
"""Largest amount of memory that the large buffers of one connection take in addition to `TLS_CONNECTION_BYTES`: 256 KiB
for the read buffer, and 512 KiB for the encrypted buffer."""
LARGE_READ_BYTES: Final = 18 * KIB
"""A connection may have large buffers after they have held more bytes than this at once. This is slightly more than the
largest TLS record (RFC 8446, 5.2), and more than a request without a large body."""
MAX_EXAMINED: Final = 100
"""Largest number of connections that a *short* search examines. A *long* search examines more: all counted connections
if necessary. Examining a connection takes up to ten microseconds.

Both searches look for a *silent* connection: one without a request, or one whose request makes no progress
(`registry.server.gate.connection_limit.SilentConnectionKind`)."""
LONG_SEARCH_SECONDS: Final = 0.25
"""Shortest time between two long searches. Searches between them are short."""
_MEMORY_DIVISOR: Final = 8
"""The TLS connections of the server together may take an eighth of the memory, without their large buffers. The large
buffers together may take another eighth."""
_MIN_CONNECTIONS: Final = 512
"""A worker may always have this many TLS connections, even if there is little memory."""
_MIN_LARGE_CONNECTIONS: Final = 64
"""This many TLS connections of a worker may always have large buffers, even if there is little memory."""
_LOG_INTERVAL_SECONDS: Final = 60.0
"""Shortest time between two log lines about closed connections."""


def tls_limits(memory_bytes: int, workers: int) -> tuple[int, int]:
    """Returns how many TLS connections each worker may have, and how many of these connections may have large buffers.
    `memory_bytes`: how much memory the server may use; 0 if this is unknown, which gives the limits of a large machine.
    `workers`: the number of workers."""
    if not memory_bytes:
        return MAX_CONNECTIONS, MAX_CONNECTIONS // 8
    share_bytes = memory_bytes // _MEMORY_DIVISOR // workers
    connections = min(max(share_bytes // TLS_CONNECTION_BYTES, _MIN_CONNECTIONS), MAX_CONNECTIONS)
    return connections, min(max(share_bytes // LARGE_CONNECTION_BYTES, _MIN_LARGE_CONNECTIONS), connections)


class LargeBufferLimit:
    """Counts the connections of one worker that may have large buffers, and limits their number. When a new connection
    exceeds the limit, closes one of the counted connections."""

    def __init__(self, max_count: int, clock: Callable[[], float]) -> None:
        """`max_count`: the limit. `clock`: returns the time of the event loop, in seconds."""
        self._max_count = max_count
        self._clock = clock
        self._addresses: dict[EvictableConnection, str | None] = {}
        """Maps each counted connection to the IPv4 address or IPv6 network of its client; None for a trusted proxy. The
        connections that were examined most recently come last."""
        self._closing: dict[EvictableConnection, None] = {}
        """The counted connections for which `add` got `is_closing`. Used as an ordered set."""
        self._no_long_search_until = -LONG_SEARCH_SECONDS
        self._unlogged_evictions = 0  # since the last log line
        self._logged_at = -_LOG_INTERVAL_SECONDS

    @property
    def count(self) -> int:
        """Number of counted connections."""
        return len(self._addresses)

    def add(self, connection: EvictableConnection, address: str | None, *, is_closing: bool = False) -> None:
        """Counts a connection that may have large buffers, until `discard`. Called once for each such connection. If
        the count exceeds the limit, closes (*evicts*) one counted connection, in this order of preference:

        1. a silent connection
        2. a connection that was being closed already when it was added (it still waits for its client)
        3. a connection of the address with the most counted connections

        `address`: the client's IP address; None for a trusted proxy. All addresses of an IPv6 /64 network count as one.
        `is_closing`: whether the connection is being closed already."""
        self._addresses.setdefault(connection, None if address is None else network_of(address))
        if is_closing:
            self._closing[connection] = None
        if len(self._addresses) > self._max_count:
            evicted = self._find_silent() or next(iter(self._closing), None) or self._find_from_busiest_address()
            self.discard(evicted)
            evicted.evict()
            self._log_eviction()

    def discard(self, connection: EvictableConnection) -> None:
        """Stops counting a connection. Called when the connection is lost. Does nothing if the connection is not
        counted."""
        self._addresses.pop(connection, None)
        self._closing.pop(connection, None)

    def _find_silent(self) -> EvictableConnection | None:
        """Returns a silent connection; None if the search finds none. Examines first the connections whose last
        examination is longest ago. The search is short if the last long search was less than `LONG_SEARCH_SECONDS`
        ago."""
        now = self._clock()
        max_examined = MAX_EXAMINED if now < self._no_long_search_until else len(self._addresses)
        for examined_count, connection in enumerate(list(islice(self._addresses, max_examined))):
            if examined_count == MAX_EXAMINED:
                self._no_long_search_until = now + LONG_SEARCH_SECONDS
            if connection.eviction_candidate(now) is not None:
                return connection
            self._addresses[connection] = self._addresses.pop(connection)  # to the end
        return None

    def _find_from_busiest_address(self) -> EvictableConnection:
        """Returns a connection of the address with the most counted connections. Leaves out connections of trusted
        proxies, which serve many clients, unless there are no others."""
        counts = Counter(address for address in self._addresses.values() if address is not None)
        busiest = counts.most_common(1)[0][0] if counts else None
        return next(connection for connection, address in self._addresses.items() if address == busiest)

    def _log_eviction(self) -> None:
        self._unlogged_evictions += 1
        now = self._clock()
        if now - self._logged_at >= _LOG_INTERVAL_SECONDS:
            log.warning(
                "closed %d TLS connections to free their large buffers: this process has memory for at most %d "
                "connections with such buffers; see docs/en/network.md",
                self._unlogged_evictions,
                self._max_count,
            )
            self._logged_at, self._unlogged_evictions = now, 0
