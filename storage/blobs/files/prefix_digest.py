"""The digest of a file that is filled in any order, computed while it is filled (`PrefixDigest`).

A step in a thread hashes the bytes from the start of the file up to the first gap, and ends when it has caught up; no
thread waits for bytes. The bytes it reads were written a moment ago and are still in the page cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor

from storage.data_dir.durable_files import WRITEBACK_BYTES
from storage.data_dir.system import System
from storage.names import Digest
from storage.running_digest import start_digest

PIECE = 1024 * 1024
PIECES_PER_STEP = 64
"""Pieces after which a step leaves its thread to the steps of other files."""


class PrefixDigest:
    """Digest of the file `fd` of `size` bytes. `prefix` returns how many bytes there are before the first gap. `keep`
    runs a step with the file kept open, or does not run it if the file is closed."""

    def __init__(
        self,
        system: System,
        threads: Executor,
        fd: int,
        size: int,
        algorithm: str,
        prefix: Callable[[], int],
        keep: Callable[[Callable[[], None]], None],
    ) -> None:
        self._system = system
        self._threads = threads
        self._fd = fd
        self._size = size
        self._running = start_digest(algorithm)
        self._prefix = prefix
        self._keep = keep
        self._at = 0
        self._changed = threading.Condition()
        self._busy = False
        self._finishing = False
        self._failed = False

    def notify(self) -> None:
        """Starts a step after new bytes were written, if none runs and there is enough to hash."""
        with self._changed:
            if self._busy or self._finishing or self._failed or not self._due():
                return
            self._busy = True
        self._submit()

    def _submit(self) -> None:
        try:
            self._threads.submit(self._work)
        except RuntimeError:  # the registry is being closed
            self._rest()

    def _rest(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _due(self) -> int:
        """Returns the number of bytes to hash next; 0 if there is too little to be worth it."""
        prefix = self._prefix()
        waiting = min(PIECE, prefix - self._at)
        return waiting if waiting == PIECE or prefix == self._size else 0

    def _work(self) -> None:
        again = False

        def follow() -> None:
            nonlocal again
            buffer = memoryview(bytearray(PIECE))
            for _ in range(PIECES_PER_STEP):
                if self._finishing or not (length := self._due()):
                    return
                self._take(buffer, length)
            again = True

        try:
            self._keep(follow)
        except OSError:
            self._failed = True  # `finish` meets the error again and raises it
        if again:
            self._submit()
            return
        self._rest()
        self.notify()  # for bytes that were written since the last check

    def _take(self, buffer: memoryview, length: int) -> None:
        done = os.preadv(self._fd, [buffer[:length]], self._at)
        if done == 0:
            raise OSError(f"the file ends after {self._at} bytes")
        self._running.update(buffer[:done])
        before, self._at = self._at, self._at + done
        if self._at // WRITEBACK_BYTES != before // WRITEBACK_BYTES:
            begin = before // WRITEBACK_BYTES * WRITEBACK_BYTES
            self._system.start_writeback(self._fd, begin, self._at - begin)

    def finish(self) -> Digest:
        """Returns the digest of the whole file, once all bytes are there. Blocking. Raises OSError."""
        with self._changed:
            self._finishing = True
            while self._busy:
                self._changed.wait()
        buffer = memoryview(bytearray(PIECE))
        while self._at < self._size:
            self._take(buffer, min(PIECE, self._size - self._at))
        return self._running.digest()

    def stop(self) -> None:
        """Ends the computation."""
        self._finishing = True
