"""Files that the kernel sends (ASGI's zero-copy extension), over raw sockets, with each kind of event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import uvloop

from registry.server.connection.context import WorkerContext
from registry.server.connection.file_sender import FileSender, FileTruncated, is_local_peer
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from storage.data_dir.mapped_file import MappedFile
from tests.fakes.temporary_files import disk_folder
from tests.system.server.app_process import AppProcess, Start, read_all, read_response, wait_for
from tests.system.server.echo_app import answer

SIZE = 5 * 1024 * 1024 + 77
LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
MIB = 1024 * 1024
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(scope="session", params=LOOPS, ids=IDS)
def sender(request: pytest.FixtureRequest) -> Iterator[AppProcess]:
    running = AppProcess({"limits": {"linger_seconds": 0.5, "timeout_check_seconds": 0.1}}, request.param)
    try:
        yield running.until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session", params=LOOPS, ids=IDS)
def hasty(request: pytest.FixtureRequest) -> Iterator[AppProcess]:
    """A server that cuts off clients that take nothing for a second."""
    running = AppProcess({"limits": {"send_idle_seconds": 1.0, "timeout_check_seconds": 0.05}}, request.param)
    try:
        yield running.until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="session")
def path(data: bytes) -> Iterator[Path]:
    with disk_folder() as folder:
        made = folder / "file"
        made.write_bytes(data)
        yield made


@pytest.fixture(scope="session")
def large() -> Iterator[Path]:
    """A sparse file of a GiB."""
    with disk_folder() as folder:
        made = folder / "large"
        with made.open("wb") as file:
            file.truncate(1024 * MIB)
        yield made


def ignore(count: int) -> None:
    """Ignores the number of bytes sent."""


def asks(path: Path, method: str = "GET", version: str = "1.1", **query: object) -> bytes:
    given = "&".join(f"{name}={value}" for name, value in {"path": path, **query}.items())
    return f"{method} /file?{given} HTTP/{version}\r\nHost: test\r\n\r\n".encode()


@contextlib.contextmanager
def asking(server: AppProcess, request: bytes, buffer: int | None = None) -> Iterator[socket.socket]:
    """Opens a connection and sends a request. `buffer` is the size of its receive buffer."""
    with socket.socket() as sock:
        sock.settimeout(15)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(server.address)
        sock.sendall(request)
        yield sock


@contextlib.contextmanager
def closes_all_descriptors(server: AppProcess) -> Iterator[None]:
    """Checks that the server closes what it opens during the `with` block. Asks over one connection, because the server
    closes those of earlier questions a little later. At the beginning, connections of earlier tests may be closing."""
    with server.connect() as sock:
        before = min(descriptors(sock) for _ in range(5))
        yield
        wait_for(lambda: descriptors(sock) <= before)


def descriptors(sock: socket.socket) -> int:
    """Returns how many descriptors the server has open."""
    sock.sendall(b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n")
    return int(read_response(sock)[2])


def test_a_file_and_what_follows(sender: AppProcess, path: Path, data: bytes) -> None:
    """Every byte of the file arrives, and the connection is kept for the next request."""
    with asking(sender, asks(path, length=SIZE)) as sock:
        for _ in range(3):
            status, headers, body = read_response(sock)
            assert (status, headers["content-length"]) == (200, str(SIZE))
            assert body == data
            sock.sendall(asks(path, length=SIZE))


def test_requests_sent_ahead(sender: AppProcess, path: Path, data: bytes) -> None:
    """Files and other responses arrive whole, in the order of their requests."""
    small = b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n"
    with asking(sender, (asks(path, length=SIZE) + small) * 3) as sock:
        for _ in range(3):
            assert read_response(sock)[2] == data
            assert read_response(sock)[2].isdigit()


@pytest.mark.parametrize("length", [True, False])
def test_parts_between_text(sender: AppProcess, path: Path, data: bytes, length: bool) -> None:
    """Parts of a file and other pieces of the body keep their order, with a declared length and in chunks."""
    expected = b"head" + data[100:2_000_100] + b"middle" + data[7:8] + data[SIZE - 5 :] + b"tail"
    parts = f"=head,100-2000000,=middle,5-0,7-1,{SIZE - 5}-,=tail"
    request = asks(path, parts=parts, length=len(expected)) if length else asks(path, parts=parts)
    with asking(sender, request * 2) as sock:
        for _ in range(2):
            _, headers, body = read_response(sock)
            assert body == expected
            assert ("transfer-encoding" in headers) != length


def test_a_file_goes_on_where_it_stands(sender: AppProcess, path: Path, data: bytes) -> None:
    """Without an offset each part starts where the one before ended; without a count it ends with the file."""
    with asking(sender, asks(path, parts="-10,-20,-", length=SIZE)) as sock:
        assert read_response(sock)[2] == data


def test_http_1_0(sender: AppProcess, path: Path, data: bytes) -> None:
    """In HTTP/1.0 a file without a declared length ends with the connection."""
    head, _, body = sender.talk(asks(path, version="1.0")).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert body == data


def test_head(sender: AppProcess, path: Path) -> None:
    """HEAD gets the length and nothing of the file."""
    with asking(sender, asks(path, "HEAD", length=SIZE) * 2) as sock:
        for _ in range(2):
            status, headers, _ = read_response(sock, "HEAD")
            assert (status, headers["content-length"]) == (200, str(SIZE))


def test_a_file_that_is_too_short(sender: AppProcess, path: Path) -> None:
    """If a file ends before the declared length, the response is broken off; the log says why, and the server goes
    on."""
    with closes_all_descriptors(sender):
        with asking(sender, asks(path, parts=f"0-{SIZE + 10}", length=SIZE + 10)) as sock:
            with pytest.raises(IncompleteRead) as caught:
                read_response(sock)
            assert len(caught.value.partial) == SIZE
            assert sock.recv(1) == b""
        wait_for(lambda: f"ends at byte {SIZE}; 10 more were promised" in sender.errors)
        assert_ends(sender, path, SIZE)


def test_more_than_was_promised(sender: AppProcess, path: Path) -> None:
    """A file larger than the declared length is an error of the application, raised before a byte of it is sent."""
    with asking(sender, asks(path, length=5)) as sock:
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (500, "close")
        assert sock.recv(1) == b""


def test_less_than_was_promised(sender: AppProcess, path: Path) -> None:
    """A response that ends before its declared length is broken off."""
    with asking(sender, asks(path, parts="0-5", length=SIZE)) as sock, pytest.raises(IncompleteRead):
        read_response(sock)


@pytest.mark.parametrize("reset", [True, False])
def test_hang_up(sender: AppProcess, large: Path, reset: bool) -> None:
    """The application learns at once that the client left, and every descriptor is closed."""
    with closes_all_descriptors(sender):
        with asking(sender, asks(large, length=1024 * MIB)) as sock:
            sock.recv(100_000)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sender.said("cut ClientDisconnected")


def test_a_client_that_shuts_its_side(sender: AppProcess, path: Path, data: bytes) -> None:
    """A client that sends no more after a whole request still gets the file."""
    with asking(sender, asks(path, length=SIZE)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).endswith(data[-1000:])


def test_a_client_that_takes_nothing(hasty: AppProcess, large: Path) -> None:
    """A client that takes nothing of a file is cut off."""
    with asking(hasty, asks(large, length=1024 * MIB)) as sock:
        hasty.said("cut ClientDisconnected")
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(sock)) < 100 * MIB


def test_a_slow_client(hasty: AppProcess, large: Path) -> None:
    """A client that takes a little again and again is not cut off, however long its kernel takes no more of the
    file."""
    until = time.monotonic() + 3
    with asking(hasty, asks(large, length=1024 * MIB), buffer=256 * 1024) as sock:
        while time.monotonic() < until:
            assert sock.recv(32 * 1024)
            time.sleep(0.05)  # its pace, not a wait for anything
        for _ in range(100):
            assert sock.recv(MIB)
    hasty.said("cut ClientDisconnected")


@pytest.mark.parametrize("env", LOOPS, ids=IDS)
def test_a_stop_waits_for_a_file(start: Start, path: Path, data: bytes, env: dict[str, str]) -> None:
    """A server told to stop sends a file to its end, and exits with 0."""
    server = start(env, grace=15)
    with asking(server, asks(path, length=SIZE), buffer=64 * 1024) as sock:
        head = sock.recv(1000)
        os.kill(server.pid, signal.SIGTERM)
        body = head.partition(b"\r\n\r\n")[2] + read_all(sock)
    assert body == data
    assert server.end() == 0


@pytest.mark.parametrize("env", LOOPS, ids=IDS)
def test_a_stop_cuts_a_file_in_the_end(start: Start, large: Path, env: dict[str, str]) -> None:
    """After the grace period a file in progress is broken off, and the server exits with 0."""
    server = start(env, grace=0.2)
    with asking(server, asks(large, length=1024 * MIB)) as sock:
        sock.recv(1000)
        os.kill(server.pid, signal.SIGTERM)
        assert server.end() == 0
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(sock)) < 1024 * MIB


def test_small_requests_beside_large_files(sender: AppProcess, large: Path) -> None:
    """While clients pull as fast as they can, the same event loop answers small requests between the slices."""
    pulls = [sender.connect() for _ in range(3)]
    asking_beside = sender.connect()
    try:
        for pull in pulls:
            pull.sendall(asks(large, length=1024 * MIB))
            assert pull.recv(1000)
        for _ in range(20):
            for pull in pulls:
                assert pull.recv(MIB)
            descriptors(asking_beside)
    finally:
        for sock in (*pulls, asking_beside):
            sock.close()
    for _ in pulls:
        sender.said("cut ClientDisconnected")


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=IDS)
@pytest.mark.real_disk
def test_the_loop_does_not_wait_for_the_disk(tmp_path: Path, data: bytes, make_loop: MakeLoop, is_local: bool) -> None:
    """What is in memory is sent at once, and a thread reads the rest while the event loop turns; for local and remote
    clients."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file, asyncio.Runner(loop_factory=make_loop) as runner:
        os.fsync(file.fileno())
        assert runner.run(first_turn(file.fileno(), data, is_local)) > len(b"head")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert is_cold(file.fileno()) == (runner.run(first_turn(file.fileno(), data, is_local)) == len(b"head"))


