"""Shows which files a process has open (proc(5), fd)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def descriptor_targets(pid: int) -> dict[str, str]:
    """Returns what each file descriptor of a process refers to, by the descriptor's number. Leaves out descriptors that
    the process closes meanwhile."""
    targets = {}
    with suppress(FileNotFoundError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                targets[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return targets


def open_files(pid: int, target: str) -> list[str]:
    """Returns the numbers of those file descriptors of a process that refer to `target`."""
    return [number for number, found_target in descriptor_targets(pid).items() if found_target == target]


def open_files_below(folder: Path) -> list[str]:
    """Returns the files below the folder that this process has open, also deleted ones. A file that is open twice
    appears twice."""
    return [target for target in descriptor_targets(os.getpid()).values() if target.startswith(f"{folder}/")]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Fails if the process has other file descriptors after the block than before it. The garbage collector does not
    run meanwhile, because it would close files of earlier tests."""
    gc.collect()
    gc.disable()
    try:
        descriptors_before = sorted(descriptor_targets(os.getpid()))
        yield
        assert sorted(descriptor_targets(os.getpid())) == descriptors_before
    finally:
        gc.enable()
