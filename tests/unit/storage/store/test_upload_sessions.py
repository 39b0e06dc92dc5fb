"""Upload sessions: how much work they cause, and whether they can continue after restarts and crashes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import stat
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from storage.blobs.files import upload_session
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.blobs.files.upload_session import PIECE_OVERHEAD_BYTES, SMALL_PIECE_BYTES
from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.errors import BlobUploadUnknown
from storage.names import ALGORITHMS, RepositoryName, UploadID
from storage.store.stored_registry import StoredRegistry
from tests.fakes.blob_files import layout_behind
from tests.fakes.open_files import open_files_below
from tests.fakes.server_process import ROOT, running_server
from tests.system.crash.full_disk import ask, start
from tests.system.race.gated_system import GatedSystem

APP = RepositoryName("team/app")
MIB = 1024 * 1024


@pytest.mark.slow
def test_uploads_work_if_digest_states_cannot_be_saved(tmp_path: Path) -> None:
    """In a Python without libcrypto's hashes, the state of a digest cannot be saved. Uploads in chunks to two workers
    still become the right blobs. After a reboot, a session starts again without bytes."""
    command = [sys.executable, "-m", "tests.unit.storage.store.uploads_without_libcrypto", str(tmp_path / "data")]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert process.returncode == 0, process.stdout


def _bytes_read(pids: list[int]) -> int:
    """Returns how many bytes the processes have read with read calls, from files or sockets."""
    total = 0
    for pid in pids:
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        total += int(counts["rchar"])
    return total


@pytest.mark.slow
def test_a_closing_put_without_a_body_does_not_read_the_blob_again(tmp_path: Path) -> None:
    """After a chunk of 64 MiB, the PUT that completes the upload reads less than a MiB, whichever worker gets the
    request."""
    body = random.Random(1).randbytes(64 * MIB)
    with running_server(tmp_path, workers=2) as server:
        for attempt in range(3):
            location = start(server, "team/app")
            status, _, headers = ask(server, "PATCH", location, body)
            assert status == 202
            location = headers["location"]
            query_start = location + ("&" if "?" in location else "?")
            read_before = _bytes_read(server.worker_pids())
            assert ask(server, "PUT", f"{query_start}digest=sha256:{hashlib.sha256(body).hexdigest()}")[0] == 201
            assert _bytes_read(server.worker_pids()) - read_before < MIB, f"attempt {attempt}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_session_continues_after_a_reboot_that_lost_no_bytes(algorithm: str, tmp_path: Path) -> None:
    """If the disk has all bytes of a session after a reboot, the session continues, whatever sizes its chunks had."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    body = random.Random(2).randbytes(300_000)
    chunk_starts = [0, 1, 70, 127, 128, 129, 1000, 70_001, 70_130, 200_000]
    async with open_registry(data, boot="first") as before:
        writer = await before.start_upload(APP, algorithm)
        for start_at, stop in itertools.pairwise(chunk_starts):
            await writer.write(body[start_at:stop])
            await writer.aclose()
            writer = await before.resume_upload(APP, writer.id, stop)
        await writer.aclose()
    async with open_registry(data, boot="second") as after:
        assert await after.upload_offset(APP, writer.id) == chunk_starts[-1]
        writer = await after.resume_upload(APP, writer.id, chunk_starts[-1])
        await writer.write(body[chunk_starts[-1] :])
        await writer.commit(digest_of(body, algorithm))
        await writer.aclose()


async def test_a_cancelled_resume_leaves_no_file_open(tmp_path: Path) -> None:
    """The first request for a session after a reboot takes the session over. If the request is cancelled meanwhile, the
    session's file is closed, and the next request finds all bytes."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data, boot="first") as before:
        writer = await before.start_upload(APP)
        await writer.write(b"a" * 1000)
        await writer.aclose()
    system = GatedSystem()
    async with open_registry(data, boot="second", system=system) as after:
        gate = system.stop_at("rename", "/uploads/")
        asking = asyncio.create_task(after.upload_offset(APP, writer.id))
        await gate.reached()
        asking.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await after.upload_offset(APP, writer.id) == 1000
    assert open_files_below(data / "uploads") == []  # a thread closed them, and the threads have ended


async def test_a_cancelled_discard_leaves_no_file_open(tmp_path: Path) -> None:
    """If a request that deletes the bytes of an ended session is cancelled, the session's file is closed."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        claimed = await registry.blobs.take_over(UploadID.random())
        discarding = asyncio.create_task(claimed.discard())
        await asyncio.sleep(0)
        discarding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await discarding
        assert open_files_below(data / "uploads") == os.listdir(data / "uploads") == []