def is_cold(fd: int) -> bool:
    """Returns whether nothing of the file is in memory."""
    mapped = MappedFile.try_map(fd, 0, SIZE)
    assert mapped is not None
    try:
        return mapped.count_resident(0, SIZE) == 0
    finally:
        mapped.close()


async def first_turn(file: int, data: bytes, is_local: bool) -> int:
    """Sends a whole file. Returns how many bytes were sent in the first turn of the loop."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()  # of a kind that holds nothing back to fill a packet
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        sending = FileSender(loop, ours, file, ignore, is_local=is_local)
        task = asyncio.create_task(sending.run(b"head", 0, SIZE))
        await asyncio.sleep(0)
        got = bytearray(theirs.recv(2 * MIB))
        first = len(got)
        while len(got) < SIZE + 4:
            got += await loop.sock_recv(theirs, MIB)
        await task
    assert got == b"head" + data
    return first


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("offset", [0, 77])
def test_parts_of_a_file(path: Path, data: bytes, is_local: bool, offset: int) -> None:
    """Any part of a file arrives unchanged, also one longer than a slice; for local and remote clients."""

    async def send(count: int) -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs, path.open("rb") as file:
            ours.setblocking(False)
            theirs.setblocking(False)
            task = asyncio.create_task(
                FileSender(loop, ours, file.fileno(), ignore, is_local=is_local).run(b"head", offset, count)
            )
            got = bytearray()
            while len(got) < count + 4:
                got += await loop.sock_recv(theirs, MIB)
            await task
        return bytes(got)

    for count in (1, 4096, MIB + 5, SIZE - offset):
        assert asyncio.run(send(count)) == b"head" + data[offset : offset + count]


@pytest.mark.parametrize("is_local", [True, False])
def test_the_file_ends_before_what_was_promised(tmp_path: Path, is_local: bool) -> None:
    """If a file is too short, only its own bytes are sent, and an error is raised; for local and remote clients."""
    path = tmp_path / "short"
    path.write_bytes(b"x" * 5000)

    async def send() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs, path.open("rb") as file:
            with ours:
                ours.setblocking(False)
                theirs.setblocking(False)
                with pytest.raises(FileTruncated):
                    await FileSender(loop, ours, file.fileno(), ignore, is_local=is_local).run(b"", 0, 6000)
            return await loop.sock_recv(theirs, MIB)

    assert asyncio.run(send()) == b"x" * 5000


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_who_is_near(address: str) -> None:
    """A client on this machine counts as local, whichever address it uses; one that has left does not."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), source_address=(address, 0)),
        server.accept()[0] as taken,
    ):
        assert is_local_peer(taken)
    with socket.socket() as gone:
        assert not is_local_peer(gone)


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=IDS)
def test_a_cancelled_sending(large: Path, make_loop: MakeLoop) -> None:
    """A cancelled transfer leaves no descriptor open and none watched, whatever it waited for."""

    async def cancel(turns: int) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs, large.open("rb") as file:
            ours.setblocking(False)
            task = asyncio.create_task(FileSender(loop, ours, file.fileno(), ignore).run(b"", 0, MIB))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await loop.shutdown_default_executor()
        await asyncio.sleep(0)  # frees what a thread has left behind

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(asyncio.sleep(0))  # the first loop of a process opens descriptors that stay open
    before = os.listdir("/proc/self/fd")
    for turns in (0, 1, 2, 10):
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(cancel(turns))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=IDS)
def test_no_files_through_tls(make_loop: MakeLoop) -> None:
    """Over TLS the extension is not offered: what must be encrypted cannot be sent by the kernel."""

    async def ask() -> tuple[list[str], bytes]:
        offered: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            offered.extend(scope.get("extensions", ()))
            await answer(send, 200, b"plain bytes")

        loop = asyncio.get_running_loop()
        limits = ServerLimits()
        worker = WorkerContext(app, loop, limits, UnsentBudget(limits.unsent_bytes, loop.time))
        server = await loop.create_server(
            lambda: RegistryProtocol(worker),
            "127.0.0.1",
            0,
            ssl=anonymous(ssl.PROTOCOL_TLS_SERVER),
        )
        port = server.sockets[0].getsockname()[1]
        client = anonymous(ssl.PROTOCOL_TLS_CLIENT)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        writer.write(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        got = await reader.read()
        writer.close()
        server.close()
        return offered, got

    with asyncio.Runner(loop_factory=make_loop) as runner:
        offered, got = runner.run(ask())
    assert offered == []
    assert got.endswith(b"plain bytes")


def anonymous(side: int) -> ssl.SSLContext:
    """Makes a TLS context that needs no certificates."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


def test_a_file_system_in_memory(sender: AppProcess, data: bytes) -> None:
    """On tmpfs every byte arrives, and a file that is too short is noticed."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        with asking(sender, asks(Path(file.name), length=SIZE) * 2) as sock:
            for _ in range(2):
                assert read_response(sock)[2] == data
        assert_ends(sender, Path(file.name), SIZE)


def test_a_file_system_that_cannot_tell(sender: AppProcess) -> None:
    """Where the kernel does not tell what is in memory, threads read each piece before it is sent."""
    path = Path("/proc/version")  # cannot be mapped
    data = path.read_bytes()
    with asking(sender, asks(path, parts=f"0-{len(data)}", length=len(data)) * 2) as sock:
        for _ in range(2):
            assert read_response(sock)[2] == data
    assert_ends(sender, path, len(data))


def assert_ends(server: AppProcess, path: Path, size: int) -> None:
    """Asserts that a response that promises more than the file has is broken off."""
    for more in (1, 10 * MIB):
        with asking(server, asks(path, parts=f"0-{size + more}", length=size + more)) as sock:
            with pytest.raises(IncompleteRead) as caught:
                read_response(sock)
            assert len(caught.value.partial) == size
