"""Limits of the server: how much memory and time its connections can use."""

from __future__ import annotations

from dataclasses import dataclass

MIN_HEADER_COST = 64
"""A header that is shorter than this number of bytes counts as this number of bytes, because even the Python objects
of a short header take about as much memory. So a head of 32 KiB has at most 512 headers."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The limits of one worker process. Each limit applies to one connection unless its description says otherwise.
    Sizes are in bytes, times in seconds. The time of a whole transfer is not limited, because a layer of 40 GiB
    can take all day."""

    head_bytes: int = 32 * 1024
    """Largest size of a request's head, that is, of the request line and the headers together. A header shorter than
    `MIN_HEADER_COST` counts as that many bytes. A larger head is refused with 431, or with 414 if the request target is
    too long. The trailers of a chunked body have a limit of the same size."""
    handshake_seconds: float = 10.0
    """How long a TLS connection waits for the client's first byte, and from that byte for the end of the handshake.
    After this time, the server closes the connection."""
    head_seconds: float = 15.0
    """Two time limits:

    - From a request's first byte to the end of its head. After this time, the server refuses the request with 408.
    - From the opening of a connection to its first byte. After this time, the server closes the connection without a
      response.
    """
    keep_alive_seconds: float = 75.0
    """How long an idle connection stays open for its next request."""
    body_idle_seconds: float = 60.0
    """How long the server waits for the next byte of a request's body. There are two cases after this time:

    - The application waits for the body: the server refuses the request with 408, and the application gets
      `http.disconnect`.
    - The response was sent, and the server discards the rest of the body: the server closes the connection.
    """
    send_idle_seconds: float = 60.0
    """How long the server waits for the client to receive more of a response. After this time, the server aborts the
    connection."""
    response_slice_seconds: float = 30.0
    """How long a client may take to receive one slice (256 KiB) of a large response that is in memory, such as a
    manifest. After this time, the server aborts the connection, even if the client still receives bytes, to free the
    memory of the slice."""
    half_close_seconds: float = 5.0
    """Applies if the client has sent a complete request and then shut down its sending side. The limit is how long the
    server waits for the application's next bytes of the response. After this time, the server assumes that the client
    has disconnected, and closes the connection."""
    linger_seconds: float = 2.0
    """How long a connection stays open after its last response, so that a client that is still sending can read the
    response. Applies after a response that was sent before the whole request was received, and after an error response
    of the server itself."""
    linger_bytes: int = 256 * 1024
    """Largest number of bytes that the server reads and discards during `linger_seconds`. Then it stops reading."""
    drain_bytes: int = 64 * 1024
    """An application may respond before the server has received the whole body of the request. The limit applies to
    the *rest*, the bytes of the body that are still missing then:

    - If the rest is within the limit, the server reads and discards it before it sends the response, so that
      the connection can stay open. If the rest takes longer than `linger_seconds`, the server closes the connection
      after the response.
    - If the rest is larger, or its size is not known, or the client still waits for a 100 response before it sends the
      body, the server sends the response at once, and then closes the connection.
    """
    buffer_bytes: int = 512 * 1024
    """How many bytes of a request's body can wait in memory for the application. At this number, the server stops
    reading. Its last read can exceed the number."""
    unsent_bytes: int = 32 * 1024 * 1024
    """Memory of one worker for response bodies that clients have not received yet. Only bodies of more than 64 KiB
    count. Each body counts as at most 256 KiB, because the server writes it in slices of this size."""
    unsent_wait_seconds: float = 4.0
    """How long a response waits if it would exceed `unsent_bytes`. After this time, the server sends 503 instead."""
    tls_connections: int = 16 * 1024
    """Largest number of TLS connections of one worker. `registry.server.gate.tls_memory` computes this limit and
    `large_tls_connections` from the memory of the machine."""
    large_tls_connections: int = 2 * 1024
    """How many TLS connections of one worker may have large buffers. A connection's buffers become large when its
    client sends much at once. If too many connections have large buffers, the worker closes one of them."""
    certificate_check_seconds: float = 2.0
    """Time between two checks whether the certificate's files have changed. Every worker makes these checks."""
    timeout_check_seconds: float = 1.0
    """Time between two checks of the timeouts. A connection can exceed a timeout by this time."""
