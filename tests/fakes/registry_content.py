"""Content for tests that call a `Registry` directly: functions that make manifests, and short functions that push and
read blobs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storage.content import (
    OCI_INDEX,
    OCI_MANIFEST,
    Actor,
    Descriptor,
    Manifest,
    Page,
    Span,
    digest_of,
)
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag

BY = Actor(name="tester", address="127.0.0.1")
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
NOWHERE = RepositoryName("never/pushed/to")
"""A repository that stays empty in all tests."""
_SUBJECT_SIZE = 7
"""The size of the subject that manifests state. Any number does, because no registry checks it."""


def descriptor_of(data: bytes, media_type: str = LAYER_TYPE, algorithm: str = "sha256") -> Descriptor:
    """Returns the descriptor of a blob with the bytes `data`."""
    return Descriptor(media_type, digest_of(data, algorithm), len(data))


def manifest_from(
    document: Mapping[str, object], media_type: str = OCI_MANIFEST, algorithm: str = "sha256"
) -> Manifest:
    body = json.dumps(document, indent=1).encode()
    return Manifest.parse(body, media_type, digest_of(body, algorithm))


def image_of(
    config: Descriptor,
    layers: Iterable[Descriptor] = (),
    *,
    subject: Digest | None = None,
    media_type: str = OCI_MANIFEST,
    algorithm: str = "sha256",
    **fields: object,
) -> Manifest:
    """Returns an image manifest. `fields`: further members of the document."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.as_json(),
        "layers": [layer.as_json() for layer in layers],
        **({"subject": Descriptor(OCI_MANIFEST, subject, _SUBJECT_SIZE).as_json()} if subject else {}),
        **fields,
    }
    return manifest_from(document, media_type, algorithm)


def index_of(
    children: Iterable[Descriptor],
    *,
    subject: Digest | None = None,
    media_type: str = OCI_INDEX,
    algorithm: str = "sha256",
    **fields: object,
) -> Manifest:
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "manifests": [child.as_json() for child in children],
        **({"subject": Descriptor(OCI_MANIFEST, subject, _SUBJECT_SIZE).as_json()} if subject else {}),
        **fields,
    }
    return manifest_from(document, media_type, algorithm)


async def push_blob(registry: Registry, repo: RepositoryName, data: bytes, algorithm: str = "sha256") -> Descriptor:
    """Pushes `data` in one session. Returns its descriptor with the media type of a layer."""
    writer = await registry.start_upload(repo, algorithm)
    await writer.write(data)
    await writer.commit(digest_of(data, algorithm))
    await writer.aclose()
    return descriptor_of(data, algorithm=algorithm)


async def push_image(
    registry: Registry, repo: RepositoryName, seed: str, *tags: str, subject: Digest | None = None, **fields: Any
) -> Manifest:
    """Pushes an image with a config and one layer. Different seeds give different bytes. `fields`: further members of
    the manifest."""
    config = await push_blob(registry, repo, json.dumps({"seed": seed}).encode())
    layer = await push_blob(registry, repo, f"layer of {seed}".encode())
    manifest = image_of(config, [layer], subject=subject, **fields)
    await registry.put_manifest(repo, manifest, [Tag(tag) for tag in tags], by=BY)
    return manifest


async def read_blob(registry: Registry, repo: RepositoryName, digest: Digest, span: Span | None = None) -> bytes:
    reader = await registry.open_blob(repo, digest, span)
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


async def all_tags(registry: Registry, repo: RepositoryName) -> list[str]:
    return list((await registry.tags(repo, None, 10_000)).items)


def names_of(page: Page[Descriptor]) -> list[Digest]:
    return [descriptor.digest for descriptor in page.items]


def in_bytes_order(texts: Sequence[str]) -> list[str]:
    return sorted(texts, key=lambda text: text.encode())
