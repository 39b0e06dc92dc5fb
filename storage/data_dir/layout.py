"""The paths in the data directory, and the names of its files (`Layout`).

    DATA/
      entrepot.db, entrepot.db-wal, entrepot.db-shm     metadata (SQLite)
      locks/metadata                                    lock of the one process that writes metadata
      locks/00 … ff                                     locks for changes of blob files
      locks/turns                                       leases and slots, each a lock on one byte offset
      blobs/sha256/ab/abcdef…                           content of the blob with the digest sha256:abcdef…
      uploads/UUID/GENERATION                           bytes of an upload session
      partials/SOURCE~sha256-abcdef….SIZE.data          bytes of a partial blob
      partials/SOURCE~sha256-abcdef….SIZE.state         which bytes of the partial blob are stored
      trash/                                            files of deleted blobs, until they are unlinked
      quarantine/sha256-abcdef…                         damaged bytes of the blob with the digest sha256:abcdef…
      workers/PID-RANDOM                                report of a running server process
      reserve                                           disk space for deletes on a full disk
      control                                           Unix socket by which commands reach a running server
      restore.json                                      marks an unfinished restore from a backup

A *partial blob* is a blob that is still being downloaded. SOURCE is the name of the upstream registry that sends the
blob. If the file name would be too long, SOURCE is `@` and a hash of the upstream's name. The GENERATION of an upload
session grows by 1 each time another request takes over the session. A *lease* is the exclusive right to do some work. A
*slot* is one of a limited number of permits.

The whole directory lies on one file system, so that a rename moves a file without copying its bytes.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.names import ALGORITHMS, Digest, UploadID

DIGEST_LOCK_COUNT = 256
"""Number of lock files for blob files. A hash of a blob's digest chooses its lock file."""
SHARD_COUNT = 256 * len(ALGORITHMS)
"""Number of *shards*, the directories that contain the blob files. There is one for each pair of a digest algorithm and
a first byte of the digest."""

MAX_FILE_NAME_BYTES = 255
"""Longest name of a file on the file systems of Linux."""


