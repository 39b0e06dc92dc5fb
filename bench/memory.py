"""The most memory a server took while it was under load."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from bench.servers import Server

EVERY = 1.0
"""Seconds between two looks: reading the size of a process tree takes the kernel some milliseconds."""


class MemoryWatch:
    """Looks at one server after the other, whichever is under load; a context manager."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self.peaks: dict[str, int] = {}
        """Bytes by server name."""
        self._server: Server | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def turn_to(self, server: Server | None) -> None:
        """From now on it is this one's turn."""
        self._server = server

    def _look(self) -> None:
        while not self._ended.wait(self._every):
            if (server := self._server) is not None:
                self.peaks[server.name] = max(self.peaks.get(server.name, 0), server.pss())
