"""Tests that upstream responses that never end, or arrive byte by byte, do not occupy a thread and a connection of the
upstream client for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from storage.errors import UpstreamTimeout, UpstreamUnavailable
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_source import REPO, answer, fetch, scripted_server, upstream_source

DIGEST = "sha256:" + "0" * 64
# A response whose chunked body has all bytes of the blob, but not the last, empty chunk.
CHUNKED = (
    b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9/10\r\n\r\n"
    b"4\r\n0123\r\n6\r\n456789"
)


@contextlib.asynccontextmanager
async def dripping_server(head: bytes, drop: bytes, pause: float = 0.02) -> AsyncIterator[str]:
    """Runs a server that sends `head`, and then `drop` again and again. `pause`: seconds between two drops."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(pause)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n0", b"\r\n0\r\n", b"\r\n0\r\nTrailer: x\r\n"])
async def test_download_does_not_wait_for_the_last_chunk(registry: StoredRegistry, end: bytes) -> None:
    """When all bytes of a blob have arrived, the client does not wait for the end of the chunked encoding. It does not
    reuse the connection."""

    async def reply(head: str) -> bytes:
        return CHUNKED + end

    async with scripted_server(reply) as server, upstream_source(registry, server.url, idle_timeout=30) as source:
        async with asyncio.timeout(15):
            for _ in range(2):
                assert bytes((await fetch(source, DIGEST)).body) == b"0123456789"
        assert server.connections == 2


async def test_connection_of_a_complete_chunked_body_is_reused(registry: StoredRegistry) -> None:
    """After a chunked body with its last chunk, the client reuses the connection."""
    async with (
        scripted_server(lambda head: CHUNKED + b"\r\n0\r\n\r\n") as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(3):
            assert bytes((await fetch(source, DIGEST)).body) == b"0123456789"
        assert server.connections == 1


async def test_very_slow_blob_times_out(registry: StoredRegistry) -> None:
    """If only a few bytes of a blob arrive each second, the client ends the download with UpstreamTimeout."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    async with dripping_server(head, b"x") as url, upstream_source(registry, url, idle_timeout=0.2) as source:
        async with asyncio.timeout(15):
            message = ""
            while "almost no bytes" not in message:  # if the machine stalls, no byte arrives in time
                with pytest.raises(UpstreamTimeout) as raised:
                    await fetch(source, DIGEST)
                message = str(raised.value)


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 60000\r\n\r\n", b"x"),
        (b"HTTP/1.1 307 On\r\nLocation: /x\r\nContent-Length: 60000\r\n\r\n", b"x"),
        (b"HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9/10\r\n\r\n", b"1"),
        (b"HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9/10\r\n\r\n0\r\n", b"X: x\r\n"),
    ],
)
async def test_very_slow_headers_and_chunk_sizes_time_out(registry: StoredRegistry, head: bytes, drop: bytes) -> None:
    """If headers, the body of an error or redirect, a chunk size, or trailers arrive very slowly, the client ends the
    download."""
    async with (
        dripping_server(head, drop) as url,
        upstream_source(registry, url, idle_timeout=0.2, connect_timeout=0.2) as source,
    ):
        async with asyncio.timeout(15):
            with pytest.raises(UpstreamUnavailable):
                await fetch(source, DIGEST)


async def test_endless_chunk_size_is_refused(registry: StoredRegistry) -> None:
    """If a chunk size never ends, the client ends the download instead of buffering it."""
    head = b"HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9/10\r\n\r\n"
    async with dripping_server(head, b"0" * 65536, 0) as url, upstream_source(registry, url) as source:
        async with asyncio.timeout(15):
            with pytest.raises(UpstreamUnavailable):
                await fetch(source, DIGEST)


async def test_very_slow_token_service_times_out(registry: StoredRegistry) -> None:
    """If the response of a token service arrives very slowly, the request that needs the token raises
    UpstreamTimeout."""
    async with dripping_server(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b" ") as url:

        def reply(head: str) -> bytes:
            return answer(401, www_authenticate=f'Bearer realm="{url}/token"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            async with asyncio.timeout(20):
                with pytest.raises(UpstreamTimeout):
                    await source.get_manifest(REPO, Tag("1"))
