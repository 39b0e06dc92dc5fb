"""`entrepot inspect REF`."""

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


async def blob(registry: Registry, data: bytes, kind: str) -> dict[str, object]:
    writer = await registry.start_upload(REPO)
    await writer.write(data)
    await writer.commit(digest_of(data))
    return Descriptor(kind, digest_of(data), len(data)).as_json()


async def put(registry: Registry, kind: str, tags: list[str], **document: object) -> Manifest:
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
    manifest = Manifest.parse(body, kind)
    await registry.put_manifest(REPO, manifest, [Tag(tag) for tag in tags], by=Actor())
    return manifest


@pytest.fixture
async def pushed(tmp_path: Path) -> dict[str, Manifest]:
    """A server with an image for each of two platforms, an index of both as `latest` and `1`, and a signature of the
    first image."""
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as registry:
        made: dict[str, Manifest] = {}
        for arch in ("amd64", "arm64"):
            about = {"os": "linux", "architecture": arch, "created": "2026-01-02T03:04:05Z"}
            config = await blob(registry, json.dumps(about).encode(), CONFIG)
            layer = await blob(registry, arch.encode() * 1000, LAYER)
            made[arch] = await put(registry, OCI_MANIFEST, [arch], config=config, layers=[layer, layer])
        children = [
            {**made[arch].descriptor.as_json(), "platform": {"os": "linux", "architecture": arch}}
            for arch in ("amd64", "arm64")
        ]
        made["index"] = await put(
            registry, OCI_INDEX, ["latest", "1"], manifests=children, annotations={"org.example.note": "[bold]hi"}
        )
        empty = await blob(registry, b"{}", "application/vnd.oci.empty.v1+json")
        subject = {k: v for k, v in made["amd64"].descriptor.as_json().items() if k in ("mediaType", "digest", "size")}
        made["signature"] = await put(
            registry, OCI_MANIFEST, [],
            artifactType="application/vnd.example.signature", config=empty, layers=[empty], subject=subject,
        )  # fmt: skip
    return made


def inspect(folder: Path, reference: str) -> dict[str, Any]:
    done = entrepot("inspect", reference, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_index(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """Without a tag, the tag `latest` is shown. For an index, the command shows its platforms with their sizes, and all
    its tags."""
    seen = inspect(tmp_path, "team/app")
    assert seen["reference"] == "team/app:latest"
    assert seen["digest"] == pushed["index"].digest
    assert seen["tags"] == ["1", "latest"]
    assert [child["platform"] for child in seen["manifests"]] == ["linux/amd64", "linux/arm64"]
    assert all(child["total"] > 5000 for child in seen["manifests"])
    assert seen["annotations"] == {"org.example.note": "[bold]hi"}


def test_image(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For an image, the command shows its config, layers, platform and referrers. A layer that occurs twice counts
    once."""
    seen = inspect(tmp_path, f"team/app@{pushed['amd64'].digest}")
    assert (seen["platform"], seen["created"]) == ("linux/amd64", "2026-01-02T03:04:05Z")
    assert len(seen["layers"]) == 2
    assert seen["total"] == seen["config"]["size"] + seen["layers"][0]["size"]
    assert [found["digest"] for found in seen["referrers"]] == [pushed["signature"].digest]
    assert seen["tags"] == ["amd64"]


def test_artifact(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For an artifact, the command shows its type and its subject. It has no tag and no platform."""
    seen = inspect(tmp_path, f"team/app@{pushed['signature'].digest}")
    assert seen["artifactType"] == "application/vnd.example.signature"
    assert seen["subject"] == pushed["amd64"].digest
    assert (seen["tags"], seen["platform"]) == ([], None)


def test_for_people(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """The table has whole digests, and sizes with units. It has no colour codes outside a terminal. Text of the content
    is not interpreted as markup."""
    shown = entrepot("inspect", "team/app", folder=tmp_path).stdout
    assert pushed["index"].digest in shown
    assert pushed["arm64"].digest in shown
    assert "linux/arm64" in shown
    assert "KiB" in shown
    assert "org.example.note = [bold]hi" in shown
    assert "\x1b" not in shown
    shown = entrepot("inspect", "team/app:amd64", folder=tmp_path).stdout
    assert "layer 2" in shown
    assert f"1: application/vnd.example.signature {pushed['signature'].digest}" in shown


def test_unknown_reference(tmp_path: Path, pushed: dict[str, Manifest]) -> None:
    """For unknown tags and repositories and for invalid references, the error is one line."""
    for reference in ("team/app:none", "team/none", "Team/App", "team/app:", "team/app@sha256:abc"):
        error_line(entrepot("inspect", reference, folder=tmp_path), 1)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    """For a broken database file, the error is one line that names the file."""
    file = tmp_path / "data" / "entrepot.db"
    file.parent.mkdir()
    file.write_bytes(b"not a database" * 1000)
    said = error_line(entrepot("inspect", "team/app", folder=tmp_path), 1)
    assert f"{file} cannot be used: file is not a database" in said


def test_no_data_directory(tmp_path: Path) -> None:
    """The command creates neither a data directory nor files in a directory without a registry."""
    assert "no data directory" in error_line(entrepot("inspect", "a", folder=tmp_path), 1)
    (tmp_path / "data").mkdir()
    assert "holds no registry" in error_line(entrepot("inspect", "a", folder=tmp_path), 1)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "place"),
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
def test_references_people_paste(text: str, place: str) -> None:
    """A host with a port, or `localhost`, at the beginning of a reference is removed. Another first part with dots
    stays, because it may be part of a repository name."""
    assert str(parse_image_reference(text)) == place


def test_human_sizes() -> None:
    """Sizes have binary units; numbers below 1 KiB are in bytes."""
    assert [human_size(count) for count in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
