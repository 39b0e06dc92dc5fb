"""The endpoints of one upstream (URLs that serve the same content), with a circuit breaker for each.

A breaker is closed while the endpoint responds. After FAILURES_TO_OPEN failures in a row, the breaker is open for some
time, and the endpoint gets no requests. Then the breaker is half-open: one request is sent to the endpoint as a
*trial*. If the trial succeeds, the breaker is closed; if it fails, the breaker is open again. Each process has its own
breakers.

A request to the endpoint is a failure if it gets no response, or a response with a status of 501 or more. Any other
status closes the breaker and resets the count of failures, with two exceptions. A 500 changes nothing, because it may
concern one request only. After a 401, the request may be sent again with a token; then only the last response counts.
Responses of token services and of servers to which the endpoint redirects do not count.

If no connection to the endpoint can be made, all repositories are *affected*: the breaker applies to their requests.
After any other failure, only the repository of the failed request is affected, because possibly only the storage of
that repository is broken. Once FAILURES_TO_OPEN repositories are affected, all repositories are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal

from registry.config import Upstream
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import EndpointHealth
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

FAILURES_TO_OPEN = 3
"""Number of failures in a row that open the breaker. It is also a number of repositories: once so many repositories are
affected, all repositories are."""
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 5.0, 60.0
"""First and longest time for which the breaker stays open. Each failed trial doubles the time."""


class EndpointAttempt:
    """The requests to one endpoint for one manifest, blob or list, such as a request and its repetition with a token.
    The sender of the requests calls the methods `on_…` to report what happens. At the end of the attempt, the breaker
    of the endpoint uses these reports."""

    timeout_seconds: float | None = None
    """Time limit for all requests of the attempt together; None: no limit."""

    def __init__(
        self, report_working: Callable[[], None], clock: Callable[[], float], observer: MirrorObserver
    ) -> None:
        """`report_working` is called once, as soon as a response shows that the endpoint works. The breaker is then
        closed for other requests, even if this attempt still takes long. `clock` returns seconds."""
        self._clock = clock
        self._observer = observer
        self._sent_at = clock()
        self.is_working = False
        """Whether a response has shown that the endpoint works."""
        self.has_no_connection = False
        """Whether no connection to the endpoint could be made."""
        self._awaits_response = False
        """Whether the latest request has no response yet."""
        self._has_server_error = False
        """Whether the latest response had a status of 501 or more."""
        self._report_working = report_working

    @property
    def counts_as_failure(self) -> bool:
        """Whether an error that ends the attempt now would count as a failure of the endpoint."""
        return not self.is_working and (self._awaits_response or self._has_server_error)

    def on_send(self) -> None:
        """Called just before a request is sent to the endpoint."""
        self._awaits_response = True
        self._sent_at = self._clock()

    def on_headers(self, status: int) -> None:
        """Called when the endpoint has responded with this status."""
        self._awaits_response = False
        self._observer.on_response(max(self._clock() - self._sent_at, 0.0))
        self._has_server_error = status >= 501
        # A 500 may concern this request only. A 401 does not show whether the request works with a token.
        if not self._has_server_error and status not in (401, 500):
            self.on_working()

    def on_connection_failed(self) -> None:
        """Called when no connection to the endpoint could be made."""
        self.has_no_connection = True

    def on_working(self) -> None:
        """Called when a response shows that the endpoint works. If an error ends the attempt later, it is no failure of
        the endpoint."""
        self._awaits_response = self._has_server_error = False
        if not self.is_working:
            self.is_working = True
            self._report_working()


class UpstreamEndpoint:
    """One URL of an upstream, and its circuit breaker."""

    def __init__(self, url: str, clock: Callable[[], float], observer: MirrorObserver) -> None:
        """`clock` returns seconds."""
        self.url = url
        self._observer = observer
        self.failures = 0
        """Number of failures in a row."""
        self._clock = clock
        self._failed_at = 0.0
        """When the last failure was counted."""
        self._open_seconds = FIRST_OPEN_SECONDS
        """How long the breaker is open after `_failed_at`."""
        self._is_trial_running = False
        """Whether the breaker is half-open and its trial is running."""
        self._failing_repos: set[str] = set()
        """The affected repositories, if not all are: those with failures since the endpoint last worked."""
        self._is_failing_for_all = False
        """Whether all repositories are affected."""
        self._last_error: tuple[str, float] | None = None
        """The message of the last error that was counted as a failure, and when it was, in seconds of the clock."""

    def is_open_for(self, repo: str) -> bool:
        """Returns whether requests for the repository must not be sent to the endpoint now: the repository is affected,
        and the breaker is open, or half-open with a trial running."""
        if self.failures < FAILURES_TO_OPEN or not self._is_affected(repo):
            return False
        return self._is_trial_running or self.retry_in_seconds > 0

    def is_failing_for(self, repo: str) -> bool:
        """Returns whether requests for the repository should go to the other endpoints first: the repository is
        affected, and the breaker is still closed. Returns False if the breaker is half-open, because an endpoint in
        last place would get no trial as long as another endpoint works."""
        return 0 < self.failures < FAILURES_TO_OPEN and self._is_affected(repo)

    @property
    def retry_in_seconds(self) -> float:
        """Seconds until the open breaker becomes half-open; 0 or less if it already is."""
        # At most `_open_seconds`, because the difference is larger if the clock was set back.
        return min(self._failed_at + self._open_seconds - self._clock(), self._open_seconds)

    @contextmanager
    def attempt(self, repo: str) -> Iterator[EndpointAttempt]:
        """Context manager for the requests for one manifest, blob or list of a repository. The `with` block sends the
        requests. If the block raises UpstreamUnavailable and `EndpointAttempt.counts_as_failure` is true, a failure of
        the endpoint is counted. If the block raises nothing, the endpoint works."""
        started_at, is_trial = self._clock(), self.failures >= FAILURES_TO_OPEN and self._is_affected(repo)
        attempt = EndpointAttempt(self._on_success, self._clock, self._observer)
        self._is_trial_running = self._is_trial_running or is_trial
        try:
            yield attempt
            attempt.on_working()
        except UpstreamUnavailable as error:
            if attempt.counts_as_failure:
                self._last_error = error.message, self._clock()
                self._on_failure(started_at, None if attempt.has_no_connection else repo)
            raise
        finally:
            if is_trial and not attempt.is_working:
                self._is_trial_running = False

    @property
    def health(self) -> EndpointHealth:
        """The health of the endpoint, as this process has observed it."""
        if self.failures < FAILURES_TO_OPEN:
            breaker: Literal["closed", "open", "half-open"] = "closed"
        else:
            breaker = "open" if self.retry_in_seconds > 0 else "half-open"
        error, error_at = self._last_error or (None, None)
        return EndpointHealth(
            self.url,
            breaker,
            self.failures,
            retry_in_seconds=max(0.0, self.retry_in_seconds) if breaker == "open" else None,
            last_error=error,
            last_error_at=error_at,
        )

    def close(self) -> None:
        """Ends the reports to the observer. If the breaker is open, first reports that it is no longer open. Call this
        method when the endpoint is no longer used. Idempotent."""
        if self.failures >= FAILURES_TO_OPEN:
            self._observer.on_breaker(opened=False)
        self._observer = UNOBSERVED  # a request that still runs may open or close the breaker

    def _is_affected(self, repo: str) -> bool:
        """Returns whether the breaker applies to requests for the repository."""
        return self._is_failing_for_all or repo in self._failing_repos

    def _on_success(self) -> None:
        """Closes the breaker, after a response has shown that the endpoint works."""
        if self.failures >= FAILURES_TO_OPEN:
            log.info("the upstream endpoint %s responds again", self.url)
            self._observer.on_breaker(opened=False)
        self.failures, self._open_seconds, self._is_trial_running = 0, FIRST_OPEN_SECONDS, False
        self._failing_repos.clear()
        self._is_failing_for_all = False

    def _on_failure(self, started_at: float, repo: str | None) -> None:
        """Records the failure of an attempt that started at `started_at`. `repo` is the repository whose request got no
        response or a status of 501 or more; None: no connection could be made."""
        if repo is not None:
            self._failing_repos.add(repo)
        if repo is None or len(self._failing_repos) >= FAILURES_TO_OPEN:
            self._is_failing_for_all = True
            self._failing_repos.clear()
        # Concurrent requests fail together in one outage, which should count as one failure. Therefore a failure is
        # not counted if its attempt started before the last counted failure.
        if self.failures and started_at < self._failed_at:
            return
        if self.failures >= FAILURES_TO_OPEN:
            self._open_seconds = min(self._open_seconds * 2, LONGEST_OPEN_SECONDS)
        self.failures += 1
        self._failed_at = self._clock()
        if self.failures == FAILURES_TO_OPEN:
            self._observer.on_breaker(opened=True)
            log.warning(
                "the upstream endpoint %s does not respond or has server errors; it is left alone for a moment: it "
                "gets no requests for %g s",
                self.url,
                self._open_seconds,
            )


class UpstreamEndpoints:
    """The endpoints of one upstream. `all` has them in the order of the settings."""

    def __init__(self, settings: Upstream, clock: Callable[[], float], observer: MirrorObserver = UNOBSERVED) -> None:
        """`clock` returns seconds."""
        self._name = settings.name
        self.all = [UpstreamEndpoint(url, clock, observer) for url in dict.fromkeys(settings.endpoints)]

    @property
    def urls(self) -> list[str]:
        """The URLs in the order of the settings."""
        return [endpoint.url for endpoint in self.all]

    def close(self) -> None:
        """See `UpstreamEndpoint.close`."""
        for endpoint in self.all:
            endpoint.close()

    def in_order(self, repo: str, avoid: Collection[str] = ()) -> list[UpstreamEndpoint]:
        """Returns the endpoints to which requests for a repository may be sent, in the order in which to try them.
        Leaves out those whose breaker is open for the repository (`is_open_for`). Puts the endpoints whose URL is in
        `avoid` after the others. In each of these two groups, endpoints with recent failures (`is_failing_for`) come
        last. Otherwise keeps the order of the settings."""
        usable = [endpoint for endpoint in self.all if not endpoint.is_open_for(repo)]
        return sorted(usable, key=lambda endpoint: (endpoint.url in avoid, endpoint.is_failing_for(repo)))

    def circuit_open_errors(self, usable: Collection[UpstreamEndpoint]) -> list[UpstreamUnavailable]:
        """Returns a list with one error that stands for all endpoints whose breaker is open; an empty list if there is
        no such endpoint. `usable`: the other endpoints, as `in_order` returns them."""
        waits = [endpoint.retry_in_seconds for endpoint in self.all if endpoint not in usable]
        if not waits:
            return []
        wait_seconds = max(1, round(min(waits)))
        return [
            UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait_seconds} s"
            )
        ]
