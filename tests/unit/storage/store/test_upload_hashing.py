"""Upload sessions whose stored bytes have to be hashed again: how much is read, and what waits for it.

The tests count and stop the reads of `os.pread`, with which such bytes are read. A stopped read occupies its thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import running_digest
from storage.blobs.files.upload_file import UploadFile
from storage.blobs.files.upload_hashing import CONCURRENT_STEPS, STEP_BYTES, UploadHasher
from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.data_dir.disk import THREADS
from storage.errors import BlobUploadInvalid, DigestInvalid
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName, UploadID
from storage.running_digest import RunningDigest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.blob_files import layout_behind
from tests.fakes.open_files import open_files_below
from tests.system.race.gated_system import pull, push

APP = RepositoryName("team/app")
MIB = 1024 * 1024
WAIT_SECONDS = 30.0
"""How long a test waits for something that happens at once if the code is right."""
WRONG_DIGEST = Digest(f"sha512:{'0' * 128}")


class ReadGate:
    """Counts the reads of upload files, and can stop them."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int]] = []
        """For each read, in their order, the session's directory name and the number of bytes."""
        self._lock = threading.Lock()
        self._reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    @property
    def bytes_read(self) -> int:
        return sum(length for _, length in self.reads)

    def shut(self) -> None:
        """Stops reads until `open`."""
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """Waits until a read has stopped at the shut gate."""
        assert await asyncio.to_thread(self._reached.wait, WAIT_SECONDS), "no bytes were read"

    def enter(self, fd: int, length: int) -> None:
        """Called before each `os.pread`. Ignores other files."""
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.parent.parent.name != "uploads":
            return
        with self._lock:
            self.reads.append((path.parent.name, length))
        self._reached.set()
        assert self._open.wait(2 * WAIT_SECONDS), "the test left the gate shut"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadGate]:
    """A gate, open at first, for all reads of upload files."""
    gate, pread = ReadGate(), os.pread

    def gated_pread(fd: int, length: int, offset: int) -> bytes:
        gate.enter(fd, length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", gated_pread)
    yield gate
    gate.open()


class HashedSessions:
    """Counts the sessions of which stored bytes are hashed, or wait for their turn."""

    def __init__(self) -> None:
        self.count = 0

    async def wait_for(self, count: int) -> None:
        """Waits until there are `count` such sessions."""
        async with asyncio.timeout(WAIT_SECONDS):
            while self.count < count:  # noqa: ASYNC110  other tasks change it
                await asyncio.sleep(0.001)


@pytest.fixture
def hashed_sessions(monkeypatch: pytest.MonkeyPatch) -> HashedSessions:
    sessions, hash_into = HashedSessions(), UploadHasher.hash_into

    async def counted_hash_into(
        hasher: UploadHasher, running_digest: RunningDigest, file: UploadFile, start: int, stop: int
    ) -> None:
        sessions.count += start < stop
        await hash_into(hasher, running_digest, file, start, stop)

    monkeypatch.setattr(UploadHasher, "hash_into", counted_hash_into)
    return sessions


async def stored_session(registry: StoredRegistry, body: bytes) -> UploadID:
    """Stores `body` in a new session, whose bytes are hashed with sha256."""
    writer = await registry.start_upload(APP)
    await writer.write(body)
    await writer.aclose()
    return writer.id


async def commit(registry: StoredRegistry, upload: UploadID, digest: Digest) -> None:
    """Makes the requests' calls of a closing PUT without a body."""
    writer = await registry.resume_upload(APP, upload)
    try:
        await writer.commit(digest)
    finally:
        await writer.aclose()


@pytest.mark.slow
async def test_an_upload_that_is_closed_by_another_algorithm_becomes_the_right_blob(
    registry: StoredRegistry, gate: ReadGate
) -> None:
    """If the closing request names a digest of another algorithm, the bytes are read once, and the blob is right. A
    wrong digest ends the session."""
    body = os.urandom(2 * STEP_BYTES + 1000)
    await commit(registry, await stored_session(registry, body), digest_of(body, "sha512"))
    assert gate.bytes_read == len(body)
    assert await pull(registry, APP, digest_of(body, "sha512")) == body
    with pytest.raises(DigestInvalid):
        await commit(registry, await stored_session(registry, body), WRONG_DIGEST)
    assert await registry.blobs.list_uploads() == []


async def test_body_of_the_closing_request_counts(registry: StoredRegistry) -> None:
    """The bytes of the closing request itself are hashed with the other algorithm as well."""
    body = os.urandom(3 * MIB)
    writer = await registry.resume_upload(APP, await stored_session(registry, body[:MIB]))
    await writer.write(body[MIB:])
    await writer.commit(digest_of(body, "sha512"))
    await writer.aclose()
    assert await pull(registry, APP, digest_of(body, "sha512")) == body


async def test_small_blob_is_hashed_with_the_algorithm_of_its_digest(registry: StoredRegistry, gate: ReadGate) -> None:
    """If a small blob comes with the closing request, it is not read, whatever the algorithm of its digest."""
    for body in (b"", os.urandom(100_000)):
        writer = await registry.resume_upload(APP, await stored_session(registry, b""))
        await writer.write(body)
        await writer.commit(digest_of(body, "sha512"))
        await writer.aclose()
        assert gate.bytes_read == 0
        assert await pull(registry, APP, digest_of(body, "sha512")) == body


async def test_a_request_that_lost_its_session_stops_hashing(registry: StoredRegistry, gate: ReadGate) -> None:
    """While a closing request hashes the stored bytes, another request takes the session over. The first request reads
    no further piece."""
    upload = await stored_session(registry, bytes(20 * MIB))
    gate.shut()
    closing = asyncio.create_task(commit(registry, upload, WRONG_DIGEST))
    await gate.reached()
    newer = await registry.resume_upload(APP, upload)
    gate.open()
    with pytest.raises(BlobUploadInvalid):
        await closing
    assert gate.bytes_read == MIB
    await newer.aclose()


async def test_of_many_closing_requests_for_one_session_only_the_last_hashes(
    registry: StoredRegistry, gate: ReadGate
) -> None:
    """50 requests have taken a session over one after another, and then all of them close it. Only the last one reads
    its bytes."""
    upload = await stored_session(registry, bytes(20 * MIB))
    writers = [await registry.resume_upload(APP, upload) for _ in range(50)]
    results = await asyncio.gather(*(writer.commit(WRONG_DIGEST) for writer in writers), return_exceptions=True)
    assert [type(result) for result in results] == [BlobUploadInvalid] * 49 + [DigestInvalid]
    assert gate.bytes_read == 20 * MIB
    for writer in writers:
        await writer.aclose()


async def test_others_push_while_many_sessions_are_hashed(registry: StoredRegistry, gate: ReadGate) -> None:
    """More sessions than there are threads have to be hashed, and none of their reads returns. Another client's push
    and pull still succeed."""
    uploads = [await stored_session(registry, b"%d" % number) for number in range(2 * THREADS)]
    gate.shut()
    closing = [asyncio.create_task(commit(registry, upload, WRONG_DIGEST)) for upload in uploads]
    await gate.reached()
    async with asyncio.timeout(WAIT_SECONDS):
        await push(registry, APP, b"x" * 100_000)
        assert await pull(registry, APP, digest_of(b"x" * 100_000)) == b"x" * 100_000
    assert len(gate.reads) <= CONCURRENT_STEPS
    gate.open()
    await asyncio.gather(*closing, return_exceptions=True)


@pytest.mark.slow
async def test_a_small_session_does_not_wait_for_large_ones(
    registry: StoredRegistry, gate: ReadGate, hashed_sessions: HashedSessions
) -> None:
    """Sessions are hashed in turns, one step at a time. So a small session that comes later than large ones is ready
    after one step of each."""
    large = [await stored_session(registry, bytes(4 * STEP_BYTES)) for _ in range(3)]
    small = await stored_session(registry, b"small")
    gate.shut()
    closing = [asyncio.create_task(commit(registry, upload, WRONG_DIGEST)) for upload in large]
    await hashed_sessions.wait_for(len(large))
    closing.append(asyncio.create_task(commit(registry, small, WRONG_DIGEST)))
    await hashed_sessions.wait_for(len(large) + 1)
    gate.open()
    await asyncio.gather(*closing, return_exceptions=True)
    read_before = gate.reads[: [upload for upload, _ in gate.reads].index(small)]
    for upload in large:
        assert sum(length for session, length in read_before if session == upload) <= 2 * STEP_BYTES


async def unsaved_session(registry: StoredRegistry, body: bytes) -> tuple[BlobWriter, UploadID]:
    """Starts a session whose progress is not saved. Returns its writer, which must stay open."""
    writer = await registry.start_upload(APP)
    await writer.write(body)
    await writer.read_at(0, 1)  # writes the last batch
    return writer, writer.id


async def test_of_many_resumptions_only_the_last_hashes_unsaved_bytes(registry: StoredRegistry, gate: ReadGate) -> None:
    """A request has stored bytes, but not saved its progress yet. Then 50 requests resume the session at the same time.
    After the last takeover, the others read no further piece of these bytes."""
    _, upload = await unsaved_session(registry, bytes(20 * MIB))
    before = gate.bytes_read
    gate.shut()
    resuming = [asyncio.create_task(registry.resume_upload(APP, upload)) for _ in range(50)]
    async with asyncio.timeout(WAIT_SECONDS):
        while not (layout_behind(registry).upload(upload) / "51").exists():  # noqa: ASYNC110  threads rename the file
            await asyncio.sleep(0.001)
    gate.open()
    results = await asyncio.gather(*resuming, return_exceptions=True)
    (writer,) = (result for result in results if not isinstance(result, BaseException))
    assert {type(result) for result in results if result is not writer} == {BlobUploadInvalid}
    assert gate.bytes_read - before <= (20 + CONCURRENT_STEPS) * MIB
    await writer.commit(digest_of(bytes(20 * MIB)))
    await writer.aclose()


async def test_a_cancelled_resumption_stops_hashing(
    tmp_path: Path, gate: ReadGate, hashed_sessions: HashedSessions
) -> None:
    """If a request that resumes a session is cancelled while it hashes unsaved bytes, or while it waits for its turn,
    it reads no further step, and leaves no file open."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        sessions = [await unsaved_session(registry, bytes(2 * STEP_BYTES)) for _ in range(CONCURRENT_STEPS + 1)]
        before = gate.bytes_read
        gate.shut()
        resuming = [asyncio.create_task(registry.resume_upload(APP, upload)) for _, upload in sessions]
        await hashed_sessions.wait_for(len(sessions))
        for task in resuming:
            task.cancel()
        gate.open()
        for result in await asyncio.gather(*resuming, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError)
        assert gate.bytes_read - before <= CONCURRENT_STEPS * STEP_BYTES
        for writer, _ in sessions:
            with pytest.raises(BlobUploadInvalid):
                await writer.cancel()
            await writer.aclose()
    assert open_files_below(data / "uploads") == []


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_without_saved_states_stored_bytes_are_hashed_once(
    algorithm: str, registry: StoredRegistry, gate: ReadGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the state of a digest cannot be saved, a request that resumes a session reads nothing. The closing request
    reads the blob once, however many chunks it came in."""
    monkeypatch.setattr(running_digest, "_libcrypto_hash", lambda _: None)
    body = os.urandom(30 * 100_000)
    upload = await stored_session(registry, body[:100_000])
    for start in range(100_000, len(body), 100_000):
        writer = await registry.resume_upload(APP, upload, start)
        await writer.write(body[start : start + 100_000])
        await writer.aclose()
    assert gate.bytes_read == 0
    await commit(registry, upload, digest_of(body, algorithm))
    assert gate.bytes_read == len(body)
    assert await pull(registry, APP, digest_of(body, algorithm)) == body


async def test_without_saved_states_unsaved_bytes_are_not_hashed_by_a_resumption(
    registry: StoredRegistry, gate: ReadGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same if a request has stored bytes whose progress was never saved."""
    monkeypatch.setattr(running_digest, "_libcrypto_hash", lambda _: None)
    _, upload = await unsaved_session(registry, bytes(3 * MIB))
    before = gate.bytes_read
    writer = await registry.resume_upload(APP, upload, 3 * MIB)
    assert gate.bytes_read == before
    await writer.commit(digest_of(bytes(3 * MIB)))
    await writer.aclose()
    assert gate.bytes_read == before + 3 * MIB
