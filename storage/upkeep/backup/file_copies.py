"""Copies blobs to files, for backups and restores (`FileCopier`). The new file is a hard link, a clone that shares
blocks on the disk with the source file, or a copy. `FileCopier` uses the first of these ways that is allowed and that
the file system supports.

A file gets its final name only when its bytes are durable. Copied bytes are always checked against their digest. The
bytes of links and clones are checked only if the caller asks for a check.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from storage.backups import BackupFailed
from storage.data_dir.blocking_calls import UncancellableFuture, run_in_thread
from storage.data_dir.durable_files import write_fully
from storage.data_dir.system import System
from storage.names import Digest
from storage.running_digest import start_digest
from storage.upkeep.backup.backup_directory import with_backup_errors

T = TypeVar("T")
CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Number of bytes that are read, hashed and written at a time."""
THREADS: Final = 4
"""Number of blobs that are copied at the same time."""
_UNSUPPORTED_ERRNOS: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EACCES}
)
"""Errors of a call that makes a link or a clone. They mean that the call fails for every file."""
_UNLINKABLE_FILE_ERRNOS: Final = frozenset({errno.EMLINK, errno.ENOENT})
"""Errors of a call that makes a link. They mean that only this file cannot be linked: it already has the maximum number
of links, or it was removed."""

