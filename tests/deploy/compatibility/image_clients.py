"""The clients of images that the compatibility tests run: docker, the BuildKit in docker, podman, buildah, skopeo and
containerd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.compatibility.client_steps import (
    UBUNTU,
    UBUNTU_GREETING,
    ClientSite,
    CompatibleClient,
    image_steps,
    version_in,
)
from tests.fakes.client_images import ClientImage, image, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.containerd_daemon import running_containerd
from tests.fakes.clients.mirror_clients import docker_for, tools_for
from tests.fakes.clients.registry_client import pull_all


@contextlib.contextmanager
def docker(site: ClientSite) -> Iterator[CompatibleClient]:
    with docker_for(site.mirror, site.folder) as engine:

        def push(image: ClientImage, name: str) -> None:
            engine.load(image, name)
            engine("push", name)
            engine.remove_image(name)

        def pull(image: ClientImage, name: str) -> None:
            engine("pull", name)
            assert image.config is not None
            assert engine.image_id(name) == image.config.digest

        def pull_mirrored() -> None:
            engine("pull", UBUNTU)
            assert engine.output_of(UBUNTU) == UBUNTU_GREETING

        version = engine("version", "--format", "{{.Server.Version}}").out
        yield CompatibleClient(version_in(version), image_steps(site, "docker", push, pull, pull_mirrored))


@contextlib.contextmanager
def buildkit(site: ClientSite) -> Iterator[CompatibleClient]:
    """Yields the client `docker build`: the BuildKit inside dockerd. BuildKit pulls the base image of a build. docker
    pushes the built image."""
    with docker_for(site.mirror, site.folder) as engine:
        build = engine.call.with_variables(DOCKER_BUILDKIT="1")

        def built_on(base: str, name: str) -> str:
            """Builds an image on `base` that copies the greeting of the base image. Returns the copied greeting."""
            folder = site.new_folder()
            (folder / "Dockerfile").write_text(f"FROM {base}\nRUN cat /greeting > /copy\n")
            build("build", "--network", "host", "--tag", name, str(folder))
            return engine.output_of(name, "/bin/cat", "/copy")

        def push() -> None:
            engine.load(image("pushed by BuildKit"), "base:1")
            name = f"{site.server.address}/buildkit/pushed:1"
            built_on("base:1", name)
            engine("push", name)
            pull_all(site.wire, "buildkit/pushed", "1")

        def pull() -> None:
            site.wire.push("buildkit/pulled", "1", image("pulled by BuildKit"))
            greeting = built_on(f"{site.server.address}/buildkit/pulled:1", "pulled:1")
            assert greeting == "pulled by BuildKit\n"

        def pull_mirrored() -> None:
            assert built_on(UBUNTU, "mirrored:1") == UBUNTU_GREETING

        version = version_in(engine("version", "--format", "{{.Server.Version}}").out)
        yield CompatibleClient(f"in docker {version}", {"push": push, "pull": pull, "mirror": pull_mirrored})


@contextlib.contextmanager
def podman(site: ClientSite) -> Iterator[CompatibleClient]:
    tools = tools_for(site.mirror, site.upstreams, site.folder)

    def push(image: ClientImage, name: str) -> None:
        image_id = _import_image(tools, image, site.new_folder())
        tools.podman("push", INSECURE, image_id, f"docker://{name}")
        tools.podman("rmi", "--force", image_id)

    def pull(image: ClientImage, name: str) -> None:
        tools.podman("pull", "--quiet", INSECURE, name)
        assert image.config is not None
        assert tools.image_id(name) == image.config.digest

    def pull_mirrored() -> None:
        tools.podman("pull", "--quiet", f"docker.io/library/{UBUNTU}")
        assert tools.output_of(f"docker.io/library/{UBUNTU}") == UBUNTU_GREETING

    yield CompatibleClient(
        version_in(tools.podman("--version").out), image_steps(site, "podman", push, pull, pull_mirrored)
    )


@contextlib.contextmanager
def buildah(site: ClientSite) -> Iterator[CompatibleClient]:
    tools = tools_for(site.mirror, site.upstreams, site.folder)

    def push(image: ClientImage, name: str) -> None:
        image_id = _import_image(tools, image, site.new_folder())
        tools.buildah("push", INSECURE, image_id, f"docker://{name}")
        tools.buildah("rmi", "--force", image_id)

    def pull(image: ClientImage, name: str) -> None:
        assert image.config is not None
        pulled = tools.buildah("pull", "--quiet", INSECURE, name).out.split()[-1]
        assert f"sha256:{pulled}" == image.config.digest

    def pull_mirrored() -> None:
        container = tools.buildah("from", "--quiet", f"docker.io/library/{UBUNTU}").out.split()[-1]
        mounted = Path(tools.buildah("mount", container).out.strip())
        assert (mounted / "greeting").read_text() == UBUNTU_GREETING

    yield CompatibleClient(
        version_in(tools.buildah("--version").out), image_steps(site, "buildah", push, pull, pull_mirrored)
    )


@contextlib.contextmanager
def skopeo(site: ClientSite) -> Iterator[CompatibleClient]:
    tools = tools_for(site.mirror, site.upstreams, site.folder)

    def push(image: ClientImage, name: str) -> None:
        layout = write_layout(site.new_folder(), {"x": image})
        tools.copy(f"oci:{layout}:x", f"docker://{name}")

    def pull(image: ClientImage, name: str) -> None:
        target = site.new_folder() / "pulled"
        tools.copy(f"docker://{name}", f"dir:{target}")
        assert (target / "manifest.json").read_bytes() == image.manifest.body
        for digest, blob in image.blobs.items():
            assert (target / digest.partition(":")[2]).read_bytes() == blob.body

    def pull_mirrored() -> None:
        target = site.new_folder() / "mirrored"
        tools.skopeo("copy", "--quiet", "--all", f"docker://docker.io/library/{UBUNTU}", f"dir:{target}")
        repository = site.upstreams.hub.content.repositories["library/ubuntu"]
        assert (target / "manifest.json").read_bytes() == repository.manifests[repository.tags["18.04"]][0]

    yield CompatibleClient(
        version_in(tools.skopeo("--version").out), image_steps(site, "skopeo", push, pull, pull_mirrored)
    )


@contextlib.contextmanager
def containerd(site: ClientSite) -> Iterator[CompatibleClient]:
    with running_containerd(site.new_folder()) as ctr:

        def push(image: ClientImage, name: str) -> None:
            ctr.load(image, name, site.new_folder() / "layout")
            ctr.push(name, name)
            ctr.forget(name)

        def pull(image: ClientImage, name: str) -> None:
            ctr.pull(name)
            assert ctr.has_same_bytes(image)

        def pull_mirrored() -> None:
            certs = site.new_folder()
            (certs / "docker.io").mkdir()
            hosts = site.upstreams.client_settings(site.mirror, "containerd", "--upstream", "docker.io")
            (certs / "docker.io" / "hosts.toml").write_text(hosts)
            options = ("--hosts-dir", str(certs), "--snapshotter", "native")
            ctr("images", "pull", *options, f"docker.io/library/{UBUNTU}")

        yield CompatibleClient(
            version_in(ctr("version").out), image_steps(site, "containerd", push, pull, pull_mirrored)
        )


def _import_image(tools: ContainerTools, image: ClientImage, folder: Path) -> str:
    """Imports an image into the storage of podman and buildah without a registry, and returns its id."""
    return tools.podman("pull", "--quiet", f"oci:{write_layout(folder, {'x': image})}:x").out.split()[-1]
