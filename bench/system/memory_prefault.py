"""Makes the host back free memory with real pages, run as a program: `python -m bench.system.memory_prefault BYTES`.

A virtual machine may get its memory from the host only at the first touch, and may return it, in blocks of 2 MiB and
more, a few seconds after it was freed. Each such block costs 3 CPU s/GiB, twice what a push costs. The kernel would
charge that to the server that writes first and in large pieces, so the bench touches the memory before the trial.
"""

from __future__ import annotations

import sys
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

from bench.system.programs import run_to_end

MAX_SHARE = 0.6
"""The largest part of the available memory that is touched."""
PREFAULT_TIMEOUT = 120.0


def prefault_memory(size: int) -> None:
    """Touches `size` bytes in a process of its own, whose end frees them. Call it right before a trial that writes
    that much: memory that is not used goes back to the host during the trial."""
    run_to_end([sys.executable, "-m", "bench.system.memory_prefault", str(size)], PREFAULT_TIMEOUT)


def available_memory() -> int:
    """Returns how many bytes the system can give to programs now."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def touch_pages(size: int) -> None:
    """Writes to each page of `size` bytes of new memory."""
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_HUGEPAGE)  # large blocks are those that the kernel returns to the host
    for at in range(0, size, PAGESIZE):
        memory[at] = 1


if __name__ == "__main__":
    touch_pages(int(min(int(sys.argv[1]), MAX_SHARE * available_memory())))
