"""Makes the files of a release from the last commit (`make_release`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.server_process import ROOT


@dataclass(frozen=True)
class ReleaseFiles:
    """The files of a release in `folder`."""

    folder: Path

    @property
    def wheel(self) -> Path:
        return self._only("*.whl")

    @property
    def source(self) -> Path:
        """The source distribution."""
        return self._only("*.tar.gz")

    @property
    def bill(self) -> Path:
        """The bill of materials."""
        return self._only("*.cdx.json")

    def bytes_by_name(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def _only(self, pattern: str) -> Path:
        (found,) = self.folder.glob(pattern)
        return found


def make_release(into: Path) -> ReleaseFiles:
    """Makes a release in the folder `into` with `make release`, which installs its tools if they are missing."""
    run_in(ROOT, "make", "release", f"ARGS=--no-image --into {into}")
    return ReleaseFiles(into)


def run_in(folder: Path, *command: str | Path, env: Mapping[str, str] | None = None, umask: int = -1) -> str:
    """Runs a program, checks that its exit code is 0, and returns its output. `env`: variables to add to the
    environment of this process. `umask`: the umask of the program; -1: that of this process."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        umask=umask,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
    return done.stdout
