"""Contract tests for upload sessions: writes, resumes, takeovers by another request, commits, and cancellations."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from storage.content import Actor, digest_of
from storage.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    NameUnknown,
    RangeInvalid,
)
from storage.interface import BlobWriter, Registry
from storage.names import RepositoryName, UploadID
from tests.fakes.registry_content import BY, push_blob, read_blob

MIB = 1 << 20
SESSION_OVER = (BlobUploadInvalid, BlobUploadUnknown)
"""A writer whose session has ended raises one of these; the interface does not say which."""


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def write_in_chunks(writer: BlobWriter, data: bytes, chunk: int) -> None:
    for start in range(0, len(data), chunk):
        await writer.write(data[start : start + chunk])
        assert writer.offset == min(start + chunk, len(data))


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize(
    ("size", "chunk"),
    [(0, 1), (1, 1), (65535, 1021), (65535, 65535), (MIB + 1, 4097), (MIB + 1, MIB), (5 * MIB + 3, 2 * MIB + 1)],
)
@pytest.mark.slow
async def test_a_blob_reads_back_as_it_was_written(
    registry: Registry, repo: RepositoryName, size: int, chunk: int, algorithm: str
) -> None:
    """A blob of any size that is written in chunks of any size can be read by its digest with the same bytes."""
    data = some_bytes(size)
    writer = await registry.start_upload(repo, algorithm)
    assert writer.offset == 0
    await write_in_chunks(writer, data, chunk)
    committed = await writer.commit(digest_of(data, algorithm))
    await writer.aclose()
    assert (committed.digest, committed.size) == (digest_of(data, algorithm), size)
    resolved = await registry.resolve_blob(repo, digest_of(data, algorithm))
    assert (resolved.digest, resolved.size) == (digest_of(data, algorithm), size)
    assert await read_blob(registry, repo, digest_of(data, algorithm)) == data


async def test_writing_nothing_changes_nothing(registry: Registry, repo: RepositoryName) -> None:
    """An empty write is no error and changes nothing."""
    writer = await registry.start_upload(repo)
    for piece in (b"", b"abc", b"", b"def", b""):
        await writer.write(piece)
    assert writer.offset == 6
    await writer.commit(digest_of(b"abcdef"))
    assert await read_blob(registry, repo, digest_of(b"abcdef")) == b"abcdef"


@pytest.mark.parametrize(("declared_algorithm", "commit_algorithm"), [("sha256", "sha512"), ("sha512", "sha256")])
async def test_a_commit_with_an_undeclared_algorithm(
    registry: Registry, repo: RepositoryName, declared_algorithm: str, commit_algorithm: str
) -> None:
    """A commit may have a digest of an algorithm that was not declared at the start of the session. The blob exists
    only under the digest of the commit."""
    data = some_bytes(200_000)
    writer = await registry.start_upload(repo, declared_algorithm)
    await write_in_chunks(writer, data, 70_001)
    await writer.commit(digest_of(data, commit_algorithm))
    assert await read_blob(registry, repo, digest_of(data, commit_algorithm)) == data
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(data, declared_algorithm))


async def test_an_undeclared_algorithm_after_a_resume(registry: Registry, repo: RepositoryName) -> None:
    """A session that was started without an algorithm and then resumed can be committed with a sha512 digest."""
    data = some_bytes(100_000)
    first = await registry.start_upload(repo)
    await first.write(data[:30_000])
    await first.aclose()
    second = await registry.resume_upload(repo, first.id, 30_000)
    await second.write(data[30_000:])
    await second.aclose()
    third = await registry.resume_upload(repo, first.id, len(data))
    await third.commit(digest_of(data, "sha512"))
    assert await read_blob(registry, repo, digest_of(data, "sha512")) == data


async def test_the_same_bytes_under_two_algorithms_are_two_blobs(registry: Registry, repo: RepositoryName) -> None:
    """The same bytes pushed with a sha256 and with a sha512 digest are two blobs. When one of them is deleted, the
    other one stays."""
    data = b"the same bytes"
    await push_blob(registry, repo, data)
    await push_blob(registry, repo, data, "sha512")
    await registry.delete_blob(repo, digest_of(data), by=BY)
    assert await read_blob(registry, repo, digest_of(data, "sha512")) == data
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(data))


async def test_an_unknown_algorithm_starts_no_session(registry: Registry, repo: RepositoryName) -> None:
    """Starting a session with an unsupported algorithm raises DigestInvalid."""
    for algorithm in ("md5", "sha1", "SHA256", "", "sha256:"):
        with pytest.raises(DigestInvalid):
            await registry.start_upload(repo, algorithm)


async def test_concurrent_sessions_do_not_mix(registry: Registry, repo: RepositoryName) -> None:
    """Concurrent sessions of one repository have different ids, and each has only its own bytes."""
    writers = [await registry.start_upload(repo) for _ in range(5)]
    assert len({writer.id for writer in writers}) == 5
    await asyncio.gather(*(writer.write(b"blob %d" % number) for number, writer in enumerate(writers)))
    await asyncio.gather(*(writer.commit(digest_of(b"blob %d" % number)) for number, writer in enumerate(writers)))
    for number in range(5):
        assert await read_blob(registry, repo, digest_of(b"blob %d" % number)) == b"blob %d" % number


async def test_a_session_is_kept_after_aclose(registry: Registry, repo: RepositoryName) -> None:
    """After `aclose`, the session has all accepted bytes. Its offset is the number of these bytes, and it can be
    resumed at this offset."""
    data = some_bytes(300_000)
    digest = digest_of(data)
    writer = await registry.start_upload(repo)
    upload = writer.id
    for start in range(0, len(data), 99_991):
        assert await registry.upload_offset(repo, upload) == start
        writer = await registry.resume_upload(repo, upload, start)
        assert (writer.id, writer.offset) == (upload, start)
        assert await writer.read_at(0, start) == data[:start]
        await writer.write(data[start : start + 99_991])
        await writer.aclose()
    assert await registry.upload_offset(repo, upload) == len(data)
    await (await registry.resume_upload(repo, upload)).commit(digest)
    assert await read_blob(registry, repo, digest) == data


async def test_a_closing_request_without_a_body(registry: Registry, repo: RepositoryName) -> None:
    """A writer that has written nothing itself can commit the bytes that an earlier writer of the session wrote."""
    writer = await registry.start_upload(repo)
    await writer.write(b"all of it")
    await writer.aclose()
    closing = await registry.resume_upload(repo, writer.id, 9)
    assert (await closing.commit(digest_of(b"all of it"))).size == 9
    await closing.aclose()
    assert await read_blob(registry, repo, digest_of(b"all of it")) == b"all of it"


async def test_an_empty_session_is_kept_too(registry: Registry, repo: RepositoryName) -> None:
    """A session without bytes can be closed, resumed at offset 0, and committed as the empty blob."""
    writer = await registry.start_upload(repo)
    await writer.aclose()
    assert await registry.upload_offset(repo, writer.id) == 0
    await (await registry.resume_upload(repo, writer.id, 0)).commit(digest_of(b""))
    assert await read_blob(registry, repo, digest_of(b"")) == b""


async def test_read_at_gives_what_was_written(registry: Registry, repo: RepositoryName) -> None:
    """Written bytes can be read from any offset; a read after the end returns no bytes. After a read, writes continue
    at the end."""
    writer = await registry.start_upload(repo)
    await writer.write(b"0123456789")
    assert await writer.read_at(0, 10) == b"0123456789"
    assert await writer.read_at(3, 4) == b"3456"
    assert await writer.read_at(8, 100) == b"89"
    assert await writer.read_at(10, 5) == b""
    assert await writer.read_at(5, 0) == b""
    await writer.write(b"ab")
    assert await writer.read_at(9, 3) == b"9ab"
    await writer.commit(digest_of(b"0123456789ab"))
    assert await read_blob(registry, repo, digest_of(b"0123456789ab")) == b"0123456789ab"


@pytest.mark.parametrize("wrong_offset", [0, 3, 5, 4_000_000_000])
async def test_a_resume_at_the_wrong_offset(registry: Registry, repo: RepositoryName, wrong_offset: int) -> None:
    """A resume at a wrong offset raises RangeInvalid with the right offset. The current writer keeps the session."""
    first = await registry.start_upload(repo)
    await first.write(b"0123")
    await first.aclose()
    second = await registry.resume_upload(repo, first.id, 4)
    with pytest.raises(RangeInvalid) as refused:
        await registry.resume_upload(repo, first.id, wrong_offset)
    assert refused.value.offset == 4
    await second.write(b"45")
    await second.commit(digest_of(b"012345"))
    assert await read_blob(registry, repo, digest_of(b"012345")) == b"012345"


async def test_a_newer_request_takes_the_session_over(registry: Registry, repo: RepositoryName) -> None:
    """When another request resumes a session, it takes the session over. Every call of the old writer then raises
    BlobUploadInvalid and does not disturb the new writer."""
    data = some_bytes(250_000)
    old = await registry.start_upload(repo)
    await old.write(data[:100_000])
    new = await registry.resume_upload(repo, old.id)
    assert 0 <= new.offset <= 100_000
    assert await new.read_at(0, new.offset) == data[: new.offset]
    for call in (
        old.read_at(0, 1),
        old.commit(digest_of(b"wrong")),
        old.commit(digest_of(data[:100_000])),
        old.cancel(),
    ):
        with pytest.raises(BlobUploadInvalid):
            await call
    await new.write(data[new.offset : 200_000])
    with contextlib.suppress(BlobUploadInvalid):
        await old.aclose()
    await new.write(data[200_000:])
    await new.commit(digest_of(data))
    assert await read_blob(registry, repo, digest_of(data)) == data
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(data[:100_000]))


@pytest.mark.parametrize("bytes_before_takeover", [0, 10, 3 * MIB])
@pytest.mark.parametrize("late_bytes", [4, 5 * MIB])
@pytest.mark.slow
async def test_writes_after_a_takeover_are_not_acknowledged(
    registry: Registry, repo: RepositoryName, bytes_before_takeover: int, late_bytes: int
) -> None:
    """After a session was taken over, a write by its old writer fails, at the latest in `aclose`. So no client gets a
    good response for bytes that are not stored."""
    old = await registry.start_upload(repo)
    await old.write(some_bytes(bytes_before_takeover))
    new = await registry.resume_upload(repo, old.id)
    with pytest.raises(BlobUploadInvalid):
        await write_and_close(old, some_bytes(late_bytes))
    assert await new.read_at(0, new.offset) == some_bytes(bytes_before_takeover)[: new.offset]
    await new.write(some_bytes(bytes_before_takeover)[new.offset :])
    await new.commit(digest_of(some_bytes(bytes_before_takeover)))
    assert await read_blob(registry, repo, digest_of(some_bytes(bytes_before_takeover))) == some_bytes(
        bytes_before_takeover
    )


async def write_and_close(writer: BlobWriter, data: bytes) -> None:
    """Writes and closes, as the handler of a PATCH does before it sends the response."""
    await writer.write(data)
    await writer.aclose()


async def test_a_session_can_be_taken_over_many_times(registry: Registry, repo: RepositoryName) -> None:
    """If a session is taken over many times, only the newest writer can write."""
    writers = [await registry.start_upload(repo)]
    for number in range(10):
        await writers[-1].write(b"%d" % number)
        await writers[-1].aclose()
        writers.append(await registry.resume_upload(repo, writers[0].id, number + 1))
    for old in writers[:-1]:
        with pytest.raises(BlobUploadInvalid):
            await write_and_close(old, b"x")
    await writers[-1].commit(digest_of(b"0123456789"))
    assert await read_blob(registry, repo, digest_of(b"0123456789")) == b"0123456789"


async def test_one_of_concurrent_resumes_owns_the_session(registry: Registry, repo: RepositoryName) -> None:
    """Of several writers from concurrent resumes, one can commit, and the commits of all others raise."""
    first = await registry.start_upload(repo)
    await first.write(b"bytes")
    await first.aclose()
    writers = await asyncio.gather(*(registry.resume_upload(repo, first.id, 5) for _ in range(6)))
    answers = await asyncio.gather(*(writer.commit(digest_of(b"bytes")) for writer in writers), return_exceptions=True)
    assert sum(not isinstance(answer, BaseException) for answer in answers) == 1
    assert all(isinstance(answer, SESSION_OVER) for answer in answers if isinstance(answer, BaseException))
    assert await read_blob(registry, repo, digest_of(b"bytes")) == b"bytes"


async def test_an_old_writer_after_the_new_one_committed(registry: Registry, repo: RepositoryName) -> None:
    """A writer that has lost its session cannot change the blob that was committed meanwhile."""
    old = await registry.start_upload(repo)
    await old.write(b"content")
    await old.aclose()
    new = await registry.resume_upload(repo, old.id)
    await new.commit(digest_of(b"content"))
    with pytest.raises(SESSION_OVER):
        await old.commit(digest_of(b"content"))
    with pytest.raises(SESSION_OVER):
        await write_and_close(old, b"x")
    assert await read_blob(registry, repo, digest_of(b"content")) == b"content"


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_a_commit_under_a_wrong_digest(registry: Registry, repo: RepositoryName, algorithm: str) -> None:
    """A commit with a wrong digest fails and ends the session. The bytes are stored under neither digest."""
    writer = await registry.start_upload(repo)
    await writer.write(b"what was sent")
    wrong_digest = digest_of(b"what was meant", algorithm)
    with pytest.raises(DigestInvalid):
        await writer.commit(wrong_digest)
    await writer.aclose()
    for digest in (wrong_digest, digest_of(b"what was sent"), digest_of(b"what was sent", algorithm)):
        with pytest.raises(BlobUnknown):
            await registry.resolve_blob(repo, digest)
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(repo, writer.id)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, writer.id)
    with pytest.raises(NameUnknown):
        await registry.tags(repo, None, 10)


async def test_a_wrong_digest_does_not_touch_the_blob_of_that_digest(registry: Registry, repo: RepositoryName) -> None:
    """A commit of other bytes with the digest of an existing blob fails. The existing blob keeps its bytes."""
    await push_blob(registry, repo, b"the true bytes")
    writer = await registry.start_upload(repo)
    await writer.write(b"other bytes")
    with pytest.raises(DigestInvalid):
        await writer.commit(digest_of(b"the true bytes"))
    assert await read_blob(registry, repo, digest_of(b"the true bytes")) == b"the true bytes"


async def test_nothing_works_after_a_commit(registry: Registry, repo: RepositoryName) -> None:
    """After a commit, the session is unknown: a write, a second commit and a resume fail. The blob keeps its bytes."""
    writer = await registry.start_upload(repo)
    await writer.write(b"once")
    await writer.commit(digest_of(b"once"))
    with pytest.raises(SESSION_OVER):
        await writer.write(b"x")
    with pytest.raises(SESSION_OVER):
        await writer.commit(digest_of(b"once"))
    await writer.aclose()
    await writer.aclose()
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(repo, writer.id)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, writer.id)
    assert await read_blob(registry, repo, digest_of(b"once")) == b"once"


async def test_a_cancelled_session_is_gone(registry: Registry, repo: RepositoryName) -> None:
    """After `cancel`, the session is unknown, and its bytes are not stored as a blob."""
    writer = await registry.start_upload(repo)
    await writer.write(b"never mind")
    await writer.cancel()
    await writer.aclose()
    with pytest.raises(SESSION_OVER):
        await writer.write(b"x")
    with pytest.raises(SESSION_OVER):
        await writer.commit(digest_of(b"never mind"))
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(repo, writer.id)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, writer.id)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(b"never mind"))


async def test_a_resumed_session_can_be_cancelled(registry: Registry, repo: RepositoryName) -> None:
    """A session can be cancelled by a writer that has resumed it."""
    writer = await registry.start_upload(repo)
    await writer.write(b"never mind")
    await (await registry.resume_upload(repo, writer.id)).cancel()
    with pytest.raises(SESSION_OVER):
        await write_and_close(writer, b"x")
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, writer.id)


async def test_an_unknown_session(registry: Registry, repo: RepositoryName) -> None:
    """A session id that was never given out is unknown."""
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(repo, UploadID.random())
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(repo, UploadID.random(), 0)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, UploadID.random())


async def test_a_session_belongs_to_its_repository(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A session is unknown in another repository. A resume in the other repository does not take the session over."""
    writer = await registry.start_upload(repo)
    await writer.write(b"mine")
    with pytest.raises(BlobUploadUnknown):
        await registry.resume_upload(other, writer.id)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(other, writer.id)
    await writer.commit(digest_of(b"mine"))
    assert await read_blob(registry, repo, digest_of(b"mine")) == b"mine"
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(other, digest_of(b"mine"))


