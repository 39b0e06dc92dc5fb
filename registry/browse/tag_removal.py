"""Removes several tags of a repository at once, and restores removed tags (`TagRemover`). The repository has to be
*hosted*: clients push its content to this registry.

- A *plan* lists what a removal would delete.
- The name of a *referrer tag*, such as `sha256-….sig`, contains the digest of the manifest to which the tag belongs.
- A manifest is *unused* if it has no tag, no index of the repository lists it, and its subject is not in the
  repository. `storage.retention` calls such a manifest an *orphan*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from registry.browse.models import RefusedTag, RemovalPlanView, RemovedTag, RemovedTags, RestoredTags
from storage.content import Actor, Condition
from storage.errors import ManifestUnknown, NameUnknown, RegistryError
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from storage.retention import MAX_ORPHANS, Retention
from storage.tag_history import TagHistory
from storage.tag_removal import PlannedTag, TagRemovalPlan, TagRemovalPlanner
from storage.tag_rules import ImmutableTags, IsImmutable


class TagRemover:
    """Deletes tags through `registry`, which checks the rights of the current request and the settings, such as
    immutable tags.

    Also deletes the manifests that are unused afterwards. The store keeps these manifests and their blobs for the grace
    period of garbage collection. During this period, the tags can be restored."""

    def __init__(
        self,
        registry: Registry,
        planner: TagRemovalPlanner,
        retention: Retention,
        history: TagHistory,
        immutable_tags: ImmutableTags,
    ) -> None:
        self._registry = registry
        self._planner = planner
        self._retention = retention
        self._history = history
        self._immutable_tags = immutable_tags

    async def plan(self, repo: RepositoryName, tags: Sequence[Tag]) -> RemovalPlanView:
        """Returns what `remove` would do now. Raises NameUnknown."""
        is_immutable = self._immutable_tags.in_repository(repo)
        plan = await self._removal_plan(repo, tags, is_immutable)
        planned_names = {tag.name for tag in plan.tags}
        unknown_tags = [tag for tag in dict.fromkeys(tags) if tag not in planned_names and not is_immutable(tag)]
        return RemovalPlanView(
            tags=[RemovedTag(tag=tag.name, digest=tag.digest) for tag in plan.tags if tag.is_requested],
            referrer_tags=[RemovedTag(tag=tag.name, digest=tag.digest) for tag in plan.tags if not tag.is_requested],
            immutable_tags=[tag for tag in dict.fromkeys(tags) if is_immutable(tag)],
            unknown_tags=list(unknown_tags),
            manifests=list(plan.manifests),
            freed_bytes=plan.freed_bytes,
            complete=plan.is_complete,
        )

    async def remove(
        self, repo: RepositoryName, tags: Sequence[Tag], expected: Mapping[Tag, Digest], by: Actor
    ) -> RemovedTags:
        """Deletes the tags, the manifests that are unused afterwards, and the referrer tags of these manifests. Returns
        the deleted tags, which `restore` accepts, and the refused tags. If a deletion fails, goes on with the others.
        `expected`: maps a tag to its expected digest. A tag that points at another digest, or that moves during the
        removal, is refused. Raises NameUnknown. After a cancellation, some of the tags may be deleted."""
        is_immutable = self._immutable_tags.in_repository(repo)
        plan = await self._removal_plan(repo, tags, is_immutable)
        moved = {tag.name: tag.digest for tag in plan.tags if expected.get(tag.name, tag.digest) != tag.digest}
        if moved:  # plans again, so that the manifests of these tags stay
            plan = await self._removal_plan(repo, [tag for tag in tags if tag not in moved], is_immutable)
        removal = _Removal(self._registry, self._retention, repo, by)
        removal.refused += [
            RefusedTag(tag=tag, reason=f"{tag} is immutable") for tag in dict.fromkeys(tags) if is_immutable(tag)
        ]
        removal.refused += [RefusedTag(tag=tag, reason=f"{tag} points at {now} now") for tag, now in moved.items()]
        await removal.run([tag for tag in plan.tags if tag.name not in moved])
        return RemovedTags(
            removed=removal.removed,
            refused=removal.refused,
            manifests=len(removal.manifests),
            restorable=removal.is_restorable,
            problem=removal.problem,
        )

    async def _removal_plan(
        self, repo: RepositoryName, tags: Sequence[Tag], is_immutable: IsImmutable
    ) -> TagRemovalPlan:
        """Returns the plan for the removal of `tags`. The field `tags` of the plan has no immutable tags. The field
        `manifests` of the plan may have a manifest to which an immutable referrer tag points. `remove` does not delete
        such a manifest, because the manifest still has a tag."""
        plan = await self._planner.plan(repo, [tag for tag in dict.fromkeys(tags) if not is_immutable(tag)])
        return replace(plan, tags=[tag for tag in plan.tags if not is_immutable(tag.name)])

    async def restore(self, repo: RepositoryName, tags: Sequence[tuple[Tag, Digest]], by: Actor) -> RestoredTags:
        """Undoes `remove`: points each tag at its digest in `tags` again, and restores the manifests. Refuses a tag
        that exists again, or that cannot be restored. The caller must check the rights to push and to pull first.
        Raises NameUnknown."""
        restored, refused = [], []
        is_immutable = self._immutable_tags.in_repository(repo)
        must_not_exist = Condition(negated=True)  # like the header `If-None-Match: *`: holds if the tag does not exist
        for tag, digest in tags:
            try:
                move = await self._history.move(
                    repo, tag, digest, by=by, condition=must_not_exist, is_immutable=is_immutable
                )
            except NameUnknown:  # the repository does not exist, so no tag can be restored
                raise
            except RegistryError as error:
                refused.append(RefusedTag(tag=tag, reason=error.message))
            else:
                restored.append(RemovedTag(tag=move.tag, digest=move.digest))
        return RestoredTags(restored=restored, refused=refused)


class _Removal:
    """One removal of tags, and its results so far. If a tag cannot be deleted, adds it to `refused`. If manifests
    cannot be deleted, stores the reason in `problem`. Neither error ends the removal, because the caller needs the
    list of tags that can be restored."""

    def __init__(self, registry: Registry, retention: Retention, repo: RepositoryName, by: Actor) -> None:
        self._registry = registry
        self._retention = retention
        self._repo = repo
        self._by = by
        self.removed: list[RemovedTag] = []
        self.refused: list[RefusedTag] = []
        self.manifests: set[Digest] = set()
        self.is_restorable = True
        """False if the disk was too full to keep the deleted manifests."""
        self.problem: str | None = None

    async def run(self, tags: Sequence[PlannedTag]) -> None:
        """Deletes tags in rounds. The first round deletes the requested tags (`is_requested`). Each later round deletes
        the referrer tags of the manifests that earlier rounds have deleted. After the tags of a round, deletes the
        manifests that have become unused. A manifest that is not deleted keeps its referrer tags."""
        batch = [tag for tag in tags if tag.is_requested]
        referrer_tags = [tag for tag in tags if not tag.is_requested]
        while batch:
            await self._delete_unused([tag.digest for tag in batch if await self._delete(tag)])
            batch = [tag for tag in referrer_tags if _subject_of(tag) in self.manifests]
            referrer_tags = [tag for tag in referrer_tags if _subject_of(tag) not in self.manifests]

    async def _delete(self, tag: PlannedTag) -> bool:
        """Deletes a tag if it points at the planned digest. Returns whether the tag was deleted."""
        unmoved = Condition(frozenset({tag.digest}))
        try:
            await self._registry.delete_tag(self._repo, tag.name, by=self._by, condition=unmoved)
        except ManifestUnknown:  # somebody else has deleted it
            return False
        except RegistryError as error:
            self.refused.append(RefusedTag(tag=tag.name, reason=error.message))
            return False
        self.removed.append(RemovedTag(tag=tag.name, digest=tag.digest))
        return True

    async def _delete_unused(self, digests: Iterable[Digest]) -> None:
        """Deletes the manifests in `digests` that are unused. Then does the same for the *dependents* of each deleted
        manifest: its referrers, and the manifests that it lists. The transaction of each deletion checks that the
        manifest is unused."""
        pending = deque(dict.fromkeys(digests))
        while pending:
            batch = [pending.popleft() for _ in range(min(len(pending), MAX_ORPHANS))]
            try:
                deletion = await self._retention.delete_orphans(self._repo, batch, self._by, unused_since=None)
            except RegistryError as error:
                self.problem = error.message
                return
            self.manifests.update(deletion.deleted)
            self.is_restorable = self.is_restorable and deletion.is_restorable
            pending.extend(deletion.dependents)


def _subject_of(tag: PlannedTag) -> str:
    """Returns the digest in the name of a referrer tag."""
    return tag.name[:71].replace("-", ":", 1)  # 71 characters: `sha256-` and 64 hex digits
