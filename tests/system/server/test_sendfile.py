"""Tests of files that the kernel sends (the zero-copy extension of ASGI). The tests use raw sockets, and run with
uvloop and with asyncio's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path

import pytest
import uvloop

from registry.server.connection.file_sender import FileSender, FileTruncated, is_local_peer
from storage.data_dir.mapped_file import MappedFile
from tests.fakes.open_files import no_descriptor_left
from tests.fakes.temporary_files import disk_folder
from tests.system.server.app_process import (
    AppProcess,
    Pauses,
    Start,
    read_all,
    read_response,
    repeat_after_stalls,
    wait_for,
)

SIZE = 5 * 1024 * 1024 + 77
"""The size of the file in bytes."""
# Environment variables that select the event loop of the server.
LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
MIB = 1024 * 1024
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(scope="session", params=LOOPS, ids=IDS)
def sender(request: pytest.FixtureRequest) -> Iterator[AppProcess]:
    """A server that sends files."""
    running = AppProcess({"limits": {"linger_seconds": 0.5, "timeout_check_seconds": 0.1}}, request.param)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session", params=LOOPS, ids=IDS)
def sender_with_short_timeout(request: pytest.FixtureRequest) -> Iterator[AppProcess]:
    """A server that disconnects clients that read nothing for a second."""
    running = AppProcess({"limits": {"send_idle_seconds": 1.0, "timeout_check_seconds": 0.05}}, request.param)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def data() -> bytes:
    """The content of the file at `path`."""
    return os.urandom(SIZE)


@pytest.fixture(scope="session")
def path(data: bytes) -> Iterator[Path]:
    """The path of a file on a real disk."""
    with disk_folder() as folder:
        file = folder / "file"
        file.write_bytes(data)
        yield file


@contextlib.contextmanager
def sparse_file(size: int) -> Iterator[Path]:
    """Yields the path of a file of this size that has no bytes on the disk."""
    with disk_folder() as folder:
        path = folder / "large"
        with path.open("wb") as file:
            file.truncate(size)
        yield path


@pytest.fixture(scope="session")
def large() -> Iterator[Path]:
    """The path of a sparse file of 1 GiB."""
    with sparse_file(1024 * MIB) as path:
        yield path


def ignore(count: int) -> None:
    """A callback for `FileSender` that ignores the number of bytes sent."""


def file_request(path: Path, method: str = "GET", version: str = "1.1", **query: object) -> bytes:
    """Returns a request for the file, for the application's path `/file`."""
    query_text = "&".join(f"{name}={value}" for name, value in {"path": path, **query}.items())
    return f"{method} /file?{query_text} HTTP/{version}\r\nHost: test\r\n\r\n".encode()


@contextlib.contextmanager
def connection_with(server: AppProcess, request: bytes, buffer: int | None = None) -> Iterator[socket.socket]:
    """Opens a connection and sends a request. `buffer`: the size of the receive buffer in bytes."""
    with socket.socket() as sock:
        sock.settimeout(15)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(server.address)
        sock.sendall(request)
        yield sock


@contextlib.contextmanager
def closes_all_descriptors(server: AppProcess) -> Iterator[None]:
    """Checks that the server closes all descriptors that it opens during the `with` block. Uses one connection for all
    its requests, because the server would close further connections with a delay. Takes the minimum at the start,
    because connections of earlier tests may still be open."""
    with server.connect() as sock:
        descriptors_before = min(descriptors(sock) for _ in range(5))
        yield
        wait_for(lambda: descriptors(sock) <= descriptors_before)


