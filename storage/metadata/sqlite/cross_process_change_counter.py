"""The data version: a value that changes with every commit to the database, by any connection of any process.

A worker (a server process) reads the version before it answers a request. If the version has changed since the last
request, the worker stops using its cached responses and lookups, and checks whether rights have changed. So a change by
another worker, such as the revocation of a right, takes effect at the next request.

The value is read from SQLite's memory. In WAL mode, SQLite keeps an index of the write-ahead log in shared memory. The
index begins with two copies of a header, which contains a count of the commits, the length of the log and a checksum.
Every commit writes both copies after it has written its data to the log and before `COMMIT` returns. Reading the two
copies takes 0.1 µs; the shortest SQL statement takes 2.5 µs. No other module depends on the layout of the header. This
module checks the layout when the database is opened. If the layout is unknown, the module uses `PRAGMA data_version`,
which is slower.

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

_HEADER_BYTES: Final = 48
"""Size of one copy of the header."""
_BOTH_COPIES_BYTES: Final = 2 * _HEADER_BYTES
"""Size of both copies. The copies differ while a commit writes them, and after a process has died between the two
writes."""
_FORMAT_VERSION: Final = 3_007_000
"""Version of the header's format (`iVersion`) that this module can read."""
_CHECKSUMMED_BYTES: Final = 40
"""Number of bytes that the checksum covers, from the start of the header. The checksum follows these bytes."""
_COMMIT_COUNT_SLICE: Final = slice(8, 12)
"""Bytes of the header with the count of the commits (`iChange`), in the machine's byte order."""
_INDEX_REGION_BYTES: Final = 32 * 1024
"""SQLite maps the index into memory in regions of this size. The header is in the first region."""
_MIN_METHODS_VERSION: Final = 2
"""First version of the structure `sqlite3_io_methods` that has the method `xShmMap`."""
_METHODS_BEFORE_SHM_MAP: Final = 12
"""Number of methods before `xShmMap` in `sqlite3_io_methods`."""
_MAX_LAYOUT_ATTEMPTS: Final = 20
"""Largest number of attempts to recognize the layout of the header. An attempt can fail because a commit is writing the
two copies."""
log = logging.getLogger("storage.metadata")


class UnknownLayout(Exception):
    """The index of the log has a layout that this module cannot read."""


class _Methods(ctypes.Structure):
    """The beginning of SQLite's C structure `sqlite3_io_methods`, up to the method `xShmMap`."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("other_methods", ctypes.c_void_p * _METHODS_BEFORE_SHM_MAP),
        (
            "shm_map",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)
            ),
        ),
    )


class _File(ctypes.Structure):
    """The beginning of SQLite's C structure `sqlite3_file`: an open file."""

    _fields_ = (("methods", ctypes.POINTER(_Methods)),)


def _log_index_address(db: apsw.Connection) -> int:
    """Returns the memory address of the log's index. SQLite maps the index once for all connections of a process, and
    unmaps it when the process closes the last connection. Raises apsw.CantOpenError."""
    file = ctypes.c_void_p()
    db.file_control("main", apsw.SQLITE_FCNTL_FILE_POINTER, ctypes.addressof(file))
    assert file.value is not None
    methods = _File.from_address(file.value).methods.contents
    address = ctypes.c_void_p()
    # Maps the region number 0, the first one. The last 0 means: do not create a missing region. `shm_map` returns an
    # error code, or 0 if it succeeds.
    if methods.version < _MIN_METHODS_VERSION or methods.shm_map(
        file, 0, _INDEX_REGION_BYTES, 0, ctypes.byref(address)
    ):
        raise apsw.CantOpenError("the database's shared memory cannot be reached")
    if address.value is None:
        raise apsw.CantOpenError("the database has no write-ahead log")
    return address.value


class DataVersion:
    """Reads the data version of an open database in WAL mode: each call returns the current version.

    If two calls return equal versions, nothing was committed between them. A lookup that starts after a call sees the
    data of the returned version or newer data.

    Close this object before the connection `db`. When the process closes its last connection to the database, SQLite
    unmaps the memory that this object reads."""

    def __init__(
        self, db: apsw.Connection, find_index_address: Callable[[apsw.Connection], int] = _log_index_address
    ) -> None:
        """Finds the log's index in memory. `find_index_address` returns the address of the index. Raises apsw.Error,
        UnknownLayout."""
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # makes SQLite open the log and map its index
        headers = (ctypes.c_char * _BOTH_COPIES_BYTES).from_address(find_index_address(db))
        page_size = int(db.pragma("page_size"))
        if not any(_is_known_layout(headers.raw, page_size) for _ in range(_MAX_LAYOUT_ATTEMPTS)):
            raise UnknownLayout
        self._read: Callable[[], object] = lambda: headers.raw

    def __call__(self) -> object:
        """Returns the current version. After `close`, each call returns a new object, which equals no other version."""
        return self._read()

    def close(self) -> None:
        """Ensures that no later call reads SQLite's memory."""
        self._read = object


