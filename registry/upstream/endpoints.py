"""The endpoints of one upstream (URLs that serve the same content), with a circuit breaker for each.

A breaker is closed while the endpoint responds. After FAILURES_TO_OPEN failures in a row it is open for some time, and
the endpoint gets no requests. Then the breaker is half-open: one request tries the endpoint, and its outcome closes the
breaker or opens it again. Each process has its own breakers.

A failure is a request to the endpoint that gets no response, or a status of 501 or more. Other statuses, the targets of
redirects, and token services do not count as failures. A status of 500 neither counts as a failure nor resets the
count, because it may concern this request only.

A failed connection affects all repositories. A missing or failed response affects its own repository only, because
the storage of that repository alone may be broken. Once FAILURES_TO_OPEN repositories are affected, all are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from registry.config import Upstream
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

FAILURES_TO_OPEN = 3
"""Failures in a row that open the breaker, and repositories with failures that make it apply to all repositories."""
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 5.0, 60.0
"""Shortest and longest time that the breaker stays open. Each failed try while it is half-open doubles the time."""


class EndpointAttempt:
    """The requests to one endpoint that belong together, such as a request that is sent again with a token. The sender
    reports what happens, and the breaker of the endpoint uses the result. `report_working` is called once the endpoint
    has responded well; from then on other requests may use the endpoint, while this attempt may still take long."""

    timeout_seconds: float | None = None
    """Time limit for all requests of the attempt; None: no limit."""

    def __init__(self, report_working: Callable[[], None]) -> None:
        self.is_working = False
        """Whether the endpoint has responded well during this attempt."""
        self.has_no_connection = False
        """Whether no connection to the endpoint could be made during this attempt."""
        self._awaits_response = False
        self._has_server_error = False  # the latest response had a status of 501 or more
        self._report_working = report_working

    @property
    def failed(self) -> bool:
        """Whether an error that ends the attempt now counts as a failure of the endpoint."""
        return not self.is_working and (self._awaits_response or self._has_server_error)

    def on_sent(self) -> None:
        """Called when a request is sent to the endpoint."""
        self._awaits_response = True

    def on_headers(self, status: int) -> None:
        """Called when the endpoint has responded with this status."""
        self._awaits_response = False
        self._has_server_error = status >= 501  # 500 may concern this request only
        if not self._has_server_error and status not in (401, 500):  # after a 401, the request with a token may fail
            self.on_working()

    def on_connection_failed(self) -> None:
        """Called when no connection to the endpoint could be made."""
        self.has_no_connection = True

    def on_working(self) -> None:
        """Called when the endpoint has responded well, even if the request then fails for another reason."""
        self._awaits_response = self._has_server_error = False
        if not self.is_working:
            self.is_working = True
            self._report_working()


class UpstreamEndpoint:
    """One URL of an upstream, and its circuit breaker."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        """`clock` returns seconds."""
        self.url = url
        self.failures = 0
        """Failures in a row."""
        self._clock = clock
        self._failed_at = 0.0
        self._open_seconds = FIRST_OPEN_SECONDS
        self._is_half_open_try_running = False
        self._failing_repos: set[str] = set()
        """Repositories whose requests got no response or a bad one since the endpoint last worked."""
        self._is_failing_for_all = False

    def is_open_for(self, repo: str) -> bool:
        """Returns whether requests for the repository must not use the endpoint now: the breaker is open, or it is
        half-open and another request is trying the endpoint."""
        if self.failures < FAILURES_TO_OPEN or not self._is_affected(repo):
            return False
        return self._is_half_open_try_running or self.retry_in_seconds > 0

    def is_failing_for(self, repo: str) -> bool:
        """Returns whether the last attempt failed and the breaker is still closed. Such an endpoint is tried after the
        others. An endpoint with a half-open breaker is not: if it came last, no request would ever try it."""
        return 0 < self.failures < FAILURES_TO_OPEN and self._is_affected(repo)

    @property
    def retry_in_seconds(self) -> float:
        """Seconds until the open breaker becomes half-open; 0 or less if that time has passed."""
        # Limited to the time it stays open, in case the clock was set back.
        return min(self._failed_at + self._open_seconds - self._clock(), self._open_seconds)

    @contextmanager
    def attempt(self, repo: str) -> Iterator[EndpointAttempt]:
        """Wraps the requests for one manifest, blob or list of a repository. Counts a failure of the endpoint when the
        block raises UpstreamUnavailable."""
        started, half_open = self._clock(), self.failures >= FAILURES_TO_OPEN and self._is_affected(repo)
        attempt = EndpointAttempt(self._on_success)
        self._is_half_open_try_running = self._is_half_open_try_running or half_open
        try:
            yield attempt
            attempt.on_working()
        except UpstreamUnavailable:
            if attempt.failed:
                self._on_failure(started, None if attempt.has_no_connection else repo)
            raise
        finally:
            if half_open and not attempt.is_working:
                self._is_half_open_try_running = False

    def _is_affected(self, repo: str) -> bool:
        """Returns whether the failures so far count for the repository."""
        return self._is_failing_for_all or repo in self._failing_repos

    def _on_success(self) -> None:
        if self.failures >= FAILURES_TO_OPEN:
            log.info("the upstream endpoint %s answers again", self.url)
        self.failures, self._open_seconds, self._is_half_open_try_running = 0, FIRST_OPEN_SECONDS, False
        self._failing_repos.clear()
        self._is_failing_for_all = False

    def _on_failure(self, started: float, repo: str | None) -> None:
        """Counts a failure of an attempt that began at `started`. `repo` is the repository whose request got no
        response or a bad one; None: no connection could be made."""
        if repo is not None:
            self._failing_repos.add(repo)
        if repo is None or len(self._failing_repos) >= FAILURES_TO_OPEN:
            self._is_failing_for_all = True
            self._failing_repos.clear()
        # Concurrent requests fail together in one outage. An attempt that began before the last failure is not counted.
        if self.failures and started < self._failed_at:
            return
        if self.failures >= FAILURES_TO_OPEN:
            self._open_seconds = min(self._open_seconds * 2, LONGEST_OPEN_SECONDS)
        self.failures += 1
        self._failed_at = self._clock()
        if self.failures == FAILURES_TO_OPEN:
            log.warning(
                "the upstream endpoint %s does not answer; it is left alone for a moment (%g s)",
                self.url,
                self._open_seconds,
            )


class UpstreamEndpoints:
    """The endpoints of one upstream. `all` has them in the order of the settings."""

    def __init__(self, settings: Upstream, clock: Callable[[], float]) -> None:
        self._name = settings.name
        self.all = [UpstreamEndpoint(url, clock) for url in dict.fromkeys(settings.endpoints)]

    @property
    def urls(self) -> list[str]:
        """The URLs in the order of the settings."""
        return [endpoint.url for endpoint in self.all]

    def in_order(self, repo: str, avoid: Collection[str] = ()) -> list[UpstreamEndpoint]:
        """Returns the endpoints to try for a repository, without those whose breaker is open. Endpoints whose last
        attempt failed come later; endpoints whose URL is in `avoid` come last."""
        usable = [endpoint for endpoint in self.all if not endpoint.is_open_for(repo)]
        return sorted(usable, key=lambda endpoint: (endpoint.url in avoid, endpoint.is_failing_for(repo)))

    def circuit_open_errors(self, usable: Collection[UpstreamEndpoint]) -> list[UpstreamUnavailable]:
        """Returns one error for all endpoints whose breaker is open, which are those not in `usable` (the result of
        `in_order`); an empty list if all endpoints are usable."""
        waits = [endpoint.retry_in_seconds for endpoint in self.all if endpoint not in usable]
        if not waits:
            return []
        wait = max(1, round(min(waits)))
        return [
            UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait} s"
            )
        ]