@dataclass(frozen=True)
class Layout:
    """Paths in the data directory `root`. A *place* is a path relative to `root`. The metadata database stores the
    places of files, not their whole paths."""

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
    def control(self) -> Path:
        """The Unix socket by which commands reach a running server."""
        return self.root / "control"

    @property
    def restore_marker(self) -> Path:
        """The file that exists while a restore copies content into the data directory."""
        return self.root / "restore.json"

    @property
    def locks(self) -> Path:
        """The directory of the lock files."""
        return self.root / "locks"

    @property
    def metadata_lock(self) -> Path:
        """The lock file of the one process that writes metadata."""
        return self.locks / "metadata"

    @property
    def lease_file(self) -> Path:
        """The file `turns`. Each lease and each slot is a lock on one byte offset of this empty file."""
        return self.locks / "turns"

    @property
    def trash(self) -> Path:
        """The directory that deleted blob files are moved to before they are unlinked."""
        return self.root / "trash"

    @property
    def quarantine(self) -> Path:
        """The directory that damaged blob files are moved to."""
        return self.root / "quarantine"

    @staticmethod
    def quarantine_place(digest: Digest) -> str:
        """Returns the place of the damaged bytes of a blob."""
        return f"quarantine/{digest.algorithm}-{digest.encoded}"

    @property
    def workers(self) -> Path:
        """The directory that contains a file for each running server process (`storage.data_dir.report_files`)."""
        return self.root / "workers"

    @property
    def workers_in_memory(self) -> Path:
        """The directory that a process uses in place of `workers` if the disk is too full. It lies in memory, outside
        of the data directory."""
        return Path("/dev/shm") / f"entrepot-{hashlib.blake2b(os.fsencode(self.root), digest_size=12).hexdigest()}"

    @property
    def uploads(self) -> Path:
        """The directory that contains a directory for each upload session."""
        return self.root / "uploads"

    def upload(self, upload: UploadID) -> Path:
        """Returns the directory of one upload session."""
        return self.uploads / upload

    @property
    def partials(self) -> Path:
        """The directory that contains the files of the partial blobs."""
        return self.root / "partials"

    @staticmethod
    def partial_name(digest: Digest, size: int, source: str = "") -> str:
        """Returns the name of a partial blob: the name of its two files without the suffix.

        - `size`: the size of the blob in bytes. A manifest may state a wrong size. The name contains the size, so that
          downloads of the same digest with different sizes use different files.
        - `source`: the name of the upstream registry that sends the bytes; empty: the name has no source. No source
          begins with `@`. If the file names would be too long, `@` and a hash replace the source."""
        digest_and_size = f"{digest.algorithm}-{digest.encoded}.{size}"
        if not source:
            return digest_and_size
        if len(os.fsencode(f"{source}~{digest_and_size}.state")) > MAX_FILE_NAME_BYTES:
            source = f"@{hashlib.blake2b(source.encode(), digest_size=16).hexdigest()}"
        return f"{source}~{digest_and_size}"

    @staticmethod
    def parse_partial_file(file_name: str) -> tuple[str, Digest]:
        """Parses the name of a file in `partials`. Returns the name (`partial_name`) and the digest of the partial
        blob. Raises DigestInvalid if the file does not belong to a partial blob."""
        name = file_name.rpartition(".")[0]
        return name, Digest(name.rpartition("~")[2].partition(".")[0].replace("-", ":", 1))

    def partial_data(self, name: str) -> Path:
        """Returns the path of the file with the bytes of a partial blob. `name`: its `partial_name`."""
        return self.partials / f"{name}.data"

    def partial_state(self, name: str) -> Path:
        """Returns the path of the file that says which bytes of a partial blob are stored. `name`: its
        `partial_name`."""
        return self.partials / f"{name}.state"

    def blob(self, digest: Digest) -> Path:
        """Returns the path of a blob's file."""
        return self.root / self.blob_place(digest)

    @staticmethod
    def blob_place(digest: Digest) -> str:
        """Returns the place of a blob's file."""
        return f"blobs/{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}"

    def path_of(self, place: str) -> Path:
        """Returns the path of the file at `place`, which `blob_place` or `quarantine_place` has returned."""
        return self.root / place

    def digest_lock(self, digest: Digest) -> Path:
        """Returns the path of the file that a process locks while it changes the file of the blob with this digest."""
        return self.locks / f"{zlib.crc32(digest.encode()) % DIGEST_LOCK_COUNT:02x}"

    def lock_files(self) -> Iterator[Path]:
        """Yields all lock files. They are created together with the data directory, so that deletes have them even on a
        full disk."""
        directory = self.locks
        yield from (self.metadata_lock, self.lease_file)
        yield from (directory / f"{number:02x}" for number in range(DIGEST_LOCK_COUNT))

    def shards(self) -> Iterator[Path]:
        """Yields the shards: the `SHARD_COUNT` directories that contain the blob files."""
        for algorithm in ALGORITHMS:
            directory = self.root / "blobs" / algorithm
            yield from (directory / f"{number:02x}" for number in range(SHARD_COUNT // len(ALGORITHMS)))

    def shard(self, number: int) -> Path:
        """Returns one of the shards. `number`: 0 to `SHARD_COUNT` - 1."""
        return self.root / "blobs" / ALGORITHMS[number // 256] / f"{number % 256:02x}"

    def directories(self) -> Iterator[Path]:
        """Yields the directories to create in a new data directory, parents first. All shards are created, so that no
        push has to create a shard and sync its parent directory."""
        yield from (self.locks, self.uploads, self.partials, self.trash, self.quarantine)
        yield from (self.workers, self.root / "blobs")
        yield from (self.root / "blobs" / algorithm for algorithm in ALGORITHMS)
        yield from self.shards()