def descriptors(sock: socket.socket) -> int:
    """Returns how many file descriptors the server has open, by a request over this connection."""
    sock.sendall(b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n")
    return int(read_response(sock)[2])


def test_file_is_sent_and_connection_stays_open(sender: AppProcess, path: Path, data: bytes) -> None:
    """Every byte of the file arrives, and the connection is kept for the next request."""
    with connection_with(sender, file_request(path, length=SIZE)) as sock:
        for _ in range(3):
            status, headers, body = read_response(sock)
            assert (status, headers["content-length"]) == (200, str(SIZE))
            assert body == data
            sock.sendall(file_request(path, length=SIZE))


def test_pipelined_files_keep_their_order(sender: AppProcess, path: Path, data: bytes) -> None:
    """Files and other responses to pipelined requests arrive completely, in the order of the requests."""
    small = b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n"
    with connection_with(sender, (file_request(path, length=SIZE) + small) * 3) as sock:
        for _ in range(3):
            assert read_response(sock)[2] == data
            assert read_response(sock)[2].isdigit()


@pytest.mark.parametrize("length", [True, False])
def test_parts_between_text(sender: AppProcess, path: Path, data: bytes, length: bool) -> None:
    """A body of parts of a file and of text between them arrives in the right order, both with a declared length and
    chunked."""
    expected = b"head" + data[100:2_000_100] + b"middle" + data[7:8] + data[SIZE - 5 :] + b"tail"
    parts = f"=head,100-2000000,=middle,5-0,7-1,{SIZE - 5}-,=tail"
    request = file_request(path, parts=parts, length=len(expected)) if length else file_request(path, parts=parts)
    with connection_with(sender, request * 2) as sock:
        for _ in range(2):
            _, headers, body = read_response(sock)
            assert body == expected
            assert ("transfer-encoding" in headers) != length


def test_parts_without_offset_or_count(sender: AppProcess, path: Path, data: bytes) -> None:
    """A part without an offset starts where the previous part ended. A part without a count ends at the end of the
    file."""
    with connection_with(sender, file_request(path, parts="-10,-20,-", length=SIZE)) as sock:
        assert read_response(sock)[2] == data


def test_http_1_0(sender: AppProcess, path: Path, data: bytes) -> None:
    """In HTTP/1.0, the server marks the end of a file without a declared length by closing the connection."""
    head, _, body = sender.send_and_read_all(file_request(path, version="1.0")).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert body == data


def test_head(sender: AppProcess, path: Path) -> None:
    """The response to HEAD has the length of the file and no body."""
    with connection_with(sender, file_request(path, "HEAD", length=SIZE) * 2) as sock:
        for _ in range(2):
            status, headers, _ = read_response(sock, "HEAD")
            assert (status, headers["content-length"]) == (200, str(SIZE))


def test_file_shorter_than_the_declared_length(sender: AppProcess, path: Path) -> None:
    """If a file ends before the declared length, the server breaks off the response, logs the reason, and serves
    further requests."""
    with closes_all_descriptors(sender):
        with connection_with(sender, file_request(path, parts=f"0-{SIZE + 10}", length=SIZE + 10)) as sock:
            with pytest.raises(IncompleteRead) as caught:
                read_response(sock)
            assert len(caught.value.partial) == SIZE
            assert sock.recv(1) == b""
        wait_for(lambda: f"ends at byte {SIZE}, 10 bytes too early" in sender.errors)
        assert_ends(sender, path, SIZE)


def test_file_longer_than_the_declared_length(sender: AppProcess, path: Path) -> None:
    """If a file is larger than the declared length, the application gets an error before any byte is sent, and the
    client gets a 500."""
    with connection_with(sender, file_request(path, length=5)) as sock:
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (500, "close")
        assert sock.recv(1) == b""


def test_body_shorter_than_the_declared_length(sender: AppProcess, path: Path) -> None:
    """If the application ends the body before the declared length, the server closes the connection, so that the client
    notices the missing bytes."""
    with connection_with(sender, file_request(path, parts="0-5", length=SIZE)) as sock, pytest.raises(IncompleteRead):
        read_response(sock)


@pytest.mark.parametrize("reset", [True, False])
def test_disconnect_during_a_file(sender: AppProcess, large: Path, reset: bool) -> None:
    """If the client disconnects during a file, the application gets an error, and the server closes all descriptors."""
    with closes_all_descriptors(sender):
        with connection_with(sender, file_request(large, length=1024 * MIB)) as sock:
            sock.recv(100_000)
            if reset:
                # A linger time of 0 s: the close sends a RST.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sender.wait_for_line("cut ClientDisconnected")


def test_half_closed_connection_gets_the_file(sender: AppProcess, path: Path, data: bytes) -> None:
    """A client that closes its sending side after a complete request still gets the file."""
    with connection_with(sender, file_request(path, length=SIZE)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).endswith(data[-1000:])


def test_client_that_reads_nothing_is_disconnected(sender_with_short_timeout: AppProcess, large: Path) -> None:
    """The server disconnects a client that reads nothing of a file for the timeout."""
    with connection_with(sender_with_short_timeout, file_request(large, length=1024 * MIB)) as sock:
        sender_with_short_timeout.wait_for_line("cut ClientDisconnected")
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(sock)) < 100 * MIB


def test_slow_client_is_not_disconnected(sender_with_short_timeout: AppProcess, large: Path) -> None:
    """The server does not disconnect a client that reads a few bytes again and again, even if the receive buffer of the
    client stays full for longer than the timeout."""
    request = file_request(large, length=1024 * MIB)

    def receive_slowly(pauses: Pauses) -> None:
        deadline = time.monotonic() + 3
        with connection_with(sender_with_short_timeout, request, buffer=256 * 1024) as sock:
            while time.monotonic() < deadline:
                assert sock.recv(32 * 1024)
                pauses.end()
                time.sleep(0.05)  # the pace of the slow client
            for _ in range(100):
                assert sock.recv(MIB)
                pauses.end()
        sender_with_short_timeout.wait_for_line("cut ClientDisconnected")

    repeat_after_stalls(receive_slowly, longest_pause=0.5)


