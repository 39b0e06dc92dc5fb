"""The summary of one image or artifact that `entrepot inspect` shows: a dict for JSON, and a text for people.

An image for several platforms is an *index*, a manifest that lists other manifests: its *children*.
"""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from registry.cli.output import human_size, new_table, plain_console
from storage.content import INDEXES, MAX_IMAGE_CONFIG_BYTES, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown
from storage.interface import Reader, Registry
from storage.names import Digest, ImageReference, RepositoryName, Tag

PAGE_SIZE = 1000
"""Number of tags or referrers in each page that is read from the registry."""
IMAGE_CONFIG_TYPES = {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
"""Media types of the configs of ordinary images. If a manifest states no artifact type, `Manifest.artifact_type` is the
media type of its config. So the `artifactType` of an ordinary image is one of these media types. The text summary
leaves out an `artifactType` that is one of them."""
MAX_LISTED = 20
"""Maximum number of tags that the text summary lists, and maximum number of referrers. The summary shows how many
others there are."""


async def summarize_image(
    registry: Registry, image_reference: ImageReference, served_digest: Digest | None = None
) -> dict[str, Any]:
    """Returns the summary of a manifest as a dict of JSON values. The summary of an index has the key `manifests` with
    the children. The summary of any other manifest has the keys `config`, `layers`, `total` (bytes of the config and
    the layers), `platform` and `created`. Raises ManifestUnknown if there is no such manifest.

    `served_digest`: the digest that a pull of a mirrored tag gets, which can differ from the digest that the store has
    for the tag. None: the summary shows the manifest that the store has for `image_reference`."""
    repo = image_reference.repository
    manifest = await registry.get_manifest(repo, served_digest or image_reference.reference)
    summary: dict[str, Any] = {
        "reference": str(image_reference),
        "repository": repo,
        "digest": manifest.digest,
        "mediaType": manifest.media_type,
        "artifactType": manifest.artifact_type,
        "size": len(manifest.body),
        "tags": await _find_tags(registry, repo, manifest.digest),
        "referrers": await _find_referrers(registry, repo, manifest.digest),
        "subject": manifest.subject,
        "annotations": dict(manifest.annotations),
    }
    if manifest.media_type in INDEXES:
        summary["manifests"] = [await _child_summary(registry, repo, child) for child in manifest.manifests]
    else:
        summary["config"] = manifest.config.as_json() if manifest.config else None
        summary["layers"] = [layer.as_json() for layer in manifest.layers]
        summary["total"] = _total_bytes(manifest)
        summary["platform"], summary["created"] = await _platform_and_created(registry, repo, manifest)
    return summary


async def _find_tags(registry: Registry, repo: RepositoryName, digest: Digest) -> list[Tag]:
    """Returns the tags that point at the manifest. If the repository is deleted during the call, returns the tags that
    the call has found before."""
    tags: list[Tag] = []
    after: str | None = None
    try:
        while True:
            page = await registry.tags(repo, after, PAGE_SIZE)
            for tag in page.items:
                try:
                    if (await registry.resolve_manifest(repo, tag)).digest == digest:
                        tags.append(tag)
                except ManifestUnknown:
                    pass  # deleted after the page was read
            if not page.more or not page.items:
                return tags
            after = page.items[-1]
    except NameUnknown:
        return tags


async def _find_referrers(registry: Registry, repo: RepositoryName, digest: Digest) -> list[dict[str, object]]:
    """Returns the descriptors of all manifests whose `subject` is the manifest with this digest, such as its
    signatures."""
    referrers: list[dict[str, object]] = []
    after: str | None = None
    while True:
        page = await registry.referrers(repo, digest, None, after, PAGE_SIZE)
        referrers += [descriptor.as_json() for descriptor in page.items]
        if not page.more or not page.items:
            return referrers
        after = page.items[-1].digest


async def _child_summary(registry: Reader, repo: RepositoryName, child: Descriptor) -> dict[str, Any]:
    """Returns the descriptor of a child of an index with two more keys: `platform`, and `total`, the size of the
    child's config and layers in bytes. `total` is None if the child is not stored."""
    summary: dict[str, Any] = {**child.as_json(), "platform": _platform_option(child.platform)}
    try:
        summary["total"] = _total_bytes(await registry.get_manifest(repo, child.digest))
    except ManifestUnknown:
        summary["total"] = None
    return summary


def _total_bytes(manifest: Manifest) -> int:
    """Returns the total size of the config and the layers in bytes. A layer that the manifest lists more than once is
    counted once."""
    blobs = [*manifest.layers, *([manifest.config] if manifest.config else [])]
    return sum({blob.digest: blob.size for blob in blobs}.values())


async def _platform_and_created(
    registry: Reader, repo: RepositoryName, manifest: Manifest
) -> tuple[str | None, str | None]:
    """Returns the platform and the creation time from the image's config. Each of them is None if the config does not
    state it. Both are None if the config is not stored, too large or not JSON."""
    config = manifest.config
    if config is None or config.size > MAX_IMAGE_CONFIG_BYTES or not config.media_type.endswith("+json"):
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
    return _platform_option(document), created if isinstance(created, str) else None


def _platform_option(platform: object) -> str | None:
    """Formats a platform as a text such as `linux/arm64/v8`, as in docker's option `--platform`. `platform`: a JSON
    object with the fields `os`, `architecture` and `variant`, each of which may be missing. Returns None if
    `platform` is not an object or has none of these fields."""
    if not isinstance(platform, dict):
        return None
    parts = [platform.get(name) for name in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part) or None


def print_image_summary(summary: dict[str, Any]) -> None:
    """Prints `summary`, the result of `summarize_image`, as the text for people. First come lines with a name and a
    value, such as the digest. Then comes a table. The table of an index lists the children. The table of any other
    manifest lists the config and the layers."""
    console = plain_console()
    console.print(Text(summary["reference"], "bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(summary):
        facts.add_row(Text(f"  {name}", "dim"), Text(value))
    console.print(facts)
    table = _children_table(summary) if "manifests" in summary else _blobs_table(summary)
    if table.row_count:
        console.print()
        console.print(table)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the names and values for the lines above the table."""
    facts = [("digest", summary["digest"]), ("type", summary["mediaType"])]
    if summary["artifactType"] and summary["artifactType"] not in IMAGE_CONFIG_TYPES:
        facts.append(("artifact", summary["artifactType"]))
    if "total" in summary:
        facts.append(("size", f"{human_size(summary['total'])} (manifest {human_size(summary['size'])})"))
    else:
        facts.append(("size", f"{human_size(summary['size'])}, {len(summary['manifests'])} manifests"))
    for name in ("platform", "created", "subject"):
        if summary.get(name):
            facts.append((name, summary[name]))
    facts.append(("tags", _shortened_list(summary["tags"]) or "(none)"))
    if summary["referrers"]:
        referrers = [
            f"{referrer.get('artifactType') or referrer['mediaType']} {referrer['digest']}"
            for referrer in summary["referrers"]
        ]
        facts.append(("referrers", f"{len(referrers)}: {_shortened_list(referrers)}"))
    facts += [("annotation", f"{name} = {value}") for name, value in sorted(summary["annotations"].items())]
    return facts


def _shortened_list(texts: list[str]) -> str:
    """Joins the first MAX_LISTED texts with commas, and adds the number of the others, as in `a, b and 5 more`."""
    omitted = len(texts) - MAX_LISTED
    return ", ".join(texts[:MAX_LISTED]) + (f" and {omitted} more" if omitted > 0 else "")


def _children_table(summary: dict[str, Any]) -> Table:
    """Returns a table with a row for each child of the index. A row shows the size of the child's config and layers."""
    table = new_table("platform", "size", "digest", "type")
    for child in summary["manifests"]:
        size = "(not here)" if child["total"] is None else human_size(child["total"])
        table.add_row(*map(Text, (child["platform"] or "-", size, child["digest"], child["mediaType"])))
    return table


def _blobs_table(summary: dict[str, Any]) -> Table:
    """Returns a table with a row for the config and one for each layer."""
    table = new_table("role", "size", "digest", "type")
    blobs = [("config", summary["config"])] if summary["config"] else []
    blobs += [(f"layer {number}", layer) for number, layer in enumerate(summary["layers"], 1)]
    for role, blob in blobs:
        table.add_row(*map(Text, (role, human_size(blob["size"]), blob["digest"], blob["mediaType"])))
    return table
