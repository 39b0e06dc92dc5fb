"""Programs that a release runs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from release.errors import ReleaseFailed


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> bytes:
    """Runs a program in `cwd` and returns what it wrote to stdout. `env`: its environment; None: the caller's.

    Raises ReleaseFailed with its output if it cannot be started or does not end with 0.
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
