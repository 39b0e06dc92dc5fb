"""The content with which the benchmarks fill the registries: small valid images, and layers of random bytes that differ
in each run."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.loaders.http_client import BLOCK_SIZE, MANIFEST_TYPE, HttpClient

MIB, GIB = 1 << 20, 1 << 30
SMALL_SIZE = 4096  # bytes
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class BlobContent:
    """A blob in memory or in a file."""

    digest: str
    size: int
    content: bytes | Path
    media_type: str = LAYER_TYPE

    @property
    def descriptor(self) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


def digest_of(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def make_blob(body: bytes, media_type: str = LAYER_TYPE) -> BlobContent:
    return BlobContent(digest_of(body), len(body), body, media_type)


def small_layers(count: int) -> tuple[BlobContent, ...]:
    """Returns `count` random layers of 4 KiB."""
    return tuple(make_blob(os.urandom(SMALL_SIZE)) for _ in range(count))


def blob_from_file(path: Path) -> BlobContent:
    with path.open("rb") as file:
        return BlobContent("sha256:" + hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size, path)


def write_random(path: Path, size: int) -> Path:
    """Writes a file of random bytes."""
    with path.open("wb") as file:
        for start in range(0, size, BLOCK_SIZE):
            file.write(os.urandom(min(BLOCK_SIZE, size - start)))
    return path


def make_unique(path: Path) -> BlobContent:
    """Changes the first bytes of a file, so that no registry has its content."""
    with path.open("r+b") as file:
        file.write(os.urandom(32))
    return blob_from_file(path)


def write_tar_layer(folder: Path, name: str, size: int) -> BlobContent:
    """Writes a layer that docker can unpack: a tar archive with one file of random bytes. It is not compressed, so that
    a client spends most of its time on the transfer."""
    noise, path = write_random(folder / f"{name}.noise", size), folder / f"{name}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(noise, arcname=f"{name}.noise")
    noise.unlink()
    return blob_from_file(path)


def make_config(layers: Sequence[BlobContent]) -> BlobContent:
    """Returns the config of an image that docker accepts."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    return make_blob(json.dumps(document).encode(), CONFIG_TYPE)


def make_manifest(config: BlobContent, layers: Sequence[BlobContent], note: str = "") -> bytes:
    """Returns an OCI manifest. `note`: the text of an annotation; manifests that differ only in their note have
    different digests."""
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config.descriptor}
    document["layers"] = [layer.descriptor for layer in layers]
    if note:
        document["annotations"] = {"org.example.note": note}
    return json.dumps(document, separators=(",", ":")).encode()


def push_content(
    client: HttpClient, repo: str, tag: str, config: BlobContent, layers: Sequence[BlobContent], note: str = ""
) -> bytes:
    """Pushes an image and returns its manifest. Raises TrialFailed."""
    for blob in (config, *layers):
        client.push_blob(repo, blob.digest, blob.content)
    body = make_manifest(config, layers, note)
    client.put_manifest(repo, tag, body)
    return body
