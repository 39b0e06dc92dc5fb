"""A mark of the database that every commit changes, read without asking SQLite.

In WAL mode SQLite keeps the log's index in memory that all processes share. It begins with two copies of a header: a
count of the commits, how far the log reaches, a checksum over all of it. Every commit writes both anew, after its bytes
are on disk and before `COMMIT` returns, and every read of SQLite begins with comparing them. Comparing them here is a
tenth of a microsecond, where the shortest statement takes 2.5.

Sources: "WAL-mode File Format" (sqlite.org/walformat.html), section 2.1; the interface of `sqlite3_io_methods`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Final

import apsw

_COPY: Final = 48
"""Bytes of the header."""
_HEADERS: Final = 2 * _COPY
"""Bytes of both copies. Where they differ, a commit is being written or its writer died in it."""
_COMMITS: Final = slice(8, 12)
"""Where the count of commits stands in it (`iChange`), in this machine's order of bytes."""
_REGION: Final = 32 * 1024
"""Bytes of a part of the index that SQLite maps at once."""
_SHARED_MEMORY: Final = 2
"""The first version of `sqlite3_io_methods` that has it."""
_FIRST_METHODS: Final = 12
"""Methods before it."""


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


class DataVersion:
    """Of the database behind an open connection in WAL mode: equal marks mean that nothing was committed in between, by
    any connection of any process. What is looked up after a mark was taken is at least as new as it.

    To be closed before the connection, since the memory goes with that; from then on no mark equals another."""

    def __init__(self, db: apsw.Connection) -> None:
        """Raises apsw.Error."""
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # opens the WAL
        header = (ctypes.c_char * _HEADERS).from_address(_shared_memory(db))
        self._mark: Callable[[], object] = lambda: header.raw

    def __call__(self) -> object:
        return self._mark()

    def close(self) -> None:
        self._mark = object


def is_next(before: object, after: object) -> bool:
    """Whether exactly one commit lies between two marks. `before` has to come from within the transaction that was then
    committed: a count of the commits tells, and nobody else's can come in between unnoticed."""
    if not isinstance(before, bytes) or not isinstance(after, bytes) or after[:_COPY] != after[_COPY:]:
        return False
    return _commits(after) == (_commits(before) + 1) % (1 << 32)


def _commits(mark: bytes) -> int:
    return int.from_bytes(mark[_COMMITS], sys.byteorder)


def _shared_memory(db: apsw.Connection) -> int:
    """The address of the index. SQLite maps it once for all connections of a process, and leaves it where it is until
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
