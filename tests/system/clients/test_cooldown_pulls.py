"""A test with skopeo and a mirror with a cooldown: the mirror serves a new digest of a tag only some days after the
upstream has it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

FIRST_IMAGE, SECOND_IMAGE = noise_image("first", 1000), noise_image("second", 2000)


def content_with(image: ImageTree, *tags: str) -> UpstreamContent:
    content = UpstreamContent()
    content.add("org/app", image, *tags)
    return content


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path, content_with(FIRST_IMAGE, "1")) as running:
        yield running


@pytest.fixture
def mirror(tmp_path: Path, upstream: Hub) -> Iterator[RegistryServer]:
    """Runs a mirror of two upstreams with the same content, both with a cooldown of 3 days. For `strict.test`, the
    mirror refuses new tags during the cooldown."""
    (tmp_path / "entrepot.toml").write_text(
        "".join(
            f'[[upstream]]\nname = "{name}"\nendpoints = ["{upstream.url}"]\ntag_ttl = "0s"\ncooldown = "3d"\n{more}\n'
            for name, more in (("far.test", ""), ("strict.test", 'cooldown_new = "refuse"'))
        )
    )
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as running:
        yield running


def copy_image(tools: ContainerTools, source: str, folder: Path) -> str:
    """Copies an image with all blobs to a new folder with skopeo, and returns its digest."""
    tools.skopeo("copy", "--src-tls-verify=false", "--preserve-digests", f"docker://{source}", f"dir:{folder}")
    return "sha256:" + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_skopeo(tools: ContainerTools, mirror: RegistryServer, upstream: Hub, tmp_path: Path) -> None:
    """After a tag has moved at the upstream, skopeo still gets the earlier image by tag, and the newer image by digest.
    By a tag that the mirror has never seen, skopeo gets the newer image, or the registry's error if the mirror refuses
    such tags during the cooldown."""
    name = f"{mirror.address}/far.test/org/app"
    assert copy_image(tools, f"{name}:1", tmp_path / "one") == FIRST_IMAGE.digest
    upstream.put(content_with(SECOND_IMAGE, "1", "2"))
    assert copy_image(tools, f"{name}:1", tmp_path / "two") == FIRST_IMAGE.digest
    assert copy_image(tools, f"{name}@{SECOND_IMAGE.digest}", tmp_path / "three") == SECOND_IMAGE.digest
    assert copy_image(tools, f"{name}:2", tmp_path / "four") == SECOND_IMAGE.digest
    strict = f"{mirror.address}/strict.test/org/app"
    refused = tools.skopeo.attempt("copy", "--src-tls-verify=false", f"docker://{strict}:1", f"dir:{tmp_path / 'five'}")
    assert refused.code != 0
    assert "the cooldown of 3d holds it back" in refused.err
    assert copy_image(tools, f"{strict}@{SECOND_IMAGE.digest}", tmp_path / "six") == SECOND_IMAGE.digest
