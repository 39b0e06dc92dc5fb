"""Memory that the machine has really got.

A virtual machine's memory may come into being only when it is first touched, and go back to the host a few seconds
after it was freed, in blocks of 2 MiB and more. Getting such a block takes the host 3 CPU s/GiB, twice what a push
costs. It would be charged to whichever server writes first, and only to one that writes much at once: the kernel gives
that one large blocks, and smaller writes what is left of broken ones, which never goes back.
"""

from __future__ import annotations

import subprocess
import sys
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

MAX_SHARE = 0.6
"""The most of what is available that is touched."""


def prefault_memory(size: int) -> None:
    """Touches so many bytes of free memory and gives them back: by a process of its own, whose end frees them. For
    right before a trial that fills no more: what is left over goes back to the host while the trial runs."""
    subprocess.run([sys.executable, "-m", "bench.system.memory_prefault", str(size)], check=True)


def available_memory() -> int:
    """Bytes the system could give to programs now."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def touch_pages(size: int) -> None:
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_HUGEPAGE)  # the large blocks are those that go back
    for at in range(0, size, PAGESIZE):
        memory[at] = 1


if __name__ == "__main__":
    touch_pages(int(min(int(sys.argv[1]), MAX_SHARE * available_memory())))
