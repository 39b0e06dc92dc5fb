"""The endpoints of one upstream, with a circuit breaker for each.

A breaker is closed while the endpoint responds, and opens after FAILURES_TO_OPEN failures in a row. Then it is
half-open: one request tries the endpoint and closes the breaker or opens it again. The state belongs to this process.

A failure is a request to the endpoint itself without a response, or with a status from 501 up. The content of a
response, the target of a redirect and a token service never count. 500 is about the request: it is no failure, and does
not end a row of failures. A failed connection counts for all repositories. A missing or failed response counts for its
own repository, since only that repository's storage may be broken; after FAILURES_TO_OPEN repositories had one, it
counts for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from registry.config import Upstream
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

FAILURES_TO_OPEN = 3
"""Failures in a row that open the breaker, and repositories with failures that open it for all."""
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 5.0, 60.0
"""How long the breaker stays open at first; each failed try doubles it."""


class EndpointAttempt:
    """One request to an endpoint and its follow-up requests. `on_alive` is called once the endpoint responds: other
    requests may use it from then on, while this one may go on for long."""

    seconds: float | None = None
    """Time limit for all requests of the attempt; None: no limit."""

    def __init__(self, on_alive: Callable[[], None]) -> None:
        self.alive = False
        self.unreachable = False
        self._waiting = False
        self._ill = False
        self._on_alive = on_alive

    @property
    def failed(self) -> bool:
        """Whether an error now is the endpoint's fault."""
        return not self.alive and (self._waiting or self._ill)

    def on_sent(self) -> None:
        """Called when a request is sent to the endpoint."""
        self._waiting = True

    def on_headers(self, status: int) -> None:
        """Called when the endpoint has responded."""
        self._waiting = False
        self._ill = status >= 501  # 500 is about this request, the others about the server
        if not self._ill and status not in (401, 500):  # the request may still fail with the token
            self.on_alive()

    def on_connection_failed(self) -> None:
        """Called when no connection to the endpoint could be made."""
        self.unreachable = True

    def on_alive(self) -> None:
        """Called when the endpoint works, whatever happens to the request."""
        self._waiting = self._ill = False
        if not self.alive:
            self.alive = True
            self._on_alive()


class UpstreamEndpoint:
    """One URL of an upstream, and its circuit breaker."""

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
        """Returns whether the breaker is open for the repository."""
        if self.failures < FAILURES_TO_OPEN or not self._concerns(repo):
            return False
        return self._tried or self.wait > 0

    def is_failing_for(self, repo: str) -> bool:
        """Returns whether the last attempt failed while the breaker is still closed. A half-open endpoint keeps its
        place in the order: if it came last, no request would ever try it."""
        return 0 < self.failures < FAILURES_TO_OPEN and self._concerns(repo)

    @property
    def wait(self) -> float:
        """Seconds until the endpoint is tried again."""
        # Bounded, in case the clock was set back.
        return min(self._failed_at + self._pause - self._clock(), self._pause)

    @contextmanager
    def attempt(self, repo: str) -> Iterator[EndpointAttempt]:
        """Wraps the requests for one piece of content of a repository."""
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
        """Counts a failure. `repo`: the repository whose request had no good response; None: no connection could be
        made."""
        if repo is not None:
            self._failing.add(repo)
        if repo is None or len(self._failing) >= FAILURES_TO_OPEN:
            self._down = True
            self._failing.clear()
        # Requests sent before the last failure failed for the same reason: one outage counts once.
        if self.failures and started < self._failed_at:
            return
        if self.failures >= FAILURES_TO_OPEN:
            self._pause = min(self._pause * 2, LONGEST_OPEN_SECONDS)
        self.failures += 1
        self._failed_at = self._clock()
        if self.failures == FAILURES_TO_OPEN:
            log.warning("the upstream endpoint %s does not answer; it is left alone for a moment", self.url)


class UpstreamEndpoints:
    """The endpoints of one upstream, in the order of the settings."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._name = settings.name
        self.all = [UpstreamEndpoint(url, clock) for url in dict.fromkeys(settings.endpoints)]

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self.all]

    def in_order(self, repo: str, avoid: Collection[str] = ()) -> list[UpstreamEndpoint]:
        """Returns the endpoints to try for a repository: those that failed last come later, those in `avoid` last.
        Leaves out endpoints whose breaker is open."""
        found = [endpoint for endpoint in self.all if not endpoint.is_open_for(repo)]
        return sorted(found, key=lambda endpoint: (endpoint.url in avoid, endpoint.is_failing_for(repo)))

    def circuit_open_errors(self, asked: Collection[UpstreamEndpoint]) -> list[UpstreamUnavailable]:
        """Returns the error for the endpoints that are not in `asked`; an empty list if there are none."""
        waits = [endpoint.wait for endpoint in self.all if endpoint not in asked]
        if not waits:
            return []
        wait = max(1, round(min(waits)))
        return [
            UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait} s"
            )
        ]
