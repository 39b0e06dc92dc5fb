"""Writes exported images into a directory (`LayoutDirectory`) or a tar archive (`LayoutArchive`). A file gets its final
name only when it is complete."""

from __future__ import annotations

import asyncio
import json
import os
import tarfile
from collections.abc import AsyncIterable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from registry.upkeep.images.image_files import (
    INDEX_FILE,
    LAYOUT_FILE,
    LAYOUT_FILE_CONTENT,
    REF_NAME_ANNOTATION,
    blob_file,
    convert_os_errors,
)
from storage.backups import ImageFileFailed
from storage.content import OCI_INDEX
from storage.names import Digest
from storage.running_digest import start_digest

T = TypeVar("T")
Document = dict[str, Any]
"""A JSON object."""


class ImageFileWriter(Protocol):
    """Writes the content of images. `write` and `finish` raise ImageFileFailed."""

    def has(self, digest: Digest, size: int) -> bool:
        """Returns whether this export, or an earlier export into the same directory, has written the content."""
        ...

    async def write(
        self, digest: Digest, size: int, chunks: AsyncIterable[bytes], on_bytes: Callable[[int], object]
    ) -> None:
        """Writes a blob or manifest. Calls `on_bytes` with the size of each chunk. Raises ImageFileFailed also if the
        bytes do not have the digest and size."""
        ...

    async def finish(self, entries: list[Document], docker_entries: list[Document] | None) -> None:
        """Writes `index.json`, and gives an archive its final name. `entries`: the descriptors of the images, for
        `index.json`. `docker_entries`: the content of `manifest.json`, which only a docker archive has; None for other
        exports."""
        ...

    def abandon(self) -> None:
        """Removes unfinished files after an error or a cancellation."""
        ...


class LayoutDirectory:
    """An OCI image layout in a directory. Keeps the content of an existing layout, and adds to it. Implements
    `ImageFileWriter`."""

    def __init__(self, root: Path) -> None:
        """Raises ImageFileFailed if `root` is a file, or if it has content but is no OCI image layout."""
        self._root = root
        self._error_prefix = f"cannot write to {root}"
        self._temporary: Path | None = None  # the file that is being written
        convert_os_errors(self._error_prefix, self._check_directory)

    def _check_directory(self) -> None:
        if not self._root.exists():
            return
        if not self._root.is_dir():
            raise ImageFileFailed(f"{self._root} is a file; name a directory, or a file that ends with .tar")
        names = {path.name for path in self._root.iterdir() if not path.name.startswith(".")}
        if names and LAYOUT_FILE not in names:
            raise ImageFileFailed(f"{self._root} is not empty and is no OCI image layout; name a new directory")

    def has(self, digest: Digest, size: int) -> bool:
        path = self._root / blob_file(digest)
        return path.is_file() and path.stat().st_size == size

    async def write(
        self, digest: Digest, size: int, chunks: AsyncIterable[bytes], on_bytes: Callable[[int], object]
    ) -> None:
        path = self._root / blob_file(digest)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with await self._run_in_thread(self._open) as file:
            await _copy(digest, size, chunks, on_bytes, lambda chunk: self._run_in_thread(lambda: file.write(chunk)))
            await self._run_in_thread(lambda: _sync(file))
        temporary = self._temporary
        await self._run_in_thread(lambda: os.rename(temporary, path))
        self._temporary = None

    def _open(self) -> BinaryIO:
        assert self._temporary is not None
        self._make_layout()
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        return open(self._temporary, "wb")

    def _make_layout(self) -> None:
        """Creates the directory, and the file that marks it as an OCI image layout, if the file does not exist."""
        if not (self._root / LAYOUT_FILE).exists():
            self._root.mkdir(parents=True, exist_ok=True)
            _write_whole(self._root / LAYOUT_FILE, LAYOUT_FILE_CONTENT)

    async def finish(self, entries: list[Document], docker_entries: list[Document] | None) -> None:
        """Ignores `docker_entries`, because a docker archive is always a tar archive."""
        await self._run_in_thread(self._make_layout)
        await self._run_in_thread(lambda: self._write_index(entries))

    def _write_index(self, entries: list[Document]) -> None:
        """Adds the entries to `index.json`. An entry replaces an old entry with the same `_entry_key`."""
        path = self._root / INDEX_FILE
        entries_by_key: dict[tuple[str, str], Document] = {}
        with suppress(FileNotFoundError):
            try:
                old_entries = list(json.loads(path.read_bytes())["manifests"])
                entries_by_key = {_entry_key(entry): entry for entry in old_entries}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ImageFileFailed(f"{path} is not valid; name a new directory") from None
        entries_by_key |= {_entry_key(entry): entry for entry in entries}
        _write_whole(path, index_json(list(entries_by_key.values())))

    def abandon(self) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.unlink()

    async def _run_in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(convert_os_errors, self._error_prefix, call)


