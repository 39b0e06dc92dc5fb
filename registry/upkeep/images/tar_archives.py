"""Reads a tar archive whose headers may be hostile (`open_archive`).

The parser of `tarfile` reads each extended header into memory as a whole, however long it is: long names, pax records,
maps of sparse files. So the parser reads the archive through a file object that limits how many bytes it may read for
the headers of one file. `tarfile.open` takes such an object as its documented argument `fileobj`. So the limit holds
for every kind of header, and no private method of the parser has to be overridden.
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
"""Largest size of the extended headers of all files together. It bounds the memory for their names. It is enough for
32,000 files with a short extended header each; most archives of images have none."""
MAX_GLOBAL_RECORDS: Final = 100
"""Largest number of pax records that hold for all files. For each file, the parser goes through all of them."""
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
"""The first bytes of files that are compressed with gzip, bzip2 and xz."""
_Readable = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile


class _LimitedFile(io.BufferedIOBase):
    """Wraps the file object of an archive, and limits how much the parser reads: at most `MAX_HEADER_BYTES` for the
    headers of one file in the archive. `header_bytes`: how many bytes it has read for these headers; `TarArchive` sets
    it to 0 before the headers of the next file. `is_limited`: whether the limit applies, that is, whether headers are
    being read."""

    def __init__(self, label: str, file: _Readable) -> None:
        """`label`: the archive, for the error."""
        self._label = label
        self._file = file
        self.header_bytes = 0
        self.is_limited = True

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ImageFileFailed if the headers are too long."""
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
    """An open tar archive. Its methods raise ImageFileFailed if a limit is exceeded, and for a damaged archive the
    errors of `tarfile` and of the decompressors."""

    def __init__(self, label: str, file: _Readable) -> None:
        """`label`: the archive, for errors. `file`: its uncompressed bytes. Reads the headers of the first file."""
        self._label = label
        self._file = _LimitedFile(label, file)
        self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115  `open_archive` closes the file

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yields the headers of each file. Call it once, and read it to the end before the first call of `open`."""
        count = extended_bytes = 0
        last_offset = -1
        while (member := self._tar.next()) is not None:
            count += 1
            if count > MAX_MEMBERS:
                raise ImageFileFailed(f"{self._label} has more than {MAX_MEMBERS} files")
            # A file has any number of extended headers, and then one header of one block. The parser keeps the names in
            # the extended headers of all files in memory. Before most headers, it also reads one byte of the content
            # that comes before them, to notice that an archive is cut off. The block and this byte are subtracted.
            extended_bytes += max(0, self._file.header_bytes - tarfile.BLOCKSIZE - 1)
            self._file.header_bytes = 0
            if extended_bytes > MAX_EXTENDED_BYTES:
                raise ImageFileFailed(f"{self._label} has extended headers of more than {MAX_EXTENDED_BYTES} bytes")
            if len(self._tar.pax_headers) > MAX_GLOBAL_RECORDS:
                raise ImageFileFailed(f"{self._label} has more than {MAX_GLOBAL_RECORDS} pax records for all files")
            # After a negative size, the parser goes back and finds the same headers again.
            if member.size < 0 or member.offset <= last_offset:
                raise tarfile.ReadError(f"the size of the file {member.name} is negative")
            if member.issparse():  # its size, 2**60 bytes for example, says nothing about the size of the archive
                raise ImageFileFailed(
                    f"{self._label} has the sparse file {member.name}; pack the images without --sparse"
                )
            last_offset = member.offset
            member.pax_headers = {}
            yield member
        self._file.is_limited = False

    def open(self, member: tarfile.TarInfo) -> BinaryIO:
        """Opens a regular file."""
        return cast("BinaryIO", self._tar.extractfile(member))


@contextmanager
def open_archive(path: Path) -> Iterator[TarArchive]:
    """Context manager that opens a tar archive, which may be compressed with gzip, bzip2 or xz. Raises the errors of
    `TarArchive`, and OSError."""
    with ExitStack() as stack:
        stored = stack.enter_context(path.open("rb"))
        start = stored.read(len(_XZ))
        stored.seek(0)
        file: _Readable = stored
        if start.startswith(_GZIP):
            file = stack.enter_context(gzip.open(stored))
        elif start.startswith(_BZIP2):
            file = stack.enter_context(bz2.open(stored))
        elif start.startswith(_XZ):
            file = stack.enter_context(lzma.open(stored))
        yield TarArchive(str(path), file)
