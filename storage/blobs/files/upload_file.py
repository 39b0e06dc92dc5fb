"""The file of one upload session, and how a request takes the session over from another request (`UploadFile`).

The bytes are in the file `uploads/UUID/GENERATION`. The *owner* of a session is the request that may write to the file.
A new owner renames the file to the next generation number. The previous owner then finds no file with its own
generation's name and stops.

Each write, and each rename, takes the file's lock and first checks the name. So the previous owner cannot change a byte
after the new owner has read the length of the file. The new owner does not wait for the previous one to stop, because
that one may hang on a dead connection.
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

PIECE_BYTES = 1024 * 1024
"""Bytes that `pieces` reads at a time."""


class UploadFile:
    """An upload session's open file, as one owner uses it. All methods block. They raise OSError, and BlobUploadInvalid
    after a newer owner has taken the session over."""

    def __init__(self, system: System, path: Path, fd: int) -> None:
        """`path`: the file with this owner's generation. `fd`: its descriptor, which this object closes."""
        self._system = system
        self._fd = fd
        self._published = False
        self.path = path

    @classmethod
    def create(cls, system: System, directory: Path) -> UploadFile:
        """Creates the file of a new session in `directory`. Raises BlobUploadInvalid if another request has taken over
        the session, and so created the file, already."""
        path = directory / "1"
        try:
            system.mkdir(directory)
            return cls(system, path, system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise BlobUploadInvalid("a newer request has taken this upload over") from None

    @classmethod
    def take_over(cls, system: System, directory: Path) -> UploadFile:
        """Takes over the session in `directory` from its owner, or creates an empty session if there is none. Raises
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
                return cls._rename_to_next(system, directory, current)

    @classmethod
    def _rename_to_next(cls, system: System, directory: Path, current: int) -> UploadFile:
        """Opens the file with the generation `current` and renames it to the next generation. Raises FileNotFoundError
        or BlobUploadInvalid if another request has done so first."""
        path = directory / str(current)
        file = cls(system, path, system.open(path, os.O_RDWR))
        try:
            with file._locked_as_owner():
                file.path = directory / str(current + 1)
                system.rename(path, file.path)
        except BaseException:
            file.close()
            raise
        return file

    @contextmanager
    def _locked_as_owner(self) -> Iterator[None]:
        """Holds the file's lock inside the `with` block. Raises BlobUploadInvalid if this object is no longer the
        owner."""
        with Flock(self._fd):
            try:
                has_own_path = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            except FileNotFoundError:
                has_own_path = False
            if not has_own_path:
                raise BlobUploadInvalid("a newer request has taken this upload over")
            yield

    def size(self) -> int:
        """Returns the number of bytes in the file. Does not check the owner."""
        return os.fstat(self._fd).st_size

    def append(self, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes the chunks at `offset`, which is the end of the file, and returns the new end."""
        with self._locked_as_owner():
            return write_all(self._system, self._fd, chunks, offset)

    def restart(self) -> None:
        """Deletes all bytes of the file."""
        with self._locked_as_owner():
            self._system.truncate(self._fd, 0)

    def cut(self, size: int) -> None:
        """Deletes all bytes after the first `size`."""
        with self._locked_as_owner():
            self._system.truncate(self._fd, size)

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes at `offset`, or fewer if the file ends before."""
        with self._locked_as_owner():
            return os.pread(self._fd, length, offset)

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes from `start` up to, but without, `stop`, piece by piece; fewer if the file ends before. Does
        not check the owner."""
        while start < stop:
            piece = os.pread(self._fd, min(PIECE_BYTES, stop - start), start)
            if not piece:
                return
            yield piece
            start += len(piece)

    def sync(self) -> None:
        """Makes the bytes durable."""
        self._system.sync(self._fd)

    def publish(self, target: Path) -> None:
        """Moves the synced file to `target`, the path of a blob, durably, and deletes the session's directory. Replaces
        a file at `target`; it has the same content."""
        with self._locked_as_owner():
            self._system.rename(self.path, target)
            self._published = True
            sync_directory(self._system, target.parent)
        self._drop_directory()

    def discard(self) -> None:
        """Deletes the session's file and directory. If `publish` was called, the bytes are a blob by now and stay."""
        if not self._published:
            with self._locked_as_owner():
                self._system.unlink(self.path)
        self._drop_directory()

    def _drop_directory(self) -> None:
        # This fails, as it should, if a newer owner has a file in the directory or has already deleted the directory.
        with suppress(OSError):
            self._system.rmdir(self.path.parent)

    def detach(self) -> int:
        """Returns the file descriptor, which the caller must close from now on. Returns -1 if it was closed or detached
        before."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Closes the file. May be called more than once."""
        if (fd := self.detach()) >= 0:
            os.close(fd)


def _generation(directory: Path) -> int | None:
    """Returns the highest generation number in a session's directory, or None if the session has no file yet. Raises
    FileNotFoundError if there is no such directory."""
    return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=None)


def upload_size(directory: Path) -> int:
    """Returns the number of bytes of the session in `directory`, without taking the session over. Returns 0 if there is
    no such session."""
    while True:
        try:
            generation = _generation(directory)
            if generation is None:
                return 0
            return os.stat(directory / str(generation)).st_size
        except FileNotFoundError:
            if not directory.exists():
                return 0
