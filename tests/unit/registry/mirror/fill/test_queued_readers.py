"""What a *queued reader* reads: a reader of a blob whose fill (its download) still waits for a connection to the
upstream, so that the blob's partial (the file with the bytes that have arrived) may still be replaced or deleted."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.mirror.entitlement import BlobEntitlement
from registry.mirror.withheld_last_byte import UnverifiedBlobReader
from storage.composition import open_registry
from storage.content import Actor, Descriptor, Span
from storage.errors import BlobUnknown, Denied, PartialBlobLost, RegistryError, TooManyOpenFiles, UpstreamUnavailable
from storage.interface import BlobReader
from storage.names import Digest, RepositoryName, Tag
from storage.partials import Partial
from storage.store.stored_registry import StoredRegistry
from tests.fakes.open_files import open_files_below
from tests.fakes.registry_content import image_of, read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    OTHER,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    open_in_time,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

TAG = Tag("1")
Read = Callable[[BlobReader], Awaitable[bytes]]
SPANS = [None, Span(0, 5 * MIB), Span(5 * MIB, 9 * MIB), Span(-MIB)]
SOURCE = "docker.io"
WRONG_BYTES = bytes(len(BIG))


@pytest.fixture
def site(site: MirrorSite) -> MirrorSite:
    """A site whose clients wait a short time for a free connection, and whose upstream has `BIG` in two
    repositories."""
    site.start_timeout = 0.2
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.add_image("library/other", BIG)
    return site


@asynccontextmanager
async def all_connections_taken(worker: MirrorWorker) -> AsyncIterator[None]:
    """Takes the 4 connections to the upstream inside the `async with` block, as other fills would."""
    async with AsyncExitStack() as stack:
        for _ in range(4):
            assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 4))
        yield


async def store_from_another_source(store: StoredRegistry) -> None:
    """Stores `BIG` in a repository of the upstream, as the other of the shared and the separate fill would."""
    upload = await store.start_upload(RepositoryName("docker.io/library/third"), by=Actor(name="mirror"))
    await upload.write(BIG)
    await upload.commit(DIGEST)
    await upload.aclose()


async def open_queued(worker: MirrorWorker, repo: RepositoryName, span: Span | None = None) -> BlobReader:
    """Opens the blob while its fill is queued."""
    reader = await open_in_time(worker, repo, DIGEST, span)
    assert isinstance(reader, UnverifiedBlobReader)
    return reader


def expected(span: Span | None) -> bytes:
    start, stop = span.to_offsets(len(BIG)) if span else (0, len(BIG))
    return BIG[start:stop]


async def read_as_the_server(reader: BlobReader) -> bytes:
    """Reads the reader's file as the server does, which passes the file to sendfile(2): asks for the file once, before
    it waits for the first byte."""
    file, body = reader.file, b""
    assert file is not None
    offset, stop = reader.span
    try:
        while offset < stop:
            ready_end = await reader.readable_until(offset)
            body += os.pread(file.fd, ready_end - offset, file.offset + offset)
            offset = ready_end
    finally:
        await reader.aclose()
    return body


async def outcome_of(reader: BlobReader) -> bytes | type[RegistryError]:
    """Returns what the reader reads, or the class of its error."""
    try:
        return await read_to_end(reader)
    except RegistryError as error:
        return type(error)


@asynccontextmanager
async def two_workers(site: MirrorSite) -> AsyncIterator[tuple[MirrorWorker, MirrorWorker]]:
    """Two workers that have the manifest: the first one in `MIRRORED_REPO`, the second one in `OTHER`."""
    async with site.worker() as worker_1, site.worker(source_of_another_worker(site)) as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
        await worker_2.mirror.get_manifest(OTHER, TAG)
        yield worker_1, worker_2


def all_right(bodies: Sequence[bytes]) -> bool:
    """Returns whether the bodies are the bytes of `SPANS`, in this order."""
    return all(body == expected(span) for body, span in zip(bodies, SPANS, strict=True))


@pytest.mark.parametrize("read", [read_to_end, read_as_the_server])
@pytest.mark.parametrize(
    "error", [UpstreamUnavailable("503"), Denied("no"), BlobUnknown("gone")], ids=lambda e: type(e).__name__
)
async def test_readers_get_the_bytes_of_the_partial_that_replaces_a_deleted_one(
    site: MirrorSite, error: RegistryError, read: Read
) -> None:
    """The owner of a queued fill fails before its first byte, and deletes the partial. Another worker fills a new
    partial. Its readers, which were opened before, get the bytes of the new partial, whole or in ranges, and close the
    deleted file."""
    site.upstream.faults.errors[UPSTREAM_REPO] = error
    async with two_workers(site) as (worker_1, worker_2):
        async with all_connections_taken(worker_1):
            failing = await open_queued(worker_1, MIRRORED_REPO)
            readers = [await open_queued(worker_2, OTHER, span) for span in SPANS]
        assert all_right(await asyncio.gather(*map(read, readers)))
        with pytest.raises(type(error)):
            await read_to_end(failing)
    assert open_files_below(site.data / "partials") == []


async def test_late_reader_gets_the_bytes_of_the_new_partial(site: MirrorSite) -> None:
    """A queued reader from which nothing is read until the fill has ended gets the bytes of the fill's last partial."""
    site.upstream.faults.errors[UPSTREAM_REPO] = Denied("no")
    async with two_workers(site) as (worker_1, worker_2):
        async with all_connections_taken(worker_1):
            failing = await open_queued(worker_1, MIRRORED_REPO)
            late = await open_queued(worker_2, OTHER)
        await wait_until(lambda: not worker_2.mirror.running_fills)
        assert await read_to_end(late) == BIG
        await failing.aclose()


