"""The file of one upload session, and who may write it (`UploadFile`).

The bytes lie in `uploads/UUID/GENERATION`. Taking a session over renames the file to the next generation; the former
owner then finds its name gone and stops. Each write checks the name and writes with the file's lock held, and so does
the rename: the former owner cannot change a byte after the new one has read the length. The new owner never waits for
the former one, so a half-open connection cannot keep a session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.data_dir.durable_files import sync_directory, write_all
from storage.data_dir.locks import Flock
from storage.data_dir.system import System
from storage.errors import BlobUploadInvalid, BlobUploadUnknown

PIECE = 1024 * 1024


class UploadFile:
    """The file, owned as one generation. All calls block. They raise OSError, and BlobUploadInvalid once a newer
    generation has taken the session over."""

    def __init__(self, system: System, path: Path, fd: int) -> None:
        self._system = system
        self._fd = fd
        self._published = False
        self.path = path

    @classmethod
    def create(cls, system: System, directory: Path) -> UploadFile:
        """Creates a new session's file. Raises BlobUploadInvalid if another request has taken the session over."""
        path = directory / "1"
        try:
            system.mkdir(directory)
            return cls(system, path, system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise BlobUploadInvalid("a newer request has taken this upload over") from None

    @classmethod
    def take_over(cls, system: System, directory: Path) -> UploadFile:
        """Takes over the session in `directory` from its owner; creates an empty one if there is none. Raises
        BlobUploadUnknown if another request is just ending the session."""
        with suppress(FileExistsError):
            system.mkdir(directory)
        while True:
            try:
                current = _generation(directory)
                if current is None:
                    path = directory / "1"
                    return cls(system, path, system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            except FileNotFoundError:
                raise BlobUploadUnknown("the upload session was just ended by another request") from None
            with suppress(FileNotFoundError, BlobUploadInvalid):
                return cls._succeed(system, directory, current)

    @classmethod
    def _succeed(cls, system: System, directory: Path, current: int) -> UploadFile:
        path = directory / str(current)
        owned = cls(system, path, system.open(path, os.O_RDWR))
        try:
            with owned._owning():
                owned.path = directory / str(current + 1)
                system.rename(path, owned.path)
        except BaseException:
            owned.close()
            raise
        return owned

    @contextmanager
    def _owning(self) -> Iterator[None]:
        with Flock(self._fd):
            try:
                same = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            except FileNotFoundError:
                same = False
            if not same:
                raise BlobUploadInvalid("a newer request has taken this upload over")
            yield

    def size(self) -> int:
        """Returns the number of bytes."""
        return os.fstat(self._fd).st_size

    def append(self, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes at `offset`, the end of the file, and returns the new end."""
        with self._owning():
            return write_all(self._system, self._fd, chunks, offset)

    def restart(self) -> None:
        """Drops all bytes."""
        with self._owning():
            self._system.truncate(self._fd, 0)

    def cut(self, size: int) -> None:
        """Drops the bytes after the first `size`."""
        with self._owning():
            self._system.truncate(self._fd, size)

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes, fewer where the file ends."""
        with self._owning():
            return os.pread(self._fd, length, offset)

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes from `start` to `stop`, fewer where the file ends. Checks no owner."""
        while start < stop:
            piece = os.pread(self._fd, min(PIECE, stop - start), start)
            if not piece:
                return
            yield piece
            start += len(piece)

    def sync(self) -> None:
        """Makes the bytes durable."""
        self._system.sync(self._fd)

    def publish(self, target: Path) -> None:
        """Moves the synced file to `target`, durably, and deletes the session's directory. A file that is there has the
        same content and is replaced."""
        with self._owning():
            self._system.rename(self.path, target)
            self._published = True
            sync_directory(self._system, target.parent)
        self._drop_directory()

    def discard(self) -> None:
        """Deletes the session's bytes. Published bytes belong to the blob and stay."""
        if not self._published:
            with self._owning():
                self._system.unlink(self.path)
        self._drop_directory()

    def _drop_directory(self) -> None:
        # It is not empty if a newer request uses it, and missing if that has deleted it.
        with suppress(OSError):
            self._system.rmdir(self.path.parent)

    def detach(self) -> int:
        """Returns the descriptor, which the caller has to close from now on; -1 if it was closed or detached before."""
        number, self._fd = self._fd, -1
        return number

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if (number := self.detach()) >= 0:
            os.close(number)


def _generation(directory: Path) -> int | None:
    """Returns the newest generation; None if the session has no file yet."""
    return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=None)


def upload_size(directory: Path) -> int:
    """Returns the number of bytes of a session, without taking it over; 0 if there is none."""
    while True:
        try:
            generation = _generation(directory)
            if generation is None:
                return 0
            return os.stat(directory / str(generation)).st_size
        except FileNotFoundError:
            if not directory.exists():
                return 0
