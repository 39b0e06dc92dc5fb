"""Several requests for one upload session."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.errors import BlobUnknown, BlobUploadInvalid, BlobUploadUnknown, RegistryError
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.system.race.conftest import later
from tests.system.race.content_kinds import KINDS, ContentKind
from tests.system.race.gated_system import TIMEOUT_SECONDS, GatedSystem, open_gated, pull, push

APP = RepositoryName("team/app")
BODY = random.Random(3).randbytes(3_000_000)
DIGEST = digest_of(BODY)
OTHER = random.Random(4).randbytes(3_000_000)


@pytest.fixture
async def second(data: Path, kind: ContentKind) -> AsyncIterator[StoredRegistry]:
    """Opens another worker's registry over the same data."""
    async with open_gated(data, kind, GatedSystem(), later) as opened:
        yield opened


async def test_a_stalled_owner_cannot_change_a_byte_after_a_takeover(
    registry: StoredRegistry, second: StoredRegistry, system: GatedSystem, kind: ContentKind
) -> None:
    """A newer request takes over a session whose old owner is in the middle of a write. It counts the bytes stored so
    far, later bytes of the old owner are never stored, and the blob has the right bytes."""
    old = await registry.start_upload(APP)
    await old.write(BODY[:100_000])
    await old.aclose()
    old = await registry.resume_upload(APP, old.id)
    gate = system.stop_at(*kind.steps["write"])
    stalled = asyncio.create_task(_write_and_close(old, BODY[100_000:2_500_000]))
    await gate.reached()
    taking = asyncio.create_task(second.resume_upload(APP, old.id))
    await asyncio.wait([taking], timeout=0.05)
    gate.open()
    new = await taking
    assert new.offset <= 2_500_000
    assert new.offset > 100_000 if kind.keeps_half_writes else new.offset >= 100_000
    assert await new.read_at(0, new.offset) == BODY[: new.offset]
    await stalled
    refused = await _write_and_close(old, OTHER)
    assert isinstance(refused, BlobUploadInvalid)
    await new.write(BODY[new.offset :])
    await new.commit(DIGEST)
    await new.aclose()
    assert await pull(registry, APP, DIGEST) == BODY


async def _write_and_close(writer: object, body: bytes) -> RegistryError | None:
    try:
        await writer.write(body)  # type: ignore[attr-defined]
        await writer.write(OTHER)  # type: ignore[attr-defined]
        await writer.aclose()  # type: ignore[attr-defined]
    except RegistryError as error:
        return error
    return None


async def test_of_many_takeovers_at_once_one_owns_the_session(registry: StoredRegistry, second: StoredRegistry) -> None:
    """Eight requests resume one session at once, on two workers. One of them can finish it, and the blob has the right
    bytes."""
    first = await registry.start_upload(APP)
    await first.write(BODY[:500_000])
    await first.aclose()
    taken = await asyncio.gather(*((registry, second)[n % 2].resume_upload(APP, first.id) for n in range(8)))
    assert {writer.offset for writer in taken} == {500_000}

    async def finish(writer: object) -> bool:
        try:
            await writer.write(BODY[500_000:])  # type: ignore[attr-defined]
            await writer.commit(DIGEST)  # type: ignore[attr-defined]
            return True
        except (BlobUploadInvalid, BlobUploadUnknown):
            return False
        finally:
            try:
                await writer.aclose()  # type: ignore[attr-defined]
            except (BlobUploadInvalid, BlobUploadUnknown):
                assert True

    assert sum(await asyncio.gather(*map(finish, taken))) == 1
    assert await pull(second, APP, DIGEST) == BODY
    assert await registry.blobs.list_uploads() == []


