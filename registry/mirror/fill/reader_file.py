"""The open file of one reader of a blob that is being downloaded (`ReaderFile`).

A *fill* (the download of one blob) writes the bytes into the file of a *partial blob*: a blob whose bytes have not all
arrived. The blob's first byte is at an *offset* in its file. A reader may open the file while the fill still waits for
a connection to the upstream. Later, the reader may need another file, in two cases:

- The partial blob is deleted, and the fill continues with another partial blob.
- Another fill stores the blob first.

A reader that has got no bytes yet gets the new file. The file descriptor stays the same, because the
code that sends the response may have it already. A reader that has got bytes keeps the old file, because bytes of two
files must not be mixed in one response. Only the digest of the new file is checked, so the bytes of the old file may be
wrong.
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
    """The file descriptor of one reader.

    - `file`: the descriptor and the blob's offset, which stay the same until `aclose`.
    - `partial`: the partial blob to whose file the descriptor refers until `switch_to_stored` succeeds.
    - `is_used`: whether the reader was told that bytes of `partial` can be read."""

    def __init__(self, partial: Partial, open_files: set[ReaderFile]) -> None:
        """Opens the file of `partial`, whose handle must not be closed yet. `open_files`: the open files of all readers
        of the fill; contains this file until `aclose`. Raises TooManyOpenFiles, StorageFailed."""
        with as_storage_errors():
            self.file = OpenFile(os.dup(partial.file.fd), partial.file.offset)
        self.partial = partial
        self.is_used = False
        self._open_files = open_files
        open_files.add(self)

    def switch_to(self, partial: Partial) -> None:
        """Makes the descriptor refer to the file of `partial`. Does nothing if the reader has got bytes, or if the blob
        has another offset in the new file than in the old one. Raises nothing; after an error, `partial` stays the old
        one. Call it before the handle of the old partial blob is closed. Otherwise, if the old file was deleted, the
        call would block while the file system frees the file's blocks."""
        if self.is_used or partial.file.offset != self.file.offset:
            return
        with suppress(OSError):
            os.dup2(partial.file.fd, self.file.fd, inheritable=False)
            self.partial = partial

    async def switch_to_stored(self, stored: OpenFile) -> bool:
        """Makes the descriptor refer to the file of the stored blob, and returns True. Does nothing and returns False
        if the reader has got bytes, or if the blob has another offset in the new file than in the old one. Call it only
        after the fill has ended. If the call is cancelled, the file is replaced all the same. Raises StorageFailed."""
        if self.is_used or stored.offset != self.file.offset:
            return False
        with as_storage_errors():
            # In a thread: if the old file was deleted, the call blocks while the file system frees its blocks.
            await finish_in_thread(partial_function(os.dup2, stored.fd, self.file.fd, inheritable=False))
        return True

    async def aclose(self) -> None:
        """Closes the file. Call it once."""
        self._open_files.remove(self)
        if os.fstat(self.file.fd).st_nlink:
            os.close(self.file.fd)
        else:  # the file has been deleted, so the call blocks while the file system frees the file's blocks
            await finish_in_thread(partial_function(os.close, self.file.fd))  # even if the request is cancelled
