"""What follows when a connection to the upstream breaks: for how long it is waited, when a blob is given up, and how
that is told to the processes that follow the fill."""

from __future__ import annotations

import json
from typing import Final

from storage.errors import RegistryError, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import RepositoryName

PERSISTENCE: Final = 45.0
"""Seconds without progress after which a blob that somebody is in the middle of is given up: an upstream may be started
anew meanwhile, and one that did not answer is asked again only after a moment."""
PROGRESS: Final = 64 * 1024
"""Bytes worth counting."""
PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
ATTEMPTS: Final = 2
"""In a row, before anything has come: whoever waits can still go elsewhere, and must learn of it soon."""


class Breaks:
    """Of one blob. Times are in seconds of any clock that runs on."""

    def __init__(self, persistence: float = PERSISTENCE) -> None:
        self.resume_at = 0.0
        """When connections may be made again."""
        self._persistence = persistence
        self._in_row = 0
        self._since = 0.0
        self._received = 0

    def persist(self, error: RegistryError, now: float, received: int, *, begun: bool) -> bool:
        """Whether it is gone on with, from `resume_at` on. `received` bytes have come in all; `begun`: somebody has
        been given some. What does not even send a request, since it would be in vain now, counts like any other."""
        if received - self._received >= PROGRESS or not self._in_row:
            self._in_row, self._since = 0, now
        self._received = received
        pause = PAUSE * 2 ** min(self._in_row, 10)
        self._in_row += 1
        if begun:
            pause = min(pause, LONGEST_PAUSE, max(self._persistence / 20, PAUSE))
        if isinstance(error, TooManyRequests):
            pause = max(pause, float(error.retry_after))
        self.resume_at = now + pause
        if begun:
            return self.resume_at <= self._since + self._persistence
        return self._in_row < (1 if isinstance(error, UpstreamTimeout) else ATTEMPTS) and pause <= LONGEST_PAUSE

    @property
    def in_row(self) -> int:
        """Breaks since something came."""
        return self._in_row

    def once_more(self, now: float) -> None:
        """It is tried in another way."""
        self.resume_at = now + PAUSE


def reason_of(repo: RepositoryName, error: RegistryError) -> str | None:
    """Why a fill for `repo` was given up, for those who follow it in other processes. None: that says nothing of what
    they would get."""
    if not isinstance(error, UpstreamUnavailable | TooManyRequests):
        return None
    kind = "late" if isinstance(error, UpstreamTimeout) else error.code
    return json.dumps({"repository": repo, "kind": kind, "message": error.message, "wait": error.retry_after})


def failure_from(repo: RepositoryName, reason: str) -> RegistryError | None:
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