async def test_closed_reader_leaves_its_descriptor_alone(site: MirrorSite, tmp_path: Path) -> None:
    """The descriptor of a closed reader may be that of another file by the time the partial is replaced. This file
    stays open."""
    site.upstream.faults.errors[UPSTREAM_REPO] = Denied("no")
    async with two_workers(site) as (worker_1, worker_2):
        async with all_connections_taken(worker_1):
            failing = await open_queued(worker_1, MIRRORED_REPO)
            closed, reader = [await open_queued(worker_2, OTHER) for _ in range(2)]
            assert closed.file is not None
            descriptor = closed.file.fd
            await closed.aclose()
            other_files = [os.open(tmp_path, os.O_RDONLY)]
            while other_files[-1] != descriptor:  # the system gives the lowest free number, so it comes to this one
                other_files.append(os.open(tmp_path, os.O_RDONLY))
        assert await read_to_end(reader) == BIG
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
        for each in other_files:
            os.close(each)
        await failing.aclose()


@pytest.mark.parametrize("read", [read_to_end, read_as_the_server])
@pytest.mark.parametrize("reads_late", [False, True])
async def test_readers_get_the_stored_blob_if_their_fill_is_not_needed_any_more(
    site: MirrorSite, reads_late: bool, read: Read
) -> None:
    """The blob is stored by another fill while the fill of the readers is queued. Then the owner stops, and another
    worker becomes the owner. It discards the partial, and its readers get the bytes of the stored blob, whole or in
    ranges."""
    async with site.worker(source_of_another_worker(site)) as worker_2:
        async with site.worker() as worker_1:
            await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
            await worker_2.mirror.get_manifest(OTHER, TAG)
            async with all_connections_taken(worker_1):
                abandoned = await open_queued(worker_1, MIRRORED_REPO)
                readers = [await open_queued(worker_2, OTHER, span) for span in SPANS]
                reading = [] if reads_late else [asyncio.ensure_future(read(reader)) for reader in readers]
                await store_from_another_source(worker_2.store)
                await abandoned.aclose()
                await worker_1.mirror.aclose()
                await wait_until(lambda: not worker_2.mirror.running_fills)
        assert all_right(await asyncio.gather(*(reading or map(read, readers))))
    assert open_files_below(site.data / "partials") == []


