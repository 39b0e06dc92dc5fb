"""Tests of the errors that clients show after a push of another image to an immutable tag."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client_images import image, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.server_process import RegistryServer, running_server

IMMUTABLE_RULES = json.dumps([{"repositories": ["fixed/**"], "tags": ["v*"]}])


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A server with immutable tags."""
    with running_server(tmp_path_factory.mktemp("strict"), env={"ENTREPOT_IMMUTABLE": IMMUTABLE_RULES}) as running:
        yield running


def test_docker_shows_the_error(docker: DockerEngine, strict: RegistryServer) -> None:
    """Docker can push the same image again. For another image, Docker shows the registry's error."""
    name = f"{strict.address}/fixed/docker:v1"
    docker.load(image("first"), name)
    docker("push", name)
    pushed = docker("push", name).out
    digest = next(word for word in pushed.split() if word.startswith("sha256:"))
    docker.remove_image(name)
    docker.load(image("second"), name)
    refused = docker.call.attempt("push", name)
    assert refused.code == 1
    assert f"denied: fixed/docker:v1 is immutable and points at {digest}; push another tag" in refused.text


def test_skopeo_and_podman_show_the_error(tools: ContainerTools, strict: RegistryServer, tmp_path: Path) -> None:
    """skopeo can push the same image again. For another image, skopeo and podman show the registry's error."""
    first, second = image("first"), image("second")
    layout = write_layout(tmp_path / "layout", {"first": first, "second": second})
    name = f"{strict.address}/fixed/skopeo:v1"
    for _ in range(2):
        tools.copy(f"oci:{layout}:first", f"docker://{name}")
    sentence = f"fixed/skopeo:v1 is immutable and points at {first.digest}; push another tag"
    refused = tools.skopeo.attempt("copy", "--dest-tls-verify=false", f"oci:{layout}:second", f"docker://{name}")
    assert refused.code == 1
    assert sentence in refused.text
    tools.podman("pull", "--quiet", f"oci:{layout}:second")
    refused = tools.podman.attempt("push", INSECURE, second.config.digest if second.config else "", name)
    assert refused.code != 0
    assert sentence in refused.text
