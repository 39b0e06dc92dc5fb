"""Paths in the data directory. The only module that knows them.

    DATA/
      entrepot.db, entrepot.db-wal, entrepot.db-shm     metadata (SQLite)
      locks/metadata                                    one writer of metadata at a time
      locks/00 … ff                                     stripes: one change of a blob file at a time
      locks/turns                                       leases, by byte
      blobs/sha256/ab/abcdef…                           content, by digest
      uploads/UUID/GENERATION                           an upload session's bytes; who took it over last
      partials/SOURCE~sha256-abcdef….SIZE.data, .state  a partial blob; which bytes of it are there
      trash/                                            removed files, to be deleted
      reserve                                           space for deletes on a full disk (`storage.data_dir.reserve`)

Everything lies on one file system, so that a rename moves a file without copying it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.names import ALGORITHMS, Digest, UploadID

STRIPES = 256
SHARDS = 256 * len(ALGORITHMS)


@dataclass(frozen=True)
class Layout:
    """Paths in one data directory."""

    root: Path

    @property
    def metadata(self) -> Path:
        return self.root / "entrepot.db"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def metadata_lock(self) -> Path:
        return self.locks / "metadata"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    def upload(self, upload: UploadID) -> Path:
        return self.uploads / upload

    @property
    def leases(self) -> Path:
        return self.locks / "turns"

    @property
    def partials(self) -> Path:
        return self.root / "partials"

    @staticmethod
    def partial(digest: Digest, size: int, source: str = "") -> str:
        """Returns the name of a partial blob, the stem of its files. The size comes from a manifest and may be wrong,
        so it is part of the name: requests with another size are not affected."""
        own = f"{digest.algorithm}-{digest.encoded}.{size}"
        return f"{source}~{own}" if source else own

    @staticmethod
    def partial_of(file: str) -> tuple[str, Digest]:
        """Returns the name and digest of the partial blob that a file in `partials` belongs to. Raises DigestInvalid if
        it belongs to none."""
        name = file.rpartition(".")[0]
        return name, Digest(name.rpartition("~")[2].partition(".")[0].replace("-", ":", 1))

    def partial_data(self, name: str) -> Path:
        return self.partials / f"{name}.data"

    def partial_state(self, name: str) -> Path:
        return self.partials / f"{name}.state"

    def blob(self, digest: Digest) -> Path:
        return self.root / self.place(digest)

    @staticmethod
    def place(digest: Digest) -> str:
        """Returns a blob's path relative to the data directory, which metadata stores as its place."""
        return f"blobs/{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}"

    def at(self, place: str) -> Path:
        return self.root / place

    def stripe(self, digest: Digest) -> Path:
        return self.locks / f"{zlib.crc32(digest.encode()) % STRIPES:02x}"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    def lock_files(self) -> Iterator[Path]:
        """Yields all lock files. They are created with the data directory, since deletes need them on a full disk,
        where no file can be created."""
        yield from (self.metadata_lock, self.leases)
        yield from (self.locks / f"{number:02x}" for number in range(STRIPES))

    def shards(self) -> Iterator[Path]:
        """Yields the directories that blobs lie in."""
        return map(self.shard, range(SHARDS))

    def shard(self, number: int) -> Path:
        """Returns one of the `SHARDS` directories that blobs lie in."""
        return self.root / "blobs" / ALGORITHMS[number // 256] / f"{number % 256:02x}"

    def directories(self) -> Iterator[Path]:
        """Yields the directories that must exist, parents first. The shards are created with the data directory, so
        that no push has to create one and make it durable."""
        yield from (self.locks, self.uploads, self.partials, self.trash, self.root / "blobs")
        yield from (self.root / "blobs" / algorithm for algorithm in ALGORITHMS)
        yield from self.shards()
