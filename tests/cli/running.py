"""The command as a person runs it: a process, its two outputs, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.serving import ROOT

TIMEOUT = 60.0


def entrepot(
    *args: str | Path, folder: Path, given: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` in `folder` with no ENTREPOT_* variables but these, and waits for its end. `given` is its stdin;
    None: it has none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENTREPOT_")}
    return subprocess.run(
        [sys.executable, "-m", "registry", *map(str, args)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables},
        stdin=subprocess.DEVNULL if given is None else None,
        input=given,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


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
