"""A test in which an ordinary push with docker replaces a damaged layer."""

from __future__ import annotations

import json

from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.client_images import ClientImage
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files
from tests.fakes.commands import entrepot
from tests.fakes.scrub_runs import flip_byte
from tests.fakes.server_process import RegistryServer


def test_docker_push_replaces_a_damaged_layer(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """While the registry has the layer, docker does not send it. A scrub finds that the layer is damaged, and the
    registry no longer serves it. The next push then sends the layer again, although the manifest exists, and docker can
    pull the image."""
    name = f"{server.address}/{repo}"
    docker.load(small_image, name)
    docker("push", name)
    assert "Layer already exists" in docker("push", name).out
    manifest = wire.manifest(repo, "latest").body
    # docker has compressed the layer itself, so its digest differs from that in `small_image`.
    layer = json.loads(manifest)["layers"][-1]["digest"]
    flip_byte(Layout(server.data).blob(Digest(layer)))
    result = entrepot("scrub", folder=server.data.parent)
    assert result.returncode == 1, result.stderr
    assert f"damaged blob {layer} of {repo}" in result.stdout
    assert wire.blob_status(repo, layer) == 404

    assert "Pushed" in docker("push", name).out

    assert wire.manifest(repo, "latest").body == manifest
    assert_same_files(wire, repo, "latest", small_image)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == f"hello from {repo}\n"
