"""The objects of an upload session in a bucket. They also say which process owns the session.

    uploads/UUID/claims/GENERATION                  a claim; the process that stored the newest claim owns the session
    uploads/UUID/bases/GENERATION                   the list of valid chunks when this generation took the session over
    uploads/UUID/chunks/START-LENGTH-GENERATION     a chunk: bytes of the upload

A process takes a session over by storing a claim with the next generation number. Storing fails if the claim exists, so
that only one of several processes succeeds. A chunk is valid if the newest base lists it, or if its generation is that
of the newest base. So a chunk that a former owner stores later is not valid. A commit ends the session with a claim
that is closed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import BlobUploadInvalid, BlobUploadUnknown
from storage.names import UploadID
from tests.fakes.object_store.bucket import Bucket, NoSuchKey, PreconditionFailed

PREFIX = "uploads/"
PIECE = 1024 * 1024  # bytes
TAKEN_OVER = "a newer request has taken this upload over"


@dataclass(frozen=True)
class Chunk:
    """An object with `length` bytes of a session, from the offset `start` on."""

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
    """The objects of the session `upload`, for the process that owns it as `generation`; 0: this process has not
    claimed the session. All calls block. Calls that write raise BlobUploadInvalid if a newer generation owns the
    session."""

    def __init__(self, bucket: Bucket, upload: UploadID, generation: int = 0) -> None:
        self.bucket = bucket
        self.upload = upload
        self.generation = generation
        self._prefix = f"{PREFIX}{upload}/"

    @classmethod
    def take_over(cls, bucket: Bucket, upload: UploadID) -> UploadObjects:
        """Takes the session over. Raises BlobUploadUnknown if another request is ending the session."""
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
            objects._put_base(objects.chunks())  # if a newer generation stores a base, this base does not count
            return objects

    def begin(self) -> None:
        """Stores the first claim of the session, unless this object already has a claim."""
        if not self.generation:
            self._claim(1)
            self.generation = 1
            self._put_base([])

    def chunks(self) -> list[Chunk]:
        """Returns the valid chunks in order, up to the first gap. If several chunks begin at the same byte, the longest
        one counts."""
        bases = self.bucket.list_objects(f"{self._prefix}bases/")
        if not bases:
            return []
        base = int(bases[-1].key.rpartition("/")[2])
        listed_in_base = {Chunk.parse(name) for name in json.loads(self._read(bases[-1].key))}
        longest: dict[int, Chunk] = {}
        for listed in self.bucket.list_objects(f"{self._prefix}chunks/"):
            chunk = Chunk.parse(listed.key.rpartition("/")[2])
            if chunk in listed_in_base or chunk.generation == base:
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
        """Yields the bytes from `start` to `stop`, or fewer if the session ends before."""
        for chunk in self.chunks():
            position, end = max(start, chunk.start), min(stop, chunk.stop)
            while position < end:
                piece = self._read(self.key(chunk), position - chunk.start, min(PIECE, end - position))
                yield piece
                position += len(piece)

    def key(self, chunk: Chunk) -> str:
        return f"{self._prefix}chunks/{chunk.name}"

    def check_owner(self) -> None:
        if self._newest_claim() != (self.generation, False):
            raise BlobUploadInvalid(TAKEN_OVER)

    def end(self) -> None:
        """Stores a closed claim, after which nobody can take the session over. If another request has taken the session
        over and deleted its objects just before, storing the closed claim succeeds by mistake. In this case the claim
        of this generation is deleted, too. So this method checks for it afterwards, and raises BlobUploadInvalid."""
        self.check_owner()
        self._claim(self.generation + 1, closed=True)
        if not self.bucket.exists(self._claim_key(self.generation)):
            self.bucket.delete(self._claim_key(self.generation + 1))
            raise BlobUploadInvalid(TAKEN_OVER)

    def delete(self) -> None:
        """Deletes all objects of the session, the claims last. So as long as there are chunks, a former owner can see
        that it does not own the session."""
        for kind in ("chunks/", "bases/", "claims/"):
            for listed in self.bucket.list_objects(self._prefix + kind):
                self.bucket.delete(listed.key)

    def _newest_claim(self) -> tuple[int, bool]:
        """Returns the generation of the newest claim, and whether this claim is closed. Without any claim, the
        generation is 0."""
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
