"""Tests of several requests for one upload session at the same time. A later request takes over the session from its
owner, perhaps on another worker. `asyncio.wait` gives the later request time to start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.errors import BlobUnknown, BlobUploadInvalid, BlobUploadUnknown
from storage.interface import BlobWriter
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.system.race.conftest import future_clock
from tests.system.race.content_kinds import KINDS, ContentKind
from tests.system.race.gated_system import TIMEOUT_SECONDS, GatedSystem, open_gated, pull, push

APP = RepositoryName("team/app")
BODY = random.Random(3).randbytes(3_000_000)
DIGEST = digest_of(BODY)
OTHER_BODY = random.Random(4).randbytes(3_000_000)


@pytest.fixture
async def second(data: Path, kind: ContentKind) -> AsyncIterator[StoredRegistry]:
    """A second registry with the same data directory, like that of another worker."""
    async with open_gated(data, kind, GatedSystem(), future_clock) as opened:
        yield opened


async def test_old_owner_cannot_write_after_a_takeover(
    registry: StoredRegistry, second: StoredRegistry, system: GatedSystem, kind: ContentKind
) -> None:
    """A request takes over an upload session in the middle of a write. The new owner continues after the bytes stored
    so far. Later writes of the old owner are refused. The finished blob has the right bytes."""
    old = await registry.start_upload(APP)
    await old.write(BODY[:100_000])
    await old.aclose()
    old = await registry.resume_upload(APP, old.id)
    gate = system.stop_at(*kind.steps["write"])
    stalled_write = asyncio.create_task(old.write(BODY[100_000:2_500_000]))
    await gate.reached()
    takeover = asyncio.create_task(second.resume_upload(APP, old.id))
    await asyncio.wait([takeover], timeout=0.05)
    gate.open()
    new = await takeover
    assert new.offset <= 2_500_000
    assert new.offset > 100_000 if kind.keeps_half_writes else new.offset >= 100_000
    assert await new.read_at(0, new.offset) == BODY[: new.offset]
    with contextlib.suppress(BlobUploadInvalid):  # the takeover may come before a part of this write
        await stalled_write
    with pytest.raises(BlobUploadInvalid):
        await _write_and_close(old, OTHER_BODY)
    await new.write(BODY[new.offset :])
    await new.commit(DIGEST)
    await new.aclose()
    assert await pull(registry, APP, DIGEST) == BODY


async def _write_and_close(writer: BlobWriter, body: bytes) -> None:
    await writer.write(body)
    await writer.aclose()


async def test_one_of_many_simultaneous_takeovers_wins(registry: StoredRegistry, second: StoredRegistry) -> None:
    """Eight requests on two workers resume one upload session. Exactly one of them can finish the upload. The blob has
    the right bytes."""
    first = await registry.start_upload(APP)
    await first.write(BODY[:500_000])
    await first.aclose()
    writers = await asyncio.gather(*((registry, second)[n % 2].resume_upload(APP, first.id) for n in range(8)))
    assert {writer.offset for writer in writers} == {500_000}

    async def finish(writer: object) -> bool:
        try:
            await writer.write(BODY[500_000:])  # type: ignore[attr-defined]
            await writer.commit(DIGEST)  # type: ignore[attr-defined]
            return True
        except (BlobUploadInvalid, BlobUploadUnknown):
            return False
        finally:
            with contextlib.suppress(BlobUploadInvalid, BlobUploadUnknown):
                await writer.aclose()  # type: ignore[attr-defined]

    assert sum(await asyncio.gather(*map(finish, writers))) == 1
    assert await pull(second, APP, DIGEST) == BODY
    assert await registry.blobs.list_uploads() == []


@pytest.mark.parametrize("step", ["verify", "before_move", "after_move", "commit"])
@pytest.mark.parametrize("act", ["resume", "cancel"])
async def test_commit_or_concurrent_takeover_wins_but_not_both(
    act: str, step: str, kind: ContentKind, registry: StoredRegistry, second: StoredRegistry, system: GatedSystem
) -> None:
    """While one request commits an upload, another resumes the session and commits or cancels it. Exactly one of the
    two succeeds. The blob exists afterwards, except after a successful cancel. `step`: where the first request is
    stopped (`ContentKind.steps`)."""
    old = await registry.start_upload(APP)
    await old.write(BODY)
    await old.aclose()
    old = await registry.resume_upload(APP, old.id)
    gate = system.stop_at(*kind.steps[step])
    committing = asyncio.create_task(old.commit(DIGEST))
    await gate.reached()

    async def finish_or_cancel() -> bool:
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

    second_request = asyncio.create_task(finish_or_cancel())
    await asyncio.wait([second_request], timeout=0.05)
    gate.open()
    try:
        await committing
        committed = True
    except (BlobUploadInvalid, BlobUploadUnknown):
        committed = False
    is_second_successful = await second_request
    await asyncio.gather(old.aclose(), return_exceptions=True)
    assert committed != is_second_successful
    if committed or act == "resume":
        assert await pull(second, APP, DIGEST) == BODY
    else:
        with pytest.raises(BlobUnknown):
            await pull(second, APP, DIGEST)
    with pytest.raises(BlobUploadUnknown):
        await second.upload_offset(APP, old.id)
    assert await registry.blobs.list_uploads() == []


@pytest.mark.parametrize("kind", [KINDS["files"]], ids=["files"])
async def test_file_stays_open_until_a_cancelled_write_has_ended(
    registry: StoredRegistry, system: GatedSystem, tmp_path: Path
) -> None:
    """A request is cancelled while a thread writes its last bytes. The file is closed only after the write. Otherwise
    the thread could write into another file with the same descriptor."""
    writer = await registry.start_upload(APP)
    pieces = [BODY[offset : offset + 100] for offset in range(0, 90_000, 100)]
    for piece in pieces:
        await writer.write(piece)
    gate = system.stop_at("write")
    closing = asyncio.create_task(writer.aclose())
    await gate.reached()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    other_files = [os.open(tmp_path / f"victim {n}", os.O_RDWR | os.O_CREAT) for n in range(20)]
    gate.open()
    system.gate = None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while system.written < 90_000:  # noqa: ASYNC110  a thread counts the bytes
            await asyncio.sleep(0)
    resumed = await registry.resume_upload(APP, writer.id)
    try:
        assert [os.fstat(fd).st_size for fd in other_files] == [0] * len(other_files)
        assert await resumed.read_at(0, len(BODY)) == BODY[: resumed.offset]
        assert resumed.offset == 90_000
    finally:
        for fd in other_files:
            os.close(fd)
        await resumed.aclose()


async def test_two_takeovers_after_a_reboot_keep_acknowledged_bytes(data: Path, kind: ContentKind) -> None:
    """After a power cut, two requests take over an upload session at the same time, and both have read its state from
    before the cut. While the takeover by `slow` is stopped, `quick` appends bytes. If these bytes are acknowledged, the
    takeover by `slow` does not remove them."""
    async with open_gated(data, kind, GatedSystem(), future_clock, boot="first boot") as before_cut:
        writer = await before_cut.start_upload(APP)
        await writer.write(BODY[:1_100_000])
        await writer.aclose()
    system = GatedSystem()
    async with (
        open_gated(data, kind, system, future_clock, boot="second boot") as slow,
        open_gated(data, kind, GatedSystem(), future_clock, boot="second boot") as quick,
    ):
        gate = system.stop_at(*kind.steps["take_over"])
        resuming = asyncio.create_task(slow.resume_upload(APP, writer.id))
        await gate.reached()
        appending = asyncio.create_task(_append(quick, writer.id, BODY[1_100_000:1_200_000]))
        await asyncio.wait([appending], timeout=0.05)
        gate.open()
        results = await asyncio.gather(resuming, appending, return_exceptions=True)
        acknowledged_bytes = 1_200_000 if not isinstance(results[1], BaseException) else 1_100_000
        last = await quick.resume_upload(APP, writer.id)
        assert last.offset >= acknowledged_bytes
        await last.write(BODY[last.offset :])
        await last.commit(DIGEST)
        assert await pull(slow, APP, DIGEST) == BODY


async def _append(registry: StoredRegistry, upload: object, body: bytes) -> None:
    """Resumes the upload session, and writes `body`."""
    writer = await registry.resume_upload(APP, upload)  # type: ignore[arg-type]
    await writer.write(body)
    await writer.aclose()


async def test_pushes_of_different_content_do_not_mix(registry: StoredRegistry, second: StoredRegistry) -> None:
    """Twenty pushes of different content run at the same time on two workers. Each blob has the right bytes."""
    bodies = [random.Random(100 + n).randbytes(200_000 + n) for n in range(20)]
    await asyncio.gather(*(push((registry, second)[n % 2], APP, body) for n, body in enumerate(bodies)))
    for body in bodies:
        assert await pull(registry, APP, digest_of(body)) == body
