"""Logs a warning if another process holds the lock of the metadata database for long (`LockWatch`). An example is a
command that somebody has stopped with Ctrl-Z. While the lock is held, all pushes wait."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

WARN_SECONDS: Final = 5.0
"""Length of a wait for the lock after which a warning is logged. The warning can be late by half of this time."""
REPEAT_SECONDS: Final = 60.0
"""Time between two warnings about the same wait."""
log = logging.getLogger("storage.metadata")


class LockWatch:
    """Measures, in a thread of its own, how long each wait for the lock takes. If a wait is long, logs which process
    holds the lock."""

    def __init__(self, lock_fd: int, warn_seconds: float = WARN_SECONDS) -> None:
        """Starts the thread. If the operating system refuses to start a thread, no wait is watched. `lock_fd`: a
        descriptor of the locked file."""
        self._lock_fd = lock_fd
        self._warn_seconds = warn_seconds
        self._wait_began_at: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock watch", daemon=True)
        self._is_started = False
        with suppress(RuntimeError):
            self._thread.start()
            self._is_started = True

    def begin_wait(self) -> None:
        """Must be called before the wait for the lock."""
        self._wait_began_at = time.monotonic()

    def end_wait(self) -> None:
        """Must be called after the wait for the lock, both after a success and after an error."""
        self._wait_began_at = None

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._is_started:
            self._thread.join()

    def _watch(self) -> None:
        warned_wait, warned_at = None, 0.0
        while not self._closed.wait(self._warn_seconds / 2):
            wait_began_at, now = self._wait_began_at, time.monotonic()
            if wait_began_at is None or now - wait_began_at < self._warn_seconds:
                continue
            if wait_began_at != warned_wait or now - warned_at >= REPEAT_SECONDS:
                warned_wait, warned_at = wait_began_at, now
                log.warning(
                    "no change of the metadata is possible: this process has waited %.0f seconds for the lock of the "
                    "database; the lock is held by %s",
                    now - wait_began_at,
                    describe_flock_holder(self._lock_fd),
                )


def describe_flock_holder(fd: int) -> str:
    """Returns a text about the process that holds the exclusive `flock` on a file: its pid and command, and whether it
    is stopped (proc(5), /proc/locks). If the process cannot be found, the text says so. For example, /proc/locks does
    not show locks of processes in other containers."""
    inode = os.fstat(fd).st_ino
    try:
        entries = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pid = next(
            int(entry[4])
            for entry in entries
            if entry[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and entry[5].split(":")[2] == str(inode)
        )
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1]
    except (OSError, ValueError, LookupError, StopIteration):
        return "a process that cannot be found here, such as one in another container"
    advice = f", which is stopped; continue it with `fg` or `kill -CONT {pid}`" if state == "T" else ""
    return f"process {pid} ({command}){advice}"
