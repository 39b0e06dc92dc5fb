"""Retries of failed fetches: how long to wait, when to give up (`RetryPolicy`), and which endpoint to avoid
(`BadSenders`).

Also encodes the failure of a fill for the processes that follow it.
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
"""Seconds without progress after which a blob that has readers is given up. Longer than the restart of an upstream and
the first pauses of its circuit breaker."""
MIN_PROGRESS: Final = 64 * 1024
"""Bytes that count as progress."""
FIRST_RETRY_SECONDS: Final = 0.1
LONGEST_RETRY_SECONDS: Final = 2.0
ATTEMPTS_WITHOUT_BYTES: Final = 2
"""Attempts in a row before the first byte. The waiting client can still go to another registry and must get the error
soon."""


class RetryPolicy:
    """The back-off of one blob's download. Times are seconds of any monotonic clock."""

    def __init__(self, stall_timeout: float = STALL_TIMEOUT_SECONDS) -> None:
        self.resume_at = 0.0
        """When connections may be opened again."""
        self._stall_timeout = stall_timeout
        self._in_row = 0
        self._since = 0.0
        self._received = 0

    def should_retry(self, error: RegistryError, now: float, received: int, *, has_begun: bool) -> bool:
        """Returns whether the download continues, starting at `resume_at`. `received`: bytes received in total.
        `has_begun`: readers got some of them. A request that was not even sent, because of a rate limit or an open
        circuit breaker, counts like a failed one."""
        if received - self._received >= MIN_PROGRESS or not self._in_row:
            self._in_row, self._since = 0, now
        self._received = received
        pause = FIRST_RETRY_SECONDS * 2 ** min(self._in_row, 10)
        self._in_row += 1
        if has_begun:
            pause = min(pause, LONGEST_RETRY_SECONDS, max(self._stall_timeout / 20, FIRST_RETRY_SECONDS))
        if isinstance(error, TooManyRequests):
            pause = max(pause, float(error.retry_after))
        self.resume_at = now + pause
        if has_begun:
            return self.resume_at <= self._since + self._stall_timeout
        return (
            self._in_row < (1 if isinstance(error, UpstreamTimeout) else ATTEMPTS_WITHOUT_BYTES)
            and pause <= LONGEST_RETRY_SECONDS
        )

    @property
    def failures_in_row(self) -> int:
        """Failures since the last progress."""
        return self._in_row

    def resume_soon(self, now: float) -> None:
        """Allows another attempt soon, made in a different way."""
        self.resume_at = now + FIRST_RETRY_SECONDS


def encode_failure(repo: RepositoryName, error: RegistryError) -> str | None:
    """Returns the failure of a fill for `repo`, as text for its followers in other processes; None: the failure says
    nothing about what they would get."""
    if not isinstance(error, UpstreamUnavailable | TooManyRequests):
        return None
    kind = "late" if isinstance(error, UpstreamTimeout) else error.code
    return json.dumps({"repository": repo, "kind": kind, "message": error.message, "wait": error.retry_after})


def decode_failure(repo: RepositoryName, reason: str) -> RegistryError | None:
    """Returns the error that a fill for `repo` derives from a recorded failure; None: the record is about another
    repository, or cannot be read."""
    try:
        record = json.loads(reason)
        if record["repository"] != repo:
            return None
        kind, message, wait = record["kind"], str(record["message"]), record["wait"]
    except (ValueError, TypeError, LookupError):
        return None
    if kind == TooManyRequests.code:
        return TooManyRequests(message, retry_after=int(wait))
    failure = UpstreamTimeout if kind == "late" else UpstreamUnavailable
    return failure(message, retry_after=wait)


log = logging.getLogger("registry.mirror")

LONGEST_SENDER_PAUSE_SECONDS: Final = 30.0
"""Longest pause of an endpoint for one blob."""
FORGET_SENDER_SECONDS: Final = 600.0
"""Time after the last corrupt bytes until they are forgotten."""


def sender_pause(times: int) -> float:
    """Returns the seconds an endpoint is not asked for a blob after it sent corrupt bytes `times` times in a row: none
    after the first time, since bytes can be damaged in transit; then 2, 4, 8 and so on."""
    return 0.0 if times < 2 else min(2.0 ** (times - 1), LONGEST_SENDER_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class EndpointChoice:
    """The endpoints for one fetch. `last`: asked only when no other has the blob. `refused`: not used now, with the
    error to raise for each."""

    last: frozenset[str] = frozenset()
    refused: Mapping[str, UpstreamUnavailable] = field(default_factory=dict)


class BadSenders:
    """Remembers, across processes, which endpoints of one upstream sent corrupt bytes for a blob. `clock`: seconds
    since 1970."""

    def __init__(self, records: UpstreamRecords, upstream: UpstreamClient, clock: Callable[[], float]) -> None:
        self._records = records
        self._upstream = upstream
        self._clock = clock

    async def choose(self, repo: RepositoryName, digest: Digest) -> EndpointChoice:
        """Returns which endpoints to use; those that sent corrupt bytes more often than others come last. Raises
        UpstreamUnavailable, with the names and the time to retry, while all of them are paused."""
        wrong = await self._records.bad_senders(self._upstream.name, digest, FORGET_SENDER_SECONDS)
        if not wrong:
            return EndpointChoice()
        waits = {each: self._wait(wrong[each]) if each in wrong else 0.0 for each in self._upstream.endpoints}
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
        return min(seen.at + pause - self._clock(), pause)  # bounded, in case the clock was set back

    def _refusal(self, repo: RepositoryName, digest: Digest, endpoints: str, wait: float) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"the upstream {self._upstream.name} ({endpoints}) sent wrong bytes for {digest}; it is asked again in "
            f"{ceil(wait)} s, or at once after: entrepot mirror refresh {repo}@{digest}",
            {"digest": digest},
            retry_after=ceil(wait),
        )

    async def note(self, repo: RepositoryName, digest: Digest, endpoints: Collection[str]) -> None:
        """Records corrupt bytes. Called once per fetch, by the process that made it. Raises nothing: if the record
        fails, the same endpoint may be asked again."""
        log.error(
            "%s of %s does not match its digest, received from %s; the bytes are dropped",
            digest,
            repo,
            ", ".join(sorted(endpoints)) or "an endpoint asked by another process",
        )
        try:
            await self._records.save_bad_senders(self._upstream.name, digest, endpoints, FORGET_SENDER_SECONDS)
        except (StorageFull, StorageFailed) as error:
            log.warning("cannot record that %s sent corrupt bytes: %s", self._upstream.name, error.message)
