"""Reads the CPU time, the memory and the file I/O of processes from /proc (proc(5))."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def parse_cpu_ticks(stat: str) -> int:
    """Returns utime + stime + cutime + cstime from the text of /proc/PID/stat: the CPU time of the process and of the
    children that it has waited for. These fields follow the program's name, which may contain spaces and
    parentheses."""
    fields = stat.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15])


def parse_pss(rollup: str) -> int:
    """Returns the proportional set size, in bytes, from the text of /proc/PID/smaps_rollup."""
    sizes = (int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return next(sizes, 0)


def process_tree(pid: int) -> list[int]:
    """Returns the process and all its descendants, the process first."""
    found = [pid]
    for parent in found:  # also visits the children that the loop appends
        with contextlib.suppress(OSError):
            for task in (PROC / str(parent) / "task").iterdir():
                with contextlib.suppress(OSError):
                    found.extend(int(child) for child in (task / "children").read_text().split())
    return found


def tree_cpu_seconds(pid: int) -> float:
    """Returns the CPU time of the process and all its descendants. The time of a process that has ended counts as time
    of its parent, so no time is lost."""
    return sum(parse_cpu_ticks(text) for text in _read_each(pid, "stat")) / CLOCK_TICKS


def tree_pss(pid: int) -> int:
    """Returns the memory of the process and all its descendants in bytes. Shared pages are counted once."""
    return sum(parse_pss(text) for text in _read_each(pid, "smaps_rollup"))


def _read_each(pid: int, file: str) -> Iterator[str]:
    for each in process_tree(pid):
        with contextlib.suppress(OSError):
            yield (PROC / str(each) / file).read_text()


def io_bytes(pid: int) -> int:
    """Returns the bytes that a process has read and written (rchar, wchar); 0 once it has ended."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / "io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return 0


def children_cpu() -> float:
    """Returns the CPU seconds of all child processes that this process has waited for, such as the loaders."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
