"""A fake of an S3 bucket (`Bucket`).

An object is created completely or not at all. After that, every call of every process sees it. An object cannot be
appended to, renamed, or changed in place. Each object is one file in a folder, so that several processes can share the
bucket.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, unquote

MIN_PART_BYTES = 5 * 1024 * 1024
"""Smallest allowed size of a part of a multipart upload, except the last part (Amazon S3, "Multipart upload
limits")."""
MOST_PARTS = 10_000


class NoSuchKey(Exception):
    """Status 404."""


class PreconditionFailed(Exception):
    """Status 412: the request has `If-None-Match: *`, and the object exists."""


class EntityTooSmall(Exception):
    """Status 400: a part that is not the last one is smaller than the smallest allowed size."""


class ObjectInfo(NamedTuple):
    """An entry of a listing. `modified`: seconds since 1970."""

    key: str
    size: int
    modified: float


class Bucket:
    """A bucket whose objects are files below `folder`. The docstring of a method begins with the name of the S3
    operation that the method imitates. All calls block. `before`: called with `put`, `copy`, `delete`, `create` or
    `complete` and the key, before each operation of this kind."""

    def __init__(
        self,
        folder: Path,
        min_part_bytes: int = MIN_PART_BYTES,
        before: Callable[[str, str], None] = lambda operation, key: None,
    ) -> None:
        self.min_part_bytes = min_part_bytes
        self._before = before
        self._objects, self._uploads = folder / "objects", folder / "uploads"
        self._count = itertools.count()
        for directory in (self._objects, self._uploads):
            directory.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes) -> None:
        """PutObject with `If-None-Match: *`: creates an object. Raises PreconditionFailed if the object exists."""
        self._before("put", key)
        temporary = self._temporary()
        temporary.write_bytes(data)
        self._create_object(temporary, key)

    def get(self, key: str, start: int = 0) -> BinaryIO:
        """GetObject: opens an object from the byte `start` on. The returned stream continues even if the object is
        deleted. Raises NoSuchKey."""
        try:
            stream = open(self._file(key), "rb")  # noqa: SIM115  the caller closes it
        except FileNotFoundError:
            raise NoSuchKey(key) from None
        stream.seek(start)
        return stream

    def read(self, key: str, start: int = 0, length: int = -1) -> bytes:
        """GetObject of a range: returns its bytes. Raises NoSuchKey."""
        with self.get(key, start) as stream:
            return stream.read(length)

    def exists(self, key: str) -> bool:
        """HeadObject: returns whether an object exists."""
        return self._file(key).exists()

    def size(self, key: str) -> int | None:
        """HeadObject: returns the length of an object; None if it does not exist."""
        try:
            return self._file(key).stat().st_size
        except FileNotFoundError:
            return None

    def version(self, key: str) -> str | None:
        """HeadObject: returns the version id; None if the object does not exist."""
        try:
            status = self._file(key).stat()
        except FileNotFoundError:
            return None
        return f"{status.st_ino}-{status.st_mtime_ns}"

    def copy(self, source: str, target: str) -> None:
        """CopyObject: copies an object, and replaces an object at `target`. Raises NoSuchKey."""
        self._before("copy", target)
        temporary = self._temporary()
        temporary.write_bytes(self.read(source))
        temporary.replace(self._file(target))

    def delete(self, key: str) -> None:
        """DeleteObject: deletes an object. Does nothing if it does not exist."""
        self._before("delete", key)
        self._file(key).unlink(missing_ok=True)

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        """ListObjectsV2: returns the entries of all pages, in the order of the keys."""
        found = []
        for entry in os.scandir(self._objects):
            if (key := unquote(entry.name)).startswith(prefix):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append(ObjectInfo(key, status.st_size, status.st_mtime))
        return sorted(found)

    def create_multipart(self, key: str) -> str:
        """CreateMultipartUpload: starts an upload, and returns its id."""
        self._before("create", key)
        upload = uuid.uuid4().hex
        (self._uploads / upload).mkdir()
        return upload

    def copy_part(self, upload: str, number: int, source: str) -> str:
        """UploadPartCopy: adds a whole object as a part. `number`: the number of the part, from 1 on. Returns the
        part's ETag. Raises NoSuchKey."""
        assert 1 <= number <= MOST_PARTS
        data = self.read(source)
        (self._uploads / upload / str(number)).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def complete_multipart(self, upload: str, key: str, tags: list[str]) -> None:
        """CompleteMultipartUpload with `If-None-Match: *`: creates the object from all parts. `tags`: the ETags of the
        parts. Raises EntityTooSmall, PreconditionFailed."""
        self._before("complete", key)
        temporary = self._temporary()
        with temporary.open("wb") as whole:
            for number, tag in enumerate(tags, 1):
                data = (self._uploads / upload / str(number)).read_bytes()
                assert hashlib.md5(data, usedforsecurity=False).hexdigest() == tag
                if number < len(tags) and len(data) < self.min_part_bytes:
                    temporary.unlink()
                    raise EntityTooSmall(f"part {number} has {len(data)} bytes")
                whole.write(data)
        self._create_object(temporary, key)
        self.abort_multipart(upload)

    def abort_multipart(self, upload: str) -> None:
        """AbortMultipartUpload: discards an upload and its parts."""
        shutil.rmtree(self._uploads / upload, ignore_errors=True)

    def open_multiparts(self) -> int:
        """ListMultipartUploads: returns the number of open uploads."""
        return sum(entry.is_dir() for entry in os.scandir(self._uploads))

    def _file(self, key: str) -> Path:
        return self._objects / quote(key, safe="")

    def _temporary(self) -> Path:
        return self._uploads / f"{os.getpid()}-{id(self)}-{next(self._count)}.temporary"

    def _create_object(self, temporary: Path, key: str) -> None:
        try:
            os.link(temporary, self._file(key))
        except FileExistsError:
            raise PreconditionFailed(key) from None
        finally:
            temporary.unlink()