async def test_a_session_belongs_to_the_account_that_started_it(registry: Registry, repo: RepositoryName) -> None:
    """A session is unknown to another account, and a resume by that account does not take the session over. The account
    that started it can resume it from any address. Code that gives no account can resume any session."""
    writer = await registry.start_upload(repo, by=BY)
    await writer.write(b"mine")
    somebody = Actor("somebody else", BY.address)
    with pytest.raises(BlobUploadUnknown):
        await registry.upload_offset(repo, writer.id, by=somebody)
    for offset in (None, 0, 4):
        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(repo, writer.id, offset, by=somebody)
    await writer.write(b" still")
    await writer.aclose()
    writer = await registry.resume_upload(repo, writer.id, 10, by=Actor(BY.name, "192.0.2.1"))
    await writer.aclose()
    assert await registry.upload_offset(repo, writer.id) == 10
    writer = await registry.resume_upload(repo, writer.id)
    assert (await writer.commit(digest_of(b"mine still"))).size == 10


async def test_a_session_started_without_an_account(registry: Registry, repo: RepositoryName) -> None:
    """A session that was started without an account can be resumed by every account."""
    writer = await registry.start_upload(repo)
    await writer.aclose()
    assert await registry.upload_offset(repo, writer.id, by=BY) == 0
    await (await registry.resume_upload(repo, writer.id, by=BY)).commit(digest_of(b""))


