"""The file with the bytes of one upload session (`UploadFile`). A request can take the session over from another
request.

The bytes are in the file `uploads/UUID/GENERATION`. The *owner* of a session is the request that may write to the file.
A request that takes the session over renames the file to the next generation number. The previous owner then no longer
finds the file under the old name, and stops.

Each write and each rename holds the file's lock, and first checks that the file has not been renamed. So the previous
owner cannot change a byte after the rename. The new owner does not wait until the previous owner stops, because the
previous owner may be waiting for a dead connection.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.data_dir.durable_files import append_chunks, sync_directory
from storage.data_dir.locks import Flock
from storage.data_dir.system import System
from storage.errors import BlobUploadInvalid, BlobUploadUnknown

PIECE_BYTES = 1024 * 1024
"""Number of bytes that `read_pieces` reads at a time."""


class UploadFile:
    """The open file of an upload session. Each owner of the session has its own `UploadFile`. All methods block and may
    raise OSError. After a newer owner has taken the session over, methods raise BlobUploadInvalid unless their
    docstring says otherwise."""

    def __init__(self, system: System, path: Path, fd: int) -> None:
        """`path`: path of the file, whose name is the generation number of this owner. `fd`: the file's descriptor,
        which this object closes."""
        self._system = system
        self._fd = fd
        self._published = False
        self.path = path

    @classmethod
    def create(cls, system: System, directory: Path) -> UploadFile:
        """Creates the directory and the first file of a session. A new session has neither until its first write.
        Raises BlobUploadInvalid if the directory exists already, because another request has then taken the session
        over."""
        path = directory / "1"
        try:
            system.mkdir(directory)
            return cls(system, path, _create_file(system, path))
        except FileExistsError:
            raise BlobUploadInvalid("a newer request has taken this upload over") from None

    @classmethod
    def take_over(cls, system: System, directory: Path) -> UploadFile:
        """Takes the session in `directory` over from its owner. If the session has no file, creates an empty file.
        Raises BlobUploadUnknown if another request commits or deletes the session at the same time."""
        with suppress(FileExistsError):
            system.mkdir(directory)
        while True:
            try:
                current = _last_generation(directory)
                if current is None:
                    path = directory / "1"
                    return cls(system, path, _create_file(system, path))
            except FileExistsError:  # another request has just created the file
                continue
            except FileNotFoundError:
                raise BlobUploadUnknown("the upload session was just ended by another request") from None
            with suppress(FileNotFoundError, BlobUploadInvalid):  # another request has just renamed the file
                return cls._rename_to_next(system, directory, current)

    @classmethod
    def _rename_to_next(cls, system: System, directory: Path, current: int) -> UploadFile:
        """Opens the file of the generation `current` and renames it to the next generation number. Raises
        FileNotFoundError or BlobUploadInvalid if another request has renamed the file first."""
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
        """Holds the file's lock inside the `with` block. Raises BlobUploadInvalid if a newer owner has taken the
        session over."""
        with Flock(self._fd):
            self._check_owner()
            yield

    def _check_owner(self) -> None:
        """Raises BlobUploadInvalid if a newer owner has taken the session over. A caller that does not hold the file's
        lock can still lose the session directly after this call."""
        try:
            is_file_at_path = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            is_file_at_path = False
        if not is_file_at_path:
            raise BlobUploadInvalid("a newer request has taken this upload over")

    def size(self) -> int:
        """Returns the number of bytes in the file. Works also after a takeover."""
        return os.fstat(self._fd).st_size

    def append(self, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes the chunks at `offset`, which is the end of the file, and returns the new end."""
        with self._locked_as_owner():
            return append_chunks(self._system, self._fd, chunks, offset)

    def truncate(self, size: int) -> None:
        """Deletes all bytes after the first `size`."""
        with self._locked_as_owner():
            self._system.truncate(self._fd, size)

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes at `offset`, or fewer if the file ends earlier."""
        with self._locked_as_owner():
            return os.pread(self._fd, length, offset)

    def read_pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes from the offset `start` to the offset `stop` (exclusive) in pieces. Stops earlier if the
        file ends earlier. Does not hold the file's lock, but checks before each piece that no newer owner has taken the
        session over."""
        while start < stop:
            self._check_owner()
            piece = os.pread(self._fd, min(PIECE_BYTES, stop - start), start)
            if not piece:
                return
            yield piece
            start += len(piece)

    def sync(self) -> None:
        """Makes the bytes durable. Works also after a takeover."""
        self._system.sync(self._fd)

    def publish(self, target: Path) -> None:
        """Moves the file durably to `target`, the path of the blob's file, and deletes the session's directory.
        Replaces a file that is already at `target`. The caller has to call `sync` first."""
        with self._locked_as_owner():
            self._system.rename(self.path, target)
            self._published = True
            sync_directory(self._system, target.parent)
        self._delete_directory()

    def discard(self) -> None:
        """Deletes the session's file and directory. If `publish` has moved the file, deletes only the directory."""
        if not self._published:
            with self._locked_as_owner():
                self._system.unlink(self.path)
        self._delete_directory()

    def _delete_directory(self) -> None:
        """Deletes the session's directory, unless a newer owner has a file in it. Ignores errors."""
        with suppress(OSError):
            self._system.rmdir(self.path.parent)

    def detach(self) -> int:
        """Hands the file descriptor to the caller, which must close it. This object can then no longer be used. Returns
        -1 if the descriptor was closed or detached before."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Closes the file. May be called more than once."""
        if (fd := self.detach()) >= 0:
            os.close(fd)


def _create_file(system: System, path: Path) -> int:
    """Creates the first file of a session and returns the file's descriptor. If this fails, for example because the
    disk has no inode left, removes the session's directory if it is empty. Raises OSError."""
    try:
        return system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError:
        with suppress(OSError):
            system.rmdir(path.parent)
        raise


def _last_generation(directory: Path) -> int | None:
    """Returns the highest generation number in a session's directory, or None if the session has no file. Raises
    FileNotFoundError if the directory does not exist."""
    return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=None)


def upload_size(directory: Path) -> int:
    """Returns the number of bytes of the session in `directory`, without taking the session over. Returns 0 if the
    session has no file."""
    while True:
        try:
            generation = _last_generation(directory)
            if generation is None:
                return 0
            return os.stat(directory / str(generation)).st_size
        except FileNotFoundError:  # the session was deleted, or taken over between the two calls
            if not directory.exists():
                return 0
