"""Reads files by name from a directory or a tar archive (`DirectorySource`, `TarSource`). The methods block."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

from registry.upkeep.images.image_files import MAX_JSON_BYTES, with_file_errors
from storage.backups import ImageFileFailed

MAX_MEMBERS: Final = 200_000
"""Largest number of files in a tar archive."""
_MAX_LINKS: Final = 8
"""Largest number of links that are followed, one after another, to find a file."""


class FileSource(Protocol):
    """A directory or archive with the files of images. `label`: its name, for messages. All methods raise
    ImageFileFailed."""

    label: str

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None if there is no such file."""
        ...

    def position(self, name: str) -> int:
        """Returns a sort key: files are read fastest in the order of their keys."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Opens a file. The file must exist: `size` must not have returned None for it."""
        ...


def read_small(source: FileSource, name: str, limit: int = MAX_JSON_BYTES) -> bytes | None:
    """Returns the content of a file; None if there is none. Raises ImageFileFailed, also if it is larger than
    `limit`."""
    size = source.size(name)
    if size is None:
        return None
    if size > limit:
        raise ImageFileFailed(f"{source.label}: {name} has {size} bytes; at most {limit} are allowed")
    with source.open(name) as file:
        return with_file_errors(f"cannot read {source.label}", file.read)


@contextmanager
def open_source(path: Path) -> Iterator[FileSource]:
    """Context manager that opens a directory or a tar archive. Raises ImageFileFailed."""
    if path.is_dir():
        yield DirectorySource(path)
        return
    try:
        archive = tarfile.open(path, "r:*")  # noqa: SIM115  closed below
    except tarfile.TarError:
        raise ImageFileFailed(
            f"{path} is no tar archive (it may be compressed with gzip, bzip2 or xz) and no directory with images"
        ) from None
    except OSError as error:
        raise ImageFileFailed(f"cannot read {path}: {error.strerror or error}") from error
    with archive:
        yield TarSource(path, archive)


class DirectorySource:
    """Files in a directory."""

    def __init__(self, root: Path) -> None:
        self.label = str(root)
        self._root = root.resolve()

    def size(self, name: str) -> int | None:
        path = self._path(name)
        return path.stat().st_size if path.is_file() else None

    def position(self, name: str) -> int:
        return 0

    def open(self, name: str) -> BinaryIO:
        return with_file_errors(f"cannot read {self.label}", lambda: open(self._path(name), "rb"))

    def _path(self, name: str) -> Path:
        """Returns the path of a file. Raises ImageFileFailed if it is outside the directory."""
        path = Path(os.path.realpath(self._root / name))
        if not path.is_relative_to(self._root):
            raise ImageFileFailed(f"{self.label} names the file {name!r}, which is outside of it")
        return path


class TarSource:
    """Files in a tar archive. A compressed archive is decompressed while it is read. To read an earlier file, the
    archive is decompressed again from its beginning. So the caller should read the files in the order of `position`."""

    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self.label = str(path)
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            for member in archive:
                if len(self._members) >= MAX_MEMBERS:
                    raise ImageFileFailed(f"{path} has more than {MAX_MEMBERS} files")
                self._members[posixpath.normpath(member.name)] = member
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ImageFileFailed(f"{path} is damaged or cut off: {error}") from error

    def size(self, name: str) -> int | None:
        member = self._find(name)
        return None if member is None else member.size

    def position(self, name: str) -> int:
        member = self._find(name)
        return 0 if member is None else member.offset_data

    def open(self, name: str) -> BinaryIO:
        member = self._find(name)
        assert member is not None, "the caller has asked whether the file exists"
        try:
            return cast("BinaryIO", self._archive.extractfile(member))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ImageFileFailed(f"{self.label} is damaged or cut off: {error}") from error

    def _find(self, name: str) -> tarfile.TarInfo | None:
        """Returns the regular file of this name; None if there is none. Follows links, which old versions of docker
        write for a layer that several images have."""
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