async def test_a_session_is_unknown_after_an_interrupted_commit(tmp_path: Path) -> None:
    """A commit renames the session's file and then writes a row to the database. If the commit is interrupted between
    these steps, the session is unknown and cannot be resumed."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data, boot="one") as registry:
        writer = await registry.start_upload(APP)
        await writer.write(b"a" * 1000)
        await writer.aclose()
        layout = layout_behind(registry)
        (layout.upload(writer.id) / "1").rename(layout.blob(digest_of(b"a" * 1000)))
        with pytest.raises(BlobUploadUnknown):
            await registry.upload_offset(APP, writer.id)
        for offset in (None, 0, 1000):
            with pytest.raises(BlobUploadUnknown):
                await registry.resume_upload(APP, writer.id, offset)


@pytest.mark.parametrize("piece_bytes", [1, 1000])
@pytest.mark.slow
async def test_small_pieces_take_no_more_memory_than_their_bytes(piece_bytes: int, registry: StoredRegistry) -> None:
    """An upload that arrives in tiny pieces never takes much more memory than its bytes, although each piece is a
    memory view, and although the buffer that it was received into is much larger."""
    size = 20_000
    writer = await registry.start_upload(APP)
    tracemalloc.start()
    try:
        before, most = tracemalloc.get_traced_memory()[0], 0
        received = bytearray()
        for _ in range(size // piece_bytes):
            buffer = bytearray(os.urandom(piece_bytes) + bytes(4000))
            received += buffer[:piece_bytes]
            await writer.write(memoryview(buffer)[:piece_bytes])
            del buffer
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
        assert most < 3 * size
    finally:
        tracemalloc.stop()
    await writer.commit(digest_of(bytes(received)))
    await writer.aclose()


async def test_the_batches_of_uploads_are_written_early_if_their_pieces_take_much_memory(
    registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the pieces counts, and not only their bytes. So with many small pieces, the limit for all uploads
    together is reached earlier. Nothing counts any more after the uploads have ended."""
    pieces = [memoryview(os.urandom(SMALL_PIECE_BYTES + number % 2 - 1)) for number in range(200)]
    # Small pieces are copied and others are not. Only the overhead of both kinds together exceeds the limit.
    limit = sum(map(len, pieces)) + 150 * PIECE_OVERHEAD_BYTES
    monkeypatch.setattr(upload_session, "BUFFERED_BYTES_LIMIT", limit)
    writer = await registry.start_upload(APP)
    for piece in pieces:
        await writer.write(piece)
    assert sum(path.stat().st_size for path in layout_behind(registry).upload(writer.id).iterdir()) > 0
    await writer.commit(digest_of(b"".join(pieces)))
    await writer.aclose()
    for ends_by_cancel in (True, False):
        writer = await registry.start_upload(APP)
        await writer.write(pieces[0])
        await (writer.cancel() if ends_by_cancel else writer.aclose())
    assert isinstance(registry.blobs, FileBlobStore)
    assert registry.blobs._buffers.size == 0


@pytest.mark.parametrize("end", ["append", "commit", "cancel"])
async def test_a_large_file_is_not_closed_on_the_event_loop(
    end: str, registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is closed in a thread, because the file system may block the close until all bytes are written to
    the disk."""
    layout, close, body = layout_behind(registry), os.close, bytes(3 * MIB)
    content_folders = (f"{layout.uploads}/", f"{layout.root}/blobs/")
    closed_on_the_loop: list[bool] = []

    def record_close(fd: int) -> None:
        is_content = os.readlink(f"/proc/self/fd/{fd}").startswith(content_folders)
        if is_content and stat.S_ISREG(os.fstat(fd).st_mode):
            closed_on_the_loop.append(threading.current_thread() is threading.main_thread())
        close(fd)

    monkeypatch.setattr(os, "close", record_close)
    writer = await registry.start_upload(APP)
    await writer.write(body)
    if end == "commit":
        await writer.commit(digest_of(body))
    elif end == "cancel":
        await writer.cancel()
    await writer.aclose()
    async with asyncio.timeout(60):
        while not closed_on_the_loop:  # noqa: ASYNC110  a thread changes the list
            await asyncio.sleep(0.001)
    assert closed_on_the_loop == [False]
