"""Reads a tar archive whose headers may be hostile (`open_archive`).

The parser of `tarfile` reads a whole extended header into memory, even a very long one. (An *extended header* contains
a long name, pax records or the map of a sparse file.) Therefore, the parser reads the archive through a file object
that limits the size of the headers of each file (`_LimitedFile`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from storage.backups import ImageFileFailed

MAX_MEMBERS: Final = 200_000
"""Largest number of files in a tar archive."""
MAX_HEADER_BYTES: Final = 16 * 1024
"""Largest size of the headers of one file. A path on Linux has at most 4,096 bytes."""
MAX_EXTENDED_BYTES: Final = 32 << 20
"""Largest size of all extended headers of an archive together. It limits the memory for long file names. The limit is
enough for 32,000 files with a short extended header each; most archives of images have no extended headers."""
MAX_GLOBAL_RECORDS: Final = 100
"""Largest number of global pax records, which apply to all files. The parser goes through all of them for each file."""
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
"""The first bytes of files that are compressed with gzip, bzip2 and xz."""
_Readable = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile


class _LimitedFile(io.BufferedIOBase):
    """The file object through which the parser reads an archive. The parser may read at most `MAX_HEADER_BYTES` for the
    headers of one file in the archive. `header_bytes`: how many bytes of these headers the parser has read;
    `TarArchive` sets the number to 0 after the headers of each file. `is_limited`: True while the parser reads headers,
    False while it reads the content of files."""

    def __init__(self, label: str, file: _Readable) -> None:
        """`label`: the name of the archive, for the error."""
        self._label = label
        self._file = file
        self.header_bytes = 0
        self.is_limited = True

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ImageFileFailed if the headers of a file are too long."""
        if self.is_limited:
            if size is None or size < 0:
                raise tarfile.ReadError("a header has a negative size")
            self.header_bytes += size
            if self.header_bytes > MAX_HEADER_BYTES:
                raise ImageFileFailed(f"{self._label} has headers of more than {MAX_HEADER_BYTES} bytes for one file")
        return self._file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class TarArchive:
    """An open tar archive. If a limit is exceeded, its methods raise ImageFileFailed. If the archive is damaged, they
    raise errors of `tarfile` and of the decompressors."""

    def __init__(self, label: str, file: _Readable) -> None:
        """Reads the headers of the first file. `label`: the name of the archive, for errors. `file`: the uncompressed
        bytes of the archive."""
        self._label = label
        self._file = _LimitedFile(label, file)
        self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115  `open_archive` closes the file

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yields the headers of each file. Call this method only once, and read all headers before you call `open`."""
        count = extended_bytes = 0
        last_offset = -1
        while (member := self._tar.next()) is not None:
            count += 1
            if count > MAX_MEMBERS:
                raise ImageFileFailed(f"{self._label} has more than {MAX_MEMBERS} files")
            # Each file has one header of one block, after any number of extended headers. The sum leaves out this
            # block. It also leaves out one more byte: if the previous file has content, the parser first reads the last
            # byte before the headers, to notice that an archive is cut off.
            extended_bytes += max(0, self._file.header_bytes - tarfile.BLOCKSIZE - 1)
            self._file.header_bytes = 0
            if extended_bytes > MAX_EXTENDED_BYTES:
                raise ImageFileFailed(f"{self._label} has extended headers of more than {MAX_EXTENDED_BYTES} bytes")
            if len(self._tar.pax_headers) > MAX_GLOBAL_RECORDS:
                raise ImageFileFailed(f"{self._label} has more than {MAX_GLOBAL_RECORDS} global pax records")
            # If the size of a file is negative, the parser goes back and finds the same headers again.
            if member.size < 0 or member.offset <= last_offset:
                raise tarfile.ReadError(f"the size of the file {member.name} is negative")
            if member.issparse():  # a small archive can contain a sparse file of 2**60 bytes
                raise ImageFileFailed(
                    f"{self._label} has the sparse file {member.name}; pack the images without --sparse"
                )
            last_offset = member.offset
            member.pax_headers = {}
            yield member
        self._file.is_limited = False

    def open(self, member: tarfile.TarInfo) -> BinaryIO:
        """Opens a regular file of the archive."""
        return cast("BinaryIO", self._tar.extractfile(member))


@contextmanager
def open_archive(path: Path) -> Iterator[TarArchive]:
    """Context manager that opens a tar archive, which may be compressed with gzip, bzip2 or xz. Raises the errors of
    `TarArchive`, and OSError."""
    with ExitStack() as stack:
        raw_file = stack.enter_context(path.open("rb"))
        first_bytes = raw_file.read(len(_XZ))
        raw_file.seek(0)
        file: _Readable = raw_file
        if first_bytes.startswith(_GZIP):
            file = stack.enter_context(gzip.open(raw_file))
        elif first_bytes.startswith(_BZIP2):
            file = stack.enter_context(bz2.open(raw_file))
        elif first_bytes.startswith(_XZ):
            file = stack.enter_context(lzma.open(raw_file))
        yield TarArchive(str(path), file)
