"""A `BlobStore` that keeps blobs and upload sessions as objects of a bucket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from storage.blobs.blob_store import (
    BlobStore,
    BytesMissing,
    Checkpoint,
    ContentCheck,
    LinkRefused,
    ListedBlob,
    OnRead,
    QuarantinedBytes,
    VerifiedContent,
)
from storage.blobs.files.file_partial_store import DownloadedContent, FilePartialStore
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.data_dir.disk import Disk
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, DigestInvalid, StorageFailed
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import Digest, RepositoryName, UploadID
from storage.partials import Partials
from storage.running_digest import RunningDigest, restore_digest, start_digest
from storage.store.publication import Publication
from tests.fakes.object_store.bucket import Bucket, NoSuchKey, PreconditionFailed
from tests.fakes.object_store.upload_objects import PREFIX, UploadObjects

PIECE = 256 * 1024
"""Largest number of bytes that are read at once."""
MAX_BUFFERED_BYTES = 64 * 1024
SHARDS = "0123456789abcdef"


class ObjectReader:
    """A `BlobReader` for a range of an object whose GET has begun. `data`: the bytes of a small range, which are
    already read; None: the range is larger."""

    file: OpenFile | None = None
    location: str | None = None
    is_incomplete = False

    def __init__(
        self, disk: Disk, stream: BinaryIO, data: bytes | None, descriptor: Descriptor, span: tuple[int, int]
    ) -> None:
        self.data = data
        self.descriptor = descriptor
        self.span = span
        self._disk = disk
        self._stream = stream

    async def readable_until(self, at: int) -> int:
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data is not None:
            if self.data:
                yield self.data
            return
        remaining = self.span[1] - self.span[0]
        while remaining:
            size = min(PIECE, remaining)
            piece = await self._disk.run(lambda size=size: self._stream.read(size))  # type: ignore[misc]
            if not piece:
                raise StorageFailed("the object is shorter than its blob")
            remaining -= len(piece)
            yield piece

    async def aclose(self) -> None:
        self._stream.close()


class MultipartSession:
    """The writer of an upload session. It collects bytes in memory. When they fill a part of a multipart upload, or
    when the session is flushed, it stores them as a chunk, which is one object."""

    def __init__(self, disk: Disk, objects: UploadObjects, running: RunningDigest, stored: int = 0) -> None:
        """`running`: the running digest of the first `stored` bytes."""
        self._disk = disk
        self._objects = objects
        self._running = running
        self._stored = stored
        """Number of bytes that are stored in objects. They may include bytes of `_part`."""
        self._start = stored
        """The offset at which `_part` begins."""
        self._part = bytearray()

    @classmethod
    def resumed(cls, disk: Disk, objects: UploadObjects, algorithm: str, checkpoint: Checkpoint) -> MultipartSession:
        """Resumes a session. Blocks. If the last chunk is smaller than a part, reads it into memory, so that a larger
        chunk can replace it."""
        stored = objects.size()
        checkpoint.check_not_truncated(stored)
        running, covered = restore_digest(algorithm, checkpoint.state), checkpoint.offset
        if running is None:
            running, covered = start_digest(algorithm), 0
        for piece in objects.read(covered, stored):
            running.update(piece)
        session = cls(disk, objects, running, stored)
        chunks = objects.chunks()
        if chunks and chunks[-1].length < objects.bucket.min_part_bytes:
            session._start = chunks[-1].start
            session._part = bytearray(b"".join(objects.read(session._start, stored)))
        return session

    @property
    def offset(self) -> int:
        return self._start + len(self._part)

    async def append(self, data: bytes | memoryview) -> None:
        self._part += data
        if len(self._part) >= self._objects.bucket.min_part_bytes:
            await self._disk.run(self._put_part)

    async def read_at(self, offset: int, length: int) -> bytes:
        await self._disk.run(self._put_part)
        await self._disk.run(self._objects.check_owner)
        return await self._disk.run(lambda: b"".join(self._objects.read(offset, offset + length)))

    async def flush(self) -> Checkpoint:
        await self._disk.run(self._put_part)
        return Checkpoint(self._stored, self._running.save(), "")

    def _put_part(self) -> None:
        """Stores `_part` as a chunk. A chunk that is too small for a part of a multipart upload stays in `_part`, so
        that a larger chunk can replace it."""
        self._objects.begin()
        if self.offset == self._stored:
            return
        data = bytes(self._part)
        self._objects.put_chunk(self._start, data)
        self._running.update(data[self._stored - self._start :])
        self._stored = self.offset
        if len(data) >= self._objects.bucket.min_part_bytes:
            self._start, self._part = self._stored, bytearray()

    async def verify(self, digest: Digest) -> UploadedObjects:
        await self._disk.run(self._put_part)
        actual = await self._disk.run(lambda: self._digest(digest.algorithm))
        if actual != digest:
            raise DigestInvalid("the content has another digest", {"expected": digest, "actual": actual})
        return UploadedObjects(self._disk, self._objects, digest, self._stored)

    def _digest(self, algorithm: str) -> Digest:
        if algorithm == self._running.algorithm:
            return self._running.digest()
        other = start_digest(algorithm)
        for piece in self._objects.read(0, self._stored):
            other.update(piece)
        return other.digest()

    async def discard(self) -> None:
        def drop() -> None:
            if self._objects.generation:
                self._objects.end()
                self._objects.delete()

        await self._disk.run(drop)

    def release(self) -> None:
        self._part = bytearray()
        self._start = self._stored

    async def close(self) -> None:
        self.release()


class ClaimedObjects:
    """A `ClaimedUpload`: a session that this process has taken over from its former owner."""

    def __init__(self, disk: Disk, objects: UploadObjects) -> None:
        self._disk = disk
        self._objects = objects

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> MultipartSession:
        return await self._disk.run(lambda: MultipartSession.resumed(self._disk, self._objects, algorithm, checkpoint))

    async def discard(self) -> None:
        with suppress(BlobUploadInvalid):
            await MultipartSession(self._disk, self._objects, start_digest("sha256")).discard()

    def release(self) -> None:
        """Does nothing, because a claim is an object and holds no lock."""


class UploadedObjects:
    """A `VerifiedContent`: the chunks of a session whose digest was verified."""

    def __init__(self, disk: Disk, objects: UploadObjects, digest: Digest, size: int) -> None:
        self.digest = digest
        self.size = size
        self.place = place_of(digest)
        self._disk = disk
        self._objects = objects

    async def publish(self) -> None:
        await self._disk.run(self._publish)

    def _publish(self) -> None:
        self._objects.end()
        bucket = self._objects.bucket
        try:
            self._store(bucket)
        except PreconditionFailed:
            if not self._is_stored(bucket):  # the existing object is damaged
                bucket.delete(self.place)
                self._store(bucket)
        self._objects.delete()

    def _store(self, bucket: Bucket) -> None:
        if not self.size:
            bucket.put(self.place, b"")
        else:
            self._assemble(bucket)

    def _is_stored(self, bucket: Bucket) -> bool:
        """Returns whether the existing object has the right bytes. A real store would compare its checksum."""
        running = start_digest(self.digest.algorithm)
        running.update(bucket.read(self.place))
        return running.digest() == self.digest

    def _assemble(self, bucket: Bucket) -> None:
        multipart = bucket.create_multipart(self.place)
        try:
            chunks = self._objects.chunks()
            assert chunks[-1].stop == self.size
            keys = map(self._objects.key, chunks)
            tags = [bucket.copy_part(multipart, number, key) for number, key in enumerate(keys, 1)]
            bucket.complete_multipart(multipart, self.place, tags)
        except BaseException:
            bucket.abort_multipart(multipart)
            raise


class MultipartBlobStore:
    """A `BlobStore` in a bucket. Every write is durable at once. So the store need not know whether the machine was
    rebooted, and `boot` is empty."""

    boot = ""
    shard_count = len(SHARDS)

    def __init__(self, disk: Disk, bucket: Bucket) -> None:
        """`disk`: runs the blocking calls in its threads."""
        self.bucket = bucket
        self._disk = disk

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> ObjectReader:
        within = span.to_offsets(size) if span else (0, size)
        try:
            stream = await self._disk.run(lambda: self.bucket.get(place, within[0]))
        except NoSuchKey:
            raise BytesMissing(place) from None
        length = within[1] - within[0]
        data = await self._disk.run(lambda: stream.read(length)) if length <= MAX_BUFFERED_BYTES else None
        return ObjectReader(self._disk, stream, data, Descriptor(BLOB_TYPE, digest, size), within)

    def start_upload(self, upload: UploadID, algorithm: str) -> MultipartSession:
        return MultipartSession(self._disk, UploadObjects(self.bucket, upload), start_digest(algorithm))

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedObjects]:
        def take() -> ClaimedObjects:
            if check is not None:
                check(UploadObjects(self.bucket, upload).size())
            return ClaimedObjects(self._disk, UploadObjects.take_over(self.bucket, upload))

        return self._disk.run(take)

    async def upload_size(self, upload: UploadID) -> int:
        return await self._disk.run(UploadObjects(self.bucket, upload).size)

    async def discard_upload(self, upload: UploadID) -> None:
        """Deletes the objects of a session, also if its commit was interrupted."""
        await self._disk.run(UploadObjects(self.bucket, upload).delete)

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        found: dict[str, float] = {}
        for listed in await self._disk.run(lambda: self.bucket.list_objects(PREFIX)):
            upload = listed.key.split("/")[1]
            found[upload] = max(found.get(upload, 0.0), listed.modified)
        with suppress(BlobUploadUnknown):  # `UploadID` raises it for a text that is no id
            return [(UploadID(upload), modified) for upload, modified in found.items()]
        raise AssertionError(f"{found} are not all sessions")

    def prepare_link(self, fd: int, digest: Digest, size: int) -> VerifiedContent:
        raise LinkRefused("a bucket has no files")

    async def remove(self, place: str) -> None:
        if place:
            await self._disk.run(lambda: self.bucket.delete(place))

    async def reclaim_space(self) -> None:
        """Does nothing, because deleted objects take no space."""

    async def unreclaimed_size(self) -> int:
        return 0

    async def stored_sizes(self, places: Sequence[str]) -> list[int | None]:
        return [await self._disk.run(lambda place=place: self.bucket.size(place)) for place in places]  # type: ignore[misc]

    async def list_shard(self, number: int) -> list[ListedBlob]:
        found = []
        for algorithm in ("sha256", "sha512"):
            prefix = f"blobs/{algorithm}:{SHARDS[number]}"
            for listed in await self._disk.run(lambda prefix=prefix: self.bucket.list_objects(prefix)):  # type: ignore[misc]
                digest = Digest(listed.key.removeprefix("blobs/"))
                found.append(ListedBlob(digest, listed.key, listed.modified, listed.size))
        return found

    async def check(
        self, digest: Digest, size: int, place: str, on_read: OnRead, *, from_disk: bool = False
    ) -> ContentCheck:
        """Checks the bytes of a blob. Ignores `from_disk`, because a GET has no page cache to bypass."""
        version = await self.version(place)
        if version is None:
            raise BytesMissing(place)
        running, offset = start_digest(digest.algorithm), 0
        try:
            while data := await self._disk.run(lambda start=offset: self.bucket.read(place, start, PIECE)):  # type: ignore[misc]
                running.update(data)
                offset += len(data)
                await on_read(len(data))
        except NoSuchKey:
            raise BytesMissing(place) from None
        if offset != size:
            return ContentCheck(f"the object has {offset} bytes instead of {size}", version)
        actual = running.digest()
        return ContentCheck(None if actual == digest else f"its bytes have the digest {actual}", version)

    async def version(self, place: str) -> str | None:
        return await self._disk.run(lambda: self.bucket.version(place))

    def quarantine_place(self, digest: Digest) -> str:
        return f"quarantine/{digest}"

    async def quarantine(self, digest: Digest, place: str) -> None:
        """Copies the object and deletes the old one, because objects cannot be renamed."""

        def move() -> None:
            with suppress(NoSuchKey):
                self.bucket.copy(place, self.quarantine_place(digest))
                self.bucket.delete(place)

        await self._disk.run(move)

    async def list_quarantine(self) -> list[QuarantinedBytes]:
        listed = await self._disk.run(lambda: self.bucket.list_objects("quarantine/"))
        found = [QuarantinedBytes(Digest(each.key.partition("/")[2]), *each) for each in listed]
        return sorted(found, key=lambda each: each.since)

    async def delete_quarantined(self, digest: Digest) -> bool:
        existed = await self._disk.run(lambda: self.bucket.exists(self.quarantine_place(digest)))
        await self._disk.run(lambda: self.bucket.delete(self.quarantine_place(digest)))
        return existed


def place_of(digest: Digest) -> str:
    return f"blobs/{digest}"


OpenObjects = Callable[[Disk, str, Metadata, DigestLocks], AbstractAsyncContextManager[tuple[BlobStore, Partials]]]


def open_objects(folder: Path, min_part_bytes: int, before: Callable[[str, str], None] | None = None) -> OpenObjects:
    """Returns a value for the argument `open_content` of `open_registry`. With it, the registry keeps blobs and uploads
    in the bucket in `folder`. A partial blob (a blob that is still being downloaded from an upstream) is a file, which
    is copied into the bucket when it is complete."""

    @asynccontextmanager
    async def opened(
        disk: Disk, boot: str, metadata: Metadata, locks: DigestLocks
    ) -> AsyncIterator[tuple[BlobStore, Partials]]:
        bucket = Bucket(folder, min_part_bytes, before) if before else Bucket(folder, min_part_bytes)
        blobs = MultipartBlobStore(disk, bucket)
        publication = Publication(blobs, metadata, locks)

        async def adopt(repo: RepositoryName, content: DownloadedContent) -> None:
            session = blobs.start_upload(UploadID.random(), content.digest.algorithm)
            while session.offset < content.size:
                await session.append(await disk.run(lambda: os.pread(content.file.fd, PIECE, session.offset)))
            await publication.commit_without_upload(repo, await session.verify(content.digest))

        async with aclosing(FilePartialStore(disk, boot, adopt)) as partials:
            yield blobs, partials

    return opened
