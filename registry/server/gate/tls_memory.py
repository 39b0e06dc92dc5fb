"""Limits the memory of a worker's TLS connections.

The event loop's TLS transport has two buffers for each connection. The transport reads up to 256 KiB at once from the
socket into the first buffer. The second buffer keeps encrypted bytes while the protocol object of the connection does
not take them. The buffers grow when a client sends much at once, such as the body of a push or many requests. They
keep up to 0.75 MiB until the connection is closed, even if it is idle. Even a client that is not logged in can cause
this.

A worker therefore has two limits, which `tls_limits` computes from the memory of the machine: the number of TLS
connections, and the number of TLS connections whose buffers may be large.
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
"""Roughly the most memory that a TLS connection with small buffers takes. A new connection takes 45 KiB. A connection
on which the server has sent a blob or a large response takes about 130 KiB."""
LARGE_CONNECTION_BYTES: Final = 768 * KIB
"""How much memory a connection with large buffers can take in addition: 256 KiB for what is read from the socket, and
512 KiB for encrypted bytes."""
LARGE_READ_BYTES: Final = 18 * KIB
"""The transport's buffers are small until they hold more bytes than this at once. This number is a bit more than the
largest TLS record (RFC 8446, 5.2). A request without a large body is smaller than this."""
MAX_EXAMINED: Final = 100
"""A *short* search for a silent connection examines at most this many connections. A *long* search examines all
connections if necessary. Examining one takes up to ten microseconds.

A connection is *silent* in four cases: it is idle, its request is stalled, its client has sent no complete request yet,
or the server only waits until the client closes it."""
LONG_SEARCH_SECONDS: Final = 0.25
"""Shortest time between two long searches. In between, searches are short."""
_MEMORY_DIVISOR: Final = 8
"""The small buffers of all TLS connections of the server may take an eighth of the memory, and the large buffers
another eighth."""
_MIN_CONNECTIONS: Final = 512
"""A worker may have this many TLS connections even if there is little memory."""
_MIN_LARGE_CONNECTIONS: Final = 64
"""This many TLS connections of a worker may have large buffers even if there is little memory."""
_LOG_INTERVAL_SECONDS: Final = 60.0
"""Shortest time between two log lines about closed connections."""


def tls_limits(memory_bytes: int, workers: int) -> tuple[int, int]:
    """Returns how many TLS connections each worker may have, and how many of these connections may have large buffers.
    `memory_bytes`: how much memory the server may use. If it is 0 (unknown), the limits are those of a large machine.
    `workers`: the number of workers."""
    if not memory_bytes:
        return MAX_CONNECTIONS, MAX_CONNECTIONS // 8
    share_bytes = memory_bytes // _MEMORY_DIVISOR // workers
    connections = min(max(share_bytes // TLS_CONNECTION_BYTES, _MIN_CONNECTIONS), MAX_CONNECTIONS)
    return connections, min(max(share_bytes // LARGE_CONNECTION_BYTES, _MIN_LARGE_CONNECTIONS), connections)


class LargeBufferLimit:
    """Limits how many TLS connections of one worker may have large buffers. Above the limit, it closes one of these
    connections for each new one."""

    def __init__(self, max_count: int, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's, in seconds."""
        self._max_count = max_count
        self._clock = clock
        self._addresses: dict[EvictableConnection, str | None] = {}
        """The IPv4 address or IPv6 network of each connection's client; None for a trusted proxy. The connections that
        were examined most recently come last."""
        self._closing: dict[EvictableConnection, None] = {}
        """The connections that were already being closed at the call of `add`; used as an ordered set."""
        self._no_long_search_until = -LONG_SEARCH_SECONDS
        self._unlogged_evictions = 0  # since the last log line
        self._logged_at = -_LOG_INTERVAL_SECONDS

    @property
    def count(self) -> int:
        """How many open connections may have large buffers."""
        return len(self._addresses)

    def add(self, connection: EvictableConnection, address: str | None, *, is_closing: bool = False) -> None:
        """Counts a connection until `discard`. Call it once for each connection. If the limit is exceeded, evicts
        (closes) one connection, the first of these that it finds:

        - a silent connection (`registry.server.gate.connection_limit.SilentConnectionKind`), such as an idle one;
        - a connection that is being closed, and still waits for its client;
        - a connection of the address with the most counted connections.

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
        """Stops counting a connection; called when the connection is lost. Does nothing if it is not counted."""
        self._addresses.pop(connection, None)
        self._closing.pop(connection, None)

    def _find_silent(self) -> EvictableConnection | None:
        """Returns a silent connection; None if the search finds none. Begins with the connections whose last
        examination is longest ago. For `LONG_SEARCH_SECONDS` after a long search, examines only `MAX_EXAMINED`
        connections. The next search then continues where this search ends."""
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
        """Returns a connection of the address with the most counted connections. Returns a connection of a trusted
        proxy, which serves many clients, only if all counted connections are of trusted proxies."""
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
