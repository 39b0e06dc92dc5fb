"""Which endpoints sent wrong bytes for a blob, remembered by all processes: others are asked first, and where there is
none, nobody is asked for a moment that grows with each fetch that brings wrong bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Final

from registry.mirror.source import Source
from storage.content import WrongBytes
from storage.errors import StorageFailed, StorageFull, UpstreamUnavailable
from storage.interface import Records
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

LONGEST_PAUSE: Final = 30.0
"""Seconds."""
MEMORY: Final = 600.0
"""Seconds after the last wrong bytes until they are forgotten."""


def pause_after(times: int) -> float:
    """Seconds for which an endpoint is not asked for a blob that it sent wrong so many times in a row: none after the
    first, since bytes can be damaged on their way; then 2, 4, 8 and so on."""
    return 0.0 if times < 2 else min(2.0 ** (times - 1), LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class Choice:
    """Of the endpoints for one fetch. `last`: to be asked only when no other has the blob. `refused`: not to be taken
    from at all now, and what is said instead."""

    last: frozenset[str] = frozenset()
    refused: Mapping[str, UpstreamUnavailable] = field(default_factory=dict)


class Suspicions:
    """At one upstream. `clock`: seconds since 1970."""

    def __init__(self, records: Records, source: Source, clock: Callable[[], float]) -> None:
        self._records = records
        self._source = source
        self._clock = clock

    async def choose(self, repo: RepositoryName, digest: Digest) -> Choice:
        """Those that sent the blob wrong more often than others come last. Raises UpstreamUnavailable, which says who
        sent wrong bytes and when to come again, while all of them are left alone."""
        wrong = await self._records.wrong_senders(self._source.name, digest, MEMORY)
        if not wrong:
            return Choice()
        waits = {each: self._wait(wrong[each]) if each in wrong else 0.0 for each in self._source.endpoints}
        free = [each for each, wait in waits.items() if wait <= 0]
        if not free:
            raise self._refusal(repo, digest, ", ".join(waits), min(waits.values()))
        least = min(wrong[each].times if each in wrong else 0 for each in free)
        last = frozenset(each for each, seen in wrong.items() if seen.times > least)
        return Choice(last, {each: self._refusal(repo, digest, each, wait) for each, wait in waits.items() if wait > 0})

    def _wait(self, seen: WrongBytes) -> float:
        pause = pause_after(seen.times)
        return min(seen.at + pause - self._clock(), pause)  # no longer, where the clock was set back

    def _refusal(self, repo: RepositoryName, digest: Digest, endpoints: str, wait: float) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"the upstream {self._source.name} ({endpoints}) sent wrong bytes for {digest}; it is asked again in "
            f"{ceil(wait)} s, or at once after: entrepot mirror refresh {repo}@{digest}",
            {"digest": digest},
            retry_after=ceil(wait),
        )

    async def note(self, repo: RepositoryName, digest: Digest, endpoints: Collection[str]) -> None:
        """One fetch brought wrong bytes: called once for each, by the process that made it. Raises nothing: where it
        cannot be kept, the same may be asked again."""
        log.error(
            "%s of %s came with other bytes than its digest says, from %s; nothing of it is kept",
            digest,
            repo,
            ", ".join(sorted(endpoints)) or "whom another process asked",
        )
        try:
            await self._records.note_wrong(self._source.name, digest, endpoints, MEMORY)
        except (StorageFull, StorageFailed) as error:
            log.warning("that %s sent wrong bytes could not be kept: %s", self._source.name, error.message)
