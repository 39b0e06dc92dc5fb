"""Decides whether a mirror answers a request from its cache or asks the upstream registry again. `Freshness` decides
this for manifests. `NegativeCache` caches which blobs the upstream does not have. The rules follow the RFCs about HTTP
caches (RFC 9111 and RFC 5861).

- A cached manifest that is requested by digest never expires.
- For one time to live (TTL) after an answer of the upstream about a tag, the tag is *fresh*: the mirror serves the
  cached copy.
- For another TTL, the tag is *stale*: the mirror serves the cached copy, and asks the upstream in the background.
- After the second TTL, the mirror asks the upstream before it serves the tag.
- A "not found" answer is cached for a short time.
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
    """How to respond to a request for a manifest."""

    FRESH = auto()
    """Serve the cached copy."""
    STALE = auto()
    """Serve the cached copy, and ask the upstream in the background."""
    ASK = auto()
    """Ask the upstream, and then respond."""
    MISSING = auto()
    """Respond that the manifest does not exist: the upstream has answered "not found" a short time ago."""


class Freshness:
    """Applies the TTLs of one upstream."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        """`settings`: the settings of the upstream. `tag_ttls` maps tag patterns to TTLs. `tag_ttl` is the TTL of all
        other tags. `miss_ttl` is the time for which a "not found" answer is cached. `clock`: returns seconds since
        1970."""
        self._settings = settings
        self._clock = clock

    def ttl(self, reference: Reference) -> float:
        """Returns the TTL of `reference` in seconds; infinity for a digest."""
        if isinstance(reference, Digest):
            return float("inf")
        for pattern, ttl in self._settings.tag_ttls.items():
            if fnmatchcase(reference, pattern):
                return ttl
        return self._settings.tag_ttl

    def age(self, check: UpstreamCheck) -> float:
        """Returns the seconds since `check`, a recorded answer of the upstream. Returns infinity if the time of the
        answer is a second or more in the future, which means that the clock was set back."""
        age = self._clock() - check.at
        return age if age > -1.0 else float("inf")

    def judge(self, reference: Reference, check: UpstreamCheck | None) -> Verdict:
        """Returns how to respond to a request for the manifest `reference`. `check`: the last recorded answer of the
        upstream about `reference`; None if no answer is recorded."""
        if check is None:
            return Verdict.ASK
        age = self.age(check)
        if not check.found:
            return Verdict.MISSING if age < self._settings.miss_ttl else Verdict.ASK
        ttl = self.ttl(reference)
        if age < ttl or isinstance(reference, Digest):
            return Verdict.FRESH
        return Verdict.STALE if age < 2 * ttl else Verdict.ASK

    def now(self) -> float:
        """Returns the current time in seconds since 1970."""
        return self._clock()


class NegativeCache:
    """Caches for a short time which blobs the upstream does not have. All processes share this cache. The records about
    blobs are separate from the records about manifests, because a digest may exist as a manifest but not as a blob."""

    def __init__(self, records: UpstreamRecords, freshness: Freshness) -> None:
        self._records = records
        self._freshness = freshness

    async def has(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the cache says that the repository of the upstream does not have the blob."""
        check = await self._records.last_check(repo, digest, blob=True)
        return self._freshness.judge(digest, check) is Verdict.MISSING

    async def add(self, repo: RepositoryName, digest: Digest) -> None:
        """Records that the repository of the upstream does not have the blob. If the record cannot be stored, ignores
        the error: the next request then asks the upstream again."""
        with suppress(StorageFull, StorageFailed):
            await self._records.save_check(repo, digest, found=False, blob=True)

    async def forget(self, repo: RepositoryName, digest: Digest) -> None:
        """Deletes the record about the blob, if there is one."""
        await self._records.forget_checks(repo, digest, blob=True)
