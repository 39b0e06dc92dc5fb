"""The summary of one image or artifact that `entrepot inspect` shows, as plain values for JSON and as a table."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from registry.cli.output import human_size, new_table, plain_console
from storage.content import INDEXES, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown
from storage.interface import Reader, Registry
from storage.names import Digest, ImageReference, RepositoryName, Tag

MAX_CONFIG_SIZE = 4 << 20
"""Largest config that is read for the platform and the time of creation, in bytes."""
PAGE_SIZE = 1000
IMAGE_CONFIGS = {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
"""Artifact types that only mean "an image" and are not worth a line."""
MAX_LISTED = 20
"""How many tags and referrers are listed by name; the rest is counted."""


async def summarize_image(registry: Registry, where: ImageReference) -> dict[str, Any]:
    """Returns what is known about the manifest at `where`, and about the image or the children below it. Raises
    ManifestUnknown."""
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
                    pass  # deleted after the page was read
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
    """Returns the size of the config and the layers together, in bytes. A layer that occurs twice counts once."""
    parts = [*manifest.layers, *([manifest.config] if manifest.config else [])]
    return sum({part.digest: part.size for part in parts}.values())


async def _platform_and_created(
    registry: Reader, repo: RepositoryName, manifest: Manifest
) -> tuple[str | None, str | None]:
    """Returns the platform and the time of creation from the image's config; None for what it does not say."""
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
    """Returns a platform as docker's `--platform` takes it, such as `linux/arm64/v8`, or None when none is given."""
    if not isinstance(platform, dict):
        return None
    parts = [platform.get(name) for name in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part) or None


def print_image_summary(seen: dict[str, Any]) -> None:
    """Prints a summary for people: the facts, then a table of the children or of the config and the layers."""
    console = plain_console()
    console.print(Text(seen["reference"], "bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(seen):
        facts.add_row(Text(f"  {name}", "dim"), Text(value))
    console.print(facts)
    parts = _children_table(seen) if "manifests" in seen else _parts_table(seen)
    if parts.row_count:
        console.print()
        console.print(parts)


def _facts(seen: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("digest", seen["digest"]), ("type", seen["mediaType"])]
    if seen["artifactType"] and seen["artifactType"] not in IMAGE_CONFIGS:
        facts.append(("artifact", seen["artifactType"]))
    if "total" in seen:
        facts.append(("size", f"{human_size(seen['total'])} (manifest {human_size(seen['size'])})"))
    else:
        facts.append(("size", f"{human_size(seen['size'])}, {len(seen['manifests'])} manifests"))
    for name in ("platform", "created", "subject"):
        if seen.get(name):
            facts.append((name, seen[name]))
    facts.append(("tags", _first_ones(seen["tags"]) or "(none)"))
    if seen["referrers"]:
        names = [f"{each.get('artifactType') or each['mediaType']} {each['digest']}" for each in seen["referrers"]]
        facts.append(("referrers", f"{len(names)}: {_first_ones(names)}"))
    facts += [("annotation", f"{name} = {value}") for name, value in sorted(seen["annotations"].items())]
    return facts


def _first_ones(texts: list[str]) -> str:
    rest = len(texts) - MAX_LISTED
    return ", ".join(texts[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _children_table(seen: dict[str, Any]) -> Table:
    table = new_table("platform", "size", "digest", "type")
    for child in seen["manifests"]:
        total = "(not here)" if child["total"] is None else human_size(child["total"])
        table.add_row(*map(Text, (child["platform"] or "-", total, child["digest"], child["mediaType"])))
    return table


def _parts_table(seen: dict[str, Any]) -> Table:
    table = new_table("role", "size", "digest", "type")
    parts = [("config", seen["config"])] if seen["config"] else []
    parts += [(f"layer {place}", layer) for place, layer in enumerate(seen["layers"], 1)]
    for role, part in parts:
        table.add_row(*map(Text, (role, human_size(part["size"]), part["digest"], part["mediaType"])))
    return table
