"""What can be said about one reference, asked through the registry's interface: plain values, ready for JSON."""

from __future__ import annotations

import json
from typing import Any

from storage.content import INDEXES, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown
from storage.interface import Reader, Registry
from storage.names import Digest, ImageReference, RepositoryName, Tag

MAX_CONFIG_SIZE = 4 << 20
"""Bytes of a config that are read at the most."""
PAGE_SIZE = 1000


async def summarize_image(registry: Registry, where: ImageReference) -> dict[str, Any]:
    """Raises ManifestUnknown."""
    repo = where.repository
    manifest = await registry.get_manifest(repo, where.reference)
    seen: dict[str, Any] = {
        "reference": str(where),
        "repository": repo,
        "digest": manifest.digest,
        "mediaType": manifest.media_type,
        "artifactType": manifest.artifact_type,
        "size": len(manifest.body),
        "tags": await _tags_at(registry, repo, manifest.digest),
        "referrers": await _referrers(registry, repo, manifest.digest),
        "subject": manifest.subject,
        "annotations": dict(manifest.annotations),
    }
    if manifest.media_type in INDEXES:
        seen["manifests"] = [await _child(registry, repo, child) for child in manifest.manifests]
    else:
        seen["config"] = manifest.config.as_json() if manifest.config else None
        seen["layers"] = [layer.as_json() for layer in manifest.layers]
        seen["total"] = _total(manifest)
        seen["platform"], seen["created"] = await _platform_and_created(registry, repo, manifest)
    return seen


async def _tags_at(registry: Registry, repo: RepositoryName, digest: Digest) -> list[Tag]:
    found: list[Tag] = []
    after: str | None = None
    try:
        while True:
            page = await registry.tags(repo, after, PAGE_SIZE)
            for tag in page.items:
                try:
                    if (await registry.resolve_manifest(repo, tag)).digest == digest:
                        found.append(tag)
                except ManifestUnknown:
                    pass  # deleted since the page was read
            if not page.more or not page.items:
                return found
            after = page.items[-1]
    except NameUnknown:
        return found


async def _referrers(registry: Registry, repo: RepositoryName, digest: Digest) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    after: str | None = None
    while True:
        page = await registry.referrers(repo, digest, None, after, PAGE_SIZE)
        found += [descriptor.as_json() for descriptor in page.items]
        if not page.more or not page.items:
            return found
        after = page.items[-1].digest


async def _child(registry: Reader, repo: RepositoryName, child: Descriptor) -> dict[str, Any]:
    seen: dict[str, Any] = {**child.as_json(), "platform": platform_text(child.platform)}
    try:
        seen["total"] = _total(await registry.get_manifest(repo, child.digest))
    except ManifestUnknown:
        seen["total"] = None
    return seen


def _total(manifest: Manifest) -> int:
    """Bytes of the config and the layers, one that comes twice counted once."""
    parts = [*manifest.layers, *([manifest.config] if manifest.config else [])]
    return sum({part.digest: part.size for part in parts}.values())


async def _platform_and_created(
    registry: Reader, repo: RepositoryName, manifest: Manifest
) -> tuple[str | None, str | None]:
    """Platform and time from the image's config, where it has one and it says so."""
    config = manifest.config
    if config is None or config.size > MAX_CONFIG_SIZE or not config.media_type.endswith("+json"):
        return None, None
    try:
        blob = await registry.open_blob(repo, config.digest)
        try:
            body = b"".join([chunk async for chunk in blob])
        finally:
            await blob.aclose()
        document = json.loads(body)
    except (BlobUnknown, ValueError, RecursionError):
        return None, None
    if not isinstance(document, dict):
        return None, None
    created = document.get("created")
    return platform_text(document), created if isinstance(created, str) else None


def platform_text(platform: object) -> str | None:
    """`linux/arm64/v8`, as docker's `--platform` takes it; None where it names no system."""
    if not isinstance(platform, dict):
        return None
    parts = [platform.get(name) for name in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part) or None
