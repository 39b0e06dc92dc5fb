"""What `entrepot mirror refresh` and `purge` do to one reference, and what they say of it."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from registry.cli.report import human
from registry.cli.warming import counted
from registry.config import format_duration
from registry.mirror.mirror import Mirror
from registry.router import Place, Router
from storage.content import Actor
from storage.errors import ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.names import Digest, Location, RepositoryName
from storage.stored import StoredRegistry
from storage.upkeep.holdings import open_holdings

OPERATOR = Actor(name="entrepot mirror")


async def refreshed(router: Router, stored: StoredRegistry, where: Location) -> str:
    """Raises ManifestUnknown (it is gone upstream), UpstreamUnavailable (nobody could say; the cached copy stays)."""
    place = await _mirrored(router, where.repository)
    before = await _held(stored, place.repo, where)
    if isinstance(where.reference, Digest):
        if before is not None:
            return "a digest means the same for ever; it is here"
        return f"new here: {(await place.registry.get_manifest(place.repo, where.reference)).digest}"
    assert isinstance(place.registry, Mirror)
    try:
        outdated = await place.registry.renew(place.repo, where.reference, force=True)
    except ManifestUnknown as error:
        if before is None:
            raise
        raise ManifestUnknown(f"it is gone: {error.message}; it was {before}") from None
    if outdated is not None:
        raise UpstreamUnavailable(outdated)
    now = (await stored.resolve_manifest(place.repo, where.reference)).digest
    if before is None:
        return f"new here: {now}"
    return f"unchanged: {now}" if now == before else f"changed: {before} -> {now}"


async def purged(
    router: Router, stored: StoredRegistry, where: Location, *, data: Path, grace: float, everything: bool
) -> str:
    """Raises NameUnknown, ManifestUnknown."""
    place = await _mirrored(router, where.repository)
    with open_holdings(data) as holdings:
        going = holdings.removal_of_all(place.repo) if everything else holdings.removal(place.repo, where.reference)
    await stored.records.forget_checks(place.repo, None if everything else where.reference)
    for tag in going.tags:
        with suppress(ManifestUnknown):  # gone meanwhile
            await stored.delete_tag(place.repo, tag, by=OPERATOR)
    for digest in going.manifests:
        with suppress(ManifestUnknown):
            await stored.delete_manifest(place.repo, digest, by=OPERATOR)
    gone = f"dropped {counted(len(going.tags), 'tag')} and {counted(len(going.manifests), 'manifest')}"
    if not going.size:
        return f"{gone}; nothing else is freed, since the rest is in use"
    moment = datetime.fromtimestamp(time.time() + grace).strftime("%Y-%m-%d %H:%M")
    after = f"after {moment} (gc.grace is {format_duration(grace)}), if nobody pulls it again until then"
    return f"{gone}; {human(going.size)} are freed {after}"


async def _mirrored(router: Router, repo: RepositoryName) -> Place:
    place = await router.locate(repo)
    if place.upstream is None:
        raise NameUnknown(f"{repo} is hosted here and mirrored from nowhere")
    return place


async def _held(stored: StoredRegistry, repo: RepositoryName, where: Location) -> Digest | None:
    try:
        return (await stored.resolve_manifest(repo, where.reference)).digest
    except ManifestUnknown:
        return None
