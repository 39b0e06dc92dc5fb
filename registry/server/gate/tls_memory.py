"""Limits the memory of a worker's TLS connections.

Below the protocol object of a connection, the event loop's TLS has buffers of its own. It reads up to 256 KiB at once
from the socket, and keeps encrypted bytes in a second buffer while the protocol object does not take them. The buffers
grow when a client sends much at once, such as the body of a push or many requests. They shrink only when the connection
is closed, so a connection that is idle afterwards keeps up to 0.75 MiB. Even a client that is not logged in can cause
this.

So the number of TLS connections is limited according to the memory of the machine, and so is the number of those whose
buffers may be large. `tls_limits` returns the two numbers.
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
"""The most memory that a TLS connection with small buffers takes, roughly. A new one takes 45 KiB. One on which the
server has sent a blob or a large response takes about 130 KiB."""
LARGE_CONNECTION_BYTES: Final = 768 * KIB
"""How much more memory a connection with large buffers can take: 256 KiB for what is read from the socket, and 512 KiB
for encrypted bytes."""
LARGE_READ_BYTES: Final = 18 * KIB
"""The transport's buffers are still small if they have never held more bytes than this at once. It is a bit more than
the largest TLS record (RFC 8446, 5.2). A request without a large body is smaller."""
MAX_EXAMINED: Final = 100
"""A search looks for a *silent* connection: one that is idle or stalled, has sent no complete request yet, or only
waits until the client closes it. A *short* search examines at most this many connections, a *long* search all of them
if necessary. Examining one takes up to ten microseconds."""
LONG_SEARCH_SECONDS: Final = 0.25
"""Shortest time between two long searches. In between, searches are short."""
_MEMORY_PART: Final = 8
"""The small buffers of all TLS connections of the server may take an eighth of the memory, and the large ones another
eighth."""
_MIN_CONNECTIONS: Final = 512
"""A worker may have this many TLS connections even if there is little memory."""
_MIN_LARGE_CONNECTIONS: Final = 64
"""This many TLS connections of a worker may have large buffers even if there is little memory."""
_LOG_INTERVAL_SECONDS: Final = 60.0
"""Shortest time between two log lines about closed connections."""


def tls_limits(memory_bytes: int, workers: int) -> tuple[int, int]:
    """Returns how many TLS connections each of the `workers` may have, and how many of these may have large buffers.
    `memory_bytes`: how much memory the server may use; 0: unknown, so the limits are those of a large machine."""
    if not memory_bytes:
        return MAX_CONNECTIONS, MAX_CONNECTIONS // 8
    part = memory_bytes // _MEMORY_PART // workers
    connections = min(max(part // TLS_CONNECTION_BYTES, _MIN_CONNECTIONS), MAX_CONNECTIONS)
    return connections, min(max(part // LARGE_CONNECTION_BYTES, _MIN_LARGE_CONNECTIONS), connections)


class LargeBufferLimit:
    """The TLS connections of one worker that may have large buffers. If there are more than the limit, this closes one
    of them for each new one."""

    def __init__(self, max_count: int, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's, in seconds."""
        self._max_count = max_count
        self._clock = clock
        self._addresses: dict[EvictableConnection, str | None] = {}
        """The IPv4 address or IPv6 network of each connection's client. The connections that were examined last come
        last."""
        self._closing: dict[EvictableConnection, None] = {}  # those that were being closed when they were counted
        self._no_long_search_until = -LONG_SEARCH_SECONDS
        self._unlogged_evictions = 0  # since the last log line
        self._logged_at = -_LOG_INTERVAL_SECONDS

    @property
    def count(self) -> int:
        """How many open connections may have large buffers."""
        return len(self._addresses)

    def add(self, connection: EvictableConnection, address: str | None, *, is_closing: bool = False) -> None:
        """Counts a connection until `discard`. Call it once for each connection. If the limit is exceeded, evicts one
        connection. Prefers a silent one (`registry.server.gate.connection_limit.EvictionKind`), such as an idle one. If
        there is none, takes one that is being closed and still waits for its client. Otherwise takes one of the address
        with the most counted connections. `address`: the client's IP address (those of an IPv6 /64 network count as
        one); None for a trusted proxy. `is_closing`: whether the connection is being closed already."""
        self._addresses.setdefault(connection, None if address is None else network_of(address))
        if is_closing:
            self._closing[connection] = None
        if len(self._addresses) > self._max_count:
            evicted = self._find_silent() or next(iter(self._closing), None) or self._find_of_busiest_address()
            self.discard(evicted)
            evicted.evict()
            self._log_eviction()

    def discard(self, connection: EvictableConnection) -> None:
        """Called when a connection is lost. Does nothing if it is not counted."""
        self._addresses.pop(connection, None)
        self._closing.pop(connection, None)

    def _find_silent(self) -> EvictableConnection | None:
        """Returns a silent connection; None if there is none. Begins with those that were not examined for the longest
        time. Soon after a long search, examines only `MAX_EXAMINED`: the next search goes on where this one ends."""
        now = self._clock()
        max_examined = MAX_EXAMINED if now < self._no_long_search_until else len(self._addresses)
        for number, connection in enumerate(list(islice(self._addresses, max_examined))):
            if number == MAX_EXAMINED:
                self._no_long_search_until = now + LONG_SEARCH_SECONDS
            if connection.eviction_candidate(now) is not None:
                return connection
            self._addresses[connection] = self._addresses.pop(connection)  # to the end
        return None

    def _find_of_busiest_address(self) -> EvictableConnection:
        """Returns a connection of the address with the most counted connections. Returns one of a trusted proxy,
        behind which there are many clients, only if there are no others."""
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
