"""Paths in the data directory. No other module knows them.

    DATA/
      entrepot.db, entrepot.db-wal, entrepot.db-shm     metadata (SQLite)
      locks/metadata                                    lock of the one process that writes metadata
      locks/00 … ff                                     locks by digest: one change of a blob file at a time
      locks/turns                                       leases and slots, each a locked byte of this empty file
      blobs/sha256/ab/abcdef…                           content of the blob with the digest sha256:abcdef…
      uploads/UUID/GENERATION                           bytes of an upload session; the generation counts its owners
      partials/SOURCE~sha256-abcdef….SIZE.data          bytes of a partial blob: one that is still being downloaded
      partials/SOURCE~sha256-abcdef….SIZE.state         which of these bytes are stored
      trash/                                            files of removed blobs, until they are unlinked
      reserve                                           disk space for deletes on a full disk

The whole directory lies on one file system, so that a rename moves a file without copying it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.names import ALGORITHMS, Digest, UploadID

DIGEST_LOCKS = 256
"""Lock files for digests. A digest's lock is chosen by a hash."""
SHARDS = 256 * len(ALGORITHMS)
"""Directories that the blobs are spread over: one for each algorithm and first byte of the digest."""


@dataclass(frozen=True)
class Layout:
    """Paths in the data directory `root`."""

    root: Path

    @property
    def metadata(self) -> Path:
        """The SQLite database."""
        return self.root / "entrepot.db"

    @property
    def reserve(self) -> Path:
        """The file that holds disk space for deletes on a full disk."""
        return self.root / "reserve"

    @property
    def locks(self) -> Path:
        """The directory of the lock files."""
        return self.root / "locks"

    @property
    def metadata_lock(self) -> Path:
        """The lock file of the process that writes metadata."""
        return self.locks / "metadata"

    @property
    def leases(self) -> Path:
        """The file whose bytes are locked for leases and slots."""
        return self.locks / "turns"

    @property
    def trash(self) -> Path:
        """The directory that removed blob files are moved to before they are unlinked."""
        return self.root / "trash"

    @property
    def uploads(self) -> Path:
        """The directory of the upload sessions."""
        return self.root / "uploads"

    def upload(self, upload: UploadID) -> Path:
        """Returns the directory of one upload session."""
        return self.uploads / upload

    @property
    def partials(self) -> Path:
        """The directory of the partial blobs."""
        return self.root / "partials"

    @staticmethod
    def partial_name(digest: Digest, size: int, source: str = "") -> str:
        """Returns the name of a partial blob: the name of its files without their suffix. `source`: the upstream that
        the bytes come from. `size`, in bytes, is a part of the name because it comes from a manifest and may be wrong:
        requests with the right size then use other files."""
        digest_and_size = f"{digest.algorithm}-{digest.encoded}.{size}"
        return f"{source}~{digest_and_size}" if source else digest_and_size

    @staticmethod
    def parse_partial_file(file_name: str) -> tuple[str, Digest]:
        """Returns the name (`partial_name`) and digest of the partial blob that a file in `partials` belongs to. Raises
        DigestInvalid if the file belongs to no partial blob."""
        name = file_name.rpartition(".")[0]
        return name, Digest(name.rpartition("~")[2].partition(".")[0].replace("-", ":", 1))

    def partial_data(self, name: str) -> Path:
        """Returns the file with the bytes of a partial blob. `name`: its `partial_name`."""
        return self.partials / f"{name}.data"

    def partial_state(self, name: str) -> Path:
        """Returns the file that says which bytes of a partial blob are stored. `name`: its `partial_name`."""
        return self.partials / f"{name}.state"

    def blob(self, digest: Digest) -> Path:
        """Returns the file of a blob."""
        return self.root / self.blob_place(digest)

    @staticmethod
    def blob_place(digest: Digest) -> str:
        """Returns the path of a blob's file relative to the data directory. The metadata stores it as the blob's
        *place*."""
        return f"blobs/{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}"

    def path_of(self, place: str) -> Path:
        """Returns the path of a `blob_place`."""
        return self.root / place

    def digest_lock(self, digest: Digest) -> Path:
        """Returns the lock file for changes of a blob's file."""
        return self.locks / f"{zlib.crc32(digest.encode()) % DIGEST_LOCKS:02x}"

    def lock_files(self) -> Iterator[Path]:
        """Yields all lock files. They are created together with the data directory, because deletes need them on a full
        disk, where no file can be created."""
        directory = self.locks
        yield from (self.metadata_lock, self.leases)
        yield from (directory / f"{number:02x}" for number in range(DIGEST_LOCKS))

    def shards(self) -> Iterator[Path]:
        """Yields the `SHARDS` directories that contain the blob files."""
        for algorithm in ALGORITHMS:
            directory = self.root / "blobs" / algorithm
            yield from (directory / f"{number:02x}" for number in range(SHARDS // len(ALGORITHMS)))

    def shard(self, number: int) -> Path:
        """Returns one of the directories that contain the blob files. `number`: 0 to `SHARDS` - 1."""
        return self.root / "blobs" / ALGORITHMS[number // 256] / f"{number % 256:02x}"

    def directories(self) -> Iterator[Path]:
        """Yields all directories in the data directory, parents first. The shards are among them, so that no push has
        to create a directory and sync its parent."""
        yield from (self.locks, self.uploads, self.partials, self.trash, self.root / "blobs")
        yield from (self.root / "blobs" / algorithm for algorithm in ALGORITHMS)
        yield from self.shards()
