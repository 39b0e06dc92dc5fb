"""What one connection may take of us: bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_COST = 64
"""About what a header takes in memory beside its bytes: a shorter one counts as if it had so many. So a head has 512
headers at the most."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes are in bytes, times in seconds. None of the times is a total: a 40 GiB layer may take all day."""

    header_bytes: int = 32 * 1024
    """Request line and headers together, where a short header counts as `HEADER_COST` bytes; the same
    again for the trailers of a chunked body. Above: 431, or 414."""
    handshake_seconds: float = 10.0
    """From a connection's start to the client's first byte where TLS is spoken, and from there to the handshake's end.
    Above: the connection is closed."""
    header_seconds: float = 15.0
    """From a connection's start, or a later request's first byte, to the end of the headers. Above: 408."""
    keep_alive_seconds: float = 75.0
    """How long an idle connection is kept for its next request."""
    body_idle_seconds: float = 60.0
    """Without a byte of the body while the application waits for one. Above: 408, and the application is told."""
    send_idle_seconds: float = 60.0
    """Without the client taking a byte while there are some for it. Above: the connection is cut."""
    slice_seconds: float = 30.0
    """For a client to take 256 KiB of an answer that is held in memory, such as a large manifest. What lies in the
    kernel's buffers has to be taken first. Above: the connection is cut."""
    half_close_seconds: float = 5.0
    """For an answer to a client that shut its sending side after a whole request; later it counts as gone."""
    linger_seconds: float = 2.0
    """After an early answer, or an error of ours: how long to let the client read it before the connection ends."""
    linger_bytes: int = 256 * 1024
    """And how much of what it still sends is read and thrown away; then reading stops."""
    drain_bytes: int = 64 * 1024
    """A rest of a declared body up to this is read and thrown away, to keep the connection for the next request."""
    buffer_bytes: int = 512 * 1024
    """Body bytes held for a slow application before reading pauses (one read more may come on top)."""
    unsent_bytes: int = 32 * 1024 * 1024
    """Of whole answers that the clients of one worker have not taken yet, up to 256 KiB of each. Above: 503 for those
    of more than 64 KiB."""
    pipelined: int = 64
    """Requests a client may send ahead; those beyond are not looked at, and the connection ends after the answers."""
    certificate_seconds: float = 2.0
    """How often the certificate's files are looked at."""
    pulse_seconds: float = 1.0
    """How often the times above are looked at: each may be exceeded by this much."""
