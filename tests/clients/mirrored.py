"""Two real upstreams, a mirror before them, and clients without any image that are set up for it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cli.running import entrepot
from tests.serving import Server, running_server
from tests.upstreams.content import Content, holding_of, ubuntu
from tests.upstreams.switched import Switched, switched

from .containers import Containers, containers
from .docker import Docker, running_docker
from .images import image

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
class Upstreams:
    """Debian's docker-registry as `docker.io` and as `far.example`; under one name they hold different images.

    Neither Docker Hub nor far.example can be reached: an image that comes has come through a mirror.
    """

    hub: Switched
    far: Switched
    settings: Path

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator[Server]:
        """A mirror of the two that has nothing yet, with two workers."""
        with running_server(folder, "--config", str(self.settings)) as running:
            yield running

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Both are switched off."""
        with self.hub.off(), self.far.off():
            yield

    def printed(self, mirror: Server, program: str, *args: str) -> str:
        """What `entrepot client` prints for a program."""
        args = (program, "--url", mirror.url, "--config", str(self.settings), *args)
        done = entrepot("client", *args, folder=self.settings.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def upstreams(folder: Path) -> Iterator[Upstreams]:
    """Both, on, until the block ends."""
    for_hub, for_far = Content(), Content()
    for_hub.add("library/ubuntu", ubuntu(), "18.04")
    for_hub.add("org/app", holding_of(image("org/app")), "1")
    for_far.add("library/ubuntu", ubuntu("far"), "18.04")
    with switched(folder, for_hub) as hub, switched(folder, for_far) as far:
        settings = folder / "entrepot.toml"
        settings.write_text(SETTINGS.format(hub=hub.url, far=far.url))
        yield Upstreams(hub, far, settings)


@contextlib.contextmanager
def docker_for(mirror: Server, short_folder: Path) -> Iterator[Docker]:
    """A dockerd without any image, whose daemon.json names the mirror as the README does."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir=short_folder))
    (folder / "daemon.json").write_text(json.dumps({"registry-mirrors": [mirror.url]}))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as running:
        yield running


def tools_for(mirror: Server, beyond: Upstreams, short_folder: Path) -> Containers:
    """podman, buildah and skopeo without any image, with the registries.conf that is printed for them."""
    # With a long path podman waits 20 s for a container's end.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    made = containers(folder)
    dropped_in = folder / "home" / ".config" / "containers" / "registries.conf.d"
    dropped_in.mkdir()
    # podman and buildah find the first by a variable, skopeo the second.
    for file in (folder / "registries.conf", dropped_in / "50-entrepot.conf"):
        file.write_text(beyond.printed(mirror, "podman"))
    return made
