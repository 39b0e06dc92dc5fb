"""Commands that have to end, and what they were doing where they do not."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.serving import ROOT

SHOWING = str(ROOT / "tests" / "stacks")
"""To be the first of a command's PYTHONPATH, so that `ended` can show its stacks."""


def ended(process: subprocess.Popen[str], timeout: float = 100.0, given: str | None = None) -> tuple[str, str]:
    """What the command wrote to its two outputs, once it has ended. Raises AssertionError with the stacks of its tasks
    and threads when it does not, and ends it."""
    try:
        return process.communicate(given, timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=2)
        status = "".join(line for line in _status(process.pid).splitlines(True) if line.startswith(("Sig", "Shd")))
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        raise AssertionError(f"{process.args!r} did not end within {timeout:.0f} s\n{status}{out}\n{err}") from None


def received(process: subprocess.Popen[Any]) -> bool:
    """Whether the kernel has handed the process all signals that were sent to it (proc(5)). Two of the same number that
    wait together are one."""
    status = _status(process.pid)
    return "ShdPnd:\t0000000000000000" in status and "SigPnd:\t0000000000000000" in status


def waits_for_lock(process: subprocess.Popen[str]) -> bool:
    """Whether a thread of the process waits for a lock on a file (proc(5), locks)."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any(line.split()[1] == "->" and line.split()[5] == str(process.pid) for line in lines)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return ""
