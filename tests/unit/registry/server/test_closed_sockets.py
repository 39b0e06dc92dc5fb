"""Calls of the socket of a connection that the event loop has closed, before the server is told so. The sockets of
uvloop and of asyncio then raise different errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from registry.server.connection.file_sender import is_local_peer
from registry.server.kernel import is_tcp_ending, tcp_progress, unacknowledged_bytes


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_closed_sockets_have_no_progress_and_no_peer(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Of a closed socket, no byte is acknowledged or unacknowledged, and its peer is not on this machine. No other
    error than OSError is raised."""

    async def look() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, *listener.getsockname())
            sock: socket.socket = transport.get_extra_info("socket")
            transport.abort()
            async with asyncio.timeout(10):
                while sock.fileno() >= 0:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.001)
            assert tcp_progress(sock) == (0, 0)
            assert not is_tcp_ending(sock)
            assert not is_local_peer(sock)
            with pytest.raises(OSError, match="Bad file descriptor"):
                unacknowledged_bytes(sock)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(look())
