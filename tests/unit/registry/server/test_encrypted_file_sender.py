"""Tests of sending files over TLS. The files pass through memory, and the memory for slow clients is limited."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from registry.asgi import Receive, Scope, Send
from registry.memory_budget import MemoryBudget
from registry.server.connection.context import ConnectionContext, WorkerContext
from registry.server.connection.encrypted_file_sender import PIECE_BYTES, RESERVED_BYTES, EncryptedFileSender
from registry.server.connection.file_sender import FileTruncated
from registry.server.connection.flow_control import ClientDisconnected, FlowControl
from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare
from registry.server.gate.connection_limit import EvictionCandidate
from registry.server.server_limits import ServerLimits
from storage.data_dir.mapped_file import MappedFile

SIZE = 5 * PIECE_BYTES + 77
"""Size of the file in bytes."""


class TlsClient(asyncio.Transport):
    """The transport of a client's TLS connection. While `reads` is False, the write buffer keeps everything."""

    def __init__(self, worker: WorkerContext, *, reads: bool, sock: socket.socket | None = None) -> None:
        super().__init__({"socket": sock})
        self.reads = reads
        self.received = b""
        self.buffered = b""
        self.is_aborted = False
        self.flow = FlowControl(self, is_tls=True)
        unsent = UnsentShare(worker.unsent_budget, self, self, is_tls=True)
        self.context = ConnectionContext(worker, self, self.flow, unsent, True, None, None, None, None)
        self.sender: EncryptedFileSender | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.buffered += data
        self._update()

    def read_again(self) -> None:
        """Lets the client read everything from now on."""
        self.reads = True
        self._update()

    def _update(self) -> None:
        if self.reads:
            self.received += self.buffered
            self.buffered = b""
            self.flow.resume_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self.buffered and high is not None and len(self.buffered) >= high:
            self.flow.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.buffered)

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None

    def evict(self) -> None:
        """Does nothing."""

    def start(self, file: int, head: bytes = b"head") -> asyncio.Task[None]:
        """Starts to send the file to the client."""
        self.sender = EncryptedFileSender(self.context, file, lambda count: None)
        return asyncio.create_task(self.sender.run(head, 0, SIZE))


async def no_app(scope: Scope, receive: Receive, send: Send) -> None:
    pytest.fail("the application was called")


def make_worker(max_clients: int, slow_seconds: float = 60.0) -> WorkerContext:
    """Returns a worker with memory for `max_clients` clients. While another client waits, a client that needs more than
    `slow_seconds` for a piece is cut off."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(no_app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    budget_bytes = max_clients * RESERVED_BYTES * 4 // 3  # these shares are large: they may not use the last quarter
    return replace(
        worker, piece_memory=MemoryBudget(budget_bytes, "parts of blobs", wait_seconds=60, slow_seconds=slow_seconds)
    )


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


@pytest.fixture
def data() -> bytes:
    """The content of the file."""
    return os.urandom(SIZE)


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Iterator[int]:
    """A descriptor of the file."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as opened:
        yield opened.fileno()


@pytest.mark.parametrize("is_mapped", [True, False])
async def test_the_whole_file_arrives(file: int, data: bytes, is_mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes arrive, even if the file cannot be mapped into memory. Afterwards, no memory of the budget is in
    use."""
    if not is_mapped:
        monkeypatch.setattr(MappedFile, "try_map", lambda *_: None)
    worker = make_worker(2)
    client = TlsClient(worker, reads=True)
    await client.start(file)
    assert client.received == b"head" + data
    assert worker.piece_memory.used == 0


async def test_a_client_that_does_not_read_takes_one_piece(file: int) -> None:
    """If the client does not read, the server buffers one piece only."""
    client = TlsClient(make_worker(100), reads=False)
    sending = client.start(file)
    await until(lambda: bool(client.buffered))
    await asyncio.sleep(0.01)
    assert len(client.buffered) == len(b"head") + PIECE_BYTES
    client.read_again()
    await sending


async def test_pieces_of_all_clients_are_limited_together(file: int, data: bytes) -> None:
    """If slow clients use up the budget, another client waits, and the server buffers nothing for it."""
    worker = make_worker(2)
    clients = [TlsClient(worker, reads=False) for _ in range(3)]
    sending = [client.start(file) for client in clients]
    await until(lambda: sum(bool(client.buffered) for client in clients) == 2)
    await asyncio.sleep(0.01)
    assert [bool(client.buffered) for client in clients] == [True, True, False]
    for client in (clients[2], clients[0], clients[1]):
        client.read_again()
    await asyncio.gather(*sending)
    assert {client.received for client in clients} == {b"head" + data}


async def test_a_slow_client_is_cut_off_while_another_waits(file: int, data: bytes) -> None:
    """A client that receives nothing for a while is cut off if another client waits for memory."""
    worker = make_worker(1, slow_seconds=0.05)
    slow, other = TlsClient(worker, reads=False), TlsClient(worker, reads=True)
    cut_off = slow.start(file)
    await until(lambda: bool(slow.buffered))
    async with asyncio.timeout(30):
        await other.start(file)
        with pytest.raises(ClientDisconnected):
            await cut_off
    assert slow.is_aborted
    assert other.received == b"head" + data
    assert worker.piece_memory.used == 0


async def test_a_waiting_client_can_disconnect(file: int) -> None:
    """A client that disconnects stops waiting for memory, so that it takes no place in the queue."""
    worker = make_worker(1)
    slow, waiting = TlsClient(worker, reads=False), TlsClient(worker, reads=True)
    sending = slow.start(file)
    await until(lambda: bool(slow.buffered))
    waiting_task = waiting.start(file)
    await asyncio.sleep(0.01)
    assert waiting.sender is not None
    waiting.sender.end(ClientDisconnected())
    with pytest.raises(ClientDisconnected):
        await waiting_task
    slow.read_again()
    await sending
    assert worker.piece_memory.used == 0


async def test_a_client_that_shuts_down_its_sending_side_gets_no_more_pieces(file: int) -> None:
    """The server stops sending once the client has shut down its sending side. Only the pieces that
    were written before the shutdown count as sent. uvloop discards later writes, but does not report the connection as
    closing."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        sock, _ = listener.accept()
        with sock:
            client = TlsClient(make_worker(max_clients=1), reads=False, sock=sock)
            sending = client.start(file)
            await until(lambda: len(client.buffered) > PIECE_BYTES)
            peer.shutdown(socket.SHUT_WR)
            await asyncio.to_thread(sock.recv, 1)  # waits until the shutdown has arrived
            client.read_again()
            with pytest.raises(ClientDisconnected):
                await sending
    assert client.sender is not None
    assert client.sender.unsent_bytes == SIZE - PIECE_BYTES


async def test_a_client_may_close_the_connection_once_it_has_the_whole_file(file: int) -> None:
    """If the client closes the connection after the last piece, the file counts as sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        sock, _ = listener.accept()
        with sock:
            client = TlsClient(make_worker(max_clients=1), reads=True, sock=sock)
            sending = client.start(file)
            await until(lambda: len(client.received) == len(b"head") + SIZE)
            peer.close()
            await sending


async def test_a_file_that_is_too_short(file: int, data: bytes) -> None:
    """If the file ends too early, the client gets its bytes, and the sender raises FileTruncated."""
    client = TlsClient(make_worker(1), reads=True)
    sender = EncryptedFileSender(client.context, file, lambda count: None)
    with pytest.raises(FileTruncated):
        await sender.run(b"", 0, SIZE + 10)
    assert client.received == data
