"""A response's body read into memory that is there already, as it comes. On urllib3's connections and pools.

urllib3's `readinto` waits until the memory is full, and `read1` allocates all of it for each record of TLS. So the body
is read one layer below, and every connection tells who uses it once its request is out, so that another thread can end
the waiting.
"""

from __future__ import annotations

import http.client
import select
import socket
from collections.abc import Callable

from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from registry.upstream.transfer import Connection

Told = Callable[[Connection], None]


def pool_classes(told: Told) -> dict[str, type[HTTPConnectionPool]]:
    """For `PoolManager.pool_classes_by_scheme`: `told` is called in the requesting thread with the socket on which an
    answer is waited for; what it raises ends the request."""

    class Plain(HTTPConnection):
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]
            if self.sock is not None:
                told(self.sock)
            return super().getresponse()

    class Secure(HTTPSConnection):
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]
            if self.sock is not None:
                told(self.sock)
            return super().getresponse()

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


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
            data = self._response.read1(want, decode_content=False)
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
        """Gives the connection back for the next request when the body was read to its end; else closes it."""
        if self._chunked and not self._left:
            ended = not self._response.read1(1, decode_content=False)
        else:
            ended = self._whole and not self._left
        if not ended:
            self.discard()
            return
        self._raw.close()  # of a response: its connection stays open, if the server lets it
        self._response.release_conn()

    def discard(self) -> None:
        """Closes the connection."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()
