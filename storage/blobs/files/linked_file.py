"""Makes a blob from a file of another program. The blob is a hard link to the file, so no bytes are copied
(`LinkedFile`).

The bytes of a blob must never change, and a program that writes to the file would change the blob. Therefore the link
is made only if root and the user of this process are the only users who may write to the file. The caller must be sure
that the other program never writes to the file again. The other program may delete the file: the link keeps the bytes.

    uploads/UUID/1      the link, until it is moved to the place of the blob

The link is made in a new upload directory and then moved to the place of the blob. rename(2) can replace a file that is
already there; link(2) cannot. If the process dies before the move, garbage collection deletes the upload directory.
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
    """A file of another program that can become a blob. Implements the Protocol `VerifiedContent`. The caller must
    verify the digest of the file before it calls `publish`. `size`: size of the file in bytes. `place`: the path of the
    blob's file, relative to the data directory."""

    def __init__(self, disk: Disk, fd: int, digest: Digest, size: int) -> None:
        """`fd`: the open file; the caller closes it. Raises LinkRefused if the file must not be linked."""
        self.digest = digest
        self.size = size
        self.place = disk.layout.blob_place(digest)
        self._disk = disk
        self._fd = fd
        _check_linkable(fd, disk.layout.uploads)

    async def publish(self) -> None:
        """Creates the link at `place`, and makes it durable. Raises LinkRefused, StorageFull, StorageFailed."""
        # `_publish` returns the error of link(2) as a text, because `Disk.run` turns an OSError into StorageFailed.
        refusal = await self._disk.run(self._publish)
        if refusal is not None:
            raise LinkRefused(refusal)

    def _publish(self) -> str | None:
        """Creates the link, and returns None. If link(2) fails, and the disk is not full, returns the reason. Raises
        OSError, StorageFull."""
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
            # `link` may exist even after a success: rename(2) does nothing if `target` is a link to the same file.
            with suppress(OSError):
                system.unlink(link)
            with suppress(OSError):
                system.rmdir(directory)


def _check_linkable(fd: int, uploads: Path) -> None:
    """Raises LinkRefused in three cases:

    - The open file is not a regular file.
    - The open file is on another file system than `uploads`.
    - Users other than root and the user of this process may change the open file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise LinkRefused("it is not a regular file")
    if status.st_dev != os.stat(uploads).st_dev:
        raise LinkRefused("it is on another file system")
    if status.st_uid not in (0, os.geteuid()):
        raise LinkRefused("it belongs to another user, who could change it")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LinkRefused("other users may write to it")
