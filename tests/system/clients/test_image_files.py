"""Tests in which docker and skopeo read the files of `entrepot export`, and `entrepot import` reads files of docker and
skopeo."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import httpx2
import pytest

from tests.fakes.client_images import ClientImage, artifact
from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image, pull_all
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import RegistryServer


def run(server: RegistryServer, *args: str | Path) -> str:
    """Runs an entrepot command on the data directory of the server, and returns its output."""
    return entrepot_output(*args, "--data", server.data, folder=server.data.parent)


def test_docker_load(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """docker loads an exported image under its name and with the same id, and runs it."""
    wire.push(repo, "v1", small_image)
    run(server, "export", f"{repo}:v1", "--to", tmp_path / "x.tar", "--format", "docker-archive")
    assert f"Loaded image: {repo}:v1" in docker("load", "--input", str(tmp_path / "x.tar")).out
    assert small_image.config is not None
    assert docker.image_id(f"{repo}:v1") == small_image.config.digest
    assert docker.output_of(f"{repo}:v1") == f"hello from {repo}\n"


def test_docker_load_of_a_download(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """docker loads an image file that was downloaded over the API in two ranges. skopeo can read the same file as a
    docker-archive and as an oci-archive."""
    wire.push(repo, "v1", small_image)
    url = f"{server.url}/api/v1/repositories/{repo}/manifests/v1/archive"
    first = httpx2.get(url, headers={"range": "bytes=0-99999"})
    second = httpx2.get(url, headers={"range": "bytes=100000-", "if-range": first.headers["etag"]})
    assert (first.status_code, second.status_code) == (206, 206)
    archive = tmp_path / "x.tar"
    archive.write_bytes(first.content + second.content)
    assert f"Loaded image: {repo}:v1" in docker("load", "--input", str(archive)).out
    assert small_image.config is not None
    assert docker.image_id(f"{repo}:v1") == small_image.config.digest
    assert docker.output_of(f"{repo}:v1") == f"hello from {repo}\n"
    for form in (f"docker-archive:{archive}", f"oci-archive:{archive}:v1"):
        printed = subprocess.run(["skopeo", "inspect", "--config", form], capture_output=True, check=True).stdout
        assert json.loads(printed) == json.loads(small_image.config.body)


def test_docker_load_of_one_platform(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    tmp_path: Path,
) -> None:
    """If `entrepot export` gets no --platform, a docker-archive of an index has the image for this machine's
    platform."""
    wire.push(repo, "v1", multi_platform)
    run(server, "export", f"{repo}:v1", "--to", tmp_path / "x.tar", "--format", "docker-archive")
    docker("load", "--input", str(tmp_path / "x.tar"))
    assert docker.output_of(f"{repo}:v1") == "on amd64\n"


def test_docker_save(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """An archive of `docker save` is imported under the names that docker has for the image. docker can then pull an
    image with the same id."""
    archive = tmp_path / "saved.tar"
    docker.load(small_image, f"{repo}:v1")
    docker("tag", f"{repo}:v1", f"{server.address}/{repo}:v2")
    image_id = docker.image_id(f"{repo}:v1")
    docker("save", "--output", str(archive), f"{repo}:v1", f"{server.address}/{repo}:v2")
    run(server, "import", archive)
    assert wire.tags(repo) == ["v1", "v2"]
    pull_all(wire, repo, "v1")
    docker.remove_image(image_id)
    docker("pull", f"{server.address}/{repo}:v2")
    assert docker.image_id(f"{server.address}/{repo}:v2") == image_id
    assert docker.output_of(f"{server.address}/{repo}:v2") == f"hello from {repo}\n"


def test_docker_save_of_old_versions(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """An archive of a docker version before 25, which has no `index.json`, can be imported."""
    docker.load(small_image, f"{repo}:v1")
    docker("save", "--output", str(tmp_path / "saved.tar"), f"{repo}:v1")
    with tarfile.open(tmp_path / "saved.tar") as saved, tarfile.open(tmp_path / "old.tar", "w") as old:
        for member in saved:
            if member.name not in ("index.json", "oci-layout"):
                old.addfile(member, saved.extractfile(member) if member.isreg() else None)
    run(server, "import", tmp_path / "old.tar", "--as", f"{repo}:old")
    pull_all(wire, repo, "old")
    name = f"{server.address}/{repo}:old"
    image_id = docker.image_id(f"{repo}:v1")
    docker.remove_image(image_id)
    docker("pull", name)
    assert docker.image_id(name) == image_id


@pytest.mark.parametrize("form", ["oci", "oci-archive"])
def test_skopeo_reads_exports(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    tmp_path: Path,
    form: str,
) -> None:
    """skopeo copies an exported index with all its platforms to a registry without a change, although the export also
    has a signature of the index."""
    wire.push(repo, "v1", multi_platform)
    signature = artifact(multi_platform, repo, "application/vnd.test.signature")
    wire.push(repo, signature.digest, signature)
    path = tmp_path / ("x.tar" if form == "oci-archive" else "x")
    run(server, "export", f"{repo}:v1", "--to", path)
    tools.copy(f"{form}:{path}:v1", f"docker://{server.address}/{repo}-copy:v1", "--all")
    assert_same_image(wire, f"{repo}-copy", "v1", multi_platform)


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_import_of_skopeo_files(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
    form: str,
) -> None:
    """OCI layouts and archives that skopeo has written can be imported. In the OCI formats, the manifest keeps its
    bytes."""
    wire.push(repo, "v1", small_image)
    path = tmp_path / ("x" if form == "oci" else "x.tar")
    name = f"{repo}-copy:v1" if form == "docker-archive" else "v1"
    tools.copy(f"docker://{server.address}/{repo}:v1", f"{form}:{path}:{name}", exact=form != "docker-archive")
    run(server, "import", path, "--as", f"{repo}-copy")
    if form != "docker-archive":
        assert_same_image(wire, f"{repo}-copy", "v1", small_image)
    pull_all(wire, f"{repo}-copy", "v1")
    assert small_image.config is not None
    config = json.loads(wire.manifest(f"{repo}-copy", "v1").body)["config"]["digest"]
    assert json.loads(wire.blob(f"{repo}-copy", config))["rootfs"] == json.loads(small_image.config.body)["rootfs"]


def test_skopeo_reads_docker_archives(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """skopeo copies an exported docker-archive to the registry."""
    wire.push(repo, "v1", small_image)
    run(server, "export", f"{repo}:v1", "--to", tmp_path / "x.tar", "--format", "docker-archive")
    source = f"docker-archive:{tmp_path / 'x.tar'}:{repo}:v1"
    tools.copy(source, f"docker://{server.address}/{repo}-copy:v1", exact=False)
    pull_all(wire, f"{repo}-copy", "v1")
