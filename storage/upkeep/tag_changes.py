"""Moves, restores and deletes tags at the request of a user (`TagChanger`)."""

from __future__ import annotations

from storage.content import Actor, Condition
from storage.errors import ManifestUnknown
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.tag_history import TagHistory, TagMove
from storage.tag_rules import ImmutableTags


class TagChanger:
    """Changes tags of repositories that are not mirrored. A deleted manifest can be *put back* into its repository
    until garbage collection removes the manifest.

    `by`: the actor whom the history names. `force`: whether to change the tag even if it is immutable. The audit log
    records a forced change. All methods raise:

    - NameUnknown: nothing was ever pushed to the repository.
    - Denied: the tag is immutable and `force` is false.
    - StorageFull, StorageFailed."""

    def __init__(self, history: TagHistory, immutable_tags: ImmutableTags) -> None:
        self._history = history
        self._immutable_tags = immutable_tags
        """The rules that make tags immutable. `in_repository` returns the check for one repository."""

    async def move(
        self, repo: RepositoryName, tag: Tag, target: Reference, *, by: Actor, force: bool = False
    ) -> TagMove:
        """Points the tag at a manifest. Creates the tag if it does not exist. Puts the manifest back if it was deleted.
        `target`: the manifest's digest, or a tag that points at the manifest. Raises ManifestUnknown,
        ManifestBlobUnknown."""
        digest = target if isinstance(target, Digest) else await self._history.current(repo, target)
        if digest is None:
            raise ManifestUnknown(f"{repo} has no tag {target}")
        return await self._history.move(
            repo, tag, digest, by=by, is_immutable=self._immutable_tags.in_repository(repo), force=force
        )

    async def restore(
        self,
        repo: RepositoryName,
        tag: Tag,
        *,
        to: Digest | None = None,
        at: float | None = None,
        by: Actor,
        force: bool = False,
    ) -> TagMove:
        """Points the tag at another manifest, usually an earlier one. Puts the manifest back if it was deleted.

        - With `to`: the manifest with this digest. The tag need not have pointed at this manifest before.
        - Without `to`, but with `at`: the manifest of the tag at this time, in seconds since 1970.
        - Without both: the last manifest, other than the current one, that the tag pointed at.

        Raises:

        - ManifestUnknown: the store does not have the manifest. Or the tag did not exist at the time `at`. Or the tag
          never pointed at another manifest.
        - ManifestBlobUnknown: a part of the image is missing.
        - PreconditionFailed: another client changed the tag during this call."""
        current = await self._history.current(repo, tag)
        if to is not None:
            digest: Digest | None = to
        elif at is not None:
            digest = await self._history.digest_at(repo, tag, at)
            if digest is None:
                raise ManifestUnknown(
                    f"{repo}:{tag} did not exist at that time; the tag's history shows when it existed"
                )
        else:
            digest = await self._history.last_other_digest(repo, tag, current)
            if digest is None:
                raise ManifestUnknown(
                    f"{repo} never had a tag {tag}"
                    if current is None
                    else f"{repo}:{tag} never pointed at anything other than {current}"
                )
        assert digest is not None
        # The tag must not have changed since `current` was read. `Condition(negated=True)`: the tag must not exist.
        unchanged = Condition(negated=True) if current is None else Condition(frozenset({current}))
        return await self._history.move(
            repo,
            tag,
            digest,
            by=by,
            condition=unchanged,
            is_immutable=self._immutable_tags.in_repository(repo),
            force=force,
        )

    async def delete(self, repo: RepositoryName, tag: Tag, *, by: Actor, force: bool = False) -> None:
        """Deletes the tag; its manifest stays. Raises ManifestUnknown if there is no such tag."""
        is_immutable = self._immutable_tags.in_repository(repo)
        await self._history.delete_tag(repo, tag, by=by, is_immutable=is_immutable, force=force)
