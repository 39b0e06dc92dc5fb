"""The durable steps of a run: which there are, which of them are tried, and a `System` that kills its process at one of
them.

Many steps of a run are alike, such as the first write of each of ten uploads. Of four consecutive steps of a kind, one
is tried, chosen at random. A step that is the only one of its kind is always tried. The seed of the test run decides,
so runs with other seeds try other steps. With the environment variable ENTREPOT_EVERY_STEP, a run tries all of them.
"""

from __future__ import annotations

import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

from storage.data_dir.system import System

T = TypeVar("T")
Place = Path | int | None
"""The path or the descriptor of the file that a step changes. None: the database."""
BOOT = "first run of the machine"
EVERY_STEP = "ENTREPOT_EVERY_STEP"
ALIKE = 4
"""Of this many consecutive steps of a kind, one is tried."""


class KillingSystem(System):
    """Kills its process before or after the durable step `number`, counted from 1. Opening a file counts as a step if
    it may create the file."""

    def __init__(self, number: int, after: bool) -> None:
        super().__init__()
        self.left = number
        self._after = after

    def _step(self, name: str, place: Place, step: Callable[[], T]) -> T:
        self.left -= 1
        if self.left == 0 and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return step()
        finally:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if flags & os.O_EXCL:
            return self._step("create", path, lambda: System.open(self, path, flags, mode))
        return super().open(path, flags, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        return self._step("write", fd, lambda: System.write(self, fd, chunks, offset))

    def truncate(self, fd: int, size: int) -> None:
        self._step("truncate", fd, lambda: System.truncate(self, fd, size))

    def sync(self, fd: int) -> None:
        self._step("sync", fd, lambda: System.sync(self, fd))

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target, lambda: System.rename(self, source, target))

    def link(self, fd: int, target: Path) -> None:
        self._step("link", target, lambda: System.link(self, fd, target))

    def unlink(self, path: Path) -> None:
        self._step("unlink", path, lambda: System.unlink(self, path))

    def mkdir(self, path: Path) -> None:
        self._step("mkdir", path, lambda: System.mkdir(self, path))

    def rmdir(self, path: Path) -> None:
        self._step("rmdir", path, lambda: System.rmdir(self, path))

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self._step(
            "durable commit" if durable else "commit", None, lambda: System.commit(self, commit, durable=durable)
        )


class StepRecorder(KillingSystem):
    """Kills nothing. Records the kind of each durable step: what it does, with which kind of file below `root`, and
    `during` which part of the work, which the caller sets."""

    def __init__(self, root: Path) -> None:
        super().__init__(0, after=False)
        self.kinds: list[Hashable] = []
        self.during: Hashable = None
        self._root = root

    def _step(self, name: str, place: Place, step: Callable[[], T]) -> T:
        self.kinds.append((self.during, name, kind_of_place(place, self._root)))
        return super()._step(name, place, step)


def kind_of_place(place: Place, root: Path) -> Hashable:
    """Returns the same value for files that are alike: the first directory, the depth and the suffix."""
    path = Path(os.readlink(f"/proc/self/fd/{place}")) if isinstance(place, int) else place
    if path is None or not path.is_relative_to(root):
        return None
    parts = path.relative_to(root).parts
    return parts[:1], len(parts), path.suffix


def choose_steps(kinds: Sequence[Hashable], chance: random.Random) -> list[int]:
    """Returns the numbers of the steps to try, counted from 1, in order. `kinds`: the kind of each step of a run."""
    if os.environ.get(EVERY_STEP):
        return list(range(1, len(kinds) + 1))
    numbers = defaultdict[Hashable, list[int]](list)
    for number, kind in enumerate(kinds, 1):
        numbers[kind].append(number)
    return sorted(
        chance.choice(alike[at : at + ALIKE]) for alike in numbers.values() for at in range(0, len(alike), ALIKE)
    )
