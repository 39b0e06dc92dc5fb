"""The endpoints of one upstream: which to ask first, and which to leave alone for a while.

A circuit breaker for each: closed while it answers; open, and not asked, after LIMIT failures in a row; then half open:
one request tries it, and closes or opens it again. What was learnt is this process's own.

A failure is a request to the endpoint itself that got no answer, or one that says that the server is ill. What is wrong
with an answer, with a redirect's target or with a token service is no failure of the endpoint. 500 is about its
request: it is no failure, and does not end a row of them. No connection says that
it is ill for everybody; no answer, or an ill one, says so only once LIMIT repositories had it, since one repository's
storage may be what is broken: until then the breaker is open for the repositories that failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from registry.config import Upstream
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

FAILURES_TO_OPEN = 3
"""Failures in a row that open the breaker."""
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 5.0, 60.0
"""Seconds it stays open at first; doubled by each try that fails."""


class EndpointAttempt:
    """One request to an endpoint, and those that follow for the same thing. `lives` is called once it has answered:
    others may be sent there from then on, though this one may take long, as blobs do."""

    seconds: float | None = None
    """For all of them; None: as long as they take."""

    def __init__(self, on_alive: Callable[[], None]) -> None:
        self.alive = False
        self.unreachable = False
        self._waiting = False
        self._ill = False
        self._on_alive = on_alive

    @property
    def failed(self) -> bool:
        """The endpoint is to blame if this ends with an error now."""
        return not self.alive and (self._waiting or self._ill)

    def on_sent(self) -> None:
        """A request is on its way to the endpoint."""
        self._waiting = True

    def on_headers(self, status: int) -> None:
        """The endpoint has answered the request."""
        self._waiting = False
        self._ill = status >= 501  # 500 is about this request, the others about the server
        if not self._ill and status not in (401, 500):  # after a token was got, it may still fail
            self.on_alive()

    def on_connection_failed(self) -> None:
        """No connection to the endpoint came about."""
        self.unreachable = True

    def on_alive(self) -> None:
        """The endpoint lives, whatever happens to the request."""
        self._waiting = self._ill = False
        if not self.alive:
            self.alive = True
            self._on_alive()


class UpstreamEndpoint:
    """Where an upstream answers, and how that went lately."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.url = url
        self.failures = 0
        self._clock = clock
        self._failed_at = 0.0
        self._pause = FIRST_OPEN_SECONDS
        self._tried = False
        self._failing: set[str] = set()  # repositories
        self._down = False

    def is_open_for(self, repo: str) -> bool:
        """Not to be asked for that repository now."""
        if self.failures < FAILURES_TO_OPEN or not self._concerns(repo):
            return False
        return self._tried or self.wait > 0

    def is_failing_for(self, repo: str) -> bool:
        """It failed the last time. One whose pause is over keeps its place: if it came last, nobody would ever find
        out that it is back."""
        return 0 < self.failures < FAILURES_TO_OPEN and self._concerns(repo)

    @property
    def wait(self) -> float:
        """Seconds until it is tried again."""
        # A clock that was set back must not keep it open for longer.
        return min(self._failed_at + self._pause - self._clock(), self._pause)

    @contextmanager
    def attempt(self, repo: str) -> Iterator[EndpointAttempt]:
        """Around the requests for one thing of that repository."""
        started, half_open = self._clock(), self.failures >= FAILURES_TO_OPEN and self._concerns(repo)
        attempt = EndpointAttempt(self._on_success)
        self._tried = self._tried or half_open
        try:
            yield attempt
            attempt.on_alive()
        except UpstreamUnavailable:
            if attempt.failed:
                self._on_failure(started, None if attempt.unreachable else repo)
            raise
        finally:
            if half_open and not attempt.alive:
                self._tried = False

    def _concerns(self, repo: str) -> bool:
        return self._down or repo in self._failing

    def _on_success(self) -> None:
        if self.failures >= FAILURES_TO_OPEN:
            log.info("the upstream endpoint %s answers again", self.url)
        self.failures, self._pause, self._tried = 0, FIRST_OPEN_SECONDS, False
        self._failing.clear()
        self._down = False

    def _on_failure(self, started: float, repo: str | None) -> None:
        """`repo`: the one whose request got no good answer; None: no connection came about, for whomever."""
        if repo is not None:
            self._failing.add(repo)
        if repo is None or len(self._failing) >= FAILURES_TO_OPEN:
            self._down = True
            self._failing.clear()
        # Requests that went out before the last failure was seen failed with it: one event, one count.
        if self.failures and started < self._failed_at:
            return
        if self.failures >= FAILURES_TO_OPEN:
            self._pause = min(self._pause * 2, LONGEST_OPEN_SECONDS)
        self.failures += 1
        self._failed_at = self._clock()
        if self.failures == FAILURES_TO_OPEN:
            log.warning("the upstream endpoint %s does not answer; it is left alone for a moment", self.url)


class UpstreamEndpoints:
    """All of one upstream's, in the order of its settings."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._name = settings.name
        self.all = [UpstreamEndpoint(url, clock) for url in dict.fromkeys(settings.endpoints)]

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self.all]

    def in_order(self, repo: str, avoid: Collection[str] = ()) -> list[UpstreamEndpoint]:
        """Whom to ask for a repository, the first first: those that failed last time come later, those in `avoid` last;
        without those that are left alone."""
        found = [endpoint for endpoint in self.all if not endpoint.is_open_for(repo)]
        return sorted(found, key=lambda endpoint: (endpoint.url in avoid, endpoint.is_failing_for(repo)))

    def circuit_open_errors(self, asked: Collection[UpstreamEndpoint]) -> list[UpstreamUnavailable]:
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