async def test_reader_fails_if_the_stored_blob_is_gone(site: MirrorSite) -> None:
    """The blob that another fill has stored is deleted before the reader can open it. The reader fails."""
    async with site.worker(source_of_another_worker(site)) as worker_2:
        async with site.worker() as worker_1:
            await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
            await worker_2.mirror.get_manifest(OTHER, TAG)
            async with all_connections_taken(worker_1):
                abandoned = await open_queued(worker_1, MIRRORED_REPO)
                reader = await open_queued(worker_2, OTHER)
                await store_from_another_source(worker_2.store)
                await abandoned.aclose()
                await worker_1.mirror.aclose()
                await wait_until(lambda: not worker_2.mirror.running_fills)
        for name in ("other", "app", "third"):
            repo = RepositoryName(f"docker.io/library/{name}")
            try:
                await worker_2.store.delete_blob(repo, DIGEST, by=Actor(), even_if_referenced=True)
            except BlobUnknown:
                assert name == "app"  # the repository of the abandoned fill
        with pytest.raises(PartialBlobLost):
            await read_to_end(reader)


@pytest.mark.parametrize("stated_size", [len(BIG) - MIB, len(BIG) + MIB])
async def test_reader_of_a_wrong_size_does_not_get_the_stored_blob(site: MirrorSite, stated_size: int) -> None:
    """A manifest states a wrong size of the blob, so that the response has a wrong length. A fill with the right size
    stores the blob. The reader fails: it neither ends early as if the blob were complete, nor reads beyond its end."""
    config = site.upstream.add_blob(UPSTREAM_REPO, b"{}")
    wrong_layer = Descriptor("application/vnd.oci.image.layer.v1.tar", DIGEST, stated_size)
    site.upstream.add_manifest(UPSTREAM_REPO, image_of(config, [wrong_layer]), TAG)
    async with follower(site, b"", stated_size) as (worker, owner, other):
        reader = await open_queued(worker, MIRRORED_REPO)
        assert reader.descriptor.size == stated_size
        await store_from_another_source(other)
        owner.close()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await outcome_of(reader) is PartialBlobLost
    assert open_files_below(site.data / "partials") == []


@asynccontextmanager
async def follower(
    site: MirrorSite, written: bytes, size: int = len(BIG)
) -> AsyncIterator[tuple[MirrorWorker, Partial, StoredRegistry]]:
    """Runs a worker beside a process that owns the partial, and that has not sent a request. The process has stored
    the bytes `written` at the start of the partial. `size`: size of the blob that the manifest states. Yields the
    worker, and the partial and the store of the process."""
    async with site.worker() as worker, open_registry(site.data) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        owner = await other.partials.claim(DIGEST, size, SOURCE)
        assert owner.is_owner
        if written:
            await asyncio.to_thread(owner.write_at, 0, written)
        try:
            yield worker, owner, other
        finally:
            owner.close()


async def test_unverified_bytes_of_a_dead_owner_are_not_served_for_the_stored_blob(site: MirrorSite) -> None:
    """The owner has stored all bytes, wrong ones, and dies before it checks the digest. The blob is stored by another
    fill. A reader that has got nothing yet gets the bytes of the stored blob."""
    async with follower(site, WRONG_BYTES) as (worker, owner, other):
        reader = await open_queued(worker, MIRRORED_REPO)
        await store_from_another_source(other)
        owner.close()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await read_to_end(reader) == BIG


async def test_reader_gets_the_rest_from_the_file_that_it_has_begun_to_read(site: MirrorSite) -> None:
    """A reader has got a part of the bytes of an owner that then dies, and the blob is stored by another fill. The
    reader's file is verified all the same, and the reader gets the rest only if that file has the right digest."""
    async with follower(site, BIG) as (worker, owner, other):
        reader = await open_queued(worker, MIRRORED_REPO)
        assert await reader.readable_until(0) == len(BIG) - 1
        await store_from_another_source(other)
        owner.close()
        assert await read_to_end(reader) == BIG


