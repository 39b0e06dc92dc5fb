"""A file of another program that becomes a blob by a hard link, without a copy of its bytes (`LinkedFile`).

A blob's file must never change. A hard link shares the bytes with the other name of the file. So the link is made only
if root and the user of this process are the only users who may write to the file. The caller must be sure that the
other program never writes to such a file again. The other program may delete its own name of the file: the link keeps
the bytes.

    uploads/UUID/1      the link, until it is moved to the place of the blob

The link is first made in the directory of an upload session, and then moved. This is because link(2) cannot replace a
file that is already at the blob's place, whereas rename(2) can. If the process dies before the move, garbage collection
deletes the link like any other upload without a session.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from storage.blobs.blob_store import LinkRefused
from storage.data_dir.disk import Disk
from storage.data_dir.durable_files import sync_directory
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import Digest, UploadID


class LinkedFile:
    """Implements `VerifiedContent` (verified bytes that can become a blob) for a file of another program, whose digest
    the caller has verified. `size`: in bytes. `place`: the path that the link will have, relative to the data
    directory."""

    def __init__(self, disk: Disk, fd: int, digest: Digest, size: int) -> None:
        """`fd`: the open file; the caller closes it. Raises LinkRefused if the file must not be linked."""
        self.digest = digest
        self.size = size
        self.place = disk.layout.blob_place(digest)
        self._disk = disk
        self._fd = fd
        _check_private(fd, disk.layout.uploads)

    async def publish(self) -> None:
        """Makes the link durably at `place`. Raises LinkRefused, StorageFull, StorageFailed."""
        # The errors of link(2) are passed as a value, because `Disk.run` makes StorageFailed of an OSError.
        refusal = await self._disk.run(self._publish)
        if refusal is not None:
            raise LinkRefused(refusal)

    def _publish(self) -> str | None:
        """Makes the link. Returns why it cannot be made; None if it was made. Raises OSError."""
        system, layout = self._disk.system, self._disk.layout
        self._disk.reserve.require_free_space()
        system.sync(self._fd)  # the other program may not have synced its file
        directory = layout.upload(UploadID.random())
        link = directory / "1"
        system.mkdir(directory)
        try:
            try:
                system.link(self._fd, link)
            except OSError as error:
                if error.errno in DISK_FULL_ERRNOS:
                    raise
                return f"the system does not link it: {error.strerror}"
            target = layout.path_of(self.place)
            system.rename(link, target)
            sync_directory(system, target.parent)
            return None
        finally:
            # The link still exists after a failure. It also exists if `target` was already a link to the same file,
            # because rename(2) then does nothing.
            with suppress(OSError):
                system.unlink(link)
            with suppress(OSError):
                system.rmdir(directory)


def _check_private(fd: int, uploads: Path) -> None:
    """Raises LinkRefused if the open file is not a regular file, or is on another file system than `uploads`. Also
    raises it if users other than root and the user of this process can change the file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise LinkRefused("it is not a regular file")
    if status.st_dev != os.stat(uploads).st_dev:
        raise LinkRefused("it is on another file system")
    if status.st_uid not in (0, os.geteuid()):
        raise LinkRefused("it belongs to another user, who could change it")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LinkRefused("other users may write to it")
