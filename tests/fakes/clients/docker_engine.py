"""A dockerd for tests, without networking and without the host's storage, and its command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.client_images import ClientImage, write_archive

from .programs import ForeignProgram, ProgramResult, environment, is_gone, running_daemon, unmount_below, wait_until


@dataclass(frozen=True)
class DockerEngine:
    """`docker` on its own daemon."""

    call: ForeignProgram
    folder: Path

    def __call__(self, *args: str, timeout: float = 110.0) -> ProgramResult:
        return self.call(*args, timeout=timeout)

    def load(self, image: ClientImage, name: str) -> None:
        """Imports only this image into the daemon, under the name."""
        # An archive has no default tag.
        name = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        archive = write_archive(self.folder / f"{image.digest[-12:]}.tar", image, name)
        try:
            self("load", "--quiet", "--input", str(archive))
        finally:
            archive.unlink()

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self("image", "inspect", name).out)
        return found[0]

    def image_id(self, name: str) -> str:
        return str(self.inspect(name)["Id"])

    def forget(self, name: str) -> None:
        """Removes an image with all its names, so that the next pull has to fetch it."""
        self("rmi", "--force", self.image_id(name))

    def output_of(self, name: str, *args: str) -> str:
        """Runs a container of the image and returns its output."""
        return self("run", "--rm", "--network", "host", name, *args).out


WITH_ITS_OWN = 'mkdir -p /etc/docker && mount --bind "$0" /etc/docker && exec "$@"'


@contextlib.contextmanager
def running_docker(
    folder: Path, *options: str, etc: Path | None = None, proxy: str = "", networks: bool = False
) -> Iterator[DockerEngine]:
    """A dockerd below `folder` (absolute and short: a socket's path has at most 107 bytes), with further options.

    `etc`: what it alone sees as /etc/docker. `proxy`: the way it takes to every registry. `networks`: it makes networks
    for its containers, with rules of the firewall, as people's dockerd does; only for an `own_network`."""
    socket, state, log = f"unix://{folder}/d.sock", folder / "exec", folder / "dockerd.log"
    command = ["dockerd", "--data-root", f"{folder}/data", "--exec-root", str(state), "-H", socket]
    command += [] if networks else ["--iptables=false", "--ip6tables=false", "--bridge=none"]
    command += ["--storage-driver=vfs", "--pidfile", f"{folder}/pid", "--max-download-attempts", "5", *options]
    env = environment(folder / "home", DOCKER_CONFIG=f"{folder}/config")
    env |= {"DOCKER_CLI_EXPERIMENTAL": "enabled", "DOCKER_BUILDKIT": "0"}
    docker = DockerEngine(ForeignProgram(("docker", "-H", socket), env), folder)
    if etc is not None:
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", WITH_ITS_OWN, str(etc), *command]
    if proxy:
        env |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": ""}
    containerd = 0
    try:
        with running_daemon(command, env, log, lambda: docker.call.attempt("version", timeout=10).code == 0):
            containerd = int((state / "containerd" / "containerd.pid").read_text())
            yield docker
    finally:
        if containerd:
            wait_until(lambda: is_gone(containerd), 30, lambda: f"dockerd left its containerd behind: {containerd}")
        unmount_below(folder)
