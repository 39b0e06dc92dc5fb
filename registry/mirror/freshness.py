"""How long what an upstream said may be trusted (RFC 9111 and 5861 say the same of HTTP caches).

A digest never expires. A tag is fresh for its time to live; as long again it is served as it is while somebody asks
upstream; after that it is asked for first. That the upstream knows something not is remembered for a short while.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from fnmatch import fnmatchcase

from registry.config import Upstream
from storage.content import Check
from storage.names import Digest, Reference


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

    def age(self, check: Check) -> float:
        """Seconds since that check. A clock that was set back makes it old, not young."""
        age = self._clock() - check.at
        return age if age > -1.0 else float("inf")

    def judge(self, reference: Reference, check: Check | None) -> Verdict:
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
