"""What `entrepot mirror refresh` and `entrepot mirror purge` do for one reference."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from registry.cli.output import human_size, local_time, plural
from registry.config import format_duration
from registry.mirror.mirror import Mirror
from registry.router import Destination, Router
from storage.composition import open_inventory
from storage.content import Actor
from storage.errors import ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.names import Digest, ImageReference, Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry

MIRROR_COMMAND_ACTOR = Actor(name="entrepot mirror")


async def refresh_reference(router: Router, stored: StoredRegistry, where: ImageReference) -> str:
    """Asks the upstream about a tag or digest and returns a sentence about the result.

    Also forgets which endpoints sent corrupt bytes for the blobs below the reference, whatever else happens. Raises
    ManifestUnknown when the upstream no longer has it, and UpstreamUnavailable when the upstream gave no answer; the
    cached copy then stays."""
    place = await _locate_mirrored(router, where.repository)
    cleared = await _forget_bad_senders(stored, place, where)
    if isinstance(where.reference, Digest):
        said = await _refresh_digest(stored, place, where, where.reference, cleared)
    else:
        said = await _refresh_tag(stored, place, where, where.reference)
        cleared += await _forget_bad_senders(stored, place, where)
    if not cleared:
        return said
    return f"{said}; {plural(cleared, 'blob')} that came with wrong bytes may be asked for again at once"


async def _refresh_digest(
    stored: StoredRegistry, place: Destination, where: ImageReference, digest: Digest, cleared: int
) -> str:
    if await _cached_digest(stored, place.repo, where) is not None:
        return "a digest means the same for ever; it is here"
    if cleared:  # so the digest is a blob's: corrupt bytes are recorded for blobs alone
        return "the next pull fetches it"
    return f"new here: {(await place.registry.get_manifest(place.repo, digest)).digest}"


async def _refresh_tag(stored: StoredRegistry, place: Destination, where: ImageReference, tag: Tag) -> str:
    before = await _cached_digest(stored, place.repo, where)
    assert isinstance(place.registry, Mirror)
    try:
        outdated = await place.registry.revalidate(place.repo, tag, force=True)
    except ManifestUnknown as error:
        if before is None:
            raise
        raise ManifestUnknown(f"it is gone: {error.message}; it was {before}") from None
    if outdated is not None:
        raise UpstreamUnavailable(outdated)
    now = (await stored.resolve_manifest(place.repo, tag)).digest
    if before is None:
        return f"new here: {now}"
    return f"unchanged: {now}" if now == before else f"changed: {before} -> {now}"


async def _forget_bad_senders(stored: StoredRegistry, place: Destination, where: ImageReference) -> int:
    """Forgets which endpoints sent corrupt bytes for the blobs below the reference, as far as its manifests are cached.
    Returns for how many blobs there was such a record."""
    assert place.upstream is not None
    blobs = {where.reference} if isinstance(where.reference, Digest) else set()
    waiting: list[Reference] = [where.reference]
    seen: set[Reference] = set()
    while waiting:
        reference = waiting.pop()
        if reference in seen:
            continue
        seen.add(reference)
        with suppress(ManifestUnknown):
            manifest = await stored.get_manifest(place.repo, reference)
            blobs |= {blob.digest for blob in manifest.blobs} | manifest.blob_children
            waiting += [child.digest for child in manifest.manifests]
    return await stored.records.forget_bad_senders(place.upstream, blobs)


async def purge_reference(
    router: Router, stored: StoredRegistry, where: ImageReference, *, data: Path, grace: float, everything: bool
) -> str:
    """Drops the cached content of a reference, or with `everything` of its repository, and returns a sentence about it.

    `grace` is the time in seconds after which collection frees the bytes. Raises NameUnknown and ManifestUnknown."""
    place = await _locate_mirrored(router, where.repository)
    with open_inventory(data) as inventory:
        removal = (
            inventory.plan_removal_of_all(place.repo)
            if everything
            else inventory.plan_removal(place.repo, where.reference)
        )
    await stored.records.forget_checks(place.repo, None if everything else where.reference)
    for tag in removal.tags:
        with suppress(ManifestUnknown):  # deleted in the meantime
            await stored.delete_tag(place.repo, tag, by=MIRROR_COMMAND_ACTOR)
    for digest in removal.manifests:
        with suppress(ManifestUnknown):
            await stored.delete_manifest(place.repo, digest, by=MIRROR_COMMAND_ACTOR)
    gone = f"dropped {plural(len(removal.tags), 'tag')} and {plural(len(removal.manifests), 'manifest')}"
    if not removal.size:
        return f"{gone}; nothing else is freed, since the rest is in use"
    return (
        f"{gone}; {human_size(removal.size)} are freed after {local_time(time.time() + grace)} "
        f"(gc.grace is {format_duration(grace)}), if nobody pulls it again until then"
    )


async def _locate_mirrored(router: Router, repo: RepositoryName) -> Destination:
    place = await router.locate(repo)
    if place.upstream is None:
        raise NameUnknown(f"{repo} is hosted here and has no upstream")
    return place


async def _cached_digest(stored: StoredRegistry, repo: RepositoryName, where: ImageReference) -> Digest | None:
    try:
        return (await stored.resolve_manifest(repo, where.reference)).digest
    except ManifestUnknown:
        return None
