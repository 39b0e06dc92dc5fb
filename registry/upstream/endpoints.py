"""The endpoints of one upstream: which to ask first, and which to leave alone for a while.

A circuit breaker for each: closed while it answers; open, and not asked, after LIMIT failures in a row; then half open:
one request tries it, and closes or opens it again. What was learnt is this process's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from registry.config import Upstream
from storage.errors import RegistryError, UpstreamUnavailable

log = logging.getLogger(__name__)

LIMIT = 3
"""Failures in a row that open the breaker."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds it stays open at first; doubled by each try that fails."""


class Trial:
    """One request to an endpoint. `answered` says that the endpoint lives, whatever happens to the request."""

    def __init__(self) -> None:
        self.alive = False

    def answered(self) -> None:
        self.alive = True


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
        trial, started, half_open = Trial(), self._clock(), self.failures >= LIMIT
        self._tried = self._tried or half_open
        try:
            yield trial
            self._lives()
        except UpstreamUnavailable:
            if trial.alive:
                self._lives()
            else:
                self._failed(started)
            raise
        except BaseException as error:
            if trial.alive or isinstance(error, RegistryError):
                self._lives()
            raise
        finally:
            if half_open:
                self._tried = False

    def _lives(self) -> None:
        if self.failures >= LIMIT:
            log.info("the upstream endpoint %s answers again", self.url)
        self.failures, self._pause = 0, FIRST_PAUSE

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
        """Whom to ask, the first first: those that failed last time come later, those in `avoid` last. Raises
        UpstreamUnavailable when none is to be asked now."""
        found = [endpoint for endpoint in self.all if not endpoint.open]
        if not found:
            wait = max(1, round(min(endpoint.wait for endpoint in self.all)))
            raise UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait} s"
            )
        return sorted(found, key=lambda endpoint: (endpoint.url in avoid, _ailing(endpoint)))


def _ailing(endpoint: Endpoint) -> bool:
    # One whose pause is over keeps its place: if it came last, nobody would ever find out that it is back.
    return 0 < endpoint.failures < LIMIT
