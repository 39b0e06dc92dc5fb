"""Records the durable steps of a run, chooses those at which the crash tests interrupt the run, and kills a process at
one of its steps. A durable step is one change of the disk, such as a write, a sync or a commit of the database.

Many steps of a run are of the same kind, such as the first write of each of ten uploads. Of every four successive steps
of one kind, the tests try one, chosen at random. A step that is the only one of its kind is always tried. The choice
depends on the random seed of the test run, so runs with different seeds try different steps. With the environment
variable ENTREPOT_EVERY_STEP, a run tries all steps.
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
"""The boot ID that the tests pass to the store. After a power cut they pass another one."""
EVERY_STEP = "ENTREPOT_EVERY_STEP"
"""The environment variable with which all steps are tried."""
STEPS_PER_CHOICE = 8
"""Of this many successive steps of one kind, one is tried."""


class KillingSystem(System):
    """Kills its process with SIGKILL before or after the durable step `number`, counted from 1. Opening a file counts
    as a step if O_EXCL is set, so that it creates the file. `steps_left`: the number of steps until the kill."""

    def __init__(self, number: int, after: bool) -> None:
        super().__init__()
        self.steps_left = number
        self._after = after

    def _step(self, name: str, place: Place, step: Callable[[], T]) -> T:
        self.steps_left -= 1
        if self.steps_left == 0 and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return step()
        finally:
            if self.steps_left == 0:
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
    """Records the kind of each durable step, and never kills its process. A kind consists of the current part of the
    work (`during`, which the caller sets), the operation, and the kind of file below `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__(0, after=False)
        self.kinds: list[Hashable] = []
        self.during: Hashable = None
        self._root = root

    def _step(self, name: str, place: Place, step: Callable[[], T]) -> T:
        self.kinds.append((self.during, name, kind_of_place(place, self._root)))
        return super()._step(name, place, step)


def kind_of_place(place: Place, root: Path) -> Hashable:
    """Returns the kind of a file: its first directory below `root`, its depth and its suffix."""
    path = Path(os.readlink(f"/proc/self/fd/{place}")) if isinstance(place, int) else place
    if path is None or not path.is_relative_to(root):
        return None
    parts = path.relative_to(root).parts
    return parts[:1], len(parts), path.suffix


def choose_steps(kinds: Sequence[Hashable], chance: random.Random) -> list[int]:
    """Returns the numbers of the steps to try, counted from 1, in order. `kinds`: the kind of each step of a run, in
    order."""
    if os.environ.get(EVERY_STEP):
        return list(range(1, len(kinds) + 1))
    numbers = defaultdict[Hashable, list[int]](list)
    for number, kind in enumerate(kinds, 1):
        numbers[kind].append(number)
    return sorted(
        chance.choice(same_kind[at : at + STEPS_PER_CHOICE])
        for same_kind in numbers.values()
        for at in range(0, len(same_kind), STEPS_PER_CHOICE)
    )