class PragmaDataVersion:
    """Reads the data version with `PRAGMA data_version`, which works with every layout of the log's index.

    Each thread reads with a connection of its own. Two versions that different threads have read are never equal,
    because the values of the pragma are comparable only within one connection."""

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        """`connect` opens a connection to the database. Each thread that reads a version calls `connect` once."""
        self._connect = connect
        self._local = threading.local()
        self._opened: list[apsw.Connection] = []
        self._closed = False

    def __call__(self) -> object:
        """Returns the current version. After `close`, each call returns a new object, which equals no other version.
        Raises apsw.Error."""
        if self._closed:
            return object()
        db: apsw.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = self._connect()
            self._opened.append(db)
        return threading.get_ident(), db.pragma("data_version")

    def close(self) -> None:
        """Closes the connections of all threads. The caller ensures that no thread reads a version during this call."""
        self._closed = True
        for db in self._opened:
            db.close()


def open_data_version(
    db: apsw.Connection,
    connect: Callable[[], apsw.Connection],
    find_index_address: Callable[[apsw.Connection], int] = _log_index_address,
) -> DataVersion | PragmaDataVersion:
    """Returns a `DataVersion` for the database that `db` has open. If the layout of the log's index is unknown, logs a
    warning and returns a `PragmaDataVersion`, which opens connections with `connect`. Raises apsw.Error."""
    try:
        return DataVersion(db, find_index_address)
    except UnknownLayout:
        log.warning(
            "SQLite %s has an unknown layout of the write-ahead log's index; requests take a few microseconds longer",
            apsw.sqlite_lib_version(),
        )
        return PragmaDataVersion(connect)


def is_exactly_one_commit_later(before: object, after: object) -> bool:
    """Returns True if exactly one commit lies between the versions `before` and `after`. A caller uses this
    function to check that its own transaction was the only commit between the two reads. The caller reads `before`
    inside its write transaction: no other connection can commit while this transaction is open. The caller reads
    `after` after its commit.

    Returns False if the number of commits is not one, or if the number is unknown. The number is unknown in two cases:

    - A `PragmaDataVersion` returned the versions.
    - `after` was read while another commit was writing the copies of the header."""
    if not isinstance(before, bytes) or not isinstance(after, bytes):
        return False
    if after[:_HEADER_BYTES] != after[_HEADER_BYTES:]:  # another commit was writing the two copies
        return False
    return _commit_count(after) == (_commit_count(before) + 1) % (1 << 32)


def _commit_count(version: bytes) -> int:
    return int.from_bytes(version[_COMMIT_COUNT_SLICE], sys.byteorder)


def _is_known_layout(headers: bytes, page_size: int) -> bool:
    """Returns whether the two copies of the header are equal and have the layout that this module can read. Checks the
    format version, the database's page size and the checksum."""
    header = headers[:_HEADER_BYTES]
    if header != headers[_HEADER_BYTES:]:
        return False
    format_version, _, _, initialized, _, header_page_size = struct.unpack_from("=IIIBBH", header)
    checksum = struct.unpack_from("=II", header, _CHECKSUMMED_BYTES)
    return (
        (format_version, initialized) == (_FORMAT_VERSION, 1)
        # The header has 0 if the log is empty. The page size 65536 does not fit into the header's 16 bits, so the
        # header has 1 instead: 65536 % 65535. Other page sizes are smaller, and the modulo does not change them.
        and header_page_size in {page_size % 65535, 0}
        and checksum == _checksum(header[:_CHECKSUMMED_BYTES])
    )


def _checksum(data: bytes) -> tuple[int, int]:
    """Returns SQLite's checksum over pairs of 32-bit words ("WAL-mode File Format", section 4.4)."""
    first_sum = second_sum = 0
    for first_word, second_word in struct.iter_unpack("=II", data):
        first_sum = (first_sum + first_word + second_sum) & 0xFFFFFFFF
        second_sum = (second_sum + second_word + first_sum) & 0xFFFFFFFF
    return first_sum, second_sum