async def test_reader_does_not_mix_wrong_bytes_with_the_stored_blob(site: MirrorSite) -> None:
    """A reader has got wrong bytes of an owner that then dies, and the blob is stored by another fill. The reader
    fails before its last byte."""
    async with follower(site, WRONG_BYTES) as (worker, owner, other):
        reader = await open_queued(worker, MIRRORED_REPO)
        assert await reader.readable_until(0) == len(BIG) - 1
        await store_from_another_source(other)
        owner.close()
        with pytest.raises(RegistryError):
            await reader.readable_until(len(BIG) - 1)
        await reader.aclose()
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


@pytest.mark.parametrize(("written", "reads_first"), [(0, False), (MIB, False), (MIB, True)])
async def test_reader_that_is_opened_while_its_fill_looks_for_a_stored_blob(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch, written: int, reads_first: bool
) -> None:
    """A fill continues the partial of a dead owner, and finds that the blob is stored. A reader that was opened just
    before gets the bytes of the stored blob. It fails if it has got bytes of the partial, which nobody verifies."""
    async with site.worker() as worker, open_registry(site.data) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        owner = await other.partials.claim(DIGEST, len(BIG), SOURCE)
        await asyncio.to_thread(owner.write_at, 0, WRONG_BYTES[:written])
        owner.close()
        may_mount, test = asyncio.Event(), asyncio.current_task()
        mount = BlobEntitlement.mount

        async def mount_later(*arguments: Any) -> RepositoryName | None:
            if asyncio.current_task() is not test:  # the call by the fill, not the one before it
                await may_mount.wait()
            return await mount(*arguments)

        monkeypatch.setattr(BlobEntitlement, "mount", mount_later)
        reader = await open_queued(worker, MIRRORED_REPO)
        if reads_first:
            assert await reader.readable_until(0) == written
        await store_from_another_source(other)
        may_mount.set()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await outcome_of(reader) == (PartialBlobLost if reads_first else BIG)


@pytest.mark.parametrize("reads_first", [False, True])
async def test_reader_does_not_mix_the_bytes_of_two_partials(site: MirrorSite, reads_first: bool) -> None:
    """The owner discards a partial with some wrong bytes. A reader that has got some of them fails. Another one gets
    the bytes of the next partial, or fails."""
    async with follower(site, b"") as (worker, owner, _):
        reader = await open_queued(worker, MIRRORED_REPO)
        owner.write_at(0, WRONG_BYTES[:MIB])
        if reads_first:
            assert await reader.readable_until(0) == MIB  # reads the progress without a pause
        await owner.discard()
        owner.close()
        assert await outcome_of(reader) in ([PartialBlobLost] if reads_first else [BIG, PartialBlobLost])


