"""Runs the programs that make a release."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from release.errors import ReleaseFailed


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> bytes:
    """Runs a program in the folder `cwd` and returns its stdout. `env`: the environment of the program; None: that of
    this process.

    Raises ReleaseFailed if the program cannot be started, or if its exit code is not 0. The message has its output.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise ReleaseFailed(f"{words[0]}: {error.strerror}") from error
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise ReleaseFailed(f"{' '.join(words)}\nended with {done.returncode}\n{output}")
    return done.stdout
