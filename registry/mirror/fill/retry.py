"""What follows when a connection to the upstream breaks: for how long it is waited, when a blob is given up, and how
that is told to the processes that follow the fill.

Which endpoints sent wrong bytes for a blob, remembered by all processes: others are asked first, and where there is
none, nobody is asked for a moment that grows with each fetch that brings wrong bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Final

from registry.mirror.upstream_client import UpstreamClient
from storage.content import BadSender
from storage.errors import (
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from storage.upstream_records import UpstreamRecords

STALL_TIMEOUT_SECONDS: Final = 45.0
"""Seconds without progress after which a blob that somebody is in the middle of is given up: an upstream may be started
anew meanwhile, and one that did not answer is asked again only after a moment."""
MIN_PROGRESS: Final = 64 * 1024
"""Bytes worth counting."""
FIRST_RETRY_SECONDS: Final = 0.1
LONGEST_RETRY_SECONDS: Final = 2.0
ATTEMPTS_WITHOUT_BYTES: Final = 2
"""In a row, before anything has come: whoever waits can still go elsewhere, and must learn of it soon."""


class RetryPolicy:
    """Of one blob. Times are in seconds of any clock that runs on."""

    def __init__(self, persistence: float = STALL_TIMEOUT_SECONDS) -> None:
        self.resume_at = 0.0
        """When connections may be made again."""
        self._persistence = persistence
        self._in_row = 0
        self._since = 0.0
        self._received = 0

    def should_retry(self, error: RegistryError, now: float, received: int, *, begun: bool) -> bool:
        """Whether it is gone on with, from `resume_at` on. `received` bytes have come in all; `begun`: somebody has
        been given some. What does not even send a request, since it would be in vain now, counts like any other."""
        if received - self._received >= MIN_PROGRESS or not self._in_row:
            self._in_row, self._since = 0, now
        self._received = received
        pause = FIRST_RETRY_SECONDS * 2 ** min(self._in_row, 10)
        self._in_row += 1
        if begun:
            pause = min(pause, LONGEST_RETRY_SECONDS, max(self._persistence / 20, FIRST_RETRY_SECONDS))
        if isinstance(error, TooManyRequests):
            pause = max(pause, float(error.retry_after))
        self.resume_at = now + pause
        if begun:
            return self.resume_at <= self._since + self._persistence
        return (
            self._in_row < (1 if isinstance(error, UpstreamTimeout) else ATTEMPTS_WITHOUT_BYTES)
            and pause <= LONGEST_RETRY_SECONDS
        )

    @property
    def failures_in_row(self) -> int:
        """Breaks since something came."""
        return self._in_row

    def resume_soon(self, now: float) -> None:
        """It is tried in another way."""
        self.resume_at = now + FIRST_RETRY_SECONDS


def encode_failure(repo: RepositoryName, error: RegistryError) -> str | None:
    """Why a fill for `repo` was given up, for those who follow it in other processes. None: that says nothing of what
    they would get."""
    if not isinstance(error, UpstreamUnavailable | TooManyRequests):
        return None
    kind = "late" if isinstance(error, UpstreamTimeout) else error.code
    return json.dumps({"repository": repo, "kind": kind, "message": error.message, "wait": error.retry_after})


def decode_failure(repo: RepositoryName, reason: str) -> RegistryError | None:
    """What a reason comes to for a fill for `repo`. None: nothing, since it is about another repository, or cannot be
    read."""
    try:
        told = json.loads(reason)
        if told["repository"] != repo:
            return None
        kind, message, wait = told["kind"], str(told["message"]), told["wait"]
    except (ValueError, TypeError, LookupError):
        return None
    if kind == TooManyRequests.code:
        return TooManyRequests(message, retry_after=int(wait))
    failure = UpstreamTimeout if kind == "late" else UpstreamUnavailable
    return failure(message, retry_after=wait)


log = logging.getLogger("registry.mirror")

LONGEST_SENDER_PAUSE_SECONDS: Final = 30.0
"""Seconds."""
FORGET_SENDER_SECONDS: Final = 600.0
"""Seconds after the last wrong bytes until they are forgotten."""


def sender_pause(times: int) -> float:
    """Seconds for which an endpoint is not asked for a blob that it sent wrong so many times in a row: none after the
    first, since bytes can be damaged on their way; then 2, 4, 8 and so on."""
    return 0.0 if times < 2 else min(2.0 ** (times - 1), LONGEST_SENDER_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class EndpointChoice:
    """Of the endpoints for one fetch. `last`: to be asked only when no other has the blob. `refused`: not to be taken
    from at all now, and what is said instead."""

    last: frozenset[str] = frozenset()
    refused: Mapping[str, UpstreamUnavailable] = field(default_factory=dict)


class BadSenders:
    """At one upstream. `clock`: seconds since 1970."""

    def __init__(self, records: UpstreamRecords, source: UpstreamClient, clock: Callable[[], float]) -> None:
        self._records = records
        self._source = source
        self._clock = clock

    async def choose(self, repo: RepositoryName, digest: Digest) -> EndpointChoice:
        """Those that sent the blob wrong more often than others come last. Raises UpstreamUnavailable, which says who
        sent wrong bytes and when to come again, while all of them are left alone."""
        wrong = await self._records.bad_senders(self._source.name, digest, FORGET_SENDER_SECONDS)
        if not wrong:
            return EndpointChoice()
        waits = {each: self._wait(wrong[each]) if each in wrong else 0.0 for each in self._source.endpoints}
        free = [each for each, wait in waits.items() if wait <= 0]
        if not free:
            raise self._refusal(repo, digest, ", ".join(waits), min(waits.values()))
        least = min(wrong[each].times if each in wrong else 0 for each in free)
        last = frozenset(each for each, seen in wrong.items() if seen.times > least)
        return EndpointChoice(
            last, {each: self._refusal(repo, digest, each, wait) for each, wait in waits.items() if wait > 0}
        )

    def _wait(self, seen: BadSender) -> float:
        pause = sender_pause(seen.times)
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
            await self._records.note_bad_senders(self._source.name, digest, endpoints, FORGET_SENDER_SECONDS)
        except (StorageFull, StorageFailed) as error:
            log.warning("that %s sent wrong bytes could not be kept: %s", self._source.name, error.message)
