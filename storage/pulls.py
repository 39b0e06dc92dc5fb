"""The interface of the store of pulls (`Pulls`): when each manifest was last pulled, and how often.

A *pull* is a GET or HEAD request of a client for a manifest. HEAD counts, because a client that already has the image
sends only HEAD. A request that the server itself makes, for example to warm a mirror, is no pull.
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
    """Pulls of one manifest that are not saved yet.

    - `repository`: the name of the manifest's repository in the store. The name of a mirrored repository begins with
      the name of its upstream registry, which clients may leave out.
    - `upstream`: the name of the upstream registry; '' if the repository is not mirrored.
    - `last`: time of the last of these pulls, in seconds since 1970.
    - `pulls`: number of these pulls."""

    repository: RepositoryName
    digest: Digest
    upstream: str
    last: float
    pulls: int


@dataclass(frozen=True, slots=True)
class PullRecord:
    """All pulls of one manifest so far.

    - `upstream`: see `PullCount`.
    - `last`: time of the last pull, in seconds since 1970. If `pulls` is 0, `last` is the time at which the manifest
      was stored.
    - `pulls`: number of pulls. It can be 0 only for a mirrored or imported manifest."""

    upstream: str
    last: float
    pulls: int


class Pulls(Protocol):
    """The store of pulls, which all processes share."""

    async def save(self, counts: Sequence[PullCount]) -> None:
        """Adds the pulls in `counts` to the records of the manifests. `counts` has at most `MAX_SAVED_PULLS` entries.
        Ignores manifests that are not stored. Saved pulls survive the end of the process, but a power cut may lose the
        newest ones. Raises StorageFull, StorageFailed."""
        ...

    async def mark_pulls_recorded(self, now: float) -> None:
        """Records that a server runs and has saved all pulls until `now`, in seconds since 1970. The times of
        these calls define the periods in which pulls were recorded (`storage.recorded_periods.RecordedPeriods`).
        Raises StorageFull, StorageFailed."""
        ...

    async def record_of(self, repo: RepositoryName, digest: Digest) -> PullRecord | None:
        """Returns the record of a manifest. `repo`: see `PullCount.repository`. Returns None if the manifest
        is not stored. Also returns None for a hosted manifest without pulls, unless it was imported."""
        ...
