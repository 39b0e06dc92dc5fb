"""Version of the database: a value that every commit changes, by any connection of any process.

In WAL mode, SQLite keeps an index of the log in shared memory. It begins with two copies of a header: a count of the
commits, the length of the log, a checksum. Every commit writes both copies after its bytes are on disk and before
`COMMIT` returns, and every read begins with comparing them. Comparing them here takes a tenth of a microsecond; the
shortest statement takes 2.5. This is the only module that knows the layout. Where a check at the start finds another
layout than this, `PRAGMA data_version` serves instead.

Response caches, cached look-ups and the epoch of rights are valid for one version: so a worker notices a change of
another worker, such as a revoked right, with its next request.

Sources: "WAL-mode File Format" (sqlite.org/walformat.html), sections 2.1 and 4.4; `sqlite3_io_methods`; "PRAGMA
data_version" (sqlite.org/pragma.html).
"""

from __future__ import annotations

import ctypes
import logging
import struct
import sys
import threading
from collections.abc import Callable
from typing import Final

import apsw

_COPY: Final = 48
"""Bytes of the header."""
_HEADERS: Final = 2 * _COPY
"""Bytes of both copies. They differ while a commit is being written, and after its writer died doing so."""
_FORMAT: Final = 3_007_000
"""Version of the header's format (`iVersion`)."""
_CHECKED: Final = 40
"""Bytes that the header's checksum covers; it follows them."""
_COMMITS: Final = slice(8, 12)
"""Count of the commits (`iChange`), in the machine's byte order."""
_REGION: Final = 32 * 1024
"""Bytes of a part of the index that SQLite maps at once."""
_SHARED_MEMORY: Final = 2
"""First version of `sqlite3_io_methods` that has shared memory."""
_FIRST_METHODS: Final = 12
"""Methods before it in the structure."""
_LAYOUT_CHECKS: Final = 20
"""Reads of the header until it counts as unknown: some may meet a commit."""
log = logging.getLogger("storage.metadata")


class UnknownLayout(Exception):
    """The index of the log does not look as this module expects."""


class _Methods(ctypes.Structure):
    """The beginning of `sqlite3_io_methods`."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("before", ctypes.c_void_p * _FIRST_METHODS),
        (
            "map_shared",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)
            ),
        ),
    )


class _File(ctypes.Structure):
    """The beginning of `sqlite3_file`."""

    _fields_ = (("methods", ctypes.POINTER(_Methods)),)


def _shared_memory(db: apsw.Connection) -> int:
    """Returns the address of the index. SQLite maps it once for all connections of a process, and leaves it there until
    the last of them is closed. Raises apsw.CantOpenError."""
    pointer = ctypes.c_void_p()
    db.file_control("main", apsw.SQLITE_FCNTL_FILE_POINTER, ctypes.addressof(pointer))
    assert pointer.value is not None
    methods = _File.from_address(pointer.value).methods.contents
    found = ctypes.c_void_p()
    if methods.version < _SHARED_MEMORY or methods.map_shared(pointer, 0, _REGION, 0, ctypes.byref(found)):
        raise apsw.CantOpenError("the database's shared memory cannot be reached")
    if found.value is None:
        raise apsw.CantOpenError("the database has no write-ahead log")
    return found.value


class DataVersion:
    """Version of the database behind an open connection in WAL mode. Two equal versions mean that nothing was committed
    in between. A lookup after a version was taken sees at least the data of that version.

    Close it before the connection, since the memory goes with that. After `close`, no version equals another."""

    def __init__(self, db: apsw.Connection, locate: Callable[[apsw.Connection], int] = _shared_memory) -> None:
        """`locate` returns the address of the log's index. Raises apsw.Error, UnknownLayout."""
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # opens the log
        header = (ctypes.c_char * _HEADERS).from_address(locate(db))
        page_size = int(db.pragma("page_size"))
        if not any(_is_known_layout(header.raw, page_size) for _ in range(_LAYOUT_CHECKS)):
            raise UnknownLayout
        self._read: Callable[[], object] = lambda: header.raw

    def __call__(self) -> object:
        """Returns the version."""
        return self._read()

    def close(self) -> None:
        self._read = object


class PragmaDataVersion:
    """The same, asked of SQLite. Each thread that asks gets a connection of its own; versions from different threads
    are never equal."""

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._local = threading.local()
        self._opened: list[apsw.Connection] = []
        self._closed = False

    def __call__(self) -> object:
        if self._closed:
            return object()
        db: apsw.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = self._connect()
            self._opened.append(db)
        return threading.get_ident(), db.pragma("data_version")

    def close(self) -> None:
        """Call it once no other thread asks any more."""
        self._closed = True
        for db in self._opened:
            db.close()


def open_data_version(
    db: apsw.Connection,
    connect: Callable[[], apsw.Connection],
    locate: Callable[[apsw.Connection], int] = _shared_memory,
) -> DataVersion | PragmaDataVersion:
    """Reads the log's index if its layout is known; otherwise logs that, and asks SQLite with connections that
    `connect` opens. Raises apsw.Error."""
    try:
        return DataVersion(db, locate)
    except UnknownLayout:
        log.warning("SQLite %s has an unknown layout of the log's index; reads take longer", apsw.sqlite_lib_version())
        return PragmaDataVersion(connect)


def is_next(before: object, after: object) -> bool:
    """Returns whether exactly one commit lies between two versions. `before` has to come from within the transaction
    that was then committed: the count of commits then shows any other one in between. False where that is unknown."""
    if not isinstance(before, bytes) or not isinstance(after, bytes) or after[:_COPY] != after[_COPY:]:
        return False
    return _commits(after) == (_commits(before) + 1) % (1 << 32)


def _commits(version: bytes) -> int:
    return int.from_bytes(version[_COMMITS], sys.byteorder)


def _is_known_layout(header: bytes, page_size: int) -> bool:
    """Returns whether both copies agree, name the format and the database's page size, and have the right checksum."""
    first = header[:_COPY]
    if first != header[_COPY:]:
        return False
    version, _, _, initialized, _, page = struct.unpack_from("=IIIBBH", first)
    sizes = {page_size % 65535, 0}  # 65536 is written as 1; an empty log has no page size yet
    sums = struct.unpack_from("=II", first, _CHECKED)
    return (version, initialized) == (_FORMAT, 1) and page in sizes and sums == _checksum(first[:_CHECKED])


def _checksum(data: bytes) -> tuple[int, int]:
    """Returns SQLite's checksum over pairs of 32-bit words ("WAL-mode File Format", section 4.4)."""
    one = two = 0
    for first, second in struct.iter_unpack("=II", data):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two
