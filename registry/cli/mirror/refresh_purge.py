"""What `entrepot mirror refresh` and `entrepot mirror purge` do for one image reference.

`Destination` says where a repository is served from: `mirrored.registry` is the mirror, `mirrored.upstream` the name of
its upstream registry, and `mirrored.repo` the name under which the content is stored in this registry (`stored`).
"""

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
"""Who deleted content, for the audit log."""


async def refresh_reference(router: Router, stored: StoredRegistry, image: ImageReference) -> str:
    """Asks the upstream what a tag or digest refers to now, and returns the result as a text for the user.

    Also allows blobs of the image to be fetched again that came with corrupt bytes: deletes the records of the
    endpoints that sent them, even if the request fails. Raises NameUnknown if the repository is not mirrored;
    ManifestUnknown if the upstream does not have the image; UpstreamUnavailable if the upstream gave no answer, and the
    cached copy then stays."""
    mirrored = await _locate_mirrored(router, image.repository)
    blobs_allowed = await _forget_bad_senders(stored, mirrored, image)
    if isinstance(image.reference, Digest):
        result = await _refresh_digest(stored, mirrored, image, image.reference, blobs_allowed)
    else:
        result = await _refresh_tag(stored, mirrored, image, image.reference)
        blobs_allowed += await _forget_bad_senders(stored, mirrored, image)  # the tag may refer to a new manifest now
    if not blobs_allowed:
        return result
    return f"{result}; {plural(blobs_allowed, 'blob')} that came with wrong bytes may be asked for again at once"


async def _refresh_digest(
    stored: StoredRegistry, mirrored: Destination, image: ImageReference, digest: Digest, blobs_allowed: int
) -> str:
    """Fetches the manifest with this digest if it is not cached. Returns a text for the user. `blobs_allowed`: the
    number of blobs whose records of corrupt bytes were deleted. Raises ManifestUnknown, UpstreamUnavailable."""
    if await _cached_digest(stored, mirrored.repo, image) is not None:
        return "a digest means the same for ever; it is here"
    if blobs_allowed:  # The digest is a blob's, since no manifest with it is cached.
        return "the next pull fetches it"
    return f"new here: {(await mirrored.registry.get_manifest(mirrored.repo, digest)).digest}"


async def _refresh_tag(stored: StoredRegistry, mirrored: Destination, image: ImageReference, tag: Tag) -> str:
    """Asks the upstream for the tag's digest, and fetches the manifest if it is new. Returns a text for the user.
    Raises ManifestUnknown, UpstreamUnavailable."""
    before = await _cached_digest(stored, mirrored.repo, image)
    assert isinstance(mirrored.registry, Mirror)
    try:
        why_maybe_outdated = await mirrored.registry.revalidate(mirrored.repo, tag, force=True)
    except ManifestUnknown as error:
        if before is None:
            raise
        raise ManifestUnknown(f"it is gone: {error.message}; it was {before}") from None
    if why_maybe_outdated is not None:
        raise UpstreamUnavailable(why_maybe_outdated)
    now = (await stored.resolve_manifest(mirrored.repo, tag)).digest
    if before is None:
        return f"new here: {now}"
    return f"unchanged: {now}" if now == before else f"changed: {before} -> {now}"


async def _forget_bad_senders(stored: StoredRegistry, mirrored: Destination, image: ImageReference) -> int:
    """Deletes the records of the endpoints that sent corrupt bytes for a blob of the image. The blobs are found in the
    image's manifests; manifests that are not cached are left out. Returns for how many blobs there was a record."""
    assert mirrored.upstream is not None
    blobs = {image.reference} if isinstance(image.reference, Digest) else set()  # the digest may be a blob's
    unread: list[Reference] = [image.reference]
    seen: set[Reference] = set()
    while unread:
        reference = unread.pop()
        if reference in seen:
            continue
        seen.add(reference)
        with suppress(ManifestUnknown):
            manifest = await stored.get_manifest(mirrored.repo, reference)
            blobs |= {blob.digest for blob in manifest.blobs} | manifest.blob_children
            unread += [child.digest for child in manifest.manifests]
    return await stored.records.forget_bad_senders(mirrored.upstream, blobs)


async def purge_reference(
    router: Router, stored: StoredRegistry, image: ImageReference, *, data: Path, grace: float, everything: bool
) -> str:
    """Deletes the cached tags and manifests of an image, or with `everything` those of its whole repository. Returns
    the result as a text for the user.

    The bytes of blobs are freed later, by garbage collection, once nothing referred to them for `grace` seconds. Raises
    NameUnknown if the repository is not mirrored or nothing of it is cached; ManifestUnknown if the image is not
    cached."""
    mirrored = await _locate_mirrored(router, image.repository)
    with open_inventory(data) as inventory:
        removal = (
            inventory.plan_removal_of_all(mirrored.repo)
            if everything
            else inventory.plan_removal(mirrored.repo, image.reference)
        )
    await stored.records.forget_checks(mirrored.repo, None if everything else image.reference)
    for tag in removal.tags:
        with suppress(ManifestUnknown):  # another process deleted it meanwhile
            await stored.delete_tag(mirrored.repo, tag, by=MIRROR_COMMAND_ACTOR)
    for digest in removal.manifests:
        with suppress(ManifestUnknown):
            await stored.delete_manifest(mirrored.repo, digest, by=MIRROR_COMMAND_ACTOR)
    dropped = f"dropped {plural(len(removal.tags), 'tag')} and {plural(len(removal.manifests), 'manifest')}"
    if not removal.size:
        return f"{dropped}; no blobs will be freed, because other content uses them"
    return (
        f"{dropped}; {human_size(removal.size)} are freed after {local_time(time.time() + grace)} "
        f"(gc.grace is {format_duration(grace)}), if nobody pulls it again until then"
    )


async def _locate_mirrored(router: Router, repo: RepositoryName) -> Destination:
    """Returns where the mirrored repository is served from. Raises NameUnknown if the repository is not mirrored."""
    mirrored = await router.locate(repo)
    if mirrored.upstream is None:
        raise NameUnknown(f"{repo} is hosted here and has no upstream")
    return mirrored


async def _cached_digest(stored: StoredRegistry, repo: RepositoryName, image: ImageReference) -> Digest | None:
    """Returns the digest of the image's manifest in the cache; None if the image is not cached."""
    try:
        return (await stored.resolve_manifest(repo, image.reference)).digest
    except ManifestUnknown:
        return None
