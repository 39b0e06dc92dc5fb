"""Repeats failed requests to the *old registry*, whose content is imported (`RequestRetries`). Ends the import if the
old registry is down or refuses the login.

A request is retried with growing pauses after errors that may be temporary. A request *fails* if all its attempts get
such errors. `RequestRetries` counts the failed requests of each repository. All counts return to 0 when a request
succeeds or gets an error that is not temporary.

An `Unconfirmed` error means that a proxy or firewall in front of the registry possibly sent the response. For example,
while a registry restarts, a proxy may send a 404 without the error code of a registry. A request with this error is
retried, unless it was refused because the import has no login (`needs_login`).

A repository has *many failures* in two cases:

- `FAILURES_TO_END` of its requests have failed.
- `FAILURES_TO_END` repositories each have a failed request. In this case, every repository has many failures.

When a request fails and its repository then has many failures, there are two cases:

- If `FAILURES_TO_END` repositories each have a failed request whose last error was an error other than `Unconfirmed`,
  the import ends immediately with `OldRegistryDown`.
- Otherwise, GET `/v2/` is sent. If no registry responds, the import ends with `OldRegistryDown`. If a registry
  responds, the import continues. A request of a repository with many failures is then retried only once.

After `OldRegistryDown`, the next import continues where this one stopped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from registry.mirror.upstream_client import Unconfirmed, UpstreamContentInvalid
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.upstream_responses import is_from_registry
from storage.errors import (
    Denied,
    NameUnknown,
    PartialBlobLost,
    QuotaExceeded,
    RegistryError,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.imports import ImportInvalid, OldRegistryDown
from storage.names import RepositoryName

T = TypeVar("T")
PauseFunction = Callable[[float], Awaitable[None]]
"""A function that waits for a number of seconds."""
RETRY_SECONDS: Final = (1.0, 2.0, 4.0, 8.0)
"""Pauses before the second, third, fourth and fifth attempt of a request, in seconds."""
LONGEST_PAUSE_SECONDS: Final = 600.0
"""Longest pause before an attempt, even if the old registry asks for a longer pause (Retry-After)."""
FAILURES_TO_END: Final = 8
"""The import may end when this number of requests of one repository have failed, or when this number of repositories
have a failed request. See the module docstring."""
MAX_REFUSED_REQUESTS: Final = 50
"""After the old registry has refused this number of requests in a row, the import sends GET `/v2/` with the login. The
import ends if this request is refused, because a registry may lock an account after many failed logins. If the request
succeeds, the account only lacks the right to pull from some repositories."""


class RequestRetries:
    """Sends the requests of one import."""

    def __init__(self, client: HttpUpstreamClient, host: str, pause: PauseFunction = asyncio.sleep) -> None:
        """`host`: the host of the old registry, for messages. `pause` waits for a number of seconds."""
        self._client = client
        self._host = host
        self._pause = pause
        self._failures: Counter[RepositoryName | None] = Counter()
        """The number of failed requests, by repository, since the last call of `_clear_failures`. The key None stands
        for the requests for the list of repositories."""
        self._repos_with_confirmed_failure: set[RepositoryName | None] = set()
        """The repositories in `_failures` with a failed request whose last error was not `Unconfirmed`."""
        self._refusal_count = 0
        """The number of requests that the old registry has refused since the last successful request or the last
        completed check of the login."""

    async def run(self, repo: RepositoryName | None, attempt: Callable[[], Awaitable[T]]) -> T:
        """Calls `attempt` until it succeeds, and returns its result. Repeats the call only after errors that may be
        temporary. `repo`: the repository of the request; None for a request for the list of repositories.

        Raises OldRegistryDown if the old registry is down, and ImportInvalid if it refuses the login. Otherwise raises
        the last error of `attempt`."""
        # After many failures, a request is retried only once: a broken repository may have thousands of tags.
        pauses = RETRY_SECONDS[:1] if self._has_many_failures(repo) else RETRY_SECONDS
        for pause_seconds in (*pauses, None):
            try:
                result = await attempt()
            except RegistryError as error:
                if not _is_temporary(error):
                    self._clear_failures()
                    await self._count_refusal(error)
                    raise
                if pause_seconds is None:
                    await self._count_failure(repo, error)
                    raise
                requested_seconds = getattr(error, "retry_after", None) or 0
                await self._pause(min(max(pause_seconds, requested_seconds), LONGEST_PAUSE_SECONDS))
            else:
                self._clear_failures()
                self._refusal_count = 0
                return result
        raise AssertionError("the last attempt returns or raises")

    def _clear_failures(self) -> None:
        """Sets the counts of failed requests to 0, after a success or an error that is not temporary."""
        self._failures.clear()
        self._repos_with_confirmed_failure.clear()

    def _has_many_failures(self, repo: RepositoryName | None) -> bool:
        """Returns whether this repository has many failures, as defined in the module docstring."""
        return self._failures[repo] >= FAILURES_TO_END or len(self._failures) >= FAILURES_TO_END

    async def _count_failure(self, repo: RepositoryName | None, error: RegistryError) -> None:
        """Counts a failed request. Raises OldRegistryDown if the old registry is down."""
        self._failures[repo] += 1
        # An `Unconfirmed` error may mean only that the repository was deleted.
        if not isinstance(error, Unconfirmed):
            self._repos_with_confirmed_failure.add(repo)
        if not self._has_many_failures(repo):
            return
        if len(self._repos_with_confirmed_failure) >= FAILURES_TO_END or not await self._is_up():
            raise OldRegistryDown(f"{OldRegistryDown.default} ({error.message})") from None

    async def _is_up(self) -> bool:
        """Returns whether a registry responds to GET `/v2/`. Sends the request with the login, because a proxy may
        respond to a request without a login while the registry is down.

        If the login is refused, or `/v2/` is not found, repeats the request without the login. A 401 to this second
        request counts as a response of the registry."""
        try:
            await self._client.check_login()
        except (Denied, NameUnknown):
            pass
        except (UpstreamUnavailable, TooManyRequests):
            return False
        else:
            return True
        try:
            response = await self._client.ping()
        except UpstreamUnavailable:
            return False
        return response.status in (200, 401) or (response.status < 500 and is_from_registry(response))

    async def _count_refusal(self, error: RegistryError) -> None:
        """Counts the request if `error` says that the old registry has refused it. After MAX_REFUSED_REQUESTS refused
        requests in a row, checks the login. Raises ImportInvalid if the login is refused; otherwise the count starts
        again at 0."""
        # QuotaExceeded is a subclass of Denied, but comes from this registry and not from the old one.
        if not isinstance(error, Denied) or isinstance(error, QuotaExceeded):
            return
        self._refusal_count += 1
        if self._refusal_count < MAX_REFUSED_REQUESTS:
            return
        self._refusal_count = 0  # before the check, so that only one of several concurrent requests checks the login
        try:
            await self._client.check_login()
        except Denied:
            raise ImportInvalid(
                f"{self._host} refuses the login. It has refused {MAX_REFUSED_REQUESTS} requests in a row, so the "
                "import has ended: check the user name and the password"
            ) from None
        except (UpstreamUnavailable, TooManyRequests):
            self._refusal_count = MAX_REFUSED_REQUESTS  # no result: the next refusal checks the login again
        except NameUnknown:
            pass  # the old registry has no `/v2/`, so it cannot show that it refuses the login


def _is_temporary(error: RegistryError) -> bool:
    """Returns whether another attempt after this error may succeed."""
    if isinstance(error, Unconfirmed):
        return not error.needs_login  # a request without a login is refused again
    return isinstance(error, UpstreamUnavailable | TooManyRequests | PartialBlobLost) and not isinstance(
        error, UpstreamContentInvalid
    )
