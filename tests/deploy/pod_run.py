"""Runs the containers of a pod from the Helm chart as processes on this machine, without a cluster. The processes have
the arguments, variables, user and files of the containers, and a volume like the one that the kubelet prepares."""

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

TIMEOUT = 60.0  # seconds
ADDRESS = "0.0.0.0:5000"


class PodRun:
    """A pod whose containers run as processes. `folder`: the folder for the pod's files. `config_map` and `secret`: the
    values of the ConfigMap and the Secret by key."""

    def __init__(self, folder: Path, pod: dict[str, Any], config_map: dict[str, str], secret: dict[str, str]) -> None:
        self._folder = folder
        self._pod = pod
        context = pod["securityContext"]
        self._user, self._group = context["runAsUser"], context["fsGroup"]
        assert context["runAsGroup"] == self._group
        self._make_volume()
        self._write("etc/entrepot/settings", {name: self._with_local_paths(text) for name, text in config_map.items()})
        self._write("etc/entrepot/secrets", secret)

    def _make_volume(self) -> None:
        """Makes a folder like a new ext4 volume after the kubelet has applied `fsGroup`: it belongs to root and to the
        pod's group."""
        volume = self._folder / "var/lib/entrepot"
        volume.mkdir(parents=True)
        os.chown(volume, 0, self._group)
        volume.chmod(0o2775)
        (volume / "lost+found").mkdir(mode=0o700)

    def _write(self, subfolder: str, files: dict[str, str]) -> None:
        (self._folder / subfolder).mkdir(parents=True)
        for name, text in files.items():
            path = self._folder / subfolder / name
            path.write_text(text)
            os.chown(path, 0, self._group)
            path.chmod(0o440)

    def _with_local_paths(self, text: str) -> str:
        """Returns the text with the pod's paths replaced by paths below the folder, and the port replaced by 0, which
        stands for any free port."""
        for path in ("/var/lib/entrepot", "/etc/entrepot"):
            text = text.replace(path, f"{self._folder}{path}")
        return text.replace(ADDRESS, "0.0.0.0:0")

    def _start(self, container: dict[str, Any]) -> subprocess.Popen[str]:
        """Starts a container as a process of the pod's user and group. The process may read all files, because Python
        may be installed in a folder that only root can read. It may write only the files that its user and group may
        write."""
        variables = {entry["name"]: self._with_local_paths(entry["value"]) for entry in container.get("env", ())}
        user = ["setpriv", f"--reuid={self._user}", f"--regid={self._group}", "--clear-groups"]
        capabilities = [
            "--inh-caps=-all,+dac_read_search",
            "--ambient-caps=-all,+dac_read_search",
            "--bounding-set=-all,+dac_read_search",
        ]
        return subprocess.Popen(
            [*user, *capabilities, sys.executable, "-m", "registry", *map(self._with_local_paths, container["args"])],
            cwd="/",
            env={**environment(self._folder / "home"), "PYTHONPATH": str(ROOT), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run_init_containers(self) -> str:
        """Runs the init containers one after the other and returns their output. Raises AssertionError if one fails."""
        all_output = ""
        for container in self._pod["initContainers"]:
            with self._start(container) as process:
                output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, output
            all_output += output
        return all_output

    @contextmanager
    def running(self) -> Iterator[str]:
        """Runs the main container until the block ends. Yields the URL of the registry. Raises AssertionError if the
        exit code is not 0."""
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
                remaining_output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, remaining_output
