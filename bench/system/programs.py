"""Runs programs: in the background until a `with` block ends (`running_program`), or to their own end while the caller
waits (`run_to_end`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.errors import BenchFailed, TrialFailed

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
PROGRAM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
"""The search path for programs. It has only the folders of Debian's packages; dockerd and its helpers are in sbin."""
POLL_SECONDS = 0.002
START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 40.0  # seconds


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """Returns an environment without proxies and without the user's settings."""
    return {"PATH": PROGRAM_PATH, "HOME": str(home), "TMPDIR": str(home), "LANG": "C.UTF-8", "NO_PROXY": "*", **extra}


@contextlib.contextmanager
def running_program(
    command: Sequence[str], log: Path, *, ready: Callable[[], bool] = lambda: True, code: Path = REPOSITORY_ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program until the block ends. The block begins once `ready` returns true. The program writes to `log`, and
    the folder of `log` is its working directory. It imports Python code from the checkout `code`. Raises BenchFailed
    when the program ends, or START_TIMEOUT passes, before `ready` returns true."""
    env = clean_environment(log.parent, PYTHONPATH=str(code), PYTHONUNBUFFERED="1")
    devnull = subprocess.DEVNULL
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=env, cwd=log.parent, stdin=devnull, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"{command[0]} did not start: {' '.join(command)}\n{log_tail(log)}")
            time.sleep(POLL_SECONDS)
        yield process
    finally:
        stop_program(process)


def stop_program(process: subprocess.Popen[bytes]) -> None:
    """Stops a program that leads its own session: sends SIGTERM to the program and, if it does not end within
    STOP_TIMEOUT, SIGKILL to the whole session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_tail(log: Path, size: int = 4000) -> str:
    """Returns the last characters of a log file; an empty text if the file does not exist."""
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def run_to_end(command: Sequence[str], timeout: float, *, env: Mapping[str, str] | None = None) -> str:
    """Runs a program to its end and returns its output. Raises TrialFailed when the program fails, or does not end
    within `timeout` seconds.

    The program runs in the folder of temporary files. `python -m` imports from the current folder first, so it must not
    run in this checkout when `env` names the code of another checkout.
    """
    environment = env or clean_environment(Path(tempfile.gettempdir()), PYTHONPATH=str(REPOSITORY_ROOT))
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"{command[0]} did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()[-300:]
        raise TrialFailed(f"{' '.join(command[:3])} failed ({done.returncode}): {reason}")  # arguments may be secret
    return done.stdout
