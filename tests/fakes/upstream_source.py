"""Helpers for tests of upstream clients, with which a mirror downloads from an upstream: upstream clients that keep
their records in a real store, a sink that collects downloaded bytes, and a server with scripted responses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

from registry.config import Upstream
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import UpstreamClient
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.destinations import NetworkClassifier, classify_address
from registry.upstream.transport import TrustStore
from storage.composition import open_registry, prepare_data_dir
from storage.content import Span
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry

REPO = RepositoryName("library/app")
TAG = Tag("1")
ABSENT = Digest("sha256:" + "0" * 64)
LOGIN = {"username": "ann", "password": "correct horse"}


class CollectingSink:
    """A sink that keeps all downloaded bytes. `begin_calls`: the arguments of each call of `begin`. `pieces`: the size
    of each piece. `hook`: called with the offset of each piece before the piece is kept, in the thread that
    downloads."""

    def __init__(self, hook: Callable[[int], object] | None = None) -> None:
        self.begin_calls: list[tuple[str, int, int, int]] = []
        self.next_offset = 0
        self.body = bytearray()
        self.pieces: list[int] = []
        self._hook = hook

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        self.begin_calls.append((endpoint, start, stop, size))
        self.next_offset = start

    def take(self, offset: int, data: memoryview) -> None:
        assert offset == self.next_offset
        if self._hook:
            self._hook(offset)
        self.body += data
        self.next_offset += len(data)
        self.pieces.append(len(data))


class UpstreamClock:
    """A clock that the test sets: a call returns `now`, in seconds since 1970."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def logged_in(folder: Path, password: str = LOGIN["password"]) -> dict[str, Any]:
    """Writes the password to a file. Returns the settings of an upstream to which the mirror logs in."""
    file = folder / "password"
    file.write_text(f"{password}\n")
    return {"username": LOGIN["username"], "password_file": file}


@contextlib.asynccontextmanager
async def opened_registry(data: Path) -> AsyncIterator[StoredRegistry]:
    """Opens the registry in the data directory `data` until the block ends. A second call opens the same directory as a
    second process would."""
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        yield registry


@cache
def system_trust() -> TrustStore:
    """Returns the certificate authorities of the system. Reads them only once for all tests, because this takes 30
    ms."""
    return TrustStore(None)


@contextlib.asynccontextmanager
async def upstream_source(
    registry: StoredRegistry,
    *endpoints: str,
    name: str = "far.test",
    clock: Callable[[], float] = time.time,
    classify: NetworkClassifier = classify_address,
    observer: MirrorObserver = UNOBSERVED,
    **more: Any,
) -> AsyncIterator[UpstreamClient]:
    """Yields an upstream client for these endpoints, and closes it when the block ends."""
    settings = Upstream.model_validate({"name": name, "endpoints": list(endpoints), **more})
    trust = system_trust() if settings.ca_file is None else None
    source = HttpUpstreamClient(settings, registry.records, registry.leases, clock, classify, trust, observer)
    try:
        yield source
    finally:
        await source.aclose()


async def fetch(source: UpstreamClient, digest: str, span: Span | None = None, **more: object) -> CollectingSink:
    """Downloads a blob, and returns the sink with its bytes."""
    sink = CollectingSink()
    await source.fetch_blob(REPO, Digest(digest), span or Span(0), sink, **more)  # type: ignore[arg-type]
    return sink


Reply = Callable[[str], bytes | Awaitable[bytes]]
"""A function that gets the head of a request and returns the bytes of the response."""


class ScriptedServer:
    """A server that calls `reply` with the head of each request and sends the returned bytes. It closes the connection
    after an empty response, and after a response with `Connection: close`."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.heads: list[str] = []
        self.connections = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        return len(self.heads)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                reply = self.reply(head)
                answer = reply if isinstance(reply, bytes) else await reply
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower() or not answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return  # cancelled by `stop`
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


@contextlib.asynccontextmanager
async def scripted_server(reply: Reply, host: str = "127.0.0.1") -> AsyncIterator[ScriptedServer]:
    """Runs a scripted server on the event loop of the test until the block ends."""
    script = ScriptedServer(reply)
    server = await asyncio.start_server(script.serve, host, 0)
    script.url = f"http://{host}:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        await script.stop()
        await server.wait_closed()


def answer(status: int, body: bytes | str = b"", **headers: str) -> bytes:
    """Returns the bytes of a response. `content_type=` becomes Content-Type. Adds Content-Length unless it is given."""
    body = body.encode() if isinstance(body, str) else body
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    fields.setdefault("content-length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + body


def always(response: bytes) -> Reply:
    """Returns a `reply` that always gives the same response."""
    return lambda head: response