class LayoutArchive:
    """A tar archive with an OCI image layout. If `finish` gets `docker_entries`, the archive also has the file
    `manifest.json`, which every version of `docker load` can read. Implements `ImageFileWriter`."""

    def __init__(self, path: Path | None, stream: BinaryIO | None = None) -> None:
        """The archive is written to the file `path`, or to `stream` if `path` is None. Raises ImageFileFailed if the
        file cannot be created."""
        self._path = path
        self._error_prefix = "cannot write to the standard output" if path is None else f"cannot write {path}"
        self._temporary = None if path is None else path.with_name(f".{path.name}.{os.getpid()}.partial")
        if self._temporary is not None:
            temporary = self._temporary
            self._file: BinaryIO = convert_os_errors(self._error_prefix, lambda: open(temporary, "wb"))  # noqa: SIM115
        else:
            assert stream is not None
            self._file = stream
        self._written: set[Digest] = set()

    def has(self, digest: Digest, size: int) -> bool:
        return digest in self._written

    async def write(
        self, digest: Digest, size: int, chunks: AsyncIterable[bytes], on_bytes: Callable[[int], object]
    ) -> None:
        await self._append(tar_header(blob_file(digest), size))
        await _copy(digest, size, chunks, on_bytes, self._append)
        await self._append(tar_padding(size))
        self._written.add(digest)

    async def finish(self, entries: list[Document], docker_entries: list[Document] | None) -> None:
        files = {LAYOUT_FILE: LAYOUT_FILE_CONTENT, INDEX_FILE: index_json(entries)}
        if docker_entries is not None:
            files["manifest.json"] = json.dumps(docker_entries).encode()
        for name, data in files.items():
            await self._append(tar_header(name, len(data)) + data + tar_padding(len(data)))
        await self._append(bytes(2 * tarfile.BLOCKSIZE))  # two empty blocks end a tar archive
        await asyncio.to_thread(convert_os_errors, self._error_prefix, self._complete)

    def _complete(self) -> None:
        if self._temporary is None or self._path is None:
            self._file.flush()
            return
        _sync(self._file)
        self._file.close()
        os.rename(self._temporary, self._path)
        _sync_directory(self._path.parent)

    def abandon(self) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink()

    async def _append(self, data: bytes) -> None:
        await asyncio.to_thread(convert_os_errors, self._error_prefix, lambda: self._file.write(data))


async def _copy(
    digest: Digest,
    size: int,
    chunks: AsyncIterable[bytes],
    on_bytes: Callable[[int], object],
    append: Callable[[bytes], Any],
) -> None:
    """Passes each chunk to `append`. Raises ImageFileFailed if the chunks together do not have the digest and size."""
    running_digest, length = start_digest(digest.algorithm), 0
    async for chunk in chunks:
        length += len(chunk)
        if length > size:
            break
        running_digest.update(chunk)
        await append(bytes(chunk))
        on_bytes(len(chunk))
    if length != size or running_digest.digest() != digest:
        raise ImageFileFailed(
            f"the registry's bytes of {digest} are damaged; run `entrepot scrub`, or push the content again"
        )


def _entry_key(entry: Document) -> tuple[str, str]:
    """Returns the key of an entry in `index.json`: its tag, or its digest if it has no tag."""
    name = (entry.get("annotations") or {}).get(REF_NAME_ANNOTATION, "")
    return (name, "") if name else ("", str(entry.get("digest")))


def index_json(entries: list[Document]) -> bytes:
    """Returns the content of `index.json` for an export. `entries`: the descriptors of the images."""
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, indent=1).encode()


def tar_header(name: str, size: int) -> bytes:
    """Returns the header of a file in a tar archive. The header depends only on the name and the size, not on the time
    or the machine."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def tar_padding(size: int) -> bytes:
    """Returns the zeros that fill the last block of a file in a tar archive."""
    return bytes(-size % tarfile.BLOCKSIZE)


def _write_whole(path: Path, data: bytes) -> None:
    """Writes a file durably and atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        _sync(file)
    os.rename(temporary, path)
    _sync_directory(path.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    directory_descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory_descriptor)
    finally:
        os.close(directory_descriptor)
