"""Computes the digest of a file while its bytes arrive in any order (`PrefixDigest`).

The *prefix* is the part of the file before the first gap. Whenever the prefix has grown by enough bytes, a step in a
thread hashes them. A step ends when it has hashed the whole prefix, so no thread waits for bytes. The bytes that it
reads were written a moment ago and are usually still in the page cache.
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

PIECE_BYTES = 1024 * 1024
"""Bytes that are read and hashed at a time."""
PIECES_PER_STEP = 64
"""Pieces that one step hashes at most. Then it frees its thread for the steps of other files."""


class PrefixDigest:
    """The digest of one file. Any thread may call the methods."""

    def __init__(
        self,
        system: System,
        threads: Executor,
        fd: int,
        size: int,
        algorithm: str,
        prefix_bytes: Callable[[], int],
        run_while_open: Callable[[Callable[[], None]], None],
    ) -> None:
        """`fd`, `size`: the open file and the number of bytes that it will have. `algorithm`: of the digest, such as
        `sha256`. `prefix_bytes`: returns the present length of the prefix. `run_while_open`: calls a function and keeps
        the file open during the call, or does not call it if the file is closed already."""
        self._system = system
        self._threads = threads
        self._fd = fd
        self._size = size
        self._running_digest = start_digest(algorithm)
        self._prefix_bytes = prefix_bytes
        self._run_while_open = run_while_open
        self._hashed_bytes = 0
        self._step_ended = threading.Condition()
        self._step_is_running = False
        self._is_stopped = False
        """Whether no further step may start."""
        self._has_failed = False

    def notify(self) -> None:
        """Starts a step if none is running and the prefix has enough new bytes. Call it after bytes were written."""
        with self._step_ended:
            if self._step_is_running or self._is_stopped or self._has_failed or not self._next_length():
                return
            self._step_is_running = True
        self._submit_step()

    def _submit_step(self) -> None:
        try:
            self._threads.submit(self._run_step)
        except RuntimeError:  # the thread pool has been shut down
            self._end_step()

    def _end_step(self) -> None:
        with self._step_ended:
            self._step_is_running = False
            self._step_ended.notify_all()

    def _next_length(self) -> int:
        """Returns the number of bytes to hash next: a whole piece, or at the end of the file, the rest. Returns 0 if
        the prefix does not have that many new bytes yet."""
        prefix_bytes = self._prefix_bytes()
        new_bytes = min(PIECE_BYTES, prefix_bytes - self._hashed_bytes)
        return new_bytes if new_bytes == PIECE_BYTES or prefix_bytes == self._size else 0

    def _run_step(self) -> None:
        needs_another_step = False

        def hash_prefix() -> None:
            nonlocal needs_another_step
            buffer = memoryview(bytearray(PIECE_BYTES))
            for _ in range(PIECES_PER_STEP):
                if self._is_stopped or not (length := self._next_length()):
                    return
                self._hash_next(buffer, length)
            needs_another_step = True

        try:
            self._run_while_open(hash_prefix)
        except OSError:
            self._has_failed = True  # `finish` reads the same bytes, so it raises the error again
        if needs_another_step:
            self._submit_step()
            return
        self._end_step()
        self.notify()  # for bytes that were written after the last look at the prefix

    def _hash_next(self, buffer: memoryview, length: int) -> None:
        """Reads up to `length` bytes into `buffer` and hashes them. Asks the kernel from time to time to start writing
        the hashed bytes to the disk. Raises OSError."""
        count = os.preadv(self._fd, [buffer[:length]], self._hashed_bytes)
        if count == 0:
            raise OSError(f"the file ends after {self._hashed_bytes} bytes")
        self._running_digest.update(buffer[:count])
        before, self._hashed_bytes = self._hashed_bytes, self._hashed_bytes + count
        if self._hashed_bytes // WRITEBACK_BYTES != before // WRITEBACK_BYTES:
            start = before // WRITEBACK_BYTES * WRITEBACK_BYTES
            self._system.start_writeback(self._fd, start, self._hashed_bytes - start)

    def finish(self) -> Digest:
        """Hashes the bytes that are left and returns the digest of the whole file. Call it when the file has all its
        bytes. Blocks. Raises OSError."""
        with self._step_ended:
            self._is_stopped = True
            while self._step_is_running:
                self._step_ended.wait()
        buffer = memoryview(bytearray(PIECE_BYTES))
        while self._hashed_bytes < self._size:
            self._hash_next(buffer, min(PIECE_BYTES, self._size - self._hashed_bytes))
        return self._running_digest.digest()

    def stop(self) -> None:
        """Ends a running step early, and starts no more steps."""
        self._is_stopped = True
