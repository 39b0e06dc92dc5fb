"""Runs a docker daemon with its own folder and socket, and without networking for containers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.errors import TrialFailed
from bench.system.programs import clean_environment, run_to_end, running_program

CALL_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class DockerDaemon:
    """A running docker daemon. A call of this object runs a docker command against the daemon."""

    socket: str
    home: Path

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path) -> Iterator[Self]:
        """Runs the daemon until the block ends. Raises BenchFailed; TrialFailed if this process is not root."""
        if os.geteuid() != 0:
            raise TrialFailed("dockerd needs root")
        folder.mkdir(parents=True)
        docker = cls(f"unix://{folder}/d.sock", folder)
        command = ["dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "-H", docker.socket]
        command += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"]
        command += ["--pidfile", f"{folder}/pid"]
        with running_program(command, folder / "log", ready=docker.is_running):
            yield docker

    def is_running(self) -> bool:
        """Returns whether the daemon answers."""
        try:
            self("version")
        except TrialFailed:
            return False
        return True

    def __call__(self, *args: str) -> str:
        """Runs a docker command and returns its output. Raises TrialFailed when the command fails."""
        return run_to_end(["docker", "-H", self.socket, *args], CALL_TIMEOUT, env=clean_environment(self.home))