async def test_a_blob_pushed_twice_is_one_blob(registry: Registry, repo: RepositoryName) -> None:
    """A blob can be pushed several times, one push after the other and at the same time."""
    data = some_bytes(100_000)
    await push_blob(registry, repo, data)
    await push_blob(registry, repo, data)
    await asyncio.gather(*(push_blob(registry, repo, data) for _ in range(4)))
    assert await read_blob(registry, repo, digest_of(data)) == data


async def test_one_blob_pushed_to_many_repositories_at_once(registry: Registry) -> None:
    """Pushes of the same bytes to several repositories at the same time all succeed."""
    data = some_bytes(100_000)
    repos = [RepositoryName(f"team/app{number}") for number in range(6)]
    await asyncio.gather(*(push_blob(registry, name, data) for name in repos))
    for name in repos:
        assert await read_blob(registry, name, digest_of(data)) == data


async def test_a_blob_can_be_pushed_again_after_its_deletion(registry: Registry, repo: RepositoryName) -> None:
    """A deleted blob can be pushed again at once."""
    for _ in range(3):
        await push_blob(registry, repo, b"back again")
        assert await read_blob(registry, repo, digest_of(b"back again")) == b"back again"
        await registry.delete_blob(repo, digest_of(b"back again"), by=BY)
        with pytest.raises(BlobUnknown):
            await registry.open_blob(repo, digest_of(b"back again"))


