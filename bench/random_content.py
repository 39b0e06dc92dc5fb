"""What the registries are filled with: bytes of no pattern, made anew in each run, and manifests of a usual size."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.loaders.http_client import BLOCK_SIZE, MANIFEST_TYPE

MIB = 1 << 20
SMALL_SIZE = 4096
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
MANIFEST_ACCEPT = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
"""As docker asks for a manifest."""


@dataclass(frozen=True)
class BlobContent:
    """Bytes with their digest, in memory or in a file."""

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


def blob_from_file(path: Path) -> BlobContent:
    with path.open("rb") as file:
        return BlobContent("sha256:" + hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size, path)


def write_random(path: Path, size: int) -> Path:
    """A file of random bytes."""
    with path.open("wb") as file:
        for start in range(0, size, BLOCK_SIZE):
            file.write(os.urandom(min(BLOCK_SIZE, size - start)))
    return path


def make_unique(path: Path) -> BlobContent:
    """Changes the first bytes of a file, so that it is content nobody has seen."""
    with path.open("r+b") as file:
        file.write(os.urandom(32))
    return blob_from_file(path)


def make_manifest(config: BlobContent, layers: Sequence[BlobContent], note: str = "") -> bytes:
    """An OCI manifest; another note makes it another one."""
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config.descriptor}
    document["layers"] = [layer.descriptor for layer in layers]
    if note:
        document["annotations"] = {"org.example.note": note}
    return json.dumps(document, separators=(",", ":")).encode()


def write_layer(folder: Path, name: str, size: int) -> BlobContent:
    """A layer that holds one file of random bytes; not compressed, so that a client's time goes into the transfer."""
    noise, path = write_random(folder / f"{name}.noise", size), folder / f"{name}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(noise, arcname=f"{name}.noise")
    noise.unlink()
    return blob_from_file(path)


def make_config(layers: Sequence[BlobContent]) -> BlobContent:
    """The config of an image that docker takes."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    return make_blob(json.dumps(document).encode(), CONFIG_TYPE)
