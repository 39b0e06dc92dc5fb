"""How long what an upstream said may be trusted (RFC 9111 and 5861 say the same of HTTP caches).

A digest never expires. A tag is fresh for its time to live; as long again it is served as it is while somebody asks
upstream; after that it is asked for first. That the upstream knows something not is remembered for a short while.

Blobs an upstream said it has not: remembered for a short while, by all workers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from fnmatch import fnmatchcase

from registry.config import Upstream
from storage.content import UpstreamCheck
from storage.errors import StorageFailed, StorageFull
from storage.names import Digest, Reference, RepositoryName
from storage.upstream_records import UpstreamRecords


class Verdict(Enum):
    """What to do about a reference."""

    FRESH = auto()
    """Serve what is here."""
    STALE = auto()
    """Serve what is here, and ask meanwhile."""
    ASK = auto()
    """Ask first."""
    UNKNOWN = auto()
    """The upstream said a moment ago that it has no such thing."""


class Freshness:
    """The times set for one upstream. `clock` gives seconds since 1970."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock

    def ttl(self, reference: Reference) -> float:
        """Seconds for which `reference` is trusted."""
        if isinstance(reference, Digest):
            return float("inf")
        for pattern, ttl in self._settings.tag_ttls.items():
            if fnmatchcase(reference, pattern):
                return ttl
        return self._settings.tag_ttl

    def age(self, check: UpstreamCheck) -> float:
        """Seconds since that check. A clock that was set back makes it old, not young."""
        age = self._clock() - check.at
        return age if age > -1.0 else float("inf")

    def judge(self, reference: Reference, check: UpstreamCheck | None) -> Verdict:
        if check is None:
            return Verdict.ASK
        age = self.age(check)
        if not check.known:
            return Verdict.UNKNOWN if age < self._settings.miss_ttl else Verdict.ASK
        ttl = self.ttl(reference)
        if age < ttl or isinstance(reference, Digest):
            return Verdict.FRESH
        return Verdict.STALE if age < 2 * ttl else Verdict.ASK

    def now(self) -> float:
        return self._clock()


class NegativeCache:
    """Noted as of blobs: what is said of the same digest as a manifest, or of any tag, is another thing."""

    def __init__(self, records: UpstreamRecords, freshness: Freshness) -> None:
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