@pytest.mark.parametrize("loop_iterations", [0, 1, 2, 3, 5, 8, 13])
async def test_a_cancelled_commit_is_done_or_not(
    registry: Registry, repo: RepositoryName, loop_iterations: int
) -> None:
    """If a commit is cancelled, as when the client disconnects, either the whole blob is stored or nothing. The next
    push of the blob succeeds. `loop_iterations`: number of iterations of the event loop before the cancellation."""
    data = some_bytes(400_000, loop_iterations)
    writer = await registry.start_upload(repo)
    await writer.write(data)
    commit = asyncio.create_task(writer.commit(digest_of(data)))
    for _ in range(loop_iterations):
        await asyncio.sleep(0)
    commit.cancel()
    await asyncio.gather(commit, return_exceptions=True)
    await writer.aclose()
    with contextlib.suppress(BlobUnknown):
        assert await read_blob(registry, repo, digest_of(data)) == data
    await push_blob(registry, repo, data)
    assert await read_blob(registry, repo, digest_of(data)) == data


@pytest.mark.parametrize("loop_iterations", [0, 1, 2, 3, 5, 8])
async def test_a_cancelled_write_keeps_what_was_written_before(
    registry: Registry, repo: RepositoryName, loop_iterations: int
) -> None:
    """If a write is cancelled, as when the client disconnects, the session can be resumed. The bytes of earlier writes
    are stored. Bytes of the cancelled write may be stored, and are correct if they are. `loop_iterations`: number of
    iterations of the event loop before the cancellation."""
    data = some_bytes(1_500_000, loop_iterations)
    writer = await registry.start_upload(repo)
    await writer.write(data[:500_000])
    write = asyncio.create_task(writer.write(data[500_000:]))
    for _ in range(loop_iterations):
        await asyncio.sleep(0)
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    await writer.aclose()
    offset = await registry.upload_offset(repo, writer.id)
    assert 500_000 <= offset <= len(data)
    resumed = await registry.resume_upload(repo, writer.id, offset)
    assert await resumed.read_at(0, offset) == data[:offset]
    await resumed.write(data[offset:])
    await resumed.commit(digest_of(data))
    assert await read_blob(registry, repo, digest_of(data)) == data
