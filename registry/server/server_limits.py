"""Limits of the server: how much memory and time its connections may use."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_COST = 64
"""A header that is shorter counts as this many bytes, because each header takes about as much memory in addition to its
text. So a head of 32 KiB has at most 512 headers."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The limits of one worker process; they apply to each connection unless their text says otherwise. Sizes are in
    bytes, times in seconds. The time of a whole transfer is not limited, because a layer of 40 GiB may take all day."""

    header_bytes: int = 32 * 1024
    """Size of a request's head: of the request line and the headers together. A header shorter than `HEADER_COST`
    counts as that many bytes. A larger head is refused with 431, or with 414 if the request target is too long. The
    trailers of a chunked body have a limit of the same size."""
    handshake_seconds: float = 10.0
    """How long a TLS connection waits for the client's first byte, and after that byte for the end of the handshake.
    Then the connection is closed."""
    header_seconds: float = 15.0
    """Time from a request's first byte to the end of its head. Then the request is refused with 408. It is also how
    long a new connection waits for the first byte of its first request. Then the connection is closed."""
    keep_alive_seconds: float = 75.0
    """How long an idle connection stays open for its next request."""
    body_idle_seconds: float = 60.0
    """Timeout since the last byte of a request's body, while the application waits for a part of the body. Then the
    request is refused with 408, and the application gets `http.disconnect`."""
    send_idle_seconds: float = 60.0
    """Timeout since the last byte of a response that the client has received. Then the connection is aborted."""
    response_slice_seconds: float = 30.0
    """How long the server may take to pass each 256 KiB of a large response in memory, such as a manifest, to the
    kernel, which accepts bytes only as fast as the client receives them. Then the connection is aborted."""
    half_close_seconds: float = 5.0
    """How long the server waits for the next bytes of the response if the client has shut down its sending side after a
    complete request. Then it assumes that the client has disconnected, and closes the connection."""
    linger_seconds: float = 2.0
    """How long a connection stays open after its last response if the client may still be sending: after a response
    that was sent before the whole request was received, and after an error response of the server itself. In this time
    the client can read the response."""
    linger_bytes: int = 256 * 1024
    """How many bytes the server reads and discards during `linger_seconds`. Then it stops reading."""
    drain_bytes: int = 64 * 1024
    """If the application responds before the whole request body was received, the server first reads and discards a
    rest of the body up to this size, for at most `linger_seconds`, so that the connection can stay open. If the rest is
    longer or slower, the connection is closed after the response."""
    buffer_bytes: int = 512 * 1024
    """How many bytes of a request's body may be in memory, waiting for a slow application, before the server stops
    reading. One last read may exceed this."""
    unsent_bytes: int = 32 * 1024 * 1024
    """Memory of one worker for response bodies of more than 64 KiB that clients have not received yet. Each counts as
    at most 256 KiB. A response that would exceed the limit is replaced by 503."""
    max_pipelined_requests: int = 64
    """How many requests a client may have sent that wait for the responses to earlier ones. Further requests are
    ignored, and the connection is closed after the responses to the others."""
    certificate_check_seconds: float = 2.0
    """How often a worker checks whether the certificate's files have changed."""
    timeout_check_seconds: float = 1.0
    """How often the timeouts are checked. So each timeout may be this much longer."""
