"""The endpoints of one upstream (URLs that serve the same content), with circuit breakers for each.

A breaker (`registry.upstream.breaker`) is *closed* at first. When requests to the endpoint have failed
`FAILURES_TO_OPEN` times in a row, the breaker is *open*: it stops the requests. After a pause, the breaker is
*half-open*: it lets a request try the endpoint again (a *trial*). An open or half-open breaker is *tripped*. Each
process has its own breakers.

A request to the endpoint has one of these outcomes:

- No response, or a status of 501 or more: the request has failed.
- 500: nothing is known, because the error may concern only this request.
- 401: nothing is known. If the request is sent again with a token, the last response counts.
- Any other status: the endpoint works.

Responses of token services, and of servers to which the endpoint redirects, do not count.

The *breaker for connections* counts the requests for which no connection to the endpoint could be made. While it is
open, it stops the requests for all repositories. Any other failure counts only for the repository of the request. The
repository is *failing* until a request for the repository works. Each failing repository has a breaker, its *own
breaker*.

The endpoint becomes *suspect* when all of these conditions are true:

- At least `REPOSITORIES_TO_SUSPECT` repositories have begun to fail since the endpoint last worked.
- The endpoint has failed `FAILURES_TO_OPEN` times in a row.
- No request has worked for `WORKED_SECONDS`.

A suspect endpoint has three breakers, so that failing repositories do not delay the others. All are open at first:

- One breaker for failing repositories. It allows one trial at a time.
- One breaker for *working* repositories, whose last request worked.
- One breaker for all other repositories, such as new ones.

The last two breakers allow several trials at a time, and open again only after several trials without a response.

As soon as any request works, the endpoint is no longer suspect. An own breaker that is still closed, after too few
failures to open it, then becomes half-open: one trial may be sent immediately. If the trial fails, the breaker opens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Literal, TypeVar

from registry.config import Upstream
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import EndpointHealth
from registry.upstream.breaker import FAILURES_TO_OPEN, FIRST_OPEN_SECONDS, Breaker
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

MAX_REPOSITORIES: Final = 1024
"""Largest number of failing repositories, and largest number of working repositories, that an endpoint remembers. It
forgets those with the oldest requests first. The limit is needed because clients can request any number of names."""
RECOUNT_SECONDS: Final = 600.0
"""A repository that begins to fail counts towards `REPOSITORIES_TO_SUSPECT` at most once in this time. Otherwise,
repositories that work and fail alternately could make the endpoint suspect again and again."""
REPOSITORIES_TO_SUSPECT: Final = 3
"""Number of repositories that must have begun to fail before the endpoint becomes suspect."""
WORKED_SECONDS: Final = 5.0
"""The endpoint becomes suspect only if no request has worked for this time."""
SUSPECT_TRIALS: Final = 8
"""Largest number of trials at the same time for the breakers `_SuspectBreakers.for_working` and `for_others`. The
number is above 1, so that one trial without a response does not keep many repositories waiting."""


class EndpointAttempt:
    """One or more requests to one endpoint for one manifest, blob or list. For example, a request is sent again with a
    token. The sender of the requests calls the methods `on_…`, which set the attributes. At the end of the attempt, the
    endpoint uses the attributes to update its breakers."""

    timeout_seconds: float | None = None
    """Time limit for all requests of the attempt together; None: no limit."""

    def __init__(
        self, report_working: Callable[[], None], clock: Callable[[], float], observer: MirrorObserver
    ) -> None:
        """`report_working` closes the breakers. The attempt calls it once, as soon as the endpoint is known to work.
        `clock` returns seconds."""
        self._clock = clock
        self._observer = observer
        self._sent_at = clock()
        self.is_working = False
        """Whether a response has shown that the endpoint works."""
        self.has_no_connection = False
        """Whether no connection to the endpoint could be made."""
        self._awaits_response = False
        """Whether the latest request has no response yet."""
        self.has_server_error = False
        """Whether the latest response had a status of 501 or more."""
        self._report_working = report_working

    @property
    def counts_as_failure(self) -> bool:
        """Whether an error that ends the attempt now would count as a failure of the endpoint."""
        return not self.is_working and (self._awaits_response or self.has_server_error)

    def on_send(self) -> None:
        """Called just before a request is sent to the endpoint."""
        self._awaits_response = True
        self._sent_at = self._clock()

    def on_headers(self, status: int) -> None:
        """Called when the endpoint has responded with `status`."""
        self._awaits_response = False
        self._observer.on_response(max(self._clock() - self._sent_at, 0.0))
        self.has_server_error = status >= 501
        # A 500 may concern this request only. A 401 does not show whether the request works with a token.
        if not self.has_server_error and status not in (401, 500):
            self.on_working()

    def on_connection_failed(self) -> None:
        """Called when no connection to the endpoint could be made."""
        self.has_no_connection = True

    def on_working(self) -> None:
        """Called when the endpoint is known to work. An error that ends the attempt later does not count as a failure
        of the endpoint."""
        self._awaits_response = self.has_server_error = False
        if not self.is_working:
            self.is_working = True
            self._report_working()


class UpstreamEndpoint:
    """One URL of an upstream, and its circuit breakers."""

    def __init__(self, url: str, clock: Callable[[], float], observer: MirrorObserver) -> None:
        """`clock` returns seconds."""
        self.url = url
        self._clock = clock
        self._observer = observer
        self.failures = 0
        """Number of failures in a row, of all repositories together."""
        self._failed_at = 0.0
        """When `failures` was last increased."""
        self._connection_breaker = Breaker(clock)
        """Stops all requests after connections to the endpoint could not be made."""
        self._own_breakers: OrderedDict[str, Breaker] = OrderedDict()
        """The breakers of the failing repositories, by the name of the repository."""
        self._working: OrderedDict[str, None] = OrderedDict()
        """The working repositories, as an ordered set."""
        self._newly_failing: set[str] = set()
        """The repositories that have begun to fail since the endpoint last worked."""
        self._counted_at: OrderedDict[str, float] = OrderedDict()
        """When each repository was last added to `_newly_failing`."""
        self._worked_at = float("-inf")
        """When a request last worked."""
        self._suspect: _SuspectBreakers | None = None
        """None while the endpoint is not suspect."""
        self._is_reported_open = False
        """Whether the last report to the observer was that a breaker has opened."""
        self._last_error: tuple[str, float] | None = None
        """The message and the time of the last error that was counted as a failure."""

    def is_blocked_for(self, repo: str) -> bool:
        """Returns True if a breaker forbids requests for the repository now."""
        return any(breaker.is_blocking for breaker in self._breakers_for(repo))

    def comes_last_for(self, repo: str) -> bool:
        """Returns True if requests for the repository should go to the other endpoints first, because requests have
        failed, but too few to open a breaker. Returns False if a breaker is half-open, so that the endpoint gets a
        trial even while another endpoint works."""
        breakers = self._breakers_for(repo)
        has_failures = any(breaker.is_closed_after_failures for breaker in breakers)
        return has_failures and not any(breaker.is_tripped for breaker in breakers)

    def retry_in_seconds_for(self, repo: str) -> float:
        """Returns the seconds until no breaker for the repository is open; 0 or less if none is open now. A half-open
        breaker may then still block requests while a trial is running."""
        return max(breaker.retry_in_seconds for breaker in self._breakers_for(repo))

    @contextmanager
    def attempt(self, repo: str) -> Iterator[EndpointAttempt]:
        """Context manager for the requests for one manifest, blob or list of a repository. The `with` block sends the
        requests. If the block raises UpstreamUnavailable and `EndpointAttempt.counts_as_failure` is true, a failure of
        the endpoint is counted. If the block raises nothing, the endpoint counts as working."""
        started_at, breakers = self._clock(), self._breakers_for(repo)
        attempt = EndpointAttempt(lambda: self._on_success(repo), self._clock, self._observer)
        with ExitStack() as trials:
            for breaker in breakers:
                trials.enter_context(breaker.trial())
            try:
                yield attempt
                attempt.on_working()
            except UpstreamUnavailable as error:
                if attempt.counts_as_failure:
                    self._last_error = error.message, self._clock()
                    tripped_before = [breaker for breaker in self._breakers_for(repo) if breaker.is_tripped]
                    if attempt.has_no_connection:
                        self._connection_breaker.on_failure(started_at)
                    else:
                        self._on_repository_failure(repo, started_at, has_server_error=attempt.has_server_error)
                        if (
                            attempt.has_server_error
                            and self._connection_breaker.is_tripped
                            and self._connection_breaker in breakers
                        ):
                            self._connection_breaker = Breaker(self._clock)  # a server error proves a connection
                    self._count_failure(started_at)
                    # Reports only newly tripped breakers: trials for one failing repository may fail again and again.
                    if any(b.is_tripped and b not in tripped_before for b in self._breakers_for(repo)):
                        self._report_open()
                raise

    @property
    def health(self) -> EndpointHealth:
        """The health of the endpoint, as this process has observed it."""
        breaker: Literal["closed", "open", "half-open"] = "closed"
        wait_seconds = 0.0
        if self._is_reported_open:
            wait_seconds = min((tripped.retry_in_seconds for tripped in self._tripped_breakers()), default=0.0)
            breaker = "open" if wait_seconds > 0 else "half-open"
        error, error_at = self._last_error or (None, None)
        return EndpointHealth(
            self.url,
            breaker,
            self.failures,
            retry_in_seconds=wait_seconds if breaker == "open" else None,
            last_error=error,
            last_error_at=error_at,
        )

    def close(self) -> None:
        """Ends the reports to the observer. If an open breaker was reported, first reports that it is no longer open.
        Call this method when the endpoint is no longer used. Idempotent."""
        if self._is_reported_open:
            self._observer.on_breaker(opened=False)
        self._observer = UNOBSERVED  # a request that still runs may open or close a breaker

    def _tripped_breakers(self) -> list[Breaker]:
        """Returns the tripped breakers from which `health` computes the wait:

        - If the breaker for connections is tripped: only this breaker.
        - Otherwise, if the endpoint is suspect: the breaker for working repositories.
        - Otherwise: the tripped breakers of single repositories."""
        if self._connection_breaker.is_tripped:
            return [self._connection_breaker]
        if self._suspect is not None:
            return [self._suspect.for_working]
        return [breaker for breaker in self._own_breakers.values() if breaker.is_tripped]

    def _breakers_for(self, repo: str) -> list[Breaker]:
        """Returns the breakers that apply to requests for the repository."""
        breakers = [self._connection_breaker]
        if (own := self._own_breakers.get(repo)) is not None:
            breakers.append(own)
        if self._suspect is not None:
            if own is not None:
                breakers.append(self._suspect.for_failing)
            else:
                breakers.append(self._suspect.for_working if repo in self._working else self._suspect.for_others)
        return breakers

    def _on_success(self, repo: str) -> None:
        """Called after a response for `repo` has shown that the endpoint works. Closes the breaker for connections, the
        breakers of a suspect endpoint and the own breaker of `repo`. The own breakers of other repositories change in
        this way:

        - A tripped breaker stays as it is.
        - A closed breaker becomes half-open if the endpoint was suspect: perhaps the repository works again.
        - A closed breaker is removed if the endpoint was not suspect."""
        if self._is_reported_open:
            log.info("the upstream endpoint %s responds again", self.url)
            self._observer.on_breaker(opened=False)
            self._is_reported_open = False
        self.failures, self._worked_at = 0, self._clock()
        self._connection_breaker = Breaker(self._clock)
        self._own_breakers.pop(repo, None)
        if self._suspect is not None:
            for breaker in self._own_breakers.values():
                if not breaker.is_tripped:
                    breaker.make_half_open()
        for name in [name for name, breaker in self._own_breakers.items() if not breaker.is_tripped]:
            del self._own_breakers[name]
        self._suspect = None
        self._newly_failing.clear()
        _remember(self._working, repo, None)

    def _on_repository_failure(self, repo: str, started_at: float, *, has_server_error: bool) -> None:
        """Records the failure of an attempt that started at `started_at`. `has_server_error`: whether the endpoint
        responded with a status of 501 or more; False: it did not respond."""
        was_working = repo in self._working
        self._working.pop(repo, None)
        own = self._own_breakers.get(repo)
        if own is None:
            own = Breaker(self._clock)
            self._note_newly_failing(repo)
            if self._suspect is not None and not has_server_error:
                (self._suspect.for_working if was_working else self._suspect.for_others).on_failure(started_at)
        elif self._suspect is not None:
            self._suspect.for_failing.on_failure(started_at)
        own.on_failure(started_at)
        _remember(self._own_breakers, repo, own)

    def _note_newly_failing(self, repo: str) -> None:
        """Adds the repository to `_newly_failing`, unless it was added within the last `RECOUNT_SECONDS`."""
        now = self._clock()
        counted_at = self._counted_at.get(repo)
        if counted_at is None or not 0 <= now - counted_at < RECOUNT_SECONDS:
            self._newly_failing.add(repo)
            _remember(self._counted_at, repo, now)

    def _count_failure(self, started_at: float) -> None:
        """Counts a failure of an attempt that started at `started_at`. Makes the endpoint suspect if the conditions for
        this are true."""
        # As in `Breaker`, concurrent failures count as one. `_failed_at` is later than now if the clock was set back.
        if not self.failures or started_at >= min(self._failed_at, self._clock()):
            self.failures += 1
            self._failed_at = self._clock()
        worked_lately = 0 <= self._clock() - self._worked_at < WORKED_SECONDS
        many_fail = len(self._newly_failing) >= REPOSITORIES_TO_SUSPECT and self.failures >= FAILURES_TO_OPEN
        if many_fail and not worked_lately:
            self._suspect = self._suspect or _SuspectBreakers(self._clock)

    def _report_open(self) -> None:
        """Reports that a breaker has opened, unless an open breaker was reported since the endpoint last worked."""
        if not self._is_reported_open:
            self._is_reported_open = True
            self._observer.on_breaker(opened=True)
            log.warning(
                "the upstream endpoint %s does not respond or has server errors; the mirror sends it no requests for "
                "%g s",
                self.url,
                FIRST_OPEN_SECONDS,
            )


class _SuspectBreakers:
    """The breakers of a suspect endpoint for failing, working and all other repositories. All are open at first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.for_failing = Breaker(clock)
        self.for_working = Breaker(clock, SUSPECT_TRIALS, FAILURES_TO_OPEN)
        self.for_others = Breaker(clock, SUSPECT_TRIALS, FAILURES_TO_OPEN)
        for breaker in (self.for_failing, self.for_working, self.for_others):
            breaker.open()


