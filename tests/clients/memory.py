"""How much memory a process tree has: its proportional set size, sampled while something runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

KIB = 1024


def proportional(pids: Sequence[int]) -> int:
    """The sum of PSS in bytes. Pages that processes share count once; a process that has ended counts nothing."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except ProcessLookupError:
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * KIB
    return total


class Peak:
    """Samples the memory of a process tree for the length of a `with` block and keeps the highest value."""

    def __init__(self, pids: Callable[[], Sequence[int]], every: float = 0.05) -> None:
        self._pids, self._every = pids, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = self.highest = 0
        self.samples = 0

    @property
    def growth(self) -> int:
        return self.highest - self.before

    def __enter__(self) -> Peak:
        self.before = self.highest = proportional(self._pids())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            self.highest = max(self.highest, proportional(self._pids()))
            self.samples += 1
