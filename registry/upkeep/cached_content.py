"""Two operations on cached content, for the command line and the management API: ask the upstream for an image
(`refresh_image`), and delete cached content (`purge_image`).

An *upstream* is a remote registry that this registry mirrors. A *frozen* tag always stays at one digest. A *cooldown*
delays the change of a tag: pulls get the older digest until the cooldown ends.

`stored` is the registry that stores the cached content in the data directory. `mirrored` is a mirrored repository:
`mirrored.registry` is the mirror, which asks the upstream, `mirrored.upstream` is the upstream's name, and
`mirrored.repo` is the name that the repository has in `stored`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from registry.router import Destination, Router
from storage.composition import open_inventory
from storage.content import Actor, Manifest
from storage.errors import ManifestUnknown, UpstreamUnavailable
from storage.inventory import RemovalPlan
from storage.names import Digest, ImageReference, Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upstream_tags import FrozenTag, TagFrozen

MANIFESTS_AT_A_TIME: Final = 20
"""Number of manifests that a function reads and parses, in about 2 ms, before it lets other tasks run."""


class RefreshOutcome(StrEnum):
    """The outcome of a refresh.

    - `NEW`: the image was not cached before.
    - `UNCHANGED`: the tag points at the same digest as before.
    - `CHANGED`: the tag points at another digest than before.
    - `FROZEN`: the upstream was not asked, because the tag is frozen.
    - `CACHED`: the upstream was not asked, because a digest was given and its manifest is cached.
    - `FETCHED_LATER`: the digest of a blob was given. The next pull fetches the blob."""

    NEW = "new"
    UNCHANGED = "unchanged"
    CHANGED = "changed"
    FROZEN = "frozen"
    CACHED = "cached"
    FETCHED_LATER = "fetched-later"


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """The result of a refresh.

    - `upstream`: the name of the upstream.
    - `digest`: the digest that the image has now.
    - `before`: for the outcome `CHANGED`, the digest at which the tag pointed before; None otherwise.
    - `frozen`: for the outcome `FROZEN`, the frozen tag; None otherwise.
    - `held_back_until`: the end of the cooldown of `digest`, in seconds since 1970; None if `digest` is not in a
      cooldown.
    - `served`: the digest that pulls get until `held_back_until`; None if pulls fail until then, or if `digest` is not
      in a cooldown.
    - `unblocked_blobs`: number of blobs that the mirror may request again from endpoints (URLs of the upstream) that
      had sent corrupt bytes. `refresh_image` has deleted the records that kept the mirror from this."""

    outcome: RefreshOutcome
    upstream: str
    digest: Digest
    before: Digest | None = None
    frozen: FrozenTag | None = None
    held_back_until: float | None = None
    served: Digest | None = None
    unblocked_blobs: int = 0


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """The numbers of tags and manifests that a purge has deleted. `size`: total bytes of the blobs that only the
    deleted manifests used. Garbage collection deletes these blobs after the grace period."""

    tags: int
    manifests: int
    size: int


async def refresh_image(router: Router, stored: StoredRegistry, image: ImageReference) -> RefreshResult:
    """Asks the upstream for the present digest of a tag. For an image with a digest, fetches the manifest if it is not
    cached.

    An upstream has one or more URLs, its *endpoints*. After an endpoint has sent corrupt bytes for a blob, a record
    keeps the mirror from requesting the blob from that endpoint again. This function deletes the records for all
    blobs of the image, even if the request to the upstream then fails.

    Raises NameUnknown if the repository is not mirrored, and ManifestUnknown if the upstream does not have the image.
    Raises UpstreamUnavailable if the upstream gave no answer; the cached copy then stays."""
    mirrored = await router.require_mirrored(image.repository)
    unblocked_blobs = await _forget_bad_senders(stored, mirrored, image)
    if isinstance(image.reference, Digest):
        result = await _refresh_digest(stored, mirrored, image, image.reference, unblocked_blobs)
    else:
        result = await _refresh_tag(stored, mirrored, image, image.reference)
        unblocked_blobs += await _forget_bad_senders(stored, mirrored, image)  # the tag may refer to a new manifest now
    return replace(result, unblocked_blobs=unblocked_blobs)


async def _refresh_digest(
    stored: StoredRegistry, mirrored: Destination, image: ImageReference, digest: Digest, unblocked_blobs: int
) -> RefreshResult:
    """Fetches the manifest with this digest if it is not cached. `unblocked_blobs`: see `RefreshResult`. Raises
    ManifestUnknown, UpstreamUnavailable."""
    assert mirrored.upstream is not None
    if await _cached_digest(stored, mirrored.repo, image) is not None:
        return RefreshResult(RefreshOutcome.CACHED, mirrored.upstream, digest)
    if unblocked_blobs:
        # No manifest of the image is cached, so `_forget_bad_senders` has looked only for records about `digest`, and
        # has found some. Such records exist only for blobs, so `digest` is the digest of a blob.
        return RefreshResult(RefreshOutcome.FETCHED_LATER, mirrored.upstream, digest)
    fetched = await mirrored.registry.get_manifest(mirrored.repo, digest)
    return RefreshResult(RefreshOutcome.NEW, mirrored.upstream, fetched.digest)


async def _refresh_tag(stored: StoredRegistry, mirrored: Destination, image: ImageReference, tag: Tag) -> RefreshResult:
    """Asks the upstream for the tag's digest, and fetches the manifest of that digest if it is not cached. Does not ask
    the upstream about a frozen tag. Raises ManifestUnknown, UpstreamUnavailable."""
    from registry.mirror.mirror import Mirror  # imported late, because most processes never refresh

    upstream = mirrored.upstream
    assert upstream is not None
    frozen = await stored.upstream_tags.find_frozen_tag(mirrored.repo, tag)
    if frozen is not None:
        return RefreshResult(RefreshOutcome.FROZEN, upstream, frozen.digest, frozen=frozen)
    old_digest = await _cached_digest(stored, mirrored.repo, image)
    assert isinstance(mirrored.registry, Mirror)
    try:
        failure = await mirrored.registry.revalidate(mirrored.repo, tag, force=True)
    except ManifestUnknown as error:
        if old_digest is None:
            raise
        raise ManifestUnknown(f"the tag no longer exists: {error.message}; it pointed at {old_digest}") from None
    if failure is not None:
        raise UpstreamUnavailable(failure)
    new_digest = (await stored.resolve_manifest(mirrored.repo, tag)).digest
    if old_digest is None:
        result = RefreshResult(RefreshOutcome.NEW, upstream, new_digest)
    elif old_digest == new_digest:
        result = RefreshResult(RefreshOutcome.UNCHANGED, upstream, new_digest)
    else:
        result = RefreshResult(RefreshOutcome.CHANGED, upstream, new_digest, old_digest)
    # `choose` returns None if the tag has no cooldown, or if the mirror has no record of the tag. Otherwise:
    # - `candidates`: pulls of the tag get the first of these digests. If there are none, pulls of the tag fail.
    # - `newest_held_back_until`: when the cooldown of the tag's newest digest ends; None: it is not in a cooldown.
    choice = await mirrored.registry.served_tags.choose(mirrored.repo, tag)
    if choice is None or choice.newest_held_back_until is None:
        return result
    served = choice.candidates[0] if choice.candidates else None
    return replace(result, held_back_until=choice.newest_held_back_until, served=served)


async def _forget_bad_senders(stored: StoredRegistry, mirrored: Destination, image: ImageReference) -> int:
    """Deletes the records of endpoints that sent corrupt bytes for a blob of the image. Finds the blobs in the cached
    manifests of the image. Returns the number of blobs that had such a record."""
    assert mirrored.upstream is not None
    # The digest in a reference may be that of a blob and not of a manifest.
    blobs = {image.reference} if isinstance(image.reference, Digest) else set()
    async for manifest in _cached_tree(stored, mirrored.repo, image.reference, set()):
        # An image has `blobs`. An index can have `blob_children`: entries that are blobs, as in BuildKit's caches.
        blobs |= {blob.digest for blob in manifest.blobs} | manifest.blob_children
    return await stored.records.forget_bad_senders(mirrored.upstream, blobs)


async def _cached_tree(
    stored: StoredRegistry, repo: RepositoryName, reference: Reference, already_read: set[Reference]
) -> AsyncIterator[Manifest]:
    """Yields the cached manifest of `reference`. If the manifest is an index, also yields the cached manifests that the
    index lists, directly or through other indexes. Skips the references in `already_read`, and adds each reference that
    it reads to `already_read`. Lets other tasks run after every `MANIFESTS_AT_A_TIME` manifests."""
    unread = [reference]
    while unread:
        reference = unread.pop()
        if reference in already_read:
            continue
        already_read.add(reference)
        if len(already_read) % MANIFESTS_AT_A_TIME == 0:
            await asyncio.sleep(0)
        try:
            manifest = await stored.get_manifest(repo, reference)
        except ManifestUnknown:
            continue
        yield manifest
        unread += [child.digest for child in manifest.manifests]


async def purge_image(
    router: Router,
    stored: StoredRegistry,
    image: ImageReference,
    *,
    data: Path,
    by: Actor,
    everything: bool = False,
    force: bool = False,
) -> PurgeResult:
    """Deletes the cached tags and manifests of an image.

    - `data`: the data directory.
    - `by`: the actor that the audit log names.
    - `everything`: whether to delete all cached tags and manifests of the image's repository.
    - `force`: whether to delete also content that a frozen tag needs. The tag stays frozen, and its next pull fetches
      the content again.

    Raises NameUnknown if the repository is not mirrored or has no cached content, and ManifestUnknown if the image is
    not cached. Raises TagFrozen if `force` is false and a frozen tag needs content that would be deleted. After these
    errors, nothing has changed. After a cancellation, a part of the content may be deleted."""
    mirrored = await router.require_mirrored(image.repository)
    if isinstance(image.reference, Tag) and not (everything or force):  # the tag may be frozen and not cached
        frozen = await stored.upstream_tags.find_frozen_tag(mirrored.repo, image.reference)
        if frozen is not None:
            raise _tag_frozen(frozen)
    removal = await asyncio.to_thread(_plan_removal, data, mirrored.repo, None if everything else image.reference)
    if not force:
        await _check_not_frozen(stored, mirrored.repo, removal)
    # Deletes the records of the mirror's last checks at the upstream.
    await stored.records.forget_checks(mirrored.repo, None if everything else image.reference)
    for tag in removal.tags:
        with suppress(ManifestUnknown):  # another process has deleted the tag meanwhile
            await stored.delete_tag(mirrored.repo, tag, by=by)
    for digest in removal.manifests:
        with suppress(ManifestUnknown):
            await stored.delete_manifest(mirrored.repo, digest, by=by, restorable=False)
    return PurgeResult(len(removal.tags), len(removal.manifests), removal.freed_bytes)


def _plan_removal(data: Path, repo: RepositoryName, reference: Reference | None) -> RemovalPlan:
    """Returns the tags and manifests to delete for the image `reference`, or for the whole repository if `reference` is
    None. Blocks."""
    with open_inventory(data) as inventory:
        return inventory.plan_removal_of_all(repo) if reference is None else inventory.plan_removal(repo, reference)


async def _check_not_frozen(stored: StoredRegistry, repo: RepositoryName, removal: RemovalPlan) -> None:
    """Raises TagFrozen if `removal` has a frozen tag, or a manifest that a frozen tag of the repository needs."""
    removed_manifests, removed_tags = set(removal.manifests), set(removal.tags)
    already_read: set[Reference] = set()  # many frozen tags can need the same manifests
    for frozen in await stored.upstream_tags.frozen_tags_in(repo):
        if frozen.tag in removed_tags:
            raise _tag_frozen(frozen)
        async for manifest in _cached_tree(stored, repo, frozen.digest, already_read):
            if manifest.digest in removed_manifests:
                raise _tag_frozen(frozen)


def _tag_frozen(frozen: FrozenTag) -> TagFrozen:
    return TagFrozen(f"{frozen} is frozen at {frozen.digest}, which the upstream may no longer have")


async def _cached_digest(stored: StoredRegistry, repo: RepositoryName, image: ImageReference) -> Digest | None:
    """Returns the digest of the image's cached manifest; None if the image is not cached."""
    try:
        return (await stored.resolve_manifest(repo, image.reference)).digest
    except ManifestUnknown:
        return None
