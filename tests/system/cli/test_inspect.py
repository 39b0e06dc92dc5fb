"""Tests of `entrepot inspect`, which shows an image of the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.cli.inspect_command import parse_image_reference
from registry.cli.output import human_size
from storage.composition import open_registry, prepare_data_dir
from storage.content import OCI_INDEX, OCI_MANIFEST, Actor, Descriptor, Manifest, digest_of
from storage.interface import Registry
from storage.names import RepositoryName, Tag
from tests.fakes.commands import entrepot, error_line

REPO = RepositoryName("team/app")
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


async def push_blob(registry: Registry, data: bytes, kind: str) -> dict[str, object]:
    """Pushes a blob. Returns its descriptor."""
    writer = await registry.start_upload(REPO)
    await writer.write(data)
    await writer.commit(digest_of(data))
    return Descriptor(kind, digest_of(data), len(data)).as_json()


async def push_manifest(registry: Registry, kind: str, tags: list[str], **document: object) -> Manifest:
    """Pushes a manifest with these fields under the tags."""
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
    manifest = Manifest.parse(body, kind)
    await registry.put_manifest(REPO, manifest, [Tag(tag) for tag in tags], by=Actor())
    return manifest


@pytest.fixture
async def pushed(tmp_path: Path) -> dict[str, Manifest]:
    """Makes a data directory with an image for each of two platforms, an index of both images with the tags `latest`
    and `1`, and a signature of the first image. Returns the manifests."""
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as registry:
        manifests: dict[str, Manifest] = {}
        for arch in ("amd64", "arm64"):
            about = {"os": "linux", "architecture": arch, "created": "2026-01-02T03:04:05Z"}
            config = await push_blob(registry, json.dumps(about).encode(), CONFIG)
            layer = await push_blob(registry, arch.encode() * 1000, LAYER)
            manifests[arch] = await push_manifest(registry, OCI_MANIFEST, [arch], config=config, layers=[layer, layer])
        children = [
            {**manifests[arch].descriptor.as_json(), "platform": {"os": "linux", "architecture": arch}}
            for arch in ("amd64", "arm64")
        ]
        manifests["index"] = await push_manifest(
            registry, OCI_INDEX, ["latest", "1"], manifests=children, annotations={"org.example.note": "[bold]hi"}
        )
        empty = await push_blob(registry, b"{}", "application/vnd.oci.empty.v1+json")
        subject = {
            k: v for k, v in manifests["amd64"].descriptor.as_json().items() if k in ("mediaType", "digest", "size")
        }
        manifests["signature"] = await push_manifest(
            registry, OCI_MANIFEST, [],
            artifactType="application/vnd.example.signature", config=empty, layers=[empty], subject=subject,
        )  # fmt: skip
    return manifests


def inspect(folder: Path, reference: str) -> dict[str, Any]:
    """Returns the JSON output of the command."""
    result = entrepot("inspect", reference, "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_index(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """A reference without a tag means the tag `latest`. For an index, the command shows all its tags, and its platforms
    with their sizes."""
    output = inspect(tmp_path, "team/app")
    assert output["reference"] == "team/app:latest"
    assert output["digest"] == pushed["index"].digest
    assert output["tags"] == ["1", "latest"]
    assert [child["platform"] for child in output["manifests"]] == ["linux/amd64", "linux/arm64"]
    assert all(child["total"] > 5000 for child in output["manifests"])
    assert output["annotations"] == {"org.example.note": "[bold]hi"}


def test_image(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For an image, the command shows its config, layers, platform and referrers. In the total size, a layer that
    occurs twice counts once."""
    output = inspect(tmp_path, f"team/app@{pushed['amd64'].digest}")
    assert (output["platform"], output["created"]) == ("linux/amd64", "2026-01-02T03:04:05Z")
    assert len(output["layers"]) == 2
    assert output["total"] == output["config"]["size"] + output["layers"][0]["size"]
    assert [found["digest"] for found in output["referrers"]] == [pushed["signature"].digest]
    assert output["tags"] == ["amd64"]