async def test_reader_that_gets_old_bytes_while_the_partial_is_replaced(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader gets bytes of a deleted partial at the moment when its fill claims the next one. It fails, because only
    the digest of the next partial will be checked."""
    async with follower(site, b"") as (worker, owner, _):
        reader = await open_queued(worker, MIRRORED_REPO)
        is_claiming, may_claim = asyncio.Event(), asyncio.Event()
        claim = worker.store.partials.claim

        async def claim_later(digest: Digest, size: int, source: str = "") -> Partial:
            is_claiming.set()
            await may_claim.wait()
            return await claim(digest, size, source)

        monkeypatch.setattr(worker.store.partials, "claim", claim_later)
        (fill,) = worker.mirror.running_fills
        assert fill._partial is not None
        old_wait = fill._partial.wait
        await owner.discard()
        owner.close()
        await is_claiming.wait()

        async def wait_with_old_bytes(offset: int) -> int:
            """Returns bytes that had arrived before the partial was deleted."""
            return MIB if offset < MIB else await old_wait(offset)

        monkeypatch.setattr(fill._partial, "wait", wait_with_old_bytes)
        assert await reader.readable_until(0) == MIB
        may_claim.set()
        with pytest.raises(PartialBlobLost):
            await read_to_end(reader)
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_reader_is_told_of_old_bytes_after_the_partial_was_replaced(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader waits for bytes of a partial. They arrive, but before the reader continues, the partial is deleted, and
    the reader gets the file of the next one. It waits for the bytes of the next one."""
    stall = site.upstream.faults.stall = asyncio.Event()
    async with follower(site, b"") as (worker, owner, _):
        reader = await open_queued(worker, MIRRORED_REPO)
        (fill,) = worker.mirror.running_fills
        old_partial = fill._partial
        is_waiting, may_continue = asyncio.Event(), asyncio.Event()

        async def wait_for_old_bytes(offset: int) -> int:
            is_waiting.set()
            await may_continue.wait()
            return MIB

        monkeypatch.setattr(old_partial, "wait", wait_for_old_bytes)
        reading = asyncio.create_task(read_to_end(reader))
        await is_waiting.wait()
        await owner.discard()
        owner.close()
        await wait_until(lambda: fill._partial is not old_partial)
        may_continue.set()
        await wait_until(lambda: len(fill.demand.reader_offsets) == 1 and site.upstream.calls["get blob"] == 1)
        stall.set()
        assert await reading == BIG


async def test_old_bytes_are_no_response_of_the_upstream(site: MirrorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued reader gets the bytes of a dead owner, and then the upstream does not respond to the request for the
    rest. Clients of another repository get the blob through a separate fill. When the upstream responds, the first
    reader gets the rest, too."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.05)
    stall = site.upstream.faults.stall = asyncio.Event()
    site.upstream.faults.stalled_repos = {UPSTREAM_REPO}
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, TAG)
        owner = await worker.store.partials.claim(DIGEST, len(BIG), SOURCE)
        await asyncio.to_thread(owner.write_at, 0, BIG[:MIB])
        owner.close()
        async with all_connections_taken(worker):
            first = await open_queued(worker, MIRRORED_REPO)
            assert await first.readable_until(0) == MIB
        worker.set_start_timeout(60)  # from now on, clients wait for the upstream
        reading = asyncio.create_task(read_to_end(first))
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        async with asyncio.timeout(30):
            bodies = await asyncio.gather(*(read_blob(worker.mirror, OTHER, DIGEST) for _ in range(4)))
        assert bodies == [BIG] * 4
        assert not reading.done()
        stall.set()
        assert await reading == BIG


async def test_partial_that_a_reader_uses_is_kept_if_another_process_continues_it(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader has got bytes of an owner that then stops, before the upstream has responded to any process. Another
    process becomes the owner before the fill of the reader can, and stores the blob. The reader gets the rest."""
    async with follower(site, BIG) as (worker, owner, other):
        reader = await open_queued(worker, MIRRORED_REPO)
        assert await reader.readable_until(0) == len(BIG) - 1
        next_owner = await other.partials.claim(DIGEST, len(BIG), SOURCE)
        (fill,) = worker.mirror.running_fills
        assert fill._partial is not None
        take_ownership = fill._partial.take_ownership
        has_been_late = asyncio.Event()

        def take_ownership_late() -> bool:
            next_owner.take_ownership()
            has_been_late.set()
            return take_ownership()

        monkeypatch.setattr(fill._partial, "take_ownership", take_ownership_late)
        owner.close()
        await has_been_late.wait()
        assert next_owner.is_owner
        await next_owner.commit(RepositoryName("docker.io/library/third"))
        assert await read_to_end(reader) == BIG
        next_owner.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
async def test_reader_without_a_free_descriptor(site: MirrorSite, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If the process has too many files open for a further reader, the client is told to try again. The fill
    continues."""
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)

        def refuse(fd: int) -> int:
            raise OSError(code, os.strerror(code))

        async with all_connections_taken(worker):
            with monkeypatch.context() as patched:
                patched.setattr(os, "dup", refuse)
                with pytest.raises(TooManyOpenFiles):
                    await open_queued(worker, MIRRORED_REPO)
            reader = await open_queued(worker, MIRRORED_REPO)
        assert await read_to_end(reader) == BIG