V = TypeVar("V")


def _remember(names: OrderedDict[str, V], name: str, value: V) -> None:
    """Sets the value of `name`, and moves `name` to the end. If there are too many names, removes the first ones."""
    names[name] = value
    names.move_to_end(name)
    while len(names) > MAX_REPOSITORIES:
        names.popitem(last=False)


class EndpointSet:
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

    def in_order(
        self, repo: str, avoid: Collection[str] = (), untrusted: Collection[str] = ()
    ) -> list[UpstreamEndpoint]:
        """Returns the endpoints to which requests for a repository may be sent (`is_blocked_for` is
        false), in the order in which to try them. Sorts by these criteria, the most important first:

        - Endpoints whose URL is in `untrusted` come last, because the caller does not accept their responses.
        - Endpoints whose URL is in `avoid` come after those whose URL is not.
        - Endpoints with a few failures (`comes_last_for`) come after those without.
        - The order of the settings."""
        usable = [endpoint for endpoint in self.all if not endpoint.is_blocked_for(repo)]
        return sorted(
            usable,
            key=lambda endpoint: (endpoint.url in untrusted, endpoint.url in avoid, endpoint.comes_last_for(repo)),
        )

    def circuit_open_errors(self, repo: str, usable: Collection[UpstreamEndpoint]) -> list[UpstreamUnavailable]:
        """Returns a list with one error if `usable` lacks endpoints, because breakers block them. Otherwise returns an
        empty list. `usable`: the result of `in_order` for the repository."""
        waits = [endpoint.retry_in_seconds_for(repo) for endpoint in self.all if endpoint not in usable]
        if not waits:
            return []
        wait_seconds = max(1, round(min(waits)))
        return [
            UpstreamUnavailable(
                f"the upstream registry {self._name} did not answer lately; it is tried again in {wait_seconds} s"
            )
        ]
