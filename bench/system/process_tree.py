"""Processes as /proc shows them, and programs that end when their block does."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROC = Path("/proc")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# Debian's own programs first; dockerd and its helpers lie in sbin.
PROGRAM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
STOP_TIMEOUT = 40.0


def parse_cpu_ticks(stat: str) -> int:
    """User and system time in the text of a /proc/PID/stat, of the process and of the children it has reaped
    (proc(5): utime, stime, cutime, cstime). The name before them may hold spaces and parentheses."""
    fields = stat.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15])


def parse_pss(rollup: str) -> int:
    """The proportional set size in the text of a /proc/PID/smaps_rollup."""
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def process_tree(pid: int) -> list[int]:
    """A process and all below it, itself first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in (PROC / str(parent) / "task").iterdir():
                with contextlib.suppress(OSError):
                    found.extend(int(child) for child in (task / "children").read_text().split())
    return found


def tree_cpu_seconds(pid: int) -> float:
    """CPU time the tree has used so far. Whoever ended and was reaped counts with its parent, so nothing is lost."""
    return sum(parse_cpu_ticks(text) for text in _texts(pid, "stat")) / CLOCK_TICKS


def tree_pss(pid: int) -> int:
    """Bytes of memory the tree takes, shared pages counted once."""
    return sum(parse_pss(text) for text in _texts(pid, "smaps_rollup"))


def _texts(pid: int, file: str) -> Iterator[str]:
    for one in process_tree(pid):
        with contextlib.suppress(OSError):
            yield (PROC / str(one) / file).read_text()


def io_bytes(pid: int) -> int:
    """Bytes a process has read from and written to files so far (proc(5), /proc/PID/io: rchar, wchar)."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / "io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return 0


def children_cpu() -> float:
    """CPU seconds of the programs this process has waited for: the loaders, between two readings."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parse_steal_seconds(stat: str) -> float:
    """CPU seconds that a host has not given to this virtual machine when it wanted them, of all processors together,
    in the text of /proc/stat (proc(5): steal)."""
    return int(stat.split(maxsplit=9)[8]) / CLOCK_TICKS


def start_steal_meter() -> Callable[[], float]:
    """Tells, when called, how much of the processors' time since then the host has taken, in percent."""
    stat = PROC / "stat"
    before, begun = parse_steal_seconds(stat.read_text()), time.perf_counter()

    def share() -> float:
        spent = (time.perf_counter() - begun) * (os.cpu_count() or 1)
        return 100 * (parse_steal_seconds(stat.read_text()) - before) / spent

    return share


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """A clean environment: no proxy, no settings of the person who measures, Python's own speed-ups left on."""
    return {"PATH": PROGRAM_PATH, "HOME": str(home), "TMPDIR": str(home), "LANG": "C.UTF-8", "NO_PROXY": "*", **extra}


@contextlib.contextmanager
def running_program(
    command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program until the block ends; its output goes to `log`. It is asked to end, then made to."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop_program(process)


def stop_program(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a program that leads its own session, SIGKILL to what is left of that session when it lingers."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_tail(log: Path, size: int = 4000) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-size:] if log.exists() else ""
