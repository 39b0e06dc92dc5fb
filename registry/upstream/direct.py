"""A response's body read into memory that is there already, as it comes. On urllib3's connections and pools.

urllib3's `readinto` waits until the memory is full, and `read1` allocates all of it for each record of TLS. So the body
is read one layer below. `registry.upstream.connecting` tells which socket that is, so that another thread can end the
waiting.
"""

from __future__ import annotations

import http.client
import select
import socket

from urllib3 import HTTPResponse

_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""What follows the bytes of a chunked body: the end of its last chunk, and the chunk that says so (RFC 9112, 7.1)."""


class Body:
    """What follows a response's headers, at most `length` bytes of it."""

    def __init__(self, response: HTTPResponse, length: int) -> None:
        self._response = response
        self._left = length
        self._whole = response.length_remaining == length
        raw = response._fp
        if not isinstance(raw, http.client.HTTPResponse) or response.connection is None:
            raise TypeError("urllib3's response is built in another way than it was")
        self._raw = raw
        self._chunked = bool(raw.chunked)
        self._socket: socket.socket | None = response.connection.sock
        self._poll = select.poll()
        if self._socket is not None:
            self._poll.register(self._socket, select.POLLIN)

    def read_into(self, memory: memoryview) -> int:
        """Waits for bytes, then takes what has come, as far as it goes in; 0: there are no more. Raises what a socket
        raises, http.client.HTTPException, and urllib3's HTTPError."""
        memory = memory[: self._left]
        file, want = self._raw.fp, len(memory)
        if self._chunked:
            # Not urllib3's own: it takes a line of any length for a chunk's size.
            data = self._raw.read1(want)
            count = len(data)
            memory[:count] = data
        elif file is None:
            return 0
        else:
            # Under TLS this goes round for each 16 KiB.
            read, ready = file.readinto1, self._poll.poll
            count = read(memory) or 0
            while 0 < count < want and ready(0):
                try:
                    more = read(memory[count:])
                except OSError:
                    break  # told by the next read; what came before counts
                if not more:
                    break
                count += more
        self._left -= count
        return count

    def finish(self) -> None:
        """Gives the connection back for the next request when the body was read to its end; else closes it. Waits for
        nothing."""
        ended = self._last_chunk_is_here() if self._chunked else self._whole
        if self._left or not ended:
            self.discard()
            return
        self._raw.close()  # of a response: its connection stays open, if the server lets it
        self._response.release_conn()

    def _last_chunk_is_here(self) -> bool:
        """Whether the end of a chunked body has come with its last bytes. It is not waited for: nobody could end that
        waiting, and a new connection costs less."""
        file, sock = self._raw.fp, self._socket
        if file is None or sock is None:
            return False
        patience = sock.gettimeout()
        sock.settimeout(0)
        try:
            if not file.peek(len(_LAST_CHUNK)).startswith(_LAST_CHUNK):
                return False
            file.read(len(_LAST_CHUNK))  # of what was peeked at
            return True
        except (OSError, ValueError):
            return False
        finally:
            sock.settimeout(patience)

    def discard(self) -> None:
        """Closes the connection."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()