def test_artifact(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For an artifact, the command shows its type and its subject. It has no tag and no platform."""
    output = inspect(tmp_path, f"team/app@{pushed['signature'].digest}")
    assert output["artifactType"] == "application/vnd.example.signature"
    assert output["subject"] == pushed["amd64"].digest
    assert (output["tags"], output["platform"]) == ([], None)


def test_table_without_json(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """Without --json, the command prints a table with complete digests and with sizes with units. The table has no
    colour codes outside a terminal. Markup in annotations is printed as it is."""
    table = entrepot("inspect", "team/app", folder=tmp_path).stdout
    assert pushed["index"].digest in table
    assert pushed["arm64"].digest in table
    assert "linux/arm64" in table
    assert "KiB" in table
    assert "org.example.note = [bold]hi" in table
    assert "\x1b" not in table
    table = entrepot("inspect", "team/app:amd64", folder=tmp_path).stdout
    assert "layer 2" in table
    assert f"1: application/vnd.example.signature {pushed['signature'].digest}" in table


async def test_image_cannot_control_the_terminal(tmp_path: Path) -> None:
    """In place of control characters in the config and in the annotations of an image, the command prints `?` in the
    table, and escapes in JSON. So an image cannot move the cursor, change the title of the window or write to the
    clipboard."""
    prepare_data_dir(tmp_path / "data")
    texts = {"os": "linux\x1b]0;pwned\x07", "architecture": "a\x9b2J", "created": "\x1b[2J\x1b[1;1Htag v1 is safe"}
    annotation = "x\x1b]52;c;cm0=\x1b\\ y\x9b2J\x7f"
    async with open_registry(tmp_path / "data") as registry:
        config = await push_blob(registry, json.dumps(texts).encode(), CONFIG)
        await push_manifest(
            registry, OCI_MANIFEST, ["v1"], config=config, layers=[], annotations={"note\x1b[31m": annotation}
        )
    table = entrepot("inspect", "team/app:v1", folder=tmp_path).stdout
    assert table.replace("\n", "").isprintable()
    assert "linux?]0;pwned" in table
    assert "note?[31m = x?]52;c;cm0=?\\ y?2J?" in table
    output = entrepot("inspect", "team/app:v1", "--json", folder=tmp_path).stdout
    assert output.replace("\n", "").isprintable()
    assert json.loads(output)["annotations"] == {"note\x1b[31m": annotation}


def test_unknown_reference(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For unknown tags and repositories and for invalid references, the error is one line."""
    for reference in ("team/app:none", "team/none", "Team/App", "team/app:", "team/app@sha256:abc"):
        error_line(entrepot("inspect", reference, folder=tmp_path), 1)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    """If the database file is not a database, the error is one line that names the file."""
    file = tmp_path / "data" / "entrepot.db"
    file.parent.mkdir()
    file.write_bytes(b"not a database" * 1000)
    error = error_line(entrepot("inspect", "team/app", folder=tmp_path), 1)
    assert f"{file} cannot be used: file is not a database" in error


def test_no_data_directory(tmp_path: Path) -> None:
    """Without a data directory, or with an empty one, the command fails and creates no file."""
    assert "no data directory" in error_line(entrepot("inspect", "a", folder=tmp_path), 1)
    (tmp_path / "data").mkdir()
    assert "holds no registry" in error_line(entrepot("inspect", "a", folder=tmp_path), 1)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("ubuntu", "ubuntu:latest"),
        ("localhost/a/b", "a/b:latest"),
        ("localhost:5000/a:1", "a:1"),
        ("127.0.0.1:5000/team/app", "team/app:latest"),
        ("[::1]:5000/team/app:2", "team/app:2"),
        ("http://localhost:5000/a", "a:latest"),
        ("team/app:1", "team/app:1"),
        ("registry.example.com/app", "registry.example.com/app:latest"),
        (f"localhost:5000/a:1@sha256:{'0' * 64}", f"a@sha256:{'0' * 64}"),
    ],
)
def test_host_is_removed_from_references(text: str, reference: str) -> None:
    """The command removes a host with a port, or `localhost`, from the beginning of a reference. It keeps another first
    part with dots, because this may be part of a repository name."""
    assert str(parse_image_reference(text)) == reference


def test_human_sizes() -> None:
    """Sizes have binary units. Sizes below 1 KiB are in bytes."""
    assert [human_size(count) for count in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