@pytest.mark.parametrize("env", LOOPS, ids=IDS)
def test_stop_waits_for_a_file(start: Start, path: Path, data: bytes, env: dict[str, str]) -> None:
    """On SIGTERM, the server sends the file to its end and exits with code 0."""
    server = start(env, grace=15)
    with connection_with(server, file_request(path, length=SIZE), buffer=64 * 1024) as sock:
        head = sock.recv(1000)
        os.kill(server.pid, signal.SIGTERM)
        body = head.partition(b"\r\n\r\n")[2] + read_all(sock)
    assert body == data
    assert server.wait_for_exit() == 0


@pytest.mark.parametrize("env", LOOPS, ids=IDS)
def test_stop_cuts_a_file_after_the_grace_period(start: Start, large: Path, env: dict[str, str]) -> None:
    """If a file is still being sent when the grace period of a stop ends, the server breaks off the response and exits
    with code 0."""
    server = start(env, grace=0.2)
    with connection_with(server, file_request(large, length=1024 * MIB)) as sock:
        sock.recv(1000)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait_for_exit() == 0
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(sock)) < 1024 * MIB


def test_small_requests_during_large_files(sender: AppProcess) -> None:
    """While three clients receive large files as fast as they can, the same event loop answers small requests between
    the slices of the files: twenty small requests are answered before any of the files has been sent."""
    size = 8 * 1024 * MIB  # the transfer takes seconds
    all_receive, are_answered = threading.Barrier(4, timeout=60), threading.Event()

    def receive(download: socket.socket) -> int:
        """Receives until the small requests have been answered. Returns the number of bytes."""
        buffer = bytearray(MIB)
        received = download.recv_into(buffer)
        all_receive.wait()
        while not are_answered.is_set() and (count := download.recv_into(buffer)):
            received += count
        return received

    with contextlib.ExitStack() as stack:
        path = stack.enter_context(sparse_file(size))
        pool = stack.enter_context(ThreadPoolExecutor(3))
        downloads = [stack.enter_context(sender.connect()) for _ in range(3)]
        control = stack.enter_context(sender.connect())
        stack.callback(are_answered.set)
        for download in downloads:
            download.sendall(file_request(path, length=size))
        received = [pool.submit(receive, download) for download in downloads]
        all_receive.wait()
        for _ in range(20):
            descriptors(control)
        are_answered.set()
        assert all(0 < each.result() < size for each in received)
    for _ in downloads:
        sender.wait_for_line("cut ClientDisconnected")


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=IDS)
@pytest.mark.real_disk
def test_event_loop_does_not_wait_for_the_disk(
    tmp_path: Path, data: bytes, make_loop: MakeLoop, is_local: bool
) -> None:
    """Bytes of a file that are in the page cache are sent at once. A thread reads the other bytes, so that the event
    loop does not block. Both hold for local and for remote clients."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file, asyncio.Runner(loop_factory=make_loop) as runner:
        os.fsync(file.fileno())
        assert runner.run(sent_in_first_turn(file.fileno(), data, is_local)) > len(b"head")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # The kernel may ignore the advice and keep pages in the cache.
        assert is_cold(file.fileno()) == (runner.run(sent_in_first_turn(file.fileno(), data, is_local)) == len(b"head"))


def is_cold(fd: int) -> bool:
    """Returns whether no page of the file is in the page cache."""
    mapped = MappedFile.try_map(fd, 0, SIZE)
    assert mapped is not None
    try:
        return mapped.resident_prefix(0, SIZE) == 0
    finally:
        mapped.close()


async def sent_in_first_turn(file: int, data: bytes, is_local: bool) -> int:
    """Sends a whole file. Returns how many bytes were sent in the first iteration of the event loop."""
    loop = asyncio.get_running_loop()
    sending_socket, receiving_socket = socket.socketpair()  # Unix sockets do not wait to fill a packet
    with sending_socket, receiving_socket:
        sending_socket.setblocking(False)
        receiving_socket.setblocking(False)
        sender = FileSender(loop, sending_socket, file, ignore, is_local=is_local)
        task = asyncio.create_task(sender.run(b"head", 0, SIZE))
        await asyncio.sleep(0)
        received = bytearray(receiving_socket.recv(2 * MIB))
        first_bytes = len(received)
        while len(received) < SIZE + 4:
            received += await loop.sock_recv(receiving_socket, MIB)
        await task
    assert received == b"head" + data
    return first_bytes


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("offset", [0, 77])
def test_parts_of_a_file(path: Path, data: bytes, is_local: bool, offset: int) -> None:
    """Any part of a file arrives unchanged, even a part longer than one slice, at local and at remote clients."""

    async def send(count: int) -> bytes:
        loop = asyncio.get_running_loop()
        sending_socket, receiving_socket = socket.socketpair()
        with sending_socket, receiving_socket, path.open("rb") as file:
            sending_socket.setblocking(False)
            receiving_socket.setblocking(False)
            task = asyncio.create_task(
                FileSender(loop, sending_socket, file.fileno(), ignore, is_local=is_local).run(b"head", offset, count)
            )
            received = bytearray()
            while len(received) < count + 4:
                received += await loop.sock_recv(receiving_socket, MIB)
            await task
        return bytes(received)

    for count in (1, 4096, MIB + 5, SIZE - offset):
        assert asyncio.run(send(count)) == b"head" + data[offset : offset + count]


@pytest.mark.parametrize("is_local", [True, False])
def test_file_sender_raises_if_the_file_is_too_short(tmp_path: Path, is_local: bool) -> None:
    """If a file is shorter than the requested count, `FileSender` sends the bytes of the file and raises FileTruncated,
    for local and for remote clients."""
    path = tmp_path / "short"
    path.write_bytes(b"x" * 5000)

    async def send() -> bytes:
        loop = asyncio.get_running_loop()
        sending_socket, receiving_socket = socket.socketpair()
        with receiving_socket, path.open("rb") as file:
            with sending_socket:
                sending_socket.setblocking(False)
                receiving_socket.setblocking(False)
                with pytest.raises(FileTruncated):
                    await FileSender(loop, sending_socket, file.fileno(), ignore, is_local=is_local).run(b"", 0, 6000)
            return await loop.sock_recv(receiving_socket, MIB)

    assert asyncio.run(send()) == b"x" * 5000


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_clients_on_this_machine_are_local(address: str) -> None:
    """A client on this machine counts as local, whichever address it uses. A socket without a peer does not count as
    local."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), source_address=(address, 0)),
        server.accept()[0] as accepted,
    ):
        assert is_local_peer(accepted)
    with socket.socket() as unconnected:
        assert not is_local_peer(unconnected)


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=IDS)
def test_cancelled_transfer_leaves_no_descriptor(large: Path, make_loop: MakeLoop) -> None:
    """A cancelled transfer leaves no open descriptor, whatever it was waiting for when it was cancelled."""

    async def cancel(turns: int) -> None:
        loop = asyncio.get_running_loop()
        sending_socket, receiving_socket = socket.socketpair()
        with sending_socket, receiving_socket, large.open("rb") as file:
            sending_socket.setblocking(False)
            task = asyncio.create_task(FileSender(loop, sending_socket, file.fileno(), ignore).run(b"", 0, MIB))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await loop.shutdown_default_executor()
        await asyncio.sleep(0)  # lets the event loop release the results of its threads

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(asyncio.sleep(0))  # the first loop of a process opens descriptors that stay open
    with no_descriptor_left():
        for turns in (0, 1, 2, 10):
            with asyncio.Runner(loop_factory=make_loop) as runner:
                runner.run(cancel(turns))


