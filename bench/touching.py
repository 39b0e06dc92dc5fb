"""Memory that the machine has really got.

A virtual machine's memory may come into being only when it is first touched, and that takes the host seconds a GiB:
twice what a push costs. What is freed may go back to the host within seconds, and come into being anew. It would be
charged to whichever server happened to write first.
"""

from __future__ import annotations

import subprocess
import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

MOST = 8 << 30
"""Bytes: more than all servers write in a round."""
SHARE = 0.6
"""Of what is available."""


def touch_memory(most: int = MOST) -> None:
    """Touches at most so many bytes of free memory and gives it back: by a process of its own, whose end frees it."""
    subprocess.run([sys.executable, "-m", "bench.touching", str(most)], check=True)


def available() -> int:
    """Bytes the system could give to programs now."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def touch(size: int) -> None:
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    for at in range(0, size, PAGESIZE):
        memory[at] = 1


if __name__ == "__main__":
    touch(int(min(int(sys.argv[1]), SHARE * available())))
