"""Makes images for real container clients. Their layers have busybox and bytes that cannot be compressed. Tests know
all bytes of an image before a client pushes or pulls it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import zstandard

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "echo", "ls", "sha256sum")
CREATED = "2026-01-01T00:00:00Z"
MIB = 1 << 20


@dataclass(frozen=True)
class ImagePart:
    """The bytes of a manifest, config or layer, with their media type."""

    body: bytes = field(repr=False)
    media_type: str
    tar: bytes = field(default=b"", repr=False)  # a layer's uncompressed form

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    def descriptor(self, **extra: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.body), **extra}


@dataclass(frozen=True)
class ClientImage:
    """A manifest or an index, with all manifests, configs and layers to which it refers."""

    manifest: ImagePart
    config: ImagePart | None = None
    layers: tuple[ImagePart, ...] = ()
    children: tuple[ClientImage, ...] = ()

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def manifests(self) -> dict[str, ImagePart]:
        """This manifest and all manifests below it, by digest. This manifest is the last one."""
        found = {digest: content for child in self.children for digest, content in child.manifests.items()}
        return {**found, self.digest: self.manifest}

    @property
    def blobs(self) -> dict[str, ImagePart]:
        """The config and the layers of this manifest and of all manifests below it, by digest."""
        own_parts = [*([self.config] if self.config else []), *self.layers]
        found = {digest: content for child in self.children for digest, content in child.blobs.items()}
        return {**found, **{content.digest: content for content in own_parts}}


def digest_of(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def noise(seed: str, size: int) -> bytes:
    """Returns bytes that cannot be compressed and are the same in every run."""
    return random.Random(seed).randbytes(size)


def layer(files: Mapping[str, bytes], media_type: str = OCI_LAYER_GZIP) -> ImagePart:
    """Returns a layer with `files`. The same files always give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(body), 0o755
            tar.addfile(entry, io.BytesIO(body))
    return _compressed(packed.getvalue(), media_type)


@cache
def rootfs(media_type: str = OCI_LAYER_GZIP) -> ImagePart:
    """Returns a layer with a root filesystem that can run commands: a static busybox, and links to it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("bin")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        body = BUSYBOX.read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(body), 0o755
        tar.addfile(entry, io.BytesIO(body))
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return _compressed(packed.getvalue(), media_type)


def image(
    greeting: str,
    *more: ImagePart,
    architecture: str = "amd64",
    media_type: str = OCI_MANIFEST,
    layer_type: str = OCI_LAYER_GZIP,
) -> ClientImage:
    """Returns an image whose container prints the greeting. The layer with the greeting has a few hundred bytes.
    `more`: further layers."""
    layers = (rootfs(layer_type), layer({"greeting": f"{greeting}\n".encode()}, layer_type), *more)
    config_type = DOCKER_CONFIG if media_type == DOCKER_MANIFEST else OCI_CONFIG
    config = ImagePart(
        _json(
            {
                "architecture": architecture,
                "os": "linux",
                "created": CREATED,
                "config": {"Cmd": ["/bin/cat", "/greeting"], "Env": ["PATH=/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [digest_of(each.tar) for each in layers]},
                "history": [{"created": CREATED, "created_by": "tests"} for _ in layers],
            }
        ),
        config_type,
    )
    return ClientImage(_manifest(config, layers, media_type), config, layers)


def index(*children: tuple[ClientImage, str]) -> ClientImage:
    """Returns an OCI index. `children`: pairs of an image and its architecture."""
    entries = [
        child.manifest.descriptor(platform={"architecture": architecture, "os": "linux"})
        for child, architecture in children
    ]
    body = _json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    return ClientImage(ImagePart(body, OCI_INDEX), children=tuple(child for child, _ in children))


def artifact(subject: ClientImage, text: str, artifact_type: str) -> ClientImage:
    """Returns an OCI artifact with an empty config, one blob, annotations and a subject."""
    config = ImagePart(b"{}", OCI_EMPTY)
    blob = ImagePart(text.encode(), "text/plain")
    extra = {
        "artifactType": artifact_type,
        "subject": subject.manifest.descriptor(),
        "annotations": {"org.example.note": text},
    }
    return ClientImage(_manifest(config, (blob,), OCI_MANIFEST, extra), config, (blob,))


def write_layout(folder: Path, images: Mapping[str, ClientImage]) -> Path:
    """Writes an OCI image layout with each image under its tag. skopeo reads it as `oci:folder:tag`."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for each in images.values():
        for digest, content in (each.blobs | each.manifests).items():
            (blobs / digest.partition(":")[2]).write_bytes(content.body)
    entries = [
        each.manifest.descriptor(annotations={"org.opencontainers.image.ref.name": tag}) for tag, each in images.items()
    ]
    (folder / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": entries}))
    (folder / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return folder


def write_dir(folder: Path, client_image: ClientImage) -> Path:
    """Writes skopeo's format `dir:`, which keeps a manifest of any media type without changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for digest, content in client_image.blobs.items():
        (folder / digest.partition(":")[2]).write_bytes(content.body)
    (folder / "manifest.json").write_bytes(client_image.manifest.body)
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    return folder


def write_archive(path: Path, client_image: ClientImage, name: str) -> Path:
    """Writes an archive for `docker load` that gives the image the name `name`."""
    assert client_image.config is not None
    members = {f"{client_image.config.digest.partition(':')[2]}.json": client_image.config.body}
    names = []
    for each in client_image.layers:
        names.append(f"{digest_of(each.tar).partition(':')[2]}/layer.tar")
        members[names[-1]] = each.tar
    members["manifest.json"] = _json([{"Config": next(iter(members)), "RepoTags": [name], "Layers": names}])
    with tarfile.open(path, mode="w") as tar:
        for member, body in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return path


def digests_in(body: bytes) -> Iterator[tuple[str, int, bool]]:
    """Yields every digest to which a manifest refers, except its subject, with the size of the content, and whether the
    content is a manifest."""
    document = json.loads(body)
    for entry in document.get("manifests", []):
        yield entry["digest"], entry["size"], True
    for entry in [*([document["config"]] if "config" in document else []), *document.get("layers", [])]:
        yield entry["digest"], entry["size"], False


def _manifest(
    config: ImagePart, layers: tuple[ImagePart, ...], media_type: str, extra: Mapping[str, Any] | None = None
) -> ImagePart:
    document = {"schemaVersion": 2, "mediaType": media_type, "config": config.descriptor()}
    document["layers"] = [each.descriptor() for each in layers]
    return ImagePart(_json({**document, **(extra or {})}), media_type)


def _compressed(tar: bytes, media_type: str) -> ImagePart:
    if media_type == OCI_LAYER_ZSTD:
        return ImagePart(zstandard.ZstdCompressor(level=1).compress(tar), media_type, tar)
    # Large layers have random bytes. Compressing them would take seconds and make them no smaller.
    level = 0 if len(tar) > 4 * MIB else 6
    return ImagePart(gzip.compress(tar, compresslevel=level, mtime=0), media_type, tar)


def _json(value: Any) -> bytes:
    # Indented on purpose: if a registry or a client parses and rewrites the JSON, the bytes change, and tests fail.
    return json.dumps(value, indent=3).encode()
