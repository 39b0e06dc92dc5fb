"""Tries each client: it pushes an image, pulls an image that another client has pushed, and pulls an image of Docker
Hub through the mirror."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.compatibility.artifact_clients import cosign, helm, oras, oras_of_python
from tests.deploy.compatibility.client_steps import ClientSite, CompatibleClient
from tests.deploy.compatibility.image_clients import buildah, buildkit, containerd, docker, podman, skopeo
from tests.fakes.clients.mirror_clients import TwoRegistries
from tests.fakes.deployment.client_results import CLIENTS, clients_of, debian_release
from tests.fakes.server_process import RegistryServer
from tests.fakes.temporary_files import make_named_folder

CLIENT_FACTORIES = {
    "docker": docker,
    "BuildKit": buildkit,
    "podman": podman,
    "buildah": buildah,
    "skopeo": skopeo,
    "containerd": containerd,
    "Helm": helm,
    "oras": oras,
    "oras in Python": oras_of_python,
    "cosign": cosign,
}


@pytest.fixture(scope="module")
def client(
    request: pytest.FixtureRequest,
    short_folder: Path,
    server: RegistryServer,
    mirror: RegistryServer,
    upstreams: TwoRegistries,
) -> Iterator[CompatibleClient]:
    folder = make_named_folder(short_folder, "p")
    with CLIENT_FACTORIES[request.param](ClientSite(folder, server, mirror, upstreams)) as ready_client:
        yield ready_client


@pytest.mark.parametrize(
    ("client", "step"),
    [(name, step) for name in clients_of(debian_release()) for step in CLIENTS[name].steps],
    indirect=["client"],
)
def test_step(client: CompatibleClient, step: str) -> None:
    """The client can do the step with the settings that docs/en/compatibility.md names."""
    client.steps[step]()
