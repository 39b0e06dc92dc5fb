"""Records the system calls of running processes with strace."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .programs import PATH, wait_until

CALLS = "fsync,fdatasync,rename,renameat,renameat2,write,writev,sendto,sendmsg"
LINE = re.compile(r"^(?P<pid>\d+) +(?P<call>.*)$")
# If another thread's call comes between, strace prints a call in two lines: its start, and its end.
UNFINISHED = re.compile(r"^(?P<start>.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^<\.\.\. \w+ resumed>(?P<end>.*)$")


@dataclass(frozen=True)
class SystemCall:
    """One system call: its text in strace's output, and the numbers of the output lines at which it began and ended."""

    began: int
    ended: int
    text: str

    @property
    def name(self) -> str:
        return self.text.partition("(")[0]

    @property
    def worked(self) -> bool:
        return not self.text.rpartition(" = ")[2].startswith("-1")


class Trace:
    """The recorded system calls. The record is complete after the `tracing` block."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def steps(self) -> list[SystemCall]:
        """Returns all calls, in the order in which they ended."""
        found, open_calls = [], {}
        for number, line in enumerate(self.output.read_text(errors="replace").splitlines()):
            match = LINE.match(line)
            if match is None:
                continue
            pid, call = match["pid"], match["call"]
            if unfinished := UNFINISHED.match(call):
                open_calls[pid] = (number, unfinished["start"])
            elif resumed := RESUMED.match(call):
                first_line, start = open_calls.pop(pid, (number, ""))
                found.append(SystemCall(first_line, number, start + resumed["end"]))
            elif "(" in call and " = " in call:  # not a line about a signal or the end of a thread
                found.append(SystemCall(number, number, call))
        return found


@contextlib.contextmanager
def tracing(pids: Sequence[int], folder: Path) -> Iterator[Trace]:
    """Attaches strace to the processes and to all their present and future threads, until the block ends."""
    output, messages = folder / "strace.out", folder / "strace.err"
    threads = {int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()}
    command = ["strace", "-f", "-y", "-s", "300", "-e", f"trace={CALLS}", "-o", str(output)]
    for pid in pids:
        command += ["-p", str(pid)]
    with messages.open("wb") as errors:
        strace = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors, env={"PATH": PATH})
    try:
        wait_until(
            lambda: all(_traced(thread) for thread in threads),
            30,
            lambda: f"strace did not attach: {messages.read_text()}",
            strace,
        )
        yield Trace(output)
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(30)


def _traced(thread: int) -> bool:
    """Returns whether the thread is traced. A thread that has ended needs no tracing."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return True
    return "TracerPid:\t0\n" not in status
