"""The endpoints of one upstream: which to ask first, and which to leave alone for a while.

A circuit breaker for each: closed while it answers; open, and not asked, after LIMIT failures in a row; then half open:
one request tries it, and closes or opens it again. What was learnt is this process's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from registry.config import Upstream
from storage.errors import UpstreamUnavailable

log = logging.getLogger(__name__)

LIMIT = 3
"""Failures in a row that open the breaker."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds it stays open at first; doubled by each try that fails."""


class Trial:
    """One request to an endpoint. `answered` says that the endpoint lives, whatever happens to the request: others may
    be sent there from then on, though this one may take long, as blobs do."""

    def __init__(self, lives: Callable[[], None]) -> None:
        self.alive = False
        self._lives = lives

    def answered(self) -> None:
        if not self.alive:
            self.alive = True
            self._lives()


class Endpoint:
    """Where an upstream answers, and how that went lately."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.url = url
        self.failures = 0
        self._clock = clock
        self._failed_at = 0.0
        self._pause = FIRST_PAUSE
        self._tried = False

    @property
    def open(self) -> bool:
        """Not to be asked now."""
        if self.failures < LIMIT:
            return False
        return self._tried or self.wait > 0

    @property
    def wait(self) -> float:
        """Seconds until it is tried again."""
        # A clock that was set back must not keep it open for longer.
        return min(self._failed_at + self._pause - self._clock(), self._pause)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Around one request: counts UpstreamUnavailable and its kind, unless the endpoint `answered`."""
        started, half_open = self._clock(), self.failures >= LIMIT
        trial = Trial(self._lives)
        self._tried = self._tried or half_open
        try:
            yield trial
            trial.answered()
        except UpstreamUnavailable:
            if not trial.alive:
                self._failed(started)
            raise
        finally:
            if half_open and not trial.alive:
                self._tried = False

    def _lives(self) -> None:
        if self.failures >= LIMIT:
            log.info("the upstream endpoint %s answers again", self.url)
        self.failures, self._pause, self._tried = 0, FIRST_PAUSE, False

    def _failed(self, started: float) -> None:
        # Requests that went out before the last failure was seen failed with it: one event, one count.
        if self.failures and started < self._failed_at:
            return
        if self.failures >= LIMIT:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        self.failures += 1
        self._failed_at = self._clock()
        if self.failures == LIMIT:
            log.warning("the upstream endpoint %s does not answer; it is left alone for a moment", self.url)


class Endpoints:
    """All of one upstream's, in the order of its settings."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._name = settings.name
        self.all = [Endpoint(url, clock) for url in dict.fromkeys(settings.endpoints)]

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self.all]

    def order(self, avoid: Collection[str] = ()) -> list[Endpoint]:
        """Whom to ask, the first first: those that failed last time come later, those in `avoid` last; without those
        that are left alone."""
        found = [endpoint for endpoint in self.all if not endpoint.open]
        return sorted(found, key=lambda endpoint: (endpoint.url in avoid, _ailing(endpoint)))

    def resting(self, asked: Collection[Endpoint]) -> list[UpstreamUnavailable]:
        """What is to be said of those that are not among the `asked`, if there are any."""
        waits = [endpoint.wait for endpoint in self.all if endpoint not in asked]
        if not waits:
            return []
        wait = max(1, round(min(waits)))
        return [
            UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait} s"
            )
        ]


def _ailing(endpoint: Endpoint) -> bool:
    # One whose pause is over keeps its place: if it came last, nobody would ever find out that it is back.
    return 0 < endpoint.failures < LIMIT
