"""Removes several tags of a hosted repository, and undoes that (`TagRemover`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from registry.browse.models import RefusedTag, RemovalPlanView, RemovedTag, RemovedTags, RestoredTags
from storage.content import Actor, Condition
from storage.errors import Denied, ManifestBlobUnknown, ManifestUnknown, PreconditionFailed, QuotaExceeded
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from storage.retention import MAX_ORPHANS, Retention
from storage.tag_history import TagHistory
from storage.tag_removal import TagRemovalPlan, TagRemovals
from storage.tag_rules import ImmutableTags, IsImmutable

_NOT_RESTORABLE: Final = (ManifestUnknown, ManifestBlobUnknown, PreconditionFailed, Denied, QuotaExceeded)


class TagRemover:
    """Deletes tags through `registry`, which checks the rights of the current request and what the settings forbid.

    The manifests that nothing uses any more afterwards are deleted, too. They are kept for the grace period of garbage
    collection, and so are their blobs: until then, the tags can be put back."""

    def __init__(
        self,
        registry: Registry,
        removals: TagRemovals,
        retention: Retention,
        history: TagHistory,
        immutable_tags: ImmutableTags,
    ) -> None:
        self._registry = registry
        self._removals = removals
        self._retention = retention
        self._history = history
        self._immutable_tags = immutable_tags

    async def plan(self, repo: RepositoryName, tags: Sequence[Tag]) -> RemovalPlanView:
        """Returns what `remove` would do now. Raises NameUnknown."""
        is_immutable = self._immutable_tags.in_repository(repo)
        plan = await self._removable(repo, tags, is_immutable)
        found = {tag.name for tag in plan.tags}
        unknown = [tag for tag in dict.fromkeys(tags) if tag not in found and not is_immutable(tag)]
        return RemovalPlanView(
            tags=[RemovedTag(tag=tag.name, digest=tag.digest) for tag in plan.tags if tag.is_named],
            referrer_tags=[RemovedTag(tag=tag.name, digest=tag.digest) for tag in plan.tags if not tag.is_named],
            immutable_tags=[tag for tag in dict.fromkeys(tags) if is_immutable(tag)],
            unknown_tags=list(unknown),
            manifests=list(plan.manifests),
            freed_bytes=plan.freed_bytes,
            complete=plan.is_complete,
        )

    async def remove(self, repo: RepositoryName, tags: Sequence[Tag], by: Actor) -> RemovedTags:
        """Deletes the tags, the referrer tags of manifests that nothing uses any more, and these manifests. Returns
        what was deleted, for `restore`. Raises Unauthorized or Denied if the caller may not delete; Unsupported if the
        settings forbid it; NameUnknown. After an error or a cancellation, a part is deleted."""
        is_immutable = self._immutable_tags.in_repository(repo)
        plan = await self._removable(repo, tags, is_immutable)
        refused = [RefusedTag(tag=tag, reason=f"{tag} is immutable") for tag in tags if is_immutable(tag)]
        removed = []
        for tag in plan.tags:
            try:
                await self._registry.delete_tag(repo, tag.name, by=by)
            except ManifestUnknown:  # somebody else has deleted it
                continue
            removed.append(RemovedTag(tag=tag.name, digest=tag.digest))
        manifests = await self._delete_unused(repo, [Digest(tag.digest) for tag in removed], by)
        return RemovedTags(removed=removed, refused=refused, manifests=manifests)

    async def _removable(self, repo: RepositoryName, tags: Sequence[Tag], is_immutable: IsImmutable) -> TagRemovalPlan:
        """Returns the plan for those of the tags that are not immutable. The others stay, and so does what they
        need."""
        plan = await self._removals.plan(repo, [tag for tag in dict.fromkeys(tags) if not is_immutable(tag)])
        return replace(plan, tags=[tag for tag in plan.tags if not is_immutable(tag.name)])

    async def _delete_unused(self, repo: RepositoryName, digests: Iterable[Digest], by: Actor) -> int:
        """Deletes those of the manifests that nothing uses, and what nothing uses afterwards. Each deletion checks in
        its own transaction that the manifest is unused. Returns the number of deleted manifests."""
        pending, deleted = deque(dict.fromkeys(digests)), 0
        while pending:
            batch = [pending.popleft() for _ in range(min(len(pending), MAX_ORPHANS))]
            gone, more = await self._retention.delete_orphans(repo, batch, by, is_retention=False)
            deleted += len(gone)
            pending.extend(more)
        return deleted

    async def restore(self, repo: RepositoryName, tags: Sequence[tuple[Tag, Digest]], by: Actor) -> RestoredTags:
        """Undoes `remove`: points the tags at these digests again, and puts back the manifests. A tag that exists again
        is left alone. The caller has checked the right to push."""
        restored, refused = [], []
        is_immutable = self._immutable_tags.in_repository(repo)
        does_not_exist = Condition(negated=True)
        for tag, digest in tags:
            try:
                move = await self._history.move(
                    repo, tag, digest, by=by, condition=does_not_exist, is_immutable=is_immutable
                )
            except _NOT_RESTORABLE as error:
                refused.append(RefusedTag(tag=tag, reason=error.message))
            else:
                restored.append(RemovedTag(tag=move.tag, digest=move.digest))
        return RestoredTags(restored=restored, refused=refused)
