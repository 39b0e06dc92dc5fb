"""The digest of a file that is filled in any order, computed from its start while it comes.

A step in a thread reads what has come without a gap and ends when it has caught up; no thread waits for bytes. What it
reads was written a moment ago and is still in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor

from storage.data_dir.durable_files import WRITEBACK
from storage.data_dir.system import System
from storage.names import Digest
from storage.running_digest import start_digest

PIECE = 1024 * 1024
PIECES_PER_STEP = 64
"""Pieces after which a step lets another file's have its thread."""


class PrefixDigest:
    """Of the file `fd` of `size` bytes. `prefix` says how many bytes are there from the start; `keep` runs a step with
    the file kept open, or not at all."""

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
        """More has come. Starts a step where none is under way and there is enough to do."""
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
        """Bytes that can be read now and are worth it."""
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
            self._failed = True  # `finish` meets it again, and has somebody to tell
        if again:
            self._submit()
            return
        self._rest()
        self.notify()  # what came between the last look and the rest

    def _take(self, buffer: memoryview, length: int) -> None:
        done = os.preadv(self._fd, [buffer[:length]], self._at)
        if done == 0:
            raise OSError(f"the file ends after {self._at} bytes")
        self._running.update(buffer[:done])
        before, self._at = self._at, self._at + done
        if self._at // WRITEBACK != before // WRITEBACK:
            begin = before // WRITEBACK * WRITEBACK
            self._system.start_writeback(self._fd, begin, self._at - begin)

    def finish(self) -> Digest:
        """The digest of the whole file, once all of it is there. Raises OSError."""
        with self._changed:
            self._finishing = True
            while self._busy:
                self._changed.wait()
        buffer = memoryview(bytearray(PIECE))
        while self._at < self._size:
            self._take(buffer, min(PIECE, self._size - self._at))
        return self._running.digest()

    def stop(self) -> None:
        """Nobody wants it any more."""
        self._finishing = True
