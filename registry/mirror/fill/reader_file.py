"""The open file of one reader of a blob that is being downloaded (`ReaderFile`).

A *fill* (the download of one blob) writes the blob's bytes into the file of a *partial blob*: a blob whose bytes have
not all arrived. The blob's first byte is at an *offset* in the file. While a reader has the file open, another file can
replace it:

- The fill continues with another partial blob.
- Another fill stores the blob first.

A reader that has read no bytes gets the new file under the same file descriptor. A reader that has read bytes keeps the
old file, because one response must not mix the bytes of two files. Such a reader may get wrong bytes, because only the
digest of the new file is checked.
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

    - `file`: the descriptor and the blob's offset. Both stay the same until `aclose`.
    - `partial`: the partial blob whose file the descriptor refers to. `switch_to_stored` does not change this field.
    - `may_have_been_read`: whether the reader may have read bytes of the file. The fill sets it."""

    def __init__(self, partial: Partial, open_files: set[ReaderFile]) -> None:
        """Opens the file of `partial`, which must not be closed yet. `open_files`: the open files of the fill's
        readers; contains this object until `aclose`. Raises TooManyOpenFiles, StorageFailed."""
        with as_storage_errors():
            self.file = OpenFile(os.dup(partial.file.fd), partial.file.offset)
        self.partial = partial
        self.may_have_been_read = False
        self._open_files = open_files
        open_files.add(self)

    def switch_to_partial(self, partial: Partial) -> None:
        """Makes the descriptor refer to the file of `partial`. Keeps the old file if the reader may have read bytes of
        it, if the blob's offset differs between the two files, or if an error occurs. Raises nothing.

        This method closes the reader's descriptor of the old file. Call it before the old partial blob is closed, so
        that another descriptor of the old file is still open. Closing the last descriptor of a deleted file would block
        while the file system frees the file's blocks."""
        if self.may_have_been_read or partial.file.offset != self.file.offset:
            return
        with suppress(OSError):
            os.dup2(partial.file.fd, self.file.fd, inheritable=False)
            self.partial = partial

    async def switch_to_stored(self, stored: OpenFile) -> bool:
        """Makes the descriptor refer to the file of the stored blob, and returns True. Keeps the old file and returns
        False if the reader may have read bytes of it, or if the blob's offset differs between the two files. Call this
        method only after the fill has ended. A cancelled call still replaces the file. Raises StorageFailed."""
        if self.may_have_been_read or stored.offset != self.file.offset:
            return False
        with as_storage_errors():
            # In a thread, because `dup2` closes the old file, which blocks like `close` in `aclose`.
            await finish_in_thread(partial_function(os.dup2, stored.fd, self.file.fd, inheritable=False))
        return True

    async def aclose(self) -> None:
        """Closes the file. Call it once."""
        self._open_files.remove(self)
        if os.fstat(self.file.fd).st_nlink:
            os.close(self.file.fd)
        else:  # the file has been deleted: `close` blocks while the file system frees the file's blocks
            await finish_in_thread(partial_function(os.close, self.file.fd))
