"""What the registries are filled with: bytes of no pattern, made anew in each run, and manifests of a usual size."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.wire import BLOCK, MANIFEST_TYPE

MIB = 1 << 20
SMALL = 4096
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ACCEPT = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
"""As docker asks for a manifest."""


@dataclass(frozen=True)
class Blob:
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


def blob(body: bytes, media_type: str = LAYER_TYPE) -> Blob:
    return Blob(digest_of(body), len(body), body, media_type)


def file_blob(path: Path) -> Blob:
    with path.open("rb") as file:
        return Blob("sha256:" + hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size, path)


def write_noise(path: Path, size: int) -> Path:
    """A file of random bytes."""
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            file.write(os.urandom(min(BLOCK, size - start)))
    return path


def renew(path: Path) -> Blob:
    """Changes the first bytes of a file, so that it is content nobody has seen."""
    with path.open("r+b") as file:
        file.write(os.urandom(32))
    return file_blob(path)


def manifest(config: Blob, layers: Sequence[Blob], note: str = "") -> bytes:
    """An OCI manifest; another note makes it another one."""
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config.descriptor}
    document["layers"] = [layer.descriptor for layer in layers]
    if note:
        document["annotations"] = {"org.example.note": note}
    return json.dumps(document, separators=(",", ":")).encode()


def write_layer(folder: Path, name: str, size: int) -> Blob:
    """A layer that holds one file of random bytes; not compressed, so that a client's time goes into the transfer."""
    noise, path = write_noise(folder / f"{name}.noise", size), folder / f"{name}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(noise, arcname=f"{name}.noise")
    noise.unlink()
    return file_blob(path)


def config(layers: Sequence[Blob]) -> Blob:
    """The config of an image that docker takes."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    return blob(json.dumps(document).encode(), CONFIG_TYPE)
