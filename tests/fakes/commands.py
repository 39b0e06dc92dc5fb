"""Runs `entrepot` commands as separate processes and waits for their end. If a command does not end in time, the error
has the stacks of its threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fakes.forked_process import NO_CERTIFICATES, ROOT, ForkedProcess

STACK_DUMP = str(ROOT / "tests" / "fakes" / "stack_dump")
"""A folder that must be the first one in the PYTHONPATH of a command. Its `sitecustomize.py` lets `wait_for_output` get
the stacks of the command."""
STACK_DUMP_SITE = f"{STACK_DUMP}/sitecustomize.py"


def wait_for_output(
    process: subprocess.Popen[str] | ForkedProcess, timeout: float = 100.0, stdin_text: str | None = None
) -> tuple[str, str]:
    """Waits for the end of the command and returns its stdout and stderr. If the command does not end within `timeout`
    seconds, kills it and raises AssertionError with the stacks of its tasks and threads. `stdin_text`: the text on the
    command's stdin."""
    try:
        return process.communicate(stdin_text, timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=2)
        status = "".join(line for line in _status(process.pid).splitlines(True) if line.startswith(("Sig", "Shd")))
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        raise AssertionError(f"{process.args!r} did not end within {timeout:.0f} s\n{status}{out}\n{err}") from None


def has_received_signals(process: subprocess.Popen[Any] | ForkedProcess) -> bool:
    """Returns whether the kernel has delivered all signals that were sent to the process (proc(5)). If the same signal
    is sent twice before it is delivered, the kernel delivers it once."""
    status = _status(process.pid)
    return "ShdPnd:\t0000000000000000" in status and "SigPnd:\t0000000000000000" in status


def is_waiting_for_lock(process: subprocess.Popen[str] | ForkedProcess) -> bool:
    """Returns whether a thread of the process waits for a lock on a file (proc(5), locks)."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any(line.split()[1] == "->" and line.split()[5] == str(process.pid) for line in lines)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return ""


TIMEOUT = 200.0  # seconds


def entrepot(
    *args: str | Path, folder: Path, stdin_text: str | None = None, site: str = STACK_DUMP_SITE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` in `folder` and waits for its end. `variables`: environment variables; the command gets no other
    ENTREPOT_* variables. `stdin_text`: the text on its stdin; None: its stdin is empty. `site`: a Python file that
    the process runs first. The command runs in a fork of a process that has imported the program (`forked_process`)."""
    assert all(name == name.upper() for name in variables), f"not names of variables: {sorted(variables)}"
    with ForkedProcess(
        "registry",
        *map(str, args),
        cwd=folder,
        env=command_environment(**variables),
        stdin=subprocess.DEVNULL if stdin_text is None else subprocess.PIPE,
        site=site,
    ) as process:
        out, err = wait_for_output(process, TIMEOUT, stdin_text)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


def entrepot_program(*args: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` in a new interpreter, as a person would, with an empty stdin."""
    with subprocess.Popen(
        [sys.executable, "-m", "registry", *map(str, args)],
        cwd=folder,
        env=command_environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = wait_for_output(process, TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def command_environment(**variables: str) -> dict[str, str]:
    """Returns the environment of this process with `variables` added and all other ENTREPOT_* variables removed. A
    command with this environment can show its stacks to `wait_for_output`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENTREPOT_")}
    needed = {"PYTHONPATH": f"{STACK_DUMP}:{ROOT}", "COLUMNS": "200"}
    return {**inherited, **NO_CERTIFICATES, **needed, **variables}


def entrepot_output(*args: str | Path, folder: Path, stdin_text: str | None = None, **variables: str) -> str:
    """Runs `entrepot`, checks that it succeeds, and returns its stdout."""
    done = entrepot(*args, folder=folder, stdin_text=stdin_text, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Returns the error message of a failed command. Checks the exit code, and that the message is the only line of
    output."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("entrepot: ")
    return line.removeprefix("entrepot: ")


def json_lines(output: str) -> list[dict[str, Any]]:
    """Returns the JSON lines that an upkeep command has printed with --json. Checks that each line has the key `event`,
    and that the last line, and only this one, has the event `done`."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert [number for number, line in enumerate(lines, 1) if line["event"] == "done"] == [len(lines)]
    return lines
