"""The objects of an upload session, and its owner.

    uploads/UUID/claims/GENERATION                  who may write; the newest claim owns the session
    uploads/UUID/bases/GENERATION                   the valid chunks when that generation took the session over
    uploads/UUID/chunks/START-LENGTH-GENERATION     bytes

A claim is stored only if it does not exist. So of several requests that take a session over at once, one succeeds. A
chunk is valid if the newest base lists it, or if its own generation has written that base. A chunk that a former owner
stores later is not valid. A commit ends the session with a closed claim.
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
    """The session `upload` as `generation` sees it; 0: the session was not begun. All calls block. Calls that write
    raise BlobUploadInvalid if the generation is not the owner."""

    def __init__(self, bucket: Bucket, upload: UploadID, generation: int = 0) -> None:
        self.bucket = bucket
        self.upload = upload
        self.generation = generation
        self._prefix = f"{PREFIX}{upload}/"

    @classmethod
    def take_over(cls, bucket: Bucket, upload: UploadID) -> UploadObjects:
        """Takes the session over. Raises BlobUploadUnknown if the session is being ended."""
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
        """Begins the session, unless it was begun already."""
        if not self.generation:
            self._claim(1)
            self.generation = 1
            self._put_base([])

    def chunks(self) -> list[Chunk]:
        """Returns the valid chunks, in order and without a gap. If several begin at the same byte, the longest one
        counts."""
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
        """Stores a chunk. Raises BlobUploadInvalid if another request has taken the session over meanwhile, so that the
        chunk is not acknowledged."""
        self.check_owner()
        chunk = Chunk(start, len(data), self.generation)
        self.bucket.put(self.key(chunk), data)
        self.check_owner()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Returns the bytes from `start` to `stop`, or fewer at the end of the session."""
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
        """Makes sure that nobody can take the session over any more. If it was taken over and deleted just before, the
        name of the next claim is free again; but then the claim before it, that of this generation, was deleted
        first."""
        self.check_owner()
        self._claim(self.generation + 1, closed=True)
        if not self.bucket.exists(self._claim_key(self.generation)):
            self.bucket.delete(self._claim_key(self.generation + 1))
            raise BlobUploadInvalid(TAKEN_OVER)

    def delete(self) -> None:
        """Deletes the claims last: as long as there are bytes, a former owner finds that it does not own them."""
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
