"""A docker daemon of our own, with nothing of the machine's: its own folder and socket, no networking."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.errors import TrialFailed
from bench.system.process_tree import clean_environment, log_tail, running_program

START_TIMEOUT = 60.0
CALL_TIMEOUT = 300.0


@dataclass(frozen=True)
class DockerDaemon:
    """A client of that daemon."""

    socket: str
    home: Path

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path) -> Iterator[Self]:
        """Starts the daemon, which needs root, and ends it with the block. Raises TrialFailed."""
        if os.geteuid() != 0:
            raise TrialFailed("dockerd needs root")
        folder.mkdir(parents=True)
        log, docker = folder / "log", cls(f"unix://{folder}/d.sock", folder)
        command = ["dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "-H", docker.socket]
        command += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"]
        command += ["--pidfile", f"{folder}/pid"]
        with running_program(command, clean_environment(folder), log, folder) as process:
            deadline = time.monotonic() + START_TIMEOUT
            while not docker.answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TrialFailed(f"dockerd does not answer: {log_tail(log, 300)}")
                time.sleep(0.1)
            yield docker

    def answers(self) -> bool:
        return self._run("version").returncode == 0

    def __call__(self, *args: str) -> str:
        """Runs a command; what it printed. Raises TrialFailed unless it ends with 0."""
        done = self._run(*args)
        if done.returncode != 0:
            raise TrialFailed(f"docker {' '.join(args)}: {done.stderr.strip()[-300:]}")
        return done.stdout

    def _run(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["docker", "-H", self.socket, *args]
        env, nothing = clean_environment(self.home), subprocess.DEVNULL
        try:
            return subprocess.run(command, env=env, stdin=nothing, capture_output=True, text=True, timeout=CALL_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise TrialFailed(f"docker {args[0]} did not end within {CALL_TIMEOUT:.0f} s") from None