_LOST_FILE_ERRNOS: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""Errors which mean that the disk has lost this file or a part of it."""


class BlobDamaged(Exception):
    """The bytes of a blob are missing, have the wrong size or digest, or cannot be read. The message says which."""


class BlobForbidden(BlobDamaged):
    """This process has no permission to open the file of a blob. The bytes of the blob may be right."""


class FileCopier:
    """Copies blobs to files. Works in threads. A cancelled call stops after the current chunk. `copied_bytes` is the
    number of bytes that were copied. It does not include the bytes of links and clones."""

    def __init__(self, system: System, target: Path, *, may_link: bool, may_clone: bool = True, verify: bool) -> None:
        """`target`: the directory of the new files, for error messages. `may_link`: whether a file may be a hard link.
        `may_clone`: whether a file may be a clone. `verify`: whether linked and cloned bytes are also checked against
        their digests."""
        self._system = system
        self._failure_message = f"cannot write to {target}"
        self._may_link = may_link
        self._may_clone = may_clone
        self._verify = verify
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="copy")
        self.copied_bytes = 0

    def close(self) -> None:
        """Waits for the running calls, and ends the threads."""
        self._threads.shutdown()

    def run(self, call: Callable[[], T]) -> UncancellableFuture[T]:
        """Runs a blocking call in a thread. The future gets BackupFailed instead of an OSError."""
        return run_in_thread(self._threads, lambda: with_backup_errors(self._failure_message, call))

    async def copy_file(
        self,
        fd: int,
        digest: Digest,
        size: int,
        temporary: Path,
        final: Path,
        on_bytes: Callable[[int], object],
        *,
        verify: bool = False,
    ) -> None:
        """Creates the file `final` with the bytes of the open file `fd`. The file has the name `temporary` until its
        bytes are durable. The bytes of a link or clone are checked if `verify` is set here or in the constructor. Calls
        `on_bytes` with the number of bytes of each chunk; for a link or clone that is not checked, once with `size`.
        Raises BlobDamaged, BackupFailed. An error leaves no new file, and does not change an existing file `final`."""
        if os.fstat(fd).st_size != size:
            raise BlobDamaged(f"it has {os.fstat(fd).st_size} bytes instead of {size}")
        try:
            if await self.run(lambda: self._link_or_clone(fd, temporary)):
                if self._verify or verify:
                    await self._read_and_check(fd, digest, size, None, on_bytes)
                    # A restore, which always checks the bytes, needs this sync: a tool that copied the backup may have
                    # left the files of the backup unsynced.
                    await self.run(lambda: self._system.sync(fd))
                else:  # only in a backup: the source is a file of the registry, and such files are durable
                    on_bytes(size)
            else:
                async with self.in_thread(self._new_file(temporary)) as target:
                    await self._read_and_check(fd, digest, size, target, on_bytes)
                    await self.run(lambda: self._system.sync(target))
            await self.run(lambda: self._move(temporary, final))
        except BaseException:
            await self._remove(temporary)
            raise

    async def write_bytes(self, data: bytes, digest: Digest, temporary: Path, final: Path) -> None:
        """Creates the file `final` with these bytes. The file has the name `temporary` until its bytes are durable.
        Makes only one call in a thread, which is fast for small blobs. Raises BlobDamaged, BackupFailed. An error
        leaves no new file."""

        def write() -> None:
            running_digest = start_digest(digest.algorithm)
            running_digest.update(data)
            if running_digest.digest() != digest:
                raise BlobDamaged(f"its bytes have the digest {running_digest.digest()}")
            try:
                with self._new_file(temporary) as fd:
                    write_fully(self._system, fd, memoryview(data), 0)
                    self._system.sync(fd)
                self._move(temporary, final)
            except BaseException:
                with suppress(OSError):
                    self._system.unlink(temporary)
                raise

        await self.run(write)
        self.copied_bytes += len(data)

    async def write_chunks(
        self,
        chunks: AsyncIterable[bytes],
        digest: Digest,
        temporary: Path,
        final: Path,
        on_bytes: Callable[[int], object],
    ) -> None:
        """Creates the file `final` with the bytes of `chunks`. The file has the name `temporary` until its bytes are
        durable. Calls `on_bytes` with the number of bytes of each chunk. Raises BlobDamaged, BackupFailed. An error
        leaves no new file."""
        running_digest = start_digest(digest.algorithm)
        offset = 0
        try:
            async with self.in_thread(self._new_file(temporary)) as fd:
                async for chunk in chunks:
                    running_digest.update(chunk)
                    await self.run(partial(write_fully, self._system, fd, memoryview(chunk), offset))
                    offset += len(chunk)
                    self.copied_bytes += len(chunk)
                    on_bytes(len(chunk))
                if running_digest.digest() != digest:
                    raise BlobDamaged(f"its bytes have the digest {running_digest.digest()}")
                await self.run(lambda: self._system.sync(fd))
            await self.run(lambda: self._move(temporary, final))
        except BaseException:
            await self._remove(temporary)
            raise

    async def check_file(self, path: Path, digest: Digest, size: int, on_bytes: Callable[[int], object]) -> None:
        """Reads a file and checks its digest and size. Raises BlobDamaged if one of them is wrong, if the file is
        missing, or if the disk has lost it. Raises BlobForbidden if this process may not open the file, and
        BackupFailed for other errors. Calls `on_bytes` with the number of bytes of each chunk."""
        async with self.in_thread(self.open_file(path)) as fd:
            if os.fstat(fd).st_size != size:
                raise BlobDamaged(f"it has {os.fstat(fd).st_size} bytes instead of {size}")
            await self._read_and_check(fd, digest, size, None, on_bytes)

    @asynccontextmanager
    async def in_thread(self, resource: AbstractContextManager[T]) -> AsyncIterator[T]:
        """Context manager that enters and leaves `resource` in a thread, because opening and closing a file can block
        for long. If the task is cancelled while the thread enters `resource`, leaves `resource` again."""
        entering = self.run(resource.__enter__)
        try:
            value = await entering
        except asyncio.CancelledError:
            # The task gets a cancellation only after the call has ended (`UncancellableFuture`), so the call may have
            # entered `resource`. `done()` is only a safeguard: `exception()` fails if the future is not done.
            if entering.done() and entering.exception() is None:
                await self.run(lambda: resource.__exit__(None, None, None))
            raise
        try:
            yield value
        finally:
            await self.run(lambda: resource.__exit__(None, None, None))

    @contextmanager
    def open_file(self, path: Path) -> Iterator[int]:
        """Context manager that opens a file for reading and yields its descriptor. Blocks, so use it with `in_thread`.
        Raises BlobDamaged if the file is missing or the disk has lost it, BlobForbidden if this process may not open
        the file, and OSError for other errors."""
        try:
            fd = self._system.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise BlobDamaged("it is missing") from None
        except PermissionError as error:
            raise BlobForbidden(f"{path} cannot be opened: {error.strerror}") from error
        except OSError as error:
            if error.errno not in _LOST_FILE_ERRNOS:
                raise
            raise BlobDamaged(f"{path} cannot be opened: {error.strerror}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[int]:
        """Context manager that creates a file and yields its descriptor. Blocks. Raises OSError."""
        fd = self._create_file(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _create_file(self, path: Path) -> int:
        """Creates the file and returns its descriptor. First removes an existing file with this name, which an
        interrupted run may have left. Does not truncate the existing file, which may be a hard link to the source
        file."""
        with suppress(FileNotFoundError):
            self._system.unlink(path)
        return self._system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)

    async def _remove(self, path: Path) -> None:
        """Removes a file. Ignores errors."""
        with suppress(BackupFailed):
            await self.run(lambda: self._system.unlink(path))

    def _move(self, temporary: Path, final: Path) -> None:
        self._system.rename(temporary, final)
        with suppress(FileNotFoundError):  # if both are names of the same file, rename(2) removes neither
            self._system.unlink(temporary)

    def _link_or_clone(self, fd: int, path: Path) -> bool:
        """Creates `path` as a link to the open file `fd`, if a link is allowed and possible. Otherwise creates a clone
        of the file, if a clone is allowed and possible. Returns whether it has created a link or a clone."""
        if self._may_link:
            try:
                with suppress(FileNotFoundError):
                    self._system.unlink(path)  # an interrupted run may have left it
                self._system.link(fd, path)
                return True
            except OSError as error:
                if error.errno in _UNSUPPORTED_ERRNOS:
                    self._may_link = False
                elif error.errno not in _UNLINKABLE_FILE_ERRNOS:
                    raise
        if self._may_clone:
            with self._new_file(path) as target:
                try:
                    self._system.clone(fd, target)
                    self._system.sync(target)
                    return True
                except OSError as error:
                    if error.errno not in _UNSUPPORTED_ERRNOS:
                        raise
                    self._may_clone = False
        return False

    async def _read_and_check(
        self, fd: int, digest: Digest, size: int, target: int | None, on_bytes: Callable[[int], object]
    ) -> None:
        """Reads the whole file and checks its digest. If `target` is not None, copies the bytes to the open file
        `target` at the same time. Raises BlobDamaged, BackupFailed."""
        running_digest = start_digest(digest.algorithm)
        offset = 0

        def read_chunk() -> int:
            try:
                data = os.pread(fd, CHUNK_BYTES, offset)
            except OSError as error:
                if error.errno not in _LOST_FILE_ERRNOS:
                    raise
                raise BlobDamaged("the disk cannot read it") from error
            running_digest.update(data)
            if target is not None:
                write_fully(self._system, target, memoryview(data), offset)
                self._system.start_writeback(target, offset, len(data))
            return len(data)

        while offset < size:
            length = await self.run(read_chunk)
            if length == 0:
                raise BlobDamaged(f"it ends after {offset} bytes")
            offset += length
            if target is not None:
                self.copied_bytes += length
            on_bytes(length)
        if running_digest.digest() != digest:
            raise BlobDamaged(f"its bytes have the digest {running_digest.digest()}")


async def run_together(calls: Iterable[Coroutine[Any, Any, None]], limit: int = THREADS) -> None:
    """Runs the calls, at most `limit` at the same time. If a call raises an error, cancels the other calls, waits until
    they have ended, and raises the error."""
    pending_calls = iter(calls)

    async def work() -> None:
        for call in pending_calls:
            await call

    tasks = [asyncio.create_task(work()) for _ in range(limit)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for call in pending_calls:
            call.close()
