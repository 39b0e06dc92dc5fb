"""The command as a person runs it: a process, its two outputs, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.serving import ROOT
from tests.stuck import SHOWING, ended

TIMEOUT = 200.0


def entrepot(
    *args: str | Path, folder: Path, given: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` in `folder` with no ENTREPOT_* variables but these, and waits for its end. `given` is its stdin;
    None: it has none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENTREPOT_")}
    with subprocess.Popen(
        [sys.executable, "-m", "registry", *map(str, args)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": f"{SHOWING}:{ROOT}", "COLUMNS": "200", **variables},
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = ended(process, TIMEOUT, given)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def done_well(*args: str | Path, folder: Path, given: str | None = None, **variables: str) -> str:
    """What `entrepot` wrote to stdout; it must have ended well."""
    done = entrepot(*args, folder=folder, given=given, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What a failed command said, which must be one line on stderr and nothing else."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("entrepot: ")
    return line.removeprefix("entrepot: ")
