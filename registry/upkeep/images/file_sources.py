"""Reads the files of images by name, from a directory (`DirectorySource`) or a tar archive (`TarSource`). All methods
block."""

from __future__ import annotations

import errno
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, Self

from registry.upkeep.images.image_files import MAX_JSON_BYTES, convert_os_errors
from registry.upkeep.images.tar_archives import TarArchive, open_archive
from storage.backups import ImageFileFailed

_MAX_LINKS: Final = 8
"""Largest number of links that are followed, one after another, to find a file."""
_READ_ERRORS: Final = (
    *(tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError),
    *(ValueError, ArithmeticError, LookupError, RecursionError, MemoryError),
)
"""Errors that can occur while a damaged, cut-off or hostile archive is read. The errors in the second line come from
the parser of headers, for example for a number with thousands of digits. A MemoryError can also come from a
decompressor: the header of an xz file states how much memory the decompressor allocates."""


@contextmanager
def _convert_read_errors(label: str, name: str = "") -> Iterator[None]:
    """Context manager that raises ImageFileFailed in place of an error in `_READ_ERRORS`. `label`: the archive or
    directory that is read. `name`: the file in it that is read; empty while the list of its files is read."""
    try:
        yield
    except _READ_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ImageFileFailed(f"{label} is damaged or cut off{name and f' at {name}'}: {reason}") from error


class SourceFile:
    """An open file of a directory or archive. Its methods raise ImageFileFailed."""

    def __init__(self, label: str, name: str, file: BinaryIO) -> None:
        """`label`: the directory or archive. `name`: the name of the file in it."""
        self._label = label
        self._name = name
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Returns the next `size` bytes, or all remaining bytes if `size` is negative. Returns fewer bytes only at the
        end of the file."""
        with _convert_read_errors(self._label, self._name):
            return self._file.read(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class FileSource(Protocol):
    """A directory or archive with the files of images. `label`: its name, for messages. All methods raise
    ImageFileFailed."""

    label: str

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None if there is no such file."""
        ...

    def position(self, name: str) -> int:
        """Returns the sort key of a file. Reading files in the order of their keys is fastest."""
        ...

    def open(self, name: str) -> SourceFile:
        """Opens a file. The file must exist, so call `size` first."""
        ...


def read_small(source: FileSource, name: str, limit: int = MAX_JSON_BYTES) -> bytes | None:
    """Returns the content of a file; None if there is no such file. Raises ImageFileFailed if the file has more than
    `limit` bytes, or cannot be read."""
    size = source.size(name)
    if size is None:
        return None
    if size > limit:
        raise ImageFileFailed(f"{source.label}: {name} has {size} bytes; at most {limit} are allowed")
    with source.open(name) as file:
        return file.read()


@contextmanager
def open_file_source(path: Path) -> Iterator[FileSource]:
    """Context manager that opens a directory or a tar archive. Raises ImageFileFailed."""
    if path.is_dir():
        yield DirectorySource(path)
        return
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(open_archive(path))
        except _READ_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:  # an error of the file system
                raise ImageFileFailed(f"cannot read {path}: {error.strerror}") from error
            raise ImageFileFailed(
                f"{path} is no tar archive (plain, or compressed with gzip, bzip2 or xz), and no directory"
            ) from None
        yield TarSource(path, archive)


class DirectorySource:
    """Files in a directory."""

    def __init__(self, root: Path) -> None:
        self.label = str(root)
        self._root = root.resolve()

    def size(self, name: str) -> int | None:
        try:
            path = self._path(name)
            return path.stat().st_size if path.is_file() else None
        except ValueError:  # no file can have a name with the character NUL, or with half of a surrogate pair
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise ImageFileFailed(f"cannot read {name} in {self.label}: {error.strerror or error}") from error

    def position(self, name: str) -> int:
        return 0

    def open(self, name: str) -> SourceFile:
        path = self._path(name)
        return SourceFile(self.label, name, convert_os_errors(f"cannot read {self.label}", lambda: path.open("rb")))

    def _path(self, name: str) -> Path:
        """Returns the path of a file. Raises ImageFileFailed if it is outside the directory, and ValueError if no file
        can have this name."""
        path = Path(os.path.realpath(self._root / name))
        if not path.is_relative_to(self._root):
            raise ImageFileFailed(f"{self.label} names the file {name!r}, which is outside of this directory")
        return path


class TarSource:
    """Files in a tar archive. A compressed archive is decompressed while it is read. Going back to an earlier file
    decompresses the archive again from its beginning, so callers should read the files in the order of `position`."""

    def __init__(self, path: Path, archive: TarArchive) -> None:
        self.label = str(path)
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        with _convert_read_errors(self.label):
            for member in archive.members():
                # The member and the key of `_members` share one string object, which saves memory.
                member.name = posixpath.normpath(member.name)
                self._members[member.name] = member

    def size(self, name: str) -> int | None:
        member = self._find(name)
        return None if member is None else member.size

    def position(self, name: str) -> int:
        member = self._find(name)
        return 0 if member is None else member.offset_data

    def open(self, name: str) -> SourceFile:
        member = self._find(name)
        assert member is not None, "the caller has asked whether the file exists"
        with _convert_read_errors(self.label, name):
            return SourceFile(self.label, name, self._archive.open(member))

    def _find(self, name: str) -> tarfile.TarInfo | None:
        """Returns the regular file of this name; None if there is no such file. Follows at most `_MAX_LINKS` links. Old
        versions of docker write links if several images have the same layer."""
        name = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            member = self._members.get(name)
            if member is None or member.isreg():
                return member
            if member.issym():
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                name = posixpath.normpath(member.linkname)
            else:
                return None
        return None
