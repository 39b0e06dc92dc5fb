"""What a process tree holds: memory and open files, as the kernel counts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PATIENCE = 20.0


def memory(pids: Iterable[int]) -> int:
    """Bytes of memory, shared pages counted once (PSS)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def open_files(pids: Iterable[int]) -> dict[int, int]:
    """Open file descriptors of each process."""
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}


def files_below(*folders: Path) -> int:
    """Files below those folders."""
    return sum(len(files) for folder in folders for _, _, files in os.walk(folder))


def eventually(fact: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Whether `fact` becomes true within `patience` seconds. The kernel tells nobody when another process closes a
    file or a socket, so it is asked again and again."""
    until = time.monotonic() + patience
    while not fact():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
