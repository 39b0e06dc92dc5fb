"""Limits of the server: how much memory and time one connection may use.

A *timeout* below is the time that a connection may wait for one thing. Most timeouts start again with every byte that
is sent or received.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER_COST = 64
"""Bytes that a header counts as if it is shorter, because each header takes about that much memory besides its text. A
head of 32 KiB has at most 512 headers for this reason."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes are in bytes, times in seconds. No limit applies to the time of a whole transfer, because a layer of 40 GiB
    may take all day."""

    header_bytes: int = 32 * 1024
    """Size of the request line and the headers together; a header shorter than `HEADER_COST` counts as that many bytes.
    The trailers of a chunked body have the same limit. A larger head is refused with 431, or with 414 if the request
    target is too long."""
    handshake_seconds: float = 10.0
    """Timeout of a TLS connection for the client's first byte, and then again for the whole handshake. After it the
    connection is closed."""
    header_seconds: float = 15.0
    """Time from a request's first byte to the end of its head. After it the request is refused with 408. Also how long
    a new connection may send nothing before it is closed."""
    keep_alive_seconds: float = 75.0
    """How long an idle connection stays open for its next request."""
    body_idle_seconds: float = 60.0
    """Timeout for the next byte of the body while the application waits for one. After it the request is refused with
    408, and the application gets `http.disconnect`."""
    send_idle_seconds: float = 60.0
    """Timeout for the client to receive another byte of the response. After it the connection is aborted."""
    response_slice_seconds: float = 30.0
    """Time for a client to receive each 256 KiB of a response that is held in memory, such as a large manifest. What is
    in the kernel's buffers is not counted. After it the connection is aborted."""
    half_close_seconds: float = 5.0
    """Timeout for the response to a client that has shut down its sending side after a complete request. After it the
    client counts as gone, and the connection is closed."""
    linger_seconds: float = 2.0
    """How long the client may read the last response before the connection is closed. This applies to a response that
    was sent before the whole request was received, and to the server's own error responses."""
    linger_bytes: int = 256 * 1024
    """How many bytes the server reads and discards during `linger_seconds`. Then it stops reading."""
    drain_bytes: int = 64 * 1024
    """If the application responds early, the rest of the request's body is read and discarded up to this size, so that
    the connection can be kept. With a longer rest, the connection ends after the response."""
    buffer_bytes: int = 512 * 1024
    """How much of a request's body may wait in memory for a slow application before the server stops reading. One more
    read may exceed this."""
    unsent_bytes: int = 32 * 1024 * 1024
    """Memory for response bodies of more than 64 KiB that the clients of one worker have not received yet. Each counts
    as at most 256 KiB. Beyond the limit such responses are replaced by 503."""
    max_pipelined_requests: int = 64
    """Requests that a client may send before it has received the response to the first. Further ones are ignored, and
    the connection ends after the responses to the others."""
    certificate_check_seconds: float = 2.0
    """How often a worker checks whether the certificate's files have changed."""
    timeout_check_seconds: float = 1.0
    """How often the timeouts are checked. Each may be exceeded by this much."""
