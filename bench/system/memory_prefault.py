"""Makes the host assign real memory to the free memory of a virtual machine, run as a program:
`python -m bench.system.memory_prefault BYTES`.

A virtual machine may get a block of memory from the host only when a program first touches the block. It may return
free blocks of 2 MiB and more after a few seconds. Getting a block back costs CPU time: 3 s/GiB, twice as much as a push
costs. The kernel would count this time as time of the server that first writes large pieces. So the bench touches the
memory before the trial.
"""

from __future__ import annotations

import sys
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

from bench.system.programs import run_to_end

MAX_SHARE = 0.6
"""The largest share of the available memory that is touched."""
PREFAULT_TIMEOUT = 120.0  # seconds


def prefault_memory(size: int) -> None:
    """Touches `size` bytes of memory in a separate process, which then ends and frees the memory. Call this right
    before a trial that writes about `size` bytes: memory that the trial does not use goes back to the host during the
    trial."""
    run_to_end([sys.executable, "-m", "bench.system.memory_prefault", str(size)], PREFAULT_TIMEOUT)


def available_memory() -> int:
    """Returns how many bytes the system can give to programs now."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def touch_pages(size: int) -> None:
    """Writes to each page of `size` bytes of new memory."""
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_HUGEPAGE)  # uses large blocks, because the kernel returns only large blocks to the host
    for offset in range(0, size, PAGESIZE):
        memory[offset] = 1


if __name__ == "__main__":
    touch_pages(int(min(int(sys.argv[1]), MAX_SHARE * available_memory())))
