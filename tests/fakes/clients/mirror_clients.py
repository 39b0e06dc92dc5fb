"""Two real upstreams, a mirror before them, and clients without any image that are set up for it."""

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
"""What the upstreams have at first, by its names at the mirror."""

# Tags are trusted for no time at all: each pull asks the upstream, if it can.
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
    """Debian's docker-registry as `docker.io` and as `far.example`; under one name they hold different images.

    Neither Docker Hub nor far.example can be reached: an image that comes has come through a mirror.
    """

    hub: SwitchableRegistry
    far: SwitchableRegistry
    settings: Path

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator[RegistryServer]:
        """A mirror of the two that has nothing yet, with two workers."""
        with running_server(folder, "--config", str(self.settings)) as running:
            yield running

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Both are switched off."""
        with self.hub.off(), self.far.off():
            yield

    def printed(self, mirror: RegistryServer, program: str, *args: str) -> str:
        """What `entrepot client` prints for a program."""
        args = (program, "--url", mirror.url, "--config", str(self.settings), *args)
        done = entrepot("client", *args, folder=self.settings.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def two_registries(folder: Path) -> Iterator[TwoRegistries]:
    """Both, on, until the block ends."""
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
    """A dockerd without any image, whose daemon.json names the mirror as the README does."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir=short_folder))
    (folder / "daemon.json").write_text(json.dumps({"registry-mirrors": [mirror.url]}))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as running:
        yield running


def tools_for(mirror: RegistryServer, beyond: TwoRegistries, short_folder: Path) -> ContainerTools:
    """podman, buildah and skopeo without any image, with the registries.conf that is printed for them."""
    # With a long path podman waits 20 s for a container's end.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    made = container_tools(folder)
    dropped_in = folder / "home" / ".config" / "containers" / "registries.conf.d"
    dropped_in.mkdir()
    # podman and buildah find the first by a variable, skopeo the second.
    for file in (folder / "registries.conf", dropped_in / "50-entrepot.conf"):
        file.write_text(beyond.printed(mirror, "podman"))
    return made
