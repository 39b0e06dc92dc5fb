"""Two real upstreams, a mirror of both, and clients without images that are set up to use the mirror."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.client_images import image
from tests.fakes.commands import entrepot
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.switchable_registry import SwitchableRegistry, switchable_registry
from tests.fakes.upstream_content import UpstreamContent, image_tree_of, ubuntu

from .container_tools import ContainerTools, container_tools
from .docker_engine import DockerEngine, running_docker

HELD = ("library/ubuntu:18.04", "org/app:1", "far.example/library/ubuntu:18.04")
"""The content of the upstreams at the start, by its names at the mirror."""

# A cached tag is never fresh: each pull asks the upstream, if it can.
SETTINGS = """
[[upstream]]
name = "docker.io"
default = true
endpoints = ["{hub}"]
tag_ttl = "0s"
miss_ttl = "0s"

[[upstream]]
name = "far.example"
endpoints = ["{far}"]
tag_ttl = "0s"
"""


@dataclass(frozen=True)
class TwoRegistries:
    """Two docker-registry programs of Debian as the upstreams `docker.io` and `far.example`. The same repository name
    has different images in the two.

    Neither Docker Hub nor far.example can be reached, so an image that a client gets has come through a mirror."""

    hub: SwitchableRegistry
    far: SwitchableRegistry
    settings: Path

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator[RegistryServer]:
        """Starts a mirror of both with an empty store and two workers."""
        with running_server(folder, "--config", str(self.settings)) as running:
            yield running

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Switches both upstreams off during the block."""
        with self.hub.off(), self.far.off():
            yield

    def printed(self, mirror: RegistryServer, program: str, *args: str) -> str:
        """Returns what `entrepot client` prints for a program."""
        args = (program, "--url", mirror.url, "--config", str(self.settings), *args)
        done = entrepot("client", *args, folder=self.settings.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def two_registries(folder: Path) -> Iterator[TwoRegistries]:
    """Runs both upstreams until the block ends."""
    for_hub, for_far = UpstreamContent(), UpstreamContent()
    for_hub.add("library/ubuntu", ubuntu(), "18.04")
    for_hub.add("org/app", image_tree_of(image("org/app")), "1")
    for_far.add("library/ubuntu", ubuntu("far"), "18.04")
    with switchable_registry(folder, for_hub) as hub, switchable_registry(folder, for_far) as far:
        settings = folder / "entrepot.toml"
        settings.write_text(SETTINGS.format(hub=hub.url, far=far.url))
        yield TwoRegistries(hub, far, settings)


@contextlib.contextmanager
def docker_for(mirror: RegistryServer, short_folder: Path) -> Iterator[DockerEngine]:
    """Runs a dockerd without images, whose daemon.json names the mirror as in the README."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir=short_folder))
    (folder / "daemon.json").write_text(json.dumps({"registry-mirrors": [mirror.url]}))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as running:
        yield running


def tools_for(mirror: RegistryServer, beyond: TwoRegistries, short_folder: Path) -> ContainerTools:
    """Returns podman, buildah and skopeo without images, with the registries.conf that `entrepot client` prints for
    them."""
    # With a long path podman waits 20 s for a container's end.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    made = container_tools(folder)
    dropped_in = folder / "home" / ".config" / "containers" / "registries.conf.d"
    dropped_in.mkdir()
    # podman and buildah find the first by a variable, skopeo the second.
    for file in (folder / "registries.conf", dropped_in / "50-entrepot.conf"):
        file.write_text(beyond.printed(mirror, "podman"))
    return made
