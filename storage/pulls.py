"""The interface of the store of pulls (`Pulls`): when each manifest was last pulled, and how often.

A *pull* is a GET or HEAD request of a client for a manifest. HEAD counts too, because a client whose copy of an image
is current sends no GET. A request that the server itself makes, for example to warm a mirror, is no pull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from storage.names import Digest, RepositoryName

MAX_SAVED_PULLS: Final = 500
"""Largest number of entries in one call of `Pulls.save`."""


@dataclass(frozen=True, slots=True)
class PullCount:
    """New pulls of one manifest. `repository`: the name under which the store has its repository. For a mirrored
    repository, it begins with the name of the upstream, which clients may leave out. `upstream`: the name of the
    upstream registry whose mirror has the repository; '' for a hosted repository, one to which clients push. `last`:
    time of the last of these pulls, in seconds since 1970. `pulls`: number of the pulls."""

    repository: RepositoryName
    digest: Digest
    upstream: str
    last: float
    pulls: int


@dataclass(frozen=True, slots=True)
class PullRecord:
    """All pulls of one manifest so far. `upstream`: see `PullCount`. `last`: when it was last pulled, in seconds since
    1970; for a mirrored or imported manifest without pulls, when it was stored. `pulls`: how often it was pulled."""

    upstream: str
    last: float
    pulls: int


class Pulls(Protocol):
    """The store of pulls, which all processes share."""

    async def save(self, counts: Sequence[PullCount]) -> None:
        """Adds pulls, at most `MAX_SAVED_PULLS` entries. Ignores entries of manifests that are not stored. The pulls
        survive the end of the process, but a power cut may lose the newest ones. Raises StorageFull, StorageFailed."""
        ...

    async def mark_recorded(self, now: float) -> None:
        """Records that a server runs and has saved all pulls until `now`, in seconds since 1970. Times without such
        records are gaps (`storage.recorded_periods`). Raises StorageFull, StorageFailed."""
        ...

    async def record(self, repo: RepositoryName, digest: Digest) -> PullRecord | None:
        """Returns the record of a manifest. Returns None if there is no such manifest, or if it has no pulls and is
        neither mirrored nor imported. `repo`: see `PullCount.repository`."""
        ...
