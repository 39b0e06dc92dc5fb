"""Limits of the server: what one connection may use of its memory and time."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_COST = 64
"""About the memory that a header takes beside its bytes. A shorter header counts as so many bytes, so a head has at
most 512 headers."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes are in bytes, times in seconds. No time limits a whole transfer: a 40 GiB layer may take all day."""

    header_bytes: int = 32 * 1024
    """For request line and headers together, a short header counted as `HEADER_COST` bytes; and for the trailers of a
    chunked body. Above: 431, or 414."""
    handshake_seconds: float = 10.0
    """For TLS: from a connection's start to the client's first byte, and from there to the end of the handshake. Above:
    the connection is closed."""
    header_seconds: float = 15.0
    """From a connection's start, or a later request's first byte, to the end of the headers. Above: 408."""
    keep_alive_seconds: float = 75.0
    """How long an idle connection is kept for its next request."""
    body_idle_seconds: float = 60.0
    """Without a byte of the body while the application waits for one. Above: 408, and the application gets a
    disconnect."""
    send_idle_seconds: float = 60.0
    """Without the client taking a byte of what is sent. Above: the connection is aborted."""
    slice_seconds: float = 30.0
    """For a client to take 256 KiB of a response held in memory, such as a large manifest, after what is in the
    kernel's buffers. Above: the connection is aborted."""
    half_close_seconds: float = 5.0
    """For a response to a client that shut its sending side after a whole request. Later it counts as gone."""
    linger_seconds: float = 2.0
    """After an early response or a server's own error: how long the client may read it before the connection ends."""
    linger_bytes: int = 256 * 1024
    """How much of what the client still sends then is read and dropped before reading stops."""
    drain_bytes: int = 64 * 1024
    """After an early response, a rest of a declared body up to this is read and dropped, to keep the connection."""
    buffer_bytes: int = 512 * 1024
    """Bytes of a body that are held for a slow application before reading pauses; one more read may be added."""
    unsent_bytes: int = 32 * 1024 * 1024
    """For whole responses that the clients of one worker have not taken yet, up to 256 KiB of each. Above: 503 in place
    of responses of more than 64 KiB."""
    pipelined: int = 64
    """Requests that a client may send ahead. Those beyond are ignored, and the connection ends after the responses."""
    certificate_seconds: float = 2.0
    """How often the certificate's files are checked for changes."""
    pulse_seconds: float = 1.0
    """How often the times above are checked: each may be exceeded by this much."""
