"""Runs the containers of a rendered pod on this machine, without a cluster: with their arguments, variables, user and
files, on a volume as the kubelet prepares it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.clients.programs import environment
from tests.fakes.server_process import READY, ROOT

TIMEOUT = 60.0
ADDRESS = "0.0.0.0:5000"


class PodRun:
    """`folder`: where the files of the pod are. `config_map` and `secret`: the contents of their keys."""

    def __init__(self, folder: Path, pod: dict[str, Any], config_map: dict[str, str], secret: dict[str, str]) -> None:
        self._folder = folder
        self._pod = pod
        context = pod["securityContext"]
        self._user, self._group = context["runAsUser"], context["fsGroup"]
        assert context["runAsGroup"] == self._group
        self._make_volume()
        self._write("etc/entrepot/settings", {name: self._here(text) for name, text in config_map.items()})
        self._write("etc/entrepot/secrets", secret)

    def _make_volume(self) -> None:
        """A new ext4 volume after the kubelet has applied `fsGroup`: it belongs to root and the group."""
        volume = self._folder / "var/lib/entrepot"
        volume.mkdir(parents=True)
        os.chown(volume, 0, self._group)
        volume.chmod(0o2775)
        (volume / "lost+found").mkdir(mode=0o700)

    def _write(self, place: str, files: dict[str, str]) -> None:
        (self._folder / place).mkdir(parents=True)
        for name, text in files.items():
            path = self._folder / place / name
            path.write_text(text)
            os.chown(path, 0, self._group)
            path.chmod(0o440)

    def _here(self, text: str) -> str:
        """The text with the paths of this machine, and with a port that is free."""
        for path in ("/var/lib/entrepot", "/etc/entrepot"):
            text = text.replace(path, f"{self._folder}{path}")
        return text.replace(ADDRESS, "0.0.0.0:0")

    def _start(self, container: dict[str, Any]) -> subprocess.Popen[str]:
        """Starts a container. It may read all files, because Python may be installed where only root can read. It may
        write only where its user and group may."""
        variables = {entry["name"]: self._here(entry["value"]) for entry in container.get("env", ())}
        user = ["setpriv", f"--reuid={self._user}", f"--regid={self._group}", "--clear-groups"]
        only_read = [
            "--inh-caps=-all,+dac_read_search",
            "--ambient-caps=-all,+dac_read_search",
            "--bounding-set=-all,+dac_read_search",
        ]
        return subprocess.Popen(
            [*user, *only_read, sys.executable, "-m", "registry", *map(self._here, container["args"])],
            cwd="/",
            env={**environment(self._folder / "home"), "PYTHONPATH": str(ROOT), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run_init_containers(self) -> str:
        """Runs them one after the other and returns their output. Raises AssertionError if one fails."""
        said = ""
        for container in self._pod["initContainers"]:
            with self._start(container) as process:
                output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, output
            said += output
        return said

    @contextmanager
    def running(self) -> Iterator[str]:
        """Runs the main container during the block. Yields the URL of the registry. It must end with exit code 0."""
        with self._start(self._pod["containers"][0]) as process:
            assert process.stdout is not None
            try:
                lines = []
                for line in process.stdout:
                    lines.append(line)
                    if found := READY.search(line):
                        break
                else:
                    raise AssertionError("".join(lines))
                yield found[1].replace("0.0.0.0", "127.0.0.1")
            finally:
                process.terminate()
                rest, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, rest
