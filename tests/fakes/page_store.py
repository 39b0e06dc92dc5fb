"""Writes content for tests of the web UI into an opened store: pushed and cached repositories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from storage.content import Descriptor, Manifest, digest_of
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, LAYER_TYPE, descriptor_of, image_of, index_of, push_blob

LAYER_BYTES = 5 * 1024 * 1024
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
SIGNATURE_TYPE = "application/vnd.cncf.notary.signature"


async def add_cached(store: StoredRegistry, repo: str, *tags: str, of: str = "", layers: int = 1) -> Manifest:
    """Stores the manifest of an image without its blobs, as a mirror does. According to the manifest, each layer has
    LAYER_BYTES bytes. Different values of `of` give different images."""
    manifest = _image(of, layers)
    await store.put_manifest(RepositoryName(repo), manifest, [Tag(tag) for tag in tags], by=BY, sparse=True)
    return manifest


async def add_index(
    store: StoredRegistry, repo: str, tag: str, platforms: Iterable[tuple[str, str]], *, present: int = 0
) -> Manifest:
    """Stores an index with an image for each platform. Stores only the first `present` images."""
    images = [(_image(f"{os} {arch}"), {"os": os, "architecture": arch}) for os, arch in platforms]
    for image, _ in images[:present]:
        await store.put_manifest(RepositoryName(repo), image, [], by=BY, sparse=True)
    manifest = index_of([replace(image.descriptor, platform=platform) for image, platform in images])
    await store.put_manifest(RepositoryName(repo), manifest, [Tag(tag)], by=BY, sparse=True)
    return manifest


async def add_described(store: StoredRegistry, repo: str, tag: str, text: str, *, label_bytes: int = 0) -> Manifest:
    """Stores an index with two images. One image is stored with all its blobs, the other one is not stored. The stored
    image has two layers, labels and environment variables; the index has annotations and a signature. All these texts
    contain `text`. `label_bytes`: the size of one more label."""
    name = RepositoryName(repo)
    config = {
        "os": "linux",
        "architecture": "amd64",
        "created": "2026-01-02T03:04:05Z",
        "author": text,
        "config": {
            "User": text,
            "Cmd": ["serve", text],
            "Env": ["PATH=/bin", f"NODE={text}"],
            "Labels": {text: text, "long": "x" * label_bytes},
        },
        "history": [
            {"created_by": "ADD rootfs.tar / # buildkit"},
            {"created_by": f"ENV NODE={text}", "empty_layer": True},
            {"created_by": "RUN /bin/sh -c make # buildkit", "comment": text},
        ],
    }
    pushed = await push_blob(store, name, json.dumps(config).encode())
    layers = [await push_blob(store, name, data) for data in (b"a" * 20_000, b"b" * 5_000)]
    image = image_of(Descriptor(CONFIG_TYPE, pushed.digest, pushed.size), layers)
    await store.put_manifest(name, image, [], by=BY)
    amd64 = replace(image.descriptor, platform={"os": "linux", "architecture": "amd64"})
    arm64 = replace(_image(repo).descriptor, platform={"os": "linux", "architecture": "arm64"})
    index = index_of([amd64, arm64], annotations={text: text})
    await store.put_manifest(name, index, [Tag(tag)], by=BY, sparse=True)
    signed = replace(await push_blob(store, name, text.encode()), annotations={"org.opencontainers.image.title": text})
    signature = image_of(pushed, [signed], subject=index.digest, artifactType=SIGNATURE_TYPE)
    await store.put_manifest(name, signature, [], by=BY)
    return index


async def add_image(store: StoredRegistry, repo: str, tag: str, layers: Iterable[bytes], **config: object) -> Manifest:
    """Stores an image with all its blobs, so that its tag can be deleted and restored. `config`: members of the
    container configuration in its config, such as `User`."""
    name = RepositoryName(repo)
    document = {"os": "linux", "architecture": "amd64", "config": config}
    pushed = await push_blob(store, name, json.dumps(document).encode())
    blobs = [await push_blob(store, name, layer) for layer in layers]
    image = image_of(Descriptor(CONFIG_TYPE, pushed.digest, pushed.size), blobs)
    await store.put_manifest(name, image, [Tag(tag)], by=BY)
    return image


def _image(of: str, layers: int = 1) -> Manifest:
    config = descriptor_of(f"config {of}".encode(), CONFIG_TYPE)
    names = [f"layer {of}{number or ''}" for number in range(layers)]
    return image_of(config, [Descriptor(LAYER_TYPE, digest_of(name.encode()), LAYER_BYTES) for name in names])
