"""Reads a tar archive whose headers may be hostile (`open_archive`).

Extended headers hold long names, pax records and maps of sparse files. The parser of `tarfile` reads each of them into
memory as a whole, however long it is. So the parser reads the archive through a file object that limits the bytes of
all headers of one file. `fileobj`, a documented argument of `tarfile.open`, passes the object to the parser.
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
"""Largest size of the extended headers of all files together. It limits the memory for the names of the files. 32,000
files can have a short extended header each; most archives of images have no extended headers."""
MAX_GLOBAL_RECORDS: Final = 100
"""Largest number of pax records that hold for all files. For each file, the parser goes through all these records."""
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
"""The first bytes of files that are compressed with gzip, bzip2 and xz."""
_Readable = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile


class _LimitedFile(io.BufferedIOBase):
    """The file object of an archive, with a limit: the parser may read at most `MAX_HEADER_BYTES` for the headers of
    one file in the archive. `header_bytes`: how many bytes the parser has read for the headers of the current file;
    `TarArchive` sets it to 0 before the next file. `is_limited`: True while headers are read, False while the content
    of files is read."""

    def __init__(self, label: str, file: _Readable) -> None:
        """`label`: the name of the archive, for the error."""
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
        """Reads the headers of the first file. `label`: the name of the archive, for errors. `file`: the uncompressed
        bytes of the archive."""
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
            # all extended headers in memory. To get the size of only the extended headers, subtract the block, and the
            # byte that the parser reads before most headers to notice that an archive is cut off.
            extended_bytes += max(0, self._file.header_bytes - tarfile.BLOCKSIZE - 1)
            self._file.header_bytes = 0
            if extended_bytes > MAX_EXTENDED_BYTES:
                raise ImageFileFailed(f"{self._label} has extended headers of more than {MAX_EXTENDED_BYTES} bytes")
            if len(self._tar.pax_headers) > MAX_GLOBAL_RECORDS:
                raise ImageFileFailed(f"{self._label} has more than {MAX_GLOBAL_RECORDS} pax records for all files")
            # After a negative size, the parser goes back and finds the same headers again.
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
        """Opens a regular file."""
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
