"""Blobs an upstream said it has not: remembered for a short while, by all workers."""

from __future__ import annotations

from contextlib import suppress

from registry.mirror.freshness import Freshness, Verdict
from storage.errors import StorageFailed, StorageFull
from storage.interface import Records
from storage.names import Digest, RepositoryName


class Misses:
    """Noted as of blobs: what is said of the same digest as a manifest, or of any tag, is another thing."""

    def __init__(self, records: Records, freshness: Freshness) -> None:
        self._records = records
        self._freshness = freshness

    async def has(self, repo: RepositoryName, digest: Digest) -> bool:
        """Whether the upstream said a moment ago that the repository has no such blob."""
        check = await self._records.check(repo, digest, blob=True)
        return self._freshness.judge(digest, check) is Verdict.UNKNOWN

    async def note(self, repo: RepositoryName, digest: Digest) -> None:
        """What cannot be kept is asked for again."""
        with suppress(StorageFull, StorageFailed):
            await self._records.note_check(repo, digest, False, blob=True)

    async def forget(self, repo: RepositoryName, digest: Digest) -> None:
        await self._records.forget_checks(repo, digest, blob=True)
