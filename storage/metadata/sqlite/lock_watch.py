"""Warns of a process that holds the lock of the database for long, for example a command that somebody has stopped with
Ctrl-Z (`LockWatch`). Until that process continues or ends, no other process can change the metadata: all pushes
wait."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

WARN_SECONDS: Final = 5.0
"""How long a process waits for the lock before it warns. The warning may come half of this time later."""
REPEAT_SECONDS: Final = 60.0
"""Time between two warnings about the same wait."""
log = logging.getLogger("storage.metadata")


class LockWatch:
    """Watches in a thread how long a wait for the lock takes, and logs which process holds it."""

    def __init__(self, lock_fd: int, warn_seconds: float = WARN_SECONDS) -> None:
        """Starts the thread. Watches nothing if the operating system refuses another thread. `lock_fd`: a descriptor of
        the file that is locked."""
        self._lock_fd = lock_fd
        self._warn_seconds = warn_seconds
        self._waits_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock watch", daemon=True)
        self._is_started = False
        with suppress(RuntimeError):
            self._thread.start()
            self._is_started = True

    def begin_wait(self) -> None:
        """Must be called before the wait for the lock."""
        self._waits_since = time.monotonic()

    def end_wait(self) -> None:
        """Must be called when the lock was taken, and when the attempt to take it failed."""
        self._waits_since = None

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._is_started:
            self._thread.join()

    def _watch(self) -> None:
        warned_wait, warned_at = None, 0.0
        while not self._closed.wait(self._warn_seconds / 2):
            since, now = self._waits_since, time.monotonic()
            if since is None or now - since < self._warn_seconds:
                continue
            if since != warned_wait or now - warned_at >= REPEAT_SECONDS:
                warned_wait, warned_at = since, now
                log.warning(
                    "no change of the metadata is possible: for %.0f seconds, this process has waited for a lock. "
                    "Its holder: %s",
                    now - since,
                    holder_of_flock(self._lock_fd),
                )


def holder_of_flock(fd: int) -> str:
    """Returns a text about the process that holds the exclusive `flock` on a file: its pid and command, and whether it
    is stopped (proc(5), /proc/locks). Says so if it cannot find the process: /proc/locks does not show the locks of
    processes in other containers."""
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
