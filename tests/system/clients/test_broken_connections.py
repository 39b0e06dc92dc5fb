"""Tests with real clients whose connections break, with several clients at the same time, and with a server that is
restarted or killed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.clients.cutting_proxy import CuttingProxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files, assert_same_image, pull_all
from tests.fakes.server_process import RegistryServer, running_server


@pytest.mark.timeout(300)
def test_docker_upload_cut_midway(docker: DockerEngine, proxy: CuttingProxy, wire: RegistryClient, repo: str) -> None:
    """If the connection breaks in the middle of a 24 MiB layer, docker retries by itself or the user pushes again. The
    stored image is then correct."""
    test_image = image("cut", layer({"heavy": noise(repo, 24 * MIB)}))
    name = f"{proxy.address}/{repo}"
    docker.load(test_image, name)
    proxy.cut_upload_after(12 * MIB)
    docker.call.attempt("push", name)
    assert proxy.cuts == 1
    docker("push", name)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == "cut\n"
    assert_same_files(wire, repo, "latest", test_image)


@pytest.mark.timeout(300)
def test_docker_download_cut_midway(docker: DockerEngine, proxy: CuttingProxy, wire: RegistryClient, repo: str) -> None:
    """After the connection broke in the middle of a layer, docker requests only the rest of the layer."""
    test_image = image("cut", layer({"heavy": noise(repo, 24 * MIB)}))
    wire.push(repo, "latest", test_image)
    name = f"{proxy.address}/{repo}"
    proxy.cut_download_after(12 * MIB)
    docker("pull", name)
    assert proxy.cuts == 1
    assert 24 * MIB < proxy.received < 30 * MIB  # a second download of the whole layer would make it 36 MiB
    assert docker.output_of(name) == "cut\n"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cut_after_bytes", [64 * 1024, 12 * MIB, 23 * MIB])
def test_skopeo_upload_cut_midway(
    tools: ContainerTools, proxy: CuttingProxy, wire: RegistryClient, repo: str, tmp_path: Path, cut_after_bytes: int
) -> None:
    """After an interrupted push there is no tag, and each layer is stored completely or not at all. After a second push
    the image is complete."""
    test_image = image(f"cut {cut_after_bytes}", layer({"heavy": noise(repo, 24 * MIB)}))
    write_layout(tmp_path, {"x": test_image})
    name = f"docker://{proxy.address}/{repo}:x"
    proxy.cut_upload_after(cut_after_bytes)
    interrupted_copy = tools.skopeo.attempt(
        "copy", "--dest-tls-verify=false", "--preserve-digests", f"oci:{tmp_path}:x", name
    )
    assert (proxy.cuts, interrupted_copy.code) == (1, 1), interrupted_copy.text
    assert wire.ask("GET", f"/v2/{repo}/manifests/x").status == 404
    for digest, content in test_image.blobs.items():
        # skopeo sends several layers in parallel. A layer on another connection may have been stored.
        assert wire.blob_status(repo, digest) == 404 or wire.blob(repo, digest) == content.body
    # After 64 KiB, the cut may hit the upload of another layer.
    assert cut_after_bytes < 2 * MIB or wire.blob_status(repo, test_image.layers[-1].digest) == 404
    tools.copy(f"oci:{tmp_path}:x", name)
    assert_same_image(wire, repo, "x", test_image)


@pytest.mark.timeout(300)
def test_two_clients_push_one_image_at_once(
    docker: DockerEngine, tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """docker, podman and two skopeo processes push one image to one repository at the same time. All pushes succeed,
    and the image is complete."""
    test_image = image("at once", layer({"heavy": noise(repo, 8 * MIB)}))
    name = f"{server.address}/{repo}"
    write_layout(tmp_path, {"x": test_image})
    docker.load(test_image, f"{name}:docker")
    podman_id = tools.podman("pull", "--quiet", f"oci:{tmp_path}:x").out.split()[-1]
    pushes = [
        lambda: docker("push", f"{name}:docker"),
        lambda: tools.podman("push", "--tls-verify=false", podman_id, f"docker://{name}:podman"),
        lambda: tools.copy(f"oci:{tmp_path}:x", f"docker://{name}:skopeo"),
        lambda: tools.copy(f"oci:{tmp_path}:x", f"docker://{name}:skopeo"),
    ]
    with ThreadPoolExecutor(len(pushes)) as pool:
        for push_future in [pool.submit(push) for push in pushes]:
            push_future.result()
    assert_same_files(wire, repo, "docker", test_image)
    assert_same_files(wire, repo, "podman", test_image)
    assert_same_image(wire, repo, "skopeo", test_image)


def test_two_images_race_for_one_tag(
    docker: DockerEngine, tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """docker and skopeo push different images under one tag at the same time. The tag points at one of the two images,
    and both images are complete."""
    docker_image, skopeo_image = image(f"mine {repo}"), image(f"yours {repo}")
    name = f"{server.address}/{repo}:tag"
    write_layout(tmp_path, {"x": skopeo_image})
    docker.load(docker_image, name)
    with ThreadPoolExecutor(2) as pool:
        pushed = pool.submit(docker, "push", name)
        pool.submit(tools.copy, f"oci:{tmp_path}:x", f"docker://{name}").result()
    docker_digest = next(word for word in pushed.result().out.split() if word.startswith("sha256:"))
    assert wire.digest(repo, "tag") in {docker_digest, skopeo_image.digest}
    for digest in (docker_digest, skopeo_image.digest):
        pull_all(wire, repo, digest)


@pytest.fixture
def address() -> Iterator[str]:
    """Provides a `host:port` at which one server after another can listen. A socket is bound to the port and does not
    listen, so no other program gets the port between two servers."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        host, port = reserved.getsockname()
        yield f"{host}:{port}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("end", ["stop", "kill", "kill_parent"])
def test_restart_between_push_and_pull(
    tools: ContainerTools,
    layout: Path,
    large_image: ClientImage,
    multi_platform: ClientImage,
    tmp_path: Path,
    address: str,
    end: str,
) -> None:
    """Pushed content is there after a restart, whether the server was ended by SIGTERM, by SIGKILL of all its
    processes, or by SIGKILL of the parent process."""
    with running_server(tmp_path / "server", listen=address) as first:
        tools.copy(f"oci:{layout}:big", f"docker://{address}/team/app:big")
        tools.copy(f"oci:{layout}:multi", f"docker://{address}/team/app:multi", "--all")
        if end == "stop":
            assert first.stop() == 0
        elif end == "kill":
            first.kill()
        else:
            first.kill_parent()
    with running_server(tmp_path / "server", listen=address) as second:
        wire = RegistryClient(second.address)
        assert wire.tags("team/app") == ["big", "multi"]
        assert_same_image(wire, "team/app", "big", large_image)
        assert_same_image(wire, "team/app", "multi", multi_platform)
        tools.copy(f"docker://{address}/team/app:big", f"oci:{tmp_path / 'out'}:big")


def test_docker_pulls_after_a_restart(
    docker: DockerEngine, repo: str, small_image: ClientImage, tmp_path: Path, address: str
) -> None:
    """After a restart of the server, docker can pull an image that it has pushed before, although docker keeps
    connections open."""
    with running_server(tmp_path / "server", listen=address) as first:
        name = f"{address}/{repo}"
        docker.load(small_image, name)
        docker("push", name)
        assert first.stop() == 0
    docker.remove_image(name)
    with running_server(tmp_path / "server", listen=address) as second:
        docker("pull", name)
        assert docker.output_of(name) == f"hello from {repo}\n"
        assert_same_files(RegistryClient(second.address), repo, "latest", small_image)
