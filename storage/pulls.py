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
    """New pulls of one manifest.

    - `repository`: the name of the manifest's repository in the store. The name of a mirrored repository begins with
      the name of its upstream registry, which clients may leave out.
    - `upstream`: the name of the upstream registry; '' for a hosted repository, to which clients push.
    - `last`: time of the last of the new pulls, in seconds since 1970.
    - `pulls`: number of the new pulls."""

    repository: RepositoryName
    digest: Digest
    upstream: str
    last: float
    pulls: int


@dataclass(frozen=True, slots=True)
class PullRecord:
    """All pulls of one manifest so far.

    - `upstream`: see `PullCount`.
    - `last`: time of the last pull, in seconds since 1970. A manifest without pulls has a record only if it is mirrored
      or imported; `last` is then the time at which it was stored.
    - `pulls`: number of pulls."""

    upstream: str
    last: float
    pulls: int


class Pulls(Protocol):
    """The store of pulls, which all processes share."""

    async def save(self, counts: Sequence[PullCount]) -> None:
        """Adds the pulls in `counts`, which has at most `MAX_SAVED_PULLS` entries. Ignores the pulls of manifests that
        are not stored. Saved pulls survive the end of the process, but a power cut may lose the newest ones. Raises
        StorageFull, StorageFailed."""
        ...

    async def mark_recorded(self, now: float) -> None:
        """Records that a server runs and has saved all pulls until `now`, in seconds since 1970. A time without this
        record is a gap (`storage.recorded_periods`). Raises StorageFull, StorageFailed."""
        ...

    async def record_of(self, repo: RepositoryName, digest: Digest) -> PullRecord | None:
        """Returns the record of a manifest. `repo`: see `PullCount.repository`. Returns None in two cases: if the
        manifest is not stored, or if it has no pulls and is neither mirrored nor imported."""
        ...
