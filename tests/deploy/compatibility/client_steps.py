"""The steps (push, pull, mirror) that the compatibility tests try with each client, and the registries that they
use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.client_images import ClientImage, image
from tests.fakes.clients.mirror_clients import TwoRegistries
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files
from tests.fakes.server_process import RegistryServer
from tests.fakes.temporary_files import make_named_folder

Step = Callable[[], None]
"""A function that does the step. It raises an error if the step does not work."""
OnImage = Callable[[ClientImage, str], None]
"""A function that pushes or pulls an image under a name."""

UBUNTU = "ubuntu:18.04"
"""An image of the upstream `docker.io`. Its container prints UBUNTU_GREETING."""
UBUNTU_GREETING = "bionic amd64\n"


@dataclass(frozen=True)
class ClientSite:
    """The resources for a client: a folder with a short path, a registry for pushed images (`server`), a mirror, and
    the two upstreams of the mirror (`upstreams`)."""

    folder: Path
    server: RegistryServer
    mirror: RegistryServer
    upstreams: TwoRegistries

    @property
    def wire(self) -> RegistryClient:
        return RegistryClient(self.server.address)

    def new_folder(self) -> Path:
        return make_named_folder(self.folder, "c")


@dataclass(frozen=True)
class CompatibleClient:
    """A client that is ready to be tried: its version, and its steps by name."""

    version: str
    steps: Mapping[str, Step]


def image_steps(site: ClientSite, client: str, push: OnImage, pull: OnImage, mirror: Step) -> dict[str, Step]:
    """Returns the steps of a client of images. `push`: pushes an image from a file to the registry. `pull`: pulls an
    image and compares it with the original. `mirror`: pulls `UBUNTU` through the mirror."""

    def push_own() -> None:
        own_image, repo = image(f"pushed by {client}"), f"{client}/pushed"
        push(own_image, f"{site.server.address}/{repo}:1")
        assert_same_files(site.wire, repo, "1", own_image)

    def pull_own() -> None:
        own_image, repo = image(f"pulled by {client}"), f"{client}/pulled"
        site.wire.push(repo, "1", own_image)
        pull(own_image, f"{site.server.address}/{repo}:1")

    return {"push": push_own, "pull": pull_own, "mirror": mirror}


def version_in(text: str) -> str:
    """Returns the first version number in the text."""
    found = re.search(r"\d+(\.\d+)+", text)
    assert found is not None, text
    return found[0]
