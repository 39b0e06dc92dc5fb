"""Computes the digest of a file while its bytes arrive in any order (`PrefixDigest`).

The *prefix* is the part of the file before the first byte that has not arrived. A file is hashed in *pieces* of
`PIECE_BYTES`. When the prefix has a whole new piece, a *step* runs in a thread. The step reads and hashes pieces, and
ends when the prefix has no whole new piece. So no thread waits for bytes that have not arrived. The bytes that a step
reads were written a moment ago, so they are usually still in the page cache.
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
"""Size of a piece, in bytes. The last piece of a file can be smaller."""
MAX_PIECES_PER_STEP = 64
"""Largest number of pieces that one step hashes. The limit lets files share the threads: before its next step, a file
waits until a thread is free."""


class PrefixDigest:
    """Computes the digest of one file. Any thread may call the methods."""

    def __init__(
        self,
        system: System,
        threads: Executor,
        fd: int,
        size: int,
        algorithm: str,
        prefix_length: Callable[[], int],
        run_while_open: Callable[[Callable[[], None]], None],
    ) -> None:
        """- `threads`: runs the steps.
        - `fd`: the descriptor of the open file.
        - `size`: the size of the complete file, in bytes.
        - `algorithm`: the digest algorithm, such as `sha256`.
        - `prefix_length`: returns the current length of the prefix, in bytes.
        - `run_while_open`: calls the function that it gets, and keeps the file open during the call. Does not call the
          function if the file is closed already."""
        self._system = system
        self._threads = threads
        self._fd = fd
        self._size = size
        self._running_digest = start_digest(algorithm)
        self._prefix_length = prefix_length
        self._run_while_open = run_while_open
        self._hashed_bytes = 0
        """Number of bytes, from the start of the file, that have been hashed."""
        self._step_ended = threading.Condition()
        """Guards `_step_is_running`, and is notified when a step ends."""
        self._step_is_running = False
        self._is_stopped = False
        """Whether `stop` or `finish` was called. If True, no further step starts."""
        self._has_failed = False
        """Whether a step could not read the file."""

    def start_hashing_if_ready(self) -> None:
        """Starts a step if no step is running and the prefix has a whole new piece. Call this method after each
        write."""
        with self._step_ended:
            if self._step_is_running or self._is_stopped or self._has_failed or not self._next_piece_bytes():
                return
            self._step_is_running = True
        self._submit_step()

    def _submit_step(self) -> None:
        """Queues a step for a thread."""
        try:
            self._threads.submit(self._run_step)
        except RuntimeError:  # the thread pool has been shut down
            self._end_step()

    def _end_step(self) -> None:
        """Records that no step is running, and wakes `finish`."""
        with self._step_ended:
            self._step_is_running = False
            self._step_ended.notify_all()

    def _next_piece_bytes(self) -> int:
        """Returns the size of the next piece to hash. Returns 0 if this piece has not arrived completely, or if the
        whole file is hashed."""
        prefix_length = self._prefix_length()
        new_bytes = min(PIECE_BYTES, prefix_length - self._hashed_bytes)
        return new_bytes if new_bytes == PIECE_BYTES or prefix_length == self._size else 0

    def _run_step(self) -> None:
        """Hashes the pieces of one step. After `MAX_PIECES_PER_STEP` pieces, submits another step."""
        needs_another_step = False

        def hash_pieces() -> None:
            nonlocal needs_another_step
            buffer = memoryview(bytearray(PIECE_BYTES))
            for _ in range(MAX_PIECES_PER_STEP):
                if self._is_stopped or not (length := self._next_piece_bytes()):
                    return
                self._hash_next(buffer, length)
            needs_another_step = True

        try:
            self._run_while_open(hash_pieces)
        except OSError:
            self._has_failed = True  # `finish` reads the same bytes again, and raises the error if it occurs again
        if needs_another_step:
            self._submit_step()
            return
        self._end_step()
        # Bytes may have been written between the last check of the prefix and the end of the step.
        self.start_hashing_if_ready()

    def _hash_next(self, buffer: memoryview, length: int) -> None:
        """Reads up to `length` bytes into `buffer` and hashes them. After each `WRITEBACK_BYTES` hashed bytes, asks the
        kernel to start writing them to the disk, so that the sync of the complete file has little left to do. Raises
        OSError."""
        count = os.preadv(self._fd, [buffer[:length]], self._hashed_bytes)
        if count == 0:
            raise OSError(f"the file ends after {self._hashed_bytes} bytes")
        self._running_digest.update(buffer[:count])
        hashed_before, self._hashed_bytes = self._hashed_bytes, self._hashed_bytes + count
        if self._hashed_bytes // WRITEBACK_BYTES != hashed_before // WRITEBACK_BYTES:
            start = hashed_before // WRITEBACK_BYTES * WRITEBACK_BYTES
            self._system.start_writeback(self._fd, start, self._hashed_bytes - start)

    def finish(self) -> Digest:
        """Waits for a running step, hashes the remaining bytes, and returns the digest of the whole file. Call this
        method when all bytes have arrived. Blocks. Raises OSError."""
        with self._step_ended:
            self._is_stopped = True
            while self._step_is_running:
                self._step_ended.wait()
        buffer = memoryview(bytearray(PIECE_BYTES))
        while self._hashed_bytes < self._size:
            self._hash_next(buffer, min(PIECE_BYTES, self._size - self._hashed_bytes))
        return self._running_digest.digest()

    def stop(self) -> None:
        """Lets a running step end after its current piece, and prevents further steps. Does not wait."""
        self._is_stopped = True
