"""The objects of an upload session, and who owns it.

    uploads/UUID/claims/GENERATION                  who may write; the newest claim owns the session
    uploads/UUID/bases/GENERATION                   the chunks that counted when that generation took the session over
    uploads/UUID/chunks/START-LENGTH-GENERATION     bytes

A claim is put only if it does not exist, so of several that take a session over at once one wins. A chunk counts if the
newest base names it, or its own generation wrote that base: what a former owner puts later counts for nothing. A commit
ends the session with a claim that is closed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import BlobUploadInvalid, BlobUploadUnknown
from storage.names import UploadID
from tests.fakes.object_store.bucket import Bucket, NoSuchKey, PreconditionFailed

PREFIX = "uploads/"
PIECE = 1024 * 1024
TAKEN_OVER = "a newer request has taken this upload over"


@dataclass(frozen=True)
class Chunk:
    """Bytes of a session from `start` on, as an object."""

    start: int
    length: int
    generation: int

    @classmethod
    def parse(cls, name: str) -> Chunk:
        return cls(*map(int, name.split("-")))

    @property
    def name(self) -> str:
        return f"{self.start:015}-{self.length:015}-{self.generation:06}"

    @property
    def stop(self) -> int:
        return self.start + self.length


class UploadObjects:
    """The session `upload` as `generation` sees it; 0: nobody has begun it. All calls block; those that write raise
    BlobUploadInvalid for who is not the owner."""

    def __init__(self, bucket: Bucket, upload: UploadID, generation: int = 0) -> None:
        self.bucket = bucket
        self.upload = upload
        self.generation = generation
        self._prefix = f"{PREFIX}{upload}/"

    @classmethod
    def take_over(cls, bucket: Bucket, upload: UploadID) -> UploadObjects:
        """Raises BlobUploadUnknown: the session is being ended."""
        while True:
            objects = cls(bucket, upload)
            newest, closed = objects._newest_claim()
            if closed:
                raise BlobUploadUnknown("the upload session was just ended by another request")
            objects.generation = newest + 1
            try:
                objects._claim(objects.generation)
            except BlobUploadInvalid:
                continue
            objects._put_base(objects.chunks())  # a still newer owner writes its own; then this one counts for nothing
            return objects

    def begin(self) -> None:
        """Begins the session, if that was not done."""
        if not self.generation:
            self._claim(1)
            self.generation = 1
            self._put_base([])

    def chunks(self) -> list[Chunk]:
        """The chunks that count, in order and without a gap. Where several begin at one byte, the longest does."""
        bases = self.bucket.list_objects(f"{self._prefix}bases/")
        if not bases:
            return []
        base = int(bases[-1].key.rpartition("/")[2])
        known = {Chunk.parse(name) for name in json.loads(self._read(bases[-1].key))}
        longest: dict[int, Chunk] = {}
        for listed in self.bucket.list_objects(f"{self._prefix}chunks/"):
            chunk = Chunk.parse(listed.key.rpartition("/")[2])
            if chunk in known or chunk.generation == base:
                longest[chunk.start] = max(chunk, longest.get(chunk.start, chunk), key=lambda each: each.length)
        found, stop = [], 0
        while (following := longest.get(stop)) is not None:
            found.append(following)
            stop = following.stop
        return found

    def size(self) -> int:
        chunks = self.chunks()
        return chunks[-1].stop if chunks else 0

    def put_chunk(self, start: int, data: bytes) -> None:
        """Who lost the session meanwhile learns of it here, and so acknowledges nothing."""
        self.check_owner()
        chunk = Chunk(start, len(data), self.generation)
        self.bucket.put(self.key(chunk), data)
        self.check_owner()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes, fewer where they end."""
        for chunk in self.chunks():
            at, end = max(start, chunk.start), min(stop, chunk.stop)
            while at < end:
                piece = self._read(self.key(chunk), at - chunk.start, min(PIECE, end - at))
                yield piece
                at += len(piece)

    def key(self, chunk: Chunk) -> str:
        return f"{self._prefix}chunks/{chunk.name}"

    def check_owner(self) -> None:
        if self._newest_claim() != (self.generation, False):
            raise BlobUploadInvalid(TAKEN_OVER)

    def end(self) -> None:
        """Nobody can take the session over from here on. If it was taken over and deleted just before, the name of the
        next claim is free again; but then the claim before it, this one's own, was deleted first."""
        self.check_owner()
        self._claim(self.generation + 1, closed=True)
        if not self.bucket.exists(self._claim_key(self.generation)):
            self.bucket.delete(self._claim_key(self.generation + 1))
            raise BlobUploadInvalid(TAKEN_OVER)

    def delete(self) -> None:
        """The claims last: as long as there are bytes, a former owner finds that they are not its own."""
        for kind in ("chunks/", "bases/", "claims/"):
            for listed in self.bucket.list_objects(self._prefix + kind):
                self.bucket.delete(listed.key)

    def _newest_claim(self) -> tuple[int, bool]:
        claims = self.bucket.list_objects(f"{self._prefix}claims/")
        if not claims:
            return 0, False
        key = claims[-1].key
        return int(key.rpartition("/")[2]), self._read(key) == b"closed"

    def _claim(self, generation: int, *, closed: bool = False) -> None:
        try:
            self.bucket.put(self._claim_key(generation), b"closed" if closed else b"open")
        except PreconditionFailed:
            raise BlobUploadInvalid(TAKEN_OVER) from None

    def _claim_key(self, generation: int) -> str:
        return f"{self._prefix}claims/{generation:06}"

    def _put_base(self, chunks: list[Chunk]) -> None:
        names = json.dumps([chunk.name for chunk in chunks])
        self.bucket.put(f"{self._prefix}bases/{self.generation:06}", names.encode())

    def _read(self, key: str, start: int = 0, length: int = -1) -> bytes:
        try:
            return self.bucket.read(key, start, length)
        except NoSuchKey:
            raise BlobUploadInvalid("the upload session was just ended by another request") from None
