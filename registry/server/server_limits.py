"""Limits of the server: how much memory and time its connections can use."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_COST = 64
"""A header of fewer bytes counts as this many, because even a header of a few bytes takes about 64 bytes of memory for
the objects that hold it. So a head of 32 KiB has at most 512 headers."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The limits of one worker process. Each limit applies to one connection unless its text says otherwise. Sizes are
    in bytes, times in seconds. The time of a whole transfer is not limited, because a layer of 40 GiB can take all
    day."""

    header_bytes: int = 32 * 1024
    """Largest size of a request's head, that is, of the request line and the headers together. A header shorter than
    `HEADER_COST` counts as that many bytes. A larger head is refused with 431, or with 414 if the request target is too
    long. The trailers of a chunked body have a limit of the same size."""
    handshake_seconds: float = 10.0
    """How long a TLS connection waits for the client's first byte, and after that byte for the end of the handshake. If
    one of the two takes longer, the connection is closed."""
    header_seconds: float = 15.0
    """Longest time from a request's first byte to the end of its head. If it takes longer, the request is refused with
    408. Also the longest time from the opening of a connection to its first byte. If that takes longer, the connection
    is closed without a response."""
    keep_alive_seconds: float = 75.0
    """How long an idle connection stays open for its next request."""
    body_idle_seconds: float = 60.0
    """How long the server waits for the next byte of a request's body. If it takes longer while the application waits
    for the body, the request is refused with 408, and the application gets `http.disconnect`. If it takes longer after
    the response was sent, while the server discards the rest of the body, the connection is closed."""
    send_idle_seconds: float = 60.0
    """How long the server waits until the client has received more of a response. If it takes longer, the connection is
    aborted."""
    response_slice_seconds: float = 30.0
    """How long a client may take to receive one slice (256 KiB) of a large response that is in memory, such as a
    manifest. If it takes longer, the connection is aborted, even if the client goes on receiving bytes, because
    the slice takes memory until it is sent."""
    half_close_seconds: float = 5.0
    """How long the application may take for the next bytes of the response if the client has shut down its sending side
    after a complete request. If it takes longer, the server assumes that the client has disconnected, and closes the
    connection."""
    linger_seconds: float = 2.0
    """How long a connection stays open after its last response if the client could still be sending. In this time the
    client can read the response. This applies after a response that was sent before the whole request was received, and
    after an error response of the server itself."""
    linger_bytes: int = 256 * 1024
    """How many bytes the server reads and discards during `linger_seconds`. After more bytes it stops reading."""
    drain_bytes: int = 64 * 1024
    """If the application responds before the whole request body was received, the server reads and discards the rest of
    the body before it sends the response, so that the connection can stay open. If the rest has more than this many
    bytes, or an unknown number of bytes, the server sends the response at once. In that case, and also if the rest
    takes longer than `linger_seconds`, the connection is closed after the response."""
    buffer_bytes: int = 512 * 1024
    """How many bytes of a request's body can be in memory, waiting for a slow application, before the server stops
    reading. The last read can exceed this."""
    unsent_bytes: int = 32 * 1024 * 1024
    """Memory of one worker for response bodies of more than 64 KiB that clients have not received yet. Each counts as
    at most 256 KiB, the size of a slice, because the server writes the next slice only when the client has received
    enough of the one before."""
    unsent_wait_seconds: float = 4.0
    """How long a response waits if it would exceed `unsent_bytes`. After that it is replaced by 503."""
    tls_connections: int = 16 * 1024
    """Largest number of TLS connections of one worker. `registry.server.gate.tls_memory` computes this limit and the
    next one from the memory of the machine."""
    large_tls_connections: int = 2 * 1024
    """How many TLS connections of one worker may have large buffers. A connection's buffers become large when its
    client sends much at once. For each new one above this number, the worker closes one of them."""
    certificate_check_seconds: float = 2.0
    """Time between two checks whether the certificate's files have changed. Every worker makes these checks."""
    timeout_check_seconds: float = 1.0
    """Time between two checks of the timeouts. So a connection can exceed each timeout by this much."""
