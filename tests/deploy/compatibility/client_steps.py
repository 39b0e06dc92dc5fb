"""What the table is about: the steps of a client, and the place where it takes them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.client_images import ClientImage, image
from tests.fakes.clients.mirror_clients import TwoRegistries
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files
from tests.fakes.server_process import RegistryServer

Step = Callable[[], None]
OnImage = Callable[[ClientImage, str], None]

UBUNTU = "ubuntu:18.04"
"""An image of Docker Hub that prints `SAID`."""
SAID = "bionic amd64\n"


@dataclass(frozen=True)
class Place:
    """A folder with a short path, a server for images of one's own, and a mirror of two upstreams."""

    folder: Path
    server: RegistryServer
    mirror: RegistryServer
    beyond: TwoRegistries

    @property
    def wire(self) -> RegistryClient:
        return RegistryClient(self.server.address)

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="c", dir=self.folder))


@dataclass(frozen=True)
class CompatibleClient:
    """A client in a place. Each of its steps raises an error if it does not work."""

    version: str
    steps: Mapping[str, Step]


def image_steps(place: Place, client: str, push: OnImage, pull: OnImage, mirror: Step) -> dict[str, Step]:
    """The steps of a client of images. `push(image, name)` brings an image from a file to the registry;
    `pull(image, name)` fetches it, and compares what came; `mirror()` fetches `UBUNTU` through the mirror."""

    def push_own() -> None:
        own, repo = image(f"pushed by {client}"), f"{client}/pushed"
        push(own, f"{place.server.address}/{repo}:1")
        assert_same_files(place.wire, repo, "1", own)

    def pull_own() -> None:
        own, repo = image(f"pulled by {client}"), f"{client}/pulled"
        place.wire.push(repo, "1", own)
        pull(own, f"{place.server.address}/{repo}:1")

    return {"push": push_own, "pull": pull_own, "mirror": mirror}


def version_in(text: str) -> str:
    """The first version number in the text."""
    found = re.search(r"\d+(\.\d+)+", text)
    assert found is not None, text
    return found[0]
