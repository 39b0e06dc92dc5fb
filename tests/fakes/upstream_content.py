"""Content for the upstreams of tests: blobs, manifests and tags with the same bytes in every run.

`UpstreamContent.add(repo, tree, *tags)` adds the `ImageTree` `tree` to a repository. An `ImageTree` is a manifest with
all manifests and blobs to which it refers. `noise_image` makes an image with layers of any size, for clients that do
not unpack layers; `index_of` makes an index; `image_tree_of` makes a tree from a real image of
tests/fakes/client_images.py; `ubuntu` makes an image that docker can run. Noise (random bytes) takes no memory: even 2
GiB are stored as a seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from tests.fakes.client_images import (
    CREATED,
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MIB,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    ClientImage,
    digest_of,
    image,
)

PERIOD = (1 << 23) - 15
"""Noise repeats after this many bytes. This is a prime number, so that a piece at a wrong offset has wrong bytes."""
PIECE = MIB


@lru_cache(maxsize=16)
def _ring(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@cache
def _noise_digest(seed: str, size: int) -> str:
    total = hashlib.sha256()
    for piece in Noise(seed, size).pieces(0, size):
        total.update(piece)
    return "sha256:" + total.hexdigest()


@dataclass(frozen=True)
class Noise:
    """Random bytes, which are generated from the seed when they are read."""

    seed: str
    size: int

    @property
    def digest(self) -> str:
        """The digest of the bytes. It is computed only once per process."""
        return _noise_digest(self.seed, self.size)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yields the bytes from `start` to `stop` in views of at most 1 MiB, without a copy."""
        ring = memoryview(_ring(self.seed, min(self.size, PERIOD)))
        while start < stop:
            first = start % PERIOD
            piece = ring[first : min(first + PIECE, first + stop - start)]
            yield piece
            start += len(piece)

    def read(self, start: int, stop: int) -> bytes:
        return b"".join(self.pieces(start, stop))


@dataclass(frozen=True)
class UpstreamBlob:
    """A config or a layer."""

    body: bytes | Noise = field(repr=False)
    media_type: str

    @cached_property
    def digest(self) -> str:
        return digest_of(self.body) if isinstance(self.body, bytes) else self.body.digest

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.size

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Returns the bytes from `start` to `stop`, or to the end."""
        stop = self.size if stop is None else stop
        return self.body[start:stop] if isinstance(self.body, bytes) else self.body.read(start, stop)

    def descriptor(self, **extra: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **extra}


@dataclass(frozen=True)
class ImageTree:
    """A manifest or an index with everything that it refers to."""

    body: bytes = field(repr=False)
    media_type: str
    blobs: Mapping[str, UpstreamBlob] = field(default_factory=dict, repr=False)
    """The blobs of the manifest and of its children, by digest."""
    children: tuple[ImageTree, ...] = ()

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def layers(self) -> list[UpstreamBlob]:
        """The layers, in the order of the manifest. An index has none."""
        return [self.blobs[each["digest"]] for each in json.loads(self.body).get("layers", [])]

    @property
    def config(self) -> UpstreamBlob:
        return self.blobs[json.loads(self.body)["config"]["digest"]]

    @property
    def manifests(self) -> dict[str, tuple[bytes, str]]:
        """The body and the media type of this manifest and of all manifests below it, by digest. This manifest is the
        last one."""
        found = {digest: pair for child in self.children for digest, pair in child.manifests.items()}
        return {**found, self.digest: (self.body, self.media_type)}

    def descriptor(self, **extra: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.body), **extra}


@dataclass
class UpstreamRepository:
    """The content of one repository."""

    blobs: dict[str, UpstreamBlob] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Body and media type by digest."""
    tags: dict[str, str] = field(default_factory=dict)
    """The digest of the manifest, by tag."""


