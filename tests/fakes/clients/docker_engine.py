"""Runs a dockerd for tests, and its client `docker`. By default the dockerd has no networking. It does not share the
storage of the host's dockerd."""

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
    """The client `docker`, connected to a dockerd of the tests."""

    call: ForeignProgram
    folder: Path

    def __call__(self, *args: str, timeout: float = 110.0) -> ProgramResult:
        return self.call(*args, timeout=timeout)

    def load(self, image: ClientImage, name: str) -> None:
        """Imports an image into the daemon under `name`, without a registry."""
        # In an archive, the name must have a tag.
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

    def remove_image(self, name: str) -> None:
        """Removes an image with all its names, so that the next pull has to download it again."""
        self("rmi", "--force", self.image_id(name))

    def output_of(self, name: str, *args: str) -> str:
        """Runs a container of the image and returns its output."""
        return self("run", "--rm", "--network", "host", name, *args).out


MOUNT_ETC_SCRIPT = 'mkdir -p /etc/docker && mount --bind "$0" /etc/docker && exec "$@"'
"""A shell script that runs a program with another folder in place of /etc/docker."""


@contextlib.contextmanager
def running_docker(
    folder: Path, *options: str, etc: Path | None = None, proxy: str = "", networks: bool = False
) -> Iterator[DockerEngine]:
    """Runs a dockerd below `folder` until the block ends. The path of `folder` must be absolute and short, because the
    path of a socket can have at most 107 bytes. `options`: further options of dockerd.

    `etc`: the folder that this dockerd, and no other process, sees as /etc/docker. `proxy`: the URL of the HTTP proxy
    through which dockerd connects to registries. `networks`: let dockerd create networks and firewall rules for its
    containers, as it does by default; use this only inside an `own_network`."""
    socket, state, log = f"unix://{folder}/d.sock", folder / "exec", folder / "dockerd.log"
    command = ["dockerd", "--data-root", f"{folder}/data", "--exec-root", str(state), "-H", socket]
    command += [] if networks else ["--iptables=false", "--ip6tables=false", "--bridge=none"]
    command += ["--storage-driver=vfs", "--pidfile", f"{folder}/pid", "--max-download-attempts", "5", *options]
    env = environment(folder / "home", DOCKER_CONFIG=f"{folder}/config")
    env |= {"DOCKER_CLI_EXPERIMENTAL": "enabled", "DOCKER_BUILDKIT": "0"}
    docker = DockerEngine(ForeignProgram(("docker", "-H", socket), env), folder)
    if etc is not None:
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT_ETC_SCRIPT, str(etc), *command]
    if proxy:
        env |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": ""}
    containerd_pid = 0
    try:
        with running_daemon(command, env, log, lambda: docker.call.attempt("version", timeout=10).code == 0):
            containerd_pid = int((state / "containerd" / "containerd.pid").read_text())
            yield docker
    finally:
        if containerd_pid:
            message = f"dockerd left its containerd behind: {containerd_pid}"
            wait_until(lambda: is_gone(containerd_pid), 30, lambda: message)
        unmount_below(folder)
