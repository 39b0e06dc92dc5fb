"""The open file of one reader of a blob that is being downloaded (`ReaderFile`).

A *fill* (the download of one blob) writes the bytes into the file of a *partial blob*: a blob whose bytes have not all
arrived. The blob's first byte is at an *offset* in its file. A client may get its reader, and with it the file, while
the fill still waits for a connection to the upstream. Later, the blob's bytes may turn out to be in another file:

- The partial blob is deleted, and the fill continues with another partial blob.
- Another fill stores the blob first.

In both cases a reader that has got no bytes yet gets the new file. The file descriptor stays the same, because the code
that sends the response may have it already. A reader that has got bytes of the old file keeps that file, because bytes
of two files must not be mixed in one response: only the digest of the new file is checked, so the bytes of the old one
may be wrong.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial as partial_function

from registry.single_flight import finish_in_thread
from storage.content import OpenFile
from storage.data_dir.blocking_calls import as_storage_errors
from storage.partials import Partial


class ReaderFile:
    """A file descriptor of one reader. `partial`: the partial blob to whose file it refers; the bytes that have arrived
    in this partial blob can be read. `file`: the descriptor, which is the same until `aclose`. `is_used`: whether the
    reader was told that bytes of `partial` can be read."""

    def __init__(self, partial: Partial, open_files: set[ReaderFile]) -> None:
        """Opens the file of `partial`, whose handle must not be closed yet. `open_files`: the open files of all readers
        of the fill; this one is in it until it is closed. Raises TooManyOpenFiles, StorageFailed."""
        with as_storage_errors():
            self.file = OpenFile(os.dup(partial.file.fd), partial.file.offset)
        self.partial = partial
        self.is_used = False
        self._open_files = open_files
        open_files.add(self)

    def follow(self, partial: Partial) -> None:
        """Makes the descriptor refer to the file of `partial`. Does nothing if the reader has got bytes, or if the blob
        has another offset in the new file than in the old one. Call it before the handle of the old partial blob is
        closed: then the file system does not free the blocks of the old file in this call. Raises nothing; after an
        error, `partial` stays the old one."""
        if self.is_used or partial.file.offset != self.file.offset:
            return
        with suppress(OSError):
            os.dup2(partial.file.fd, self.file.fd, inheritable=False)
            self.partial = partial

    async def replace(self, stored: OpenFile) -> bool:
        """Makes the descriptor refer to the file of the stored blob, and returns True. Does nothing and returns False
        if the reader has got bytes, or if the blob has another offset in the new file than in the old one. Call it only
        after the fill has ended. If the call is cancelled, the file is replaced all the same. Raises StorageFailed."""
        if self.is_used or stored.offset != self.file.offset:
            return False
        with as_storage_errors():
            # In a thread, because the call closes the old file: if that was deleted, its blocks are freed now.
            await finish_in_thread(partial_function(os.dup2, stored.fd, self.file.fd, inheritable=False))
        return True

    async def aclose(self) -> None:
        """Closes the file. Call it once."""
        self._open_files.remove(self)
        if os.fstat(self.file.fd).st_nlink:
            os.close(self.file.fd)
        else:  # the file has been deleted, so the call blocks while the file system frees the file's blocks
            await finish_in_thread(partial_function(os.close, self.file.fd))  # also if the request is cancelled