@pytest.mark.parametrize("step", ["verify", "publish", "published", "commit"])
@pytest.mark.parametrize("act", ["resume", "cancel"])
async def test_a_commit_and_whoever_takes_the_session_meanwhile_have_one_winner(
    act: str, step: str, kind: ContentKind, registry: StoredRegistry, second: StoredRegistry, system: GatedSystem
) -> None:
    """A takeover or a cancel meets a commit: either the commit is acknowledged and the blob is stored, or the other
    request has the session. It is never both, and never neither."""
    old = await registry.start_upload(APP)
    await old.write(BODY)
    await old.aclose()
    old = await registry.resume_upload(APP, old.id)
    gate = system.stop_at(*kind.steps[step])
    committing = asyncio.create_task(old.commit(DIGEST))
    await gate.reached()

    async def other() -> bool:
        try:
            new = await second.resume_upload(APP, old.id)
            if act == "cancel":
                await new.cancel()
                return True
            assert new.offset == len(BODY)
            await new.commit(DIGEST)
            return True
        except (BlobUploadUnknown, BlobUploadInvalid):
            return False

    others = asyncio.create_task(other())
    await asyncio.wait([others], timeout=0.05)
    gate.open()
    try:
        await committing
        committed = True
    except (BlobUploadInvalid, BlobUploadUnknown):
        committed = False
    won = await others
    await asyncio.gather(old.aclose(), return_exceptions=True)
    assert committed != won
    if committed or act == "resume":
        assert await pull(second, APP, DIGEST) == BODY
    else:
        with pytest.raises(BlobUnknown):
            await pull(second, APP, DIGEST)
    with pytest.raises(BlobUploadUnknown):
        await second.upload_offset(APP, old.id)
    assert await registry.blobs.list_uploads() == []


@pytest.mark.parametrize("kind", [KINDS["files"]], ids=["files"])
async def test_a_file_is_not_closed_under_a_thread_that_still_writes_to_it(
    registry: StoredRegistry, system: GatedSystem, tmp_path: Path
) -> None:
    """A request that is cancelled while its last bytes are being written closes the file only after the write.
    Otherwise the next opened file could get the same number, and the bytes."""
    writer = await registry.start_upload(APP)
    pieces = [BODY[at : at + 100] for at in range(0, 90_000, 100)]
    for piece in pieces:
        await writer.write(piece)
    gate = system.stop_at("write")
    closing = asyncio.create_task(writer.aclose())
    await gate.reached()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    victims = [os.open(tmp_path / f"victim {n}", os.O_RDWR | os.O_CREAT) for n in range(20)]
    gate.open()
    system.gate = None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while system.written < 90_000:  # noqa: ASYNC110  it is a thread that counts
            await asyncio.sleep(0)
    taken = await registry.resume_upload(APP, writer.id)
    try:
        assert [os.fstat(fd).st_size for fd in victims] == [0] * len(victims)
        assert await taken.read_at(0, len(BODY)) == BODY[: taken.offset]
        assert taken.offset == 90_000
    finally:
        for fd in victims:
            os.close(fd)
        await taken.aclose()


async def test_a_takeover_after_a_reboot_by_two_keeps_what_the_first_acknowledged(
    data: Path, kind: ContentKind
) -> None:
    """After a power cut two requests that have read the session's old state resume it at once. The second does not cut
    off what the first acknowledged since."""
    async with open_gated(data, kind, GatedSystem(), later, "first run") as before:
        writer = await before.start_upload(APP)
        await writer.write(BODY[:1_100_000])
        await writer.aclose()
    system = GatedSystem()
    async with (
        open_gated(data, kind, system, later, "second run") as slow,
        open_gated(data, kind, GatedSystem(), later, "second run") as quick,
    ):
        gate = system.stop_at(*kind.steps["take_over"])
        resuming = asyncio.create_task(slow.resume_upload(APP, writer.id))
        await gate.reached()
        taking = asyncio.create_task(_append(quick, writer.id, BODY[1_100_000:1_200_000]))
        await asyncio.wait([taking], timeout=0.05)
        gate.open()
        results = await asyncio.gather(resuming, taking, return_exceptions=True)
        acknowledged = 1_200_000 if not isinstance(results[1], BaseException) else 1_100_000
        last = await quick.resume_upload(APP, writer.id)
        assert last.offset >= acknowledged
        await last.write(BODY[last.offset :])
        await last.commit(DIGEST)
        assert await pull(slow, APP, DIGEST) == BODY


async def _append(registry: StoredRegistry, upload: object, body: bytes) -> None:
    writer = await registry.resume_upload(APP, upload)  # type: ignore[arg-type]
    await writer.write(body)
    await writer.aclose()


async def test_two_pushes_of_different_content_do_not_mix(registry: StoredRegistry, second: StoredRegistry) -> None:
    """Twenty pushes at once on two workers, each with its own bytes, give twenty blobs with the right bytes."""
    bodies = [random.Random(100 + n).randbytes(200_000 + n) for n in range(20)]
    await asyncio.gather(*(push((registry, second)[n % 2], APP, body) for n, body in enumerate(bodies)))
    for body in bodies:
        assert await pull(registry, APP, digest_of(body)) == body