@dataclass
class UpstreamContent:
    """All content of an upstream."""

    repositories: dict[str, UpstreamRepository] = field(default_factory=dict)

    def add(self, repo: str, tree: ImageTree, *tags: str) -> ImageTree:
        """Adds the image tree `tree` to `repo`, makes the tags point at its manifest, and returns the tree."""
        repository = self.repositories.setdefault(repo, UpstreamRepository())
        repository.blobs.update(tree.blobs)
        repository.manifests.update(tree.manifests)
        repository.tags.update(dict.fromkeys(tags, tree.digest))
        return tree

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the bytes of all content into files in `folder`. Returns a JSON document with which the fake Hub finds
        the content."""
        folder.mkdir(parents=True, exist_ok=True)
        blobs: dict[str, Any] = {}
        repositories: dict[str, Any] = {}
        for name, repository in self.repositories.items():
            for digest, blob in repository.blobs.items():
                is_noise = isinstance(blob.body, Noise)
                blobs[digest] = [blob.body.seed, blob.body.size] if isinstance(blob.body, Noise) else digest
                if not is_noise:
                    _write(folder / _file_name(digest), blob.read())
            for digest, (body, _) in repository.manifests.items():
                _write(folder / _file_name(digest), body)
            repositories[name] = {
                "blobs": list(repository.blobs),
                "manifests": {digest: media_type for digest, (_, media_type) in repository.manifests.items()},
                "tags": repository.tags,
            }
        return {"folder": str(folder), "blobs": blobs, "repositories": repositories}


def _file_name(digest: str) -> str:
    return digest.replace(":", "-")


def _write(path: Path, body: bytes) -> None:
    if not path.exists():  # a running fake Hub may have mapped the existing file
        path.write_bytes(body)


def noise_blob(seed: str, size: int, media_type: str = OCI_LAYER_GZIP) -> UpstreamBlob:
    """Returns a layer of random bytes. Clients cannot unpack it."""
    return UpstreamBlob(Noise(seed, size), media_type)


def noise_image(
    seed: str,
    *sizes: int,
    docker: bool = False,
    architecture: str = "amd64",
    subject: ImageTree | None = None,
    annotations: Mapping[str, str] | None = None,
) -> ImageTree:
    """Returns an image with a small config and layers of these sizes. The bytes differ for each seed."""
    layers = [
        noise_blob(f"{seed} {number}", size, DOCKER_LAYER if docker else OCI_LAYER_GZIP)
        for number, size in enumerate(sizes)
    ]
    document = {
        "architecture": architecture,
        "os": "linux",
        "created": CREATED,
        "config": {"Labels": {"seed": seed}},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    config = UpstreamBlob(_json(document), DOCKER_CONFIG if docker else OCI_CONFIG)
    return manifest_of(config, *layers, docker=docker, subject=subject, annotations=annotations)


def manifest_of(
    config: UpstreamBlob,
    *layers: UpstreamBlob,
    docker: bool = False,
    artifact_type: str | None = None,
    subject: ImageTree | None = None,
    annotations: Mapping[str, str] | None = None,
) -> ImageTree:
    """Returns an image manifest in the format of docker or of OCI."""
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type}
    if artifact_type:
        document["artifactType"] = artifact_type
    document |= {"config": config.descriptor(), "layers": [layer.descriptor() for layer in layers]}
    if subject:
        document["subject"] = subject.descriptor()
    if annotations:
        document["annotations"] = dict(annotations)
    return ImageTree(_json(document), media_type, {blob.digest: blob for blob in (config, *layers)})


def index_of(*children: tuple[ImageTree, str], docker: bool = False) -> ImageTree:
    """Returns an OCI index or a docker manifest list. `children`: pairs of an image and its architecture."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    entries = [
        child.descriptor(platform={"architecture": architecture, "os": "linux"}) for child, architecture in children
    ]
    return _index(media_type, entries, tuple(child for child, _ in children))


def fallback_index(*referrers: ImageTree) -> ImageTree:
    """Returns the index that clients store at the fallback tag (`fallback_tag`) in a registry without the referrers API
    (spec: Referrers Tag Schema)."""
    return _index(OCI_INDEX, [referrer_descriptor(each.body, each.media_type) for each in referrers], referrers)


def fallback_tag(digest: str) -> str:
    """Returns the tag under which clients list the referrers of `digest` if there is no referrers API."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm[:32]}-{encoded[:64]}"


def referrer_descriptor(body: bytes, media_type: str) -> dict[str, Any]:
    """Returns the descriptor that a list of referrers has for this manifest (spec: Listing Referrers)."""
    document = json.loads(body)
    found = {"mediaType": media_type, "digest": digest_of(body), "size": len(body)}
    artifact_type = document.get("artifactType") or document.get("config", {}).get("mediaType")
    found |= {"artifactType": artifact_type} if artifact_type else {}
    return found | ({"annotations": document["annotations"]} if "annotations" in document else {})


def image_tree_of(real: ClientImage) -> ImageTree:
    """Returns the tree of an image of tests/fakes/client_images.py."""
    blobs = {digest: UpstreamBlob(content.body, content.media_type) for digest, content in real.blobs.items()}
    children = tuple(image_tree_of(child) for child in real.children)
    return ImageTree(real.manifest.body, real.manifest.media_type, blobs, children)


def ubuntu(greeting: str = "bionic") -> ImageTree:
    """Returns a substitute for ubuntu:18.04: a docker manifest list with images for two platforms. docker can run them.
    They print a greeting."""
    children = []
    for architecture in ("amd64", "arm64"):
        real = image(
            f"{greeting} {architecture}",
            architecture=architecture,
            media_type=DOCKER_MANIFEST,
            layer_type=DOCKER_LAYER,
        )
        children.append((image_tree_of(real), architecture))
    return index_of(*children, docker=True)


def _index(media_type: str, entries: list[dict[str, Any]], children: tuple[ImageTree, ...]) -> ImageTree:
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    blobs = {digest: blob for child in children for digest, blob in child.blobs.items()}
    return ImageTree(_json(document), media_type, blobs, children)


def _json(value: Any) -> bytes:
    # Indented on purpose: if a mirror parses and rewrites the JSON, the bytes change, and tests fail.
    return json.dumps(value, indent=3).encode()
