"""The work of `entrepot mirror refresh` and `entrepot mirror purge` on one image reference.

An *upstream* is a remote registry that this registry mirrors. In these functions, `stored` is the registry that stores
the cached content in the data directory. `mirrored` says where a repository is read from: `mirrored.registry` is the
mirror, which asks the upstream; `mirrored.upstream` is the upstream's name; and `mirrored.repo` is the name under which
`stored` has the repository.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from registry.cli.output import human_size, local_time, plural
from registry.config import format_duration
from registry.mirror.mirror import Mirror
from registry.mirror.served_tags import time_text
from registry.router import Destination, Router
from storage.composition import open_inventory
from storage.content import Actor, Manifest
from storage.errors import ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.inventory import RemovalPlan
from storage.names import Digest, ImageReference, Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upstream_tags import FrozenTag, TagFrozen

MIRROR_COMMAND_ACTOR = Actor(name="entrepot mirror")
"""The name with which the audit log says who deleted content."""


async def refresh_reference(router: Router, stored: StoredRegistry, image: ImageReference) -> str:
    """Asks the upstream what a tag points at now, or fetches the manifest of a digest that is not cached. Returns the
    result as a text for the user.

    An upstream has one or more URLs, its *endpoints*. After an endpoint has sent corrupt bytes for a blob, a record
    keeps the mirror from requesting the blob from that endpoint again. This function deletes the records for all
    blobs of the image, even if the request to the upstream fails.

    Raises NameUnknown if the repository is not mirrored, and ManifestUnknown if the upstream does not have the image.
    Raises UpstreamUnavailable if the upstream gave no answer; the cached copy then stays."""
    mirrored = await _locate_mirrored(router, image.repository)
    unblocked_blobs = await _forget_bad_senders(stored, mirrored, image)
    if isinstance(image.reference, Digest):
        result = await _refresh_digest(stored, mirrored, image, image.reference, unblocked_blobs)
    else:
        result = await _refresh_tag(stored, mirrored, image, image.reference)
        unblocked_blobs += await _forget_bad_senders(stored, mirrored, image)  # the tag may refer to a new manifest now
    if not unblocked_blobs:
        return result
    return f"{result}; {plural(unblocked_blobs, 'blob')} that came with corrupt bytes can be requested again at once"


async def _refresh_digest(
    stored: StoredRegistry, mirrored: Destination, image: ImageReference, digest: Digest, unblocked_blobs: int
) -> str:
    """Fetches the manifest with this digest if it is not cached. Returns a text for the user. `unblocked_blobs`: the
    number of blobs for which records of corrupt bytes were deleted. Raises ManifestUnknown, UpstreamUnavailable."""
    if await _cached_digest(stored, mirrored.repo, image) is not None:
        return "cached; the content of a digest never changes"
    if unblocked_blobs:
        # No manifest of this digest is cached, so the deleted record was for a blob with this digest.
        return "the next pull fetches it"
    return f"new here: {(await mirrored.registry.get_manifest(mirrored.repo, digest)).digest}"


async def _refresh_tag(stored: StoredRegistry, mirrored: Destination, image: ImageReference, tag: Tag) -> str:
    """Asks the upstream for the tag's digest, and fetches the manifest of that digest if it is not cached. Returns a
    text for the user, which also says whether a cooldown holds the digest back. Does not ask the upstream about a
    frozen tag. Raises ManifestUnknown, UpstreamUnavailable."""
    frozen = await stored.upstream_tags.frozen(mirrored.repo, tag)
    if frozen is not None:
        return f"frozen at {frozen.digest} since {local_time(frozen.at)}, so {mirrored.upstream} was not asked"
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
        result = f"new here: {now}"
    else:
        result = f"unchanged: {now}" if now == before else f"changed: {before} -> {now}"
    choice = await mirrored.registry.served_tags.choose(mirrored.repo, tag)
    if choice is None or choice.newest_matures_at is None:
        return result
    until = f"it is held back until {time_text(choice.newest_matures_at)}"
    return f"{result}; {until}, and {choice.candidates[0] if choice.candidates else 'nothing'} is served"


async def _forget_bad_senders(stored: StoredRegistry, mirrored: Destination, image: ImageReference) -> int:
    """Deletes the records of endpoints that sent corrupt bytes for a blob of the image. Finds the blobs in the cached
    manifests of the image. Returns the number of blobs that had such a record."""
    assert mirrored.upstream is not None
    # The digest in a reference may be that of a blob and not of a manifest.
    blobs = {image.reference} if isinstance(image.reference, Digest) else set()
    async for manifest in _cached_tree(stored, mirrored.repo, [image.reference]):
        blobs |= {blob.digest for blob in manifest.blobs} | manifest.blob_children
    return await stored.records.forget_bad_senders(mirrored.upstream, blobs)


async def _cached_tree(
    stored: StoredRegistry, repo: RepositoryName, references: Sequence[Reference]
) -> AsyncIterator[Manifest]:
    """Yields the cached manifests of the references, and those that they list, directly or through other indexes."""
    unread = list(references)
    seen: set[Reference] = set()
    while unread:
        reference = unread.pop()
        if reference in seen:
            continue
        seen.add(reference)
        try:
            manifest = await stored.get_manifest(repo, reference)
        except ManifestUnknown:
            continue
        yield manifest
        unread += [child.digest for child in manifest.manifests]


async def purge_reference(
    router: Router,
    stored: StoredRegistry,
    image: ImageReference,
    *,
    data: Path,
    grace: float,
    everything: bool,
    force: bool = False,
) -> str:
    """Deletes the cached tags and manifests of an image, or with `everything` those of its whole repository. Returns
    the result as a text for the user. `data` is the data directory. `force`: deletes also what a frozen tag needs. The
    tag stays frozen, and its next pull fetches its digest again.

    Garbage collection deletes a blob later, when no manifest has referred to it for `grace` seconds. Raises NameUnknown
    if the repository is not mirrored or nothing of it is cached, ManifestUnknown if the image is not cached, and
    TagFrozen if a frozen tag needs what would be deleted and `force` is false. Then nothing has changed."""
    mirrored = await _locate_mirrored(router, image.repository)
    if isinstance(image.reference, Tag) and not (everything or force):  # the tag may be frozen and not cached
        frozen = await stored.upstream_tags.frozen(mirrored.repo, image.reference)
        if frozen is not None:
            raise _tag_frozen(frozen)
    with open_inventory(data) as inventory:
        removal = (
            inventory.plan_removal_of_all(mirrored.repo)
            if everything
            else inventory.plan_removal(mirrored.repo, image.reference)
        )
    if not force:
        await _check_not_frozen(stored, mirrored.repo, removal)
    # Deletes the records of the mirror's last checks at the upstream, for this reference or for all (None).
    await stored.records.forget_checks(mirrored.repo, None if everything else image.reference)
    for tag in removal.tags:
        with suppress(ManifestUnknown):  # another process deleted it meanwhile
            await stored.delete_tag(mirrored.repo, tag, by=MIRROR_COMMAND_ACTOR)
    for digest in removal.manifests:
        with suppress(ManifestUnknown):
            await stored.delete_manifest(mirrored.repo, digest, by=MIRROR_COMMAND_ACTOR, restorable=False)
    dropped = f"dropped {plural(len(removal.tags), 'tag')} and {plural(len(removal.manifests), 'manifest')}"
    if not removal.size:
        return f"{dropped}; no blobs will be freed, because other content uses them"
    return (
        f"{dropped}; {human_size(removal.size)} are freed after {local_time(time.time() + grace)} "
        f"(gc.grace is {format_duration(grace)}), unless a pull uses them again before"
    )


async def _check_not_frozen(stored: StoredRegistry, repo: RepositoryName, removal: RemovalPlan) -> None:
    """Raises TagFrozen if a frozen tag of the repository is among the tags that would be deleted, or needs one of the
    manifests."""
    removed = set(removal.manifests)
    for frozen in await stored.upstream_tags.frozen_in(repo):
        if frozen.tag in removal.tags:
            raise _tag_frozen(frozen)
        async for manifest in _cached_tree(stored, repo, [frozen.digest]):
            if manifest.digest in removed:
                raise _tag_frozen(frozen)


def _tag_frozen(frozen: FrozenTag) -> TagFrozen:
    return TagFrozen(
        f"{frozen} is frozen at {frozen.digest}, which the upstream may no longer have; to drop the cached copy anyway,"
        " add --force"
    )


async def _locate_mirrored(router: Router, repo: RepositoryName) -> Destination:
    """Returns the mirror of a repository, with the names of the upstream and of the stored repository. Raises
    NameUnknown if the repository is not mirrored."""
    mirrored = await router.locate(repo)
    if mirrored.upstream is None:
        raise NameUnknown(f"{repo} is hosted here and has no upstream")
    return mirrored


async def _cached_digest(stored: StoredRegistry, repo: RepositoryName, image: ImageReference) -> Digest | None:
    """Returns the digest of the cached manifest to which the image's tag or digest refers; None if there is none."""
    try:
        return (await stored.resolve_manifest(repo, image.reference)).digest
    except ManifestUnknown:
        return None
