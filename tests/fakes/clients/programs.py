"""Runs programs of other projects: clients, and daemons that run until a block ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fakes.server_process import ROOT

# Only the folders of Debian's packages: a newer docker in /usr/local would need plugins that are not installed.
PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
CALL_TIMEOUT = 110.0  # seconds


class CommandFailed(AssertionError):
    """A client ended with an exit code other than 0. The text has the command and all its output."""


@dataclass(frozen=True)
class ProgramResult:
    """The exit code and the output of one call."""

    command: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def demand(self) -> ProgramResult:
        """Returns this result. Raises CommandFailed if the exit code is not 0."""
        if self.code != 0:
            raise CommandFailed(f"{' '.join(self.command)}\nexit code {self.code}\n{self.out}\n{self.err}")
        return self


@dataclass(frozen=True)
class ForeignProgram:
    """A program with flags and an environment that separate it from the host's settings and storage."""

    prefix: tuple[str, ...]
    env: Mapping[str, str]

    def __call__(self, *args: str, stdin_text: str = "", timeout: float = CALL_TIMEOUT) -> ProgramResult:
        """Runs the program with `stdin_text` on its stdin. Raises CommandFailed if its exit code is not 0."""
        return self.attempt(*args, stdin_text=stdin_text, timeout=timeout).demand()

    def attempt(self, *args: str, stdin_text: str = "", timeout: float = CALL_TIMEOUT) -> ProgramResult:
        """Runs the program with `stdin_text` on its stdin, and returns the result, whatever the exit code is."""
        command = (*self.prefix, *args)
        done = subprocess.run(
            command, env=dict(self.env), input=stdin_text.encode(), capture_output=True, timeout=timeout, cwd=ROOT
        )
        return ProgramResult(
            command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode("utf-8", "replace")
        )

    def with_variables(self, **variables: str) -> ForeignProgram:
        """Returns the same program with these additional environment variables."""
        return replace(self, env={**self.env, **variables})


def environment(home: Path, **extra: str) -> dict[str, str]:
    """Returns an environment with Debian's programs and the home directory `home`. It has no proxy and no settings of
    the host."""
    home.mkdir(parents=True, exist_ok=True)
    return {"PATH": PATH, "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": str(home), "NO_PROXY": "*", **extra}


@contextlib.contextmanager
def running_daemon(
    command: Sequence[str], env: Mapping[str, str], log: Path, answers: Callable[[], bool], timeout: float = 60.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a daemon until the block ends. The block begins when `answers` returns True. At the end of the block, the
    daemon gets SIGTERM and, if it does not end within 30 s, SIGKILL."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(answers, timeout, lambda: f"{command[0]} does not answer:\n{log_tail(log)}", process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(
    condition: Callable[[], bool],
    timeout: float,
    complaint: Callable[[], str],
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Calls `condition` again and again until it returns True. Raises AssertionError with the text of `complaint` when
    `timeout` seconds have passed or the process has ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise AssertionError(complaint())
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Returns whether no process has this id. A zombie counts as gone."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def unmount_below(folder: Path) -> None:
    """Unmounts all file systems that a daemon has left mounted below its folder, the deepest mounts first."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in sorted((p for p in points if p.startswith(f"{folder}/")), key=len, reverse=True):
        subprocess.run(["umount", "--lazy", point], env={**os.environ, "PATH": PATH}, check=True)


def log_tail(log: Path, size: int = 4000) -> str:
    """Returns the end of a log file, or a note that the file does not exist."""
    return log.read_text(errors="replace")[-size:] if log.exists() else f"{log}: no log"