def test_files_on_tmpfs(sender: AppProcess, data: bytes) -> None:
    """Every byte of a file on tmpfs arrives, and the response breaks off if the file is too short."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        with connection_with(sender, file_request(Path(file.name), length=SIZE) * 2) as sock:
            for _ in range(2):
                assert read_response(sock)[2] == data
        assert_ends(sender, Path(file.name), SIZE)


def test_files_that_cannot_be_mapped(sender: AppProcess) -> None:
    """For a file that cannot be mapped, the server cannot find out which pages are in the page cache, so a thread reads
    each piece. The file still arrives completely."""
    path = Path("/proc/version")  # cannot be mapped
    data = path.read_bytes()
    with connection_with(sender, file_request(path, parts=f"0-{len(data)}", length=len(data)) * 2) as sock:
        for _ in range(2):
            assert read_response(sock)[2] == data
    assert_ends(sender, path, len(data))


def assert_ends(server: AppProcess, path: Path, size: int) -> None:
    """Asserts that the response breaks off at the end of the file if the declared length is larger than the file."""
    for extra in (1, 10 * MIB):
        with connection_with(server, file_request(path, parts=f"0-{size + extra}", length=size + extra)) as sock:
            with pytest.raises(IncompleteRead) as caught:
                read_response(sock)
            assert len(caught.value.partial) == size
