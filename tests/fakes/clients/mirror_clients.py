"""Runs two real registries as upstreams, a mirror of both, and clients that are set up to use the mirror."""

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

UPSTREAM_IMAGES = ("library/ubuntu:18.04", "org/app:1", "far.example/library/ubuntu:18.04")
"""The images of the upstreams at the start, by their names at the mirror."""

# With `tag_ttl = "0s"`, the mirror sends a request to the upstream for each pull of a tag.
SETTINGS = """
[[upstream]]
name = "docker.io"
default = true
endpoints = ["{hub}"]
tag_ttl = "0s"
miss_ttl = "0s"

[[upstream]]
name = "far.example"
endpoints = ["{second}"]
tag_ttl = "0s"
"""


@dataclass(frozen=True)
class TwoRegistries:
    """Two docker-registry servers (Debian's) as the upstreams `docker.io` and `far.example`. The repository
    library/ubuntu has a different image in each of them.

    Tests can reach neither the real Docker Hub nor far.example. So every image that a client pulls has come through a
    mirror."""

    hub: SwitchableRegistry
    second: SwitchableRegistry
    settings: Path

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator[RegistryServer]:
        """Runs a mirror of both upstreams, with an empty store and two workers, until the block ends."""
        with running_server(folder, "--config", str(self.settings)) as running:
            yield running

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Switches both upstreams off until the block ends."""
        with self.hub.off(), self.second.off():
            yield

    def client_settings(self, mirror: RegistryServer, program: str, *args: str) -> str:
        """Returns the output of `entrepot client` for a client program: the settings with which it uses the mirror."""
        args = (program, "--url", mirror.url, "--config", str(self.settings), *args)
        done = entrepot("client", *args, folder=self.settings.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def two_registries(folder: Path) -> Iterator[TwoRegistries]:
    """Runs both upstreams until the block ends."""
    for_hub, for_second = UpstreamContent(), UpstreamContent()  # the content of each upstream
    for_hub.add("library/ubuntu", ubuntu(), "18.04")
    app = image("org/app")  # an image that clients can run, and that prints this text
    for_hub.add("org/app", image_tree_of(app), "1")
    for_second.add("library/ubuntu", ubuntu("far"), "18.04")
    with switchable_registry(folder, for_hub) as hub, switchable_registry(folder, for_second) as second:
        settings = folder / "entrepot.toml"
        settings.write_text(SETTINGS.format(hub=hub.url, second=second.url))
        yield TwoRegistries(hub, second, settings)


@contextlib.contextmanager
def docker_for(mirror: RegistryServer, short_folder: Path) -> Iterator[DockerEngine]:
    """Runs a dockerd without images until the block ends. Its daemon.json names the mirror as in the README."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir=short_folder))
    (folder / "daemon.json").write_text(json.dumps({"registry-mirrors": [mirror.url]}))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as running:
        yield running


def tools_for(mirror: RegistryServer, upstreams: TwoRegistries, short_folder: Path) -> ContainerTools:
    """Returns podman, buildah and skopeo without images, with the registries.conf that `entrepot client` prints for
    them."""
    # The folder is in `short_folder`, because with a long path podman waits 20 s for the end of each container.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    tools = container_tools(folder)
    drop_in_folder = folder / "home" / ".config" / "containers" / "registries.conf.d"
    drop_in_folder.mkdir()
    # podman and buildah read the first file, which an environment variable names. skopeo reads the second file.
    for file in (folder / "registries.conf", drop_in_folder / "50-entrepot.conf"):
        file.write_text(upstreams.client_settings(mirror, "podman"))
    return tools
