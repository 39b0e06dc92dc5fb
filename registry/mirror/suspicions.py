"""Who sent wrong bytes for a blob: remembered for a short while, by all processes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

from storage.errors import StorageFailed, StorageFull, UpstreamUnavailable
from storage.interface import Records
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

TRIES: Final = 3
"""Times one endpoint may send a blob wrong before the blob is left alone for a while."""
GRUDGE: Final = 60.0
"""Seconds for which it is remembered."""


class Suspicions:
    """At one upstream, `name`."""

    def __init__(self, records: Records, name: str) -> None:
        self._records = records
        self._name = name

    async def avoided(self, digest: Digest) -> frozenset[str]:
        """The endpoints not to be asked for the blob while there are others: those that sent it wrong most often.
        Raises UpstreamUnavailable when one did so too often, since by then the others must have been tried."""
        times = await self._records.wrong_senders(self._name, digest, GRUDGE)
        worst = max(times.values(), default=0)
        if worst >= TRIES:
            raise UpstreamUnavailable(f"the upstream has sent wrong bytes for {digest} {worst} times")
        return frozenset(endpoint for endpoint, count in times.items() if count == worst)

    async def note(self, repo: RepositoryName, digest: Digest, endpoints: Collection[str]) -> None:
        """Raises nothing: where it cannot be kept, the same may be asked again."""
        log.error(
            "%s of %s came with other bytes than its digest says, from %s; nothing of it is kept",
            digest,
            repo,
            ", ".join(sorted(endpoints)) or "whom another process asked",
        )
        try:
            await self._records.note_wrong(self._name, digest, endpoints, GRUDGE)
        except (StorageFull, StorageFailed) as error:
            log.warning("that %s sent wrong bytes could not be kept: %s", self._name, error.message)
