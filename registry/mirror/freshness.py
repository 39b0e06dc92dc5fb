"""Decides how long an upstream's answers are trusted (as RFC 9111 and RFC 5861 do for HTTP caches).

A digest never expires. A tag is fresh for its time to live (TTL). For one more TTL it is stale: it is served while the
upstream is asked in the background. After that the upstream is asked first. "Not found" answers are cached for a short
time.
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
    """What to do when a reference is requested."""

    FRESH = auto()
    """Serve the local copy."""
    STALE = auto()
    """Serve the local copy, and ask the upstream in the background."""
    ASK = auto()
    """Ask the upstream first."""
    UNKNOWN = auto()
    """Answer "not found": the upstream said so a short time ago."""


class Freshness:
    """The TTLs of one upstream. `clock`: seconds since 1970."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock

    def ttl(self, reference: Reference) -> float:
        """Returns the seconds for which `reference` is fresh."""
        if isinstance(reference, Digest):
            return float("inf")
        for pattern, ttl in self._settings.tag_ttls.items():
            if fnmatchcase(reference, pattern):
                return ttl
        return self._settings.tag_ttl

    def age(self, check: UpstreamCheck) -> float:
        """Returns the seconds since `check`. After the clock was set back, the age is infinite."""
        age = self._clock() - check.at
        return age if age > -1.0 else float("inf")

    def judge(self, reference: Reference, check: UpstreamCheck | None) -> Verdict:
        """Returns the verdict for a reference whose last recorded answer is `check`; None: none is recorded."""
        if check is None:
            return Verdict.ASK
        age = self.age(check)
        if not check.found:
            return Verdict.UNKNOWN if age < self._settings.miss_ttl else Verdict.ASK
        ttl = self.ttl(reference)
        if age < ttl or isinstance(reference, Digest):
            return Verdict.FRESH
        return Verdict.STALE if age < 2 * ttl else Verdict.ASK

    def now(self) -> float:
        return self._clock()


class NegativeCache:
    """Blobs that the upstream said it does not have, cached for a short time and shared by all workers. Separate from
    answers about manifests, since the same digest may exist as one and not as the other."""

    def __init__(self, records: UpstreamRecords, freshness: Freshness) -> None:
        self._records = records
        self._freshness = freshness

    async def has(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream said a short time ago that the repository has no such blob."""
        check = await self._records.last_check(repo, digest, blob=True)
        return self._freshness.judge(digest, check) is Verdict.UNKNOWN

    async def note(self, repo: RepositoryName, digest: Digest) -> None:
        """Records that the repository has no such blob. A failure to record is ignored: the upstream is then asked
        again."""
        with suppress(StorageFull, StorageFailed):
            await self._records.save_check(repo, digest, False, blob=True)

    async def forget(self, repo: RepositoryName, digest: Digest) -> None:
        """Drops the record about the blob."""
        await self._records.forget_checks(repo, digest, blob=True)
