"""Fixtures and helpers of the registry's tests: the API over a registry in memory, functions that push content to this
registry, and a function that waits for a condition."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from registry.http import DistributionAPI
from storage.content import OCI_MANIFEST, Actor, Descriptor, Manifest, digest_of
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.asgi_client import AsgiClient

REPO = RepositoryName("team/app")
V2 = f"/v2/{REPO}"
"""The path of the repository in the distribution API."""


async def wait_until(holds: Callable[[], object]) -> None:
    """Waits until another task or thread has made the condition true."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  the other task or thread does not signal the change
            await asyncio.sleep(0.001)


@pytest.fixture
def registry() -> MemoryRegistry:
    return MemoryRegistry()


@pytest.fixture
def client(registry: MemoryRegistry) -> AsgiClient:
    return AsgiClient(DistributionAPI(registry))


async def put_blob(registry: MemoryRegistry, data: bytes, repo: str = REPO, algorithm: str = "sha256") -> Digest:
    writer = await registry.start_upload(RepositoryName(repo), algorithm)
    if data:
        await writer.write(data)
    return (await writer.commit(digest_of(data, algorithm))).digest


def image(config: bytes = b"{}", **more: Any) -> bytes:
    """Returns the bytes of an image manifest without layers."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/x.test", "digest": digest_of(config), "size": len(config)},
        "layers": [],
        **more,
    }
    return json.dumps(document).encode()


async def put_image(registry: MemoryRegistry, *tags: str, repo: str = REPO, **more: Any) -> Descriptor:
    await put_blob(registry, b"{}", repo)
    manifest = Manifest.parse(image(**more), OCI_MANIFEST)
    return await registry.put_manifest(RepositoryName(repo), manifest, [Tag(tag) for tag in tags], by=Actor())
