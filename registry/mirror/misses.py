"""Blobs an upstream said it has not: remembered for a short while, by all workers."""

from __future__ import annotations

from contextlib import suppress

from registry.mirror.freshness import Freshness, Verdict
from storage.errors import StorageFailed, StorageFull
from storage.interface import Records
from storage.names import Digest, RepositoryName, Tag


class Misses:
    """A blob's digest is noted under a name of its own: what is said of it as a manifest is another thing."""

    def __init__(self, records: Records, freshness: Freshness) -> None:
        self._records = records
        self._freshness = freshness

    async def has(self, repo: RepositoryName, digest: Digest) -> bool:
        """Whether the upstream said a moment ago that the repository has no such blob."""
        name = _name(digest)
        return self._freshness.judge(name, await self._records.check(repo, name)) is Verdict.UNKNOWN

    async def note(self, repo: RepositoryName, digest: Digest) -> None:
        """What cannot be kept is asked for again."""
        with suppress(StorageFull, StorageFailed):
            await self._records.note_check(repo, _name(digest), False)

    async def forget(self, repo: RepositoryName, digest: Digest) -> None:
        await self._records.forget_checks(repo, _name(digest))


def _name(digest: Digest) -> Tag:
    return Tag(f"_blob.{digest.algorithm}.{digest.encoded}"[:128])
