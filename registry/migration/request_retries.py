"""Repeats failed requests to the *old registry*, whose content is imported (`RequestRetries`). Ends the import if the
old registry is down or refuses the login.

A request is retried with growing pauses after errors that may be temporary. A request *fails* if all its attempts get
such errors. The import counts the failed requests of each repository, because failed requests show either that the old
registry is down, or that one of its repositories is broken. All counts return to 0 when a request succeeds or gets an
error that is not temporary. The import checks three limits:

- `FAILURES_TO_END` repositories each have a failed request whose error was not `Unconfirmed` (see below). The import
  then ends with `OldRegistryDown`.
- `FAILURES_TO_END` repositories each have a failed request, with any error. If GET `/v2/` fails, too, the import ends
  with `OldRegistryDown`. Otherwise the import retries all requests only once until the counts return to 0.
- `FAILURES_TO_END` requests of one repository have failed, with any errors. If GET `/v2/` fails, too, the import ends
  with `OldRegistryDown`. Otherwise the import retries requests of this repository only once until the counts return to
  0.

The next import continues where the ended import stopped.

An `Unconfirmed` error means that a proxy or firewall in front of the registry possibly sent the response. For example,
while a registry restarts, a proxy may send a 404 without the error code of a registry. So a request with this error is
retried. But a request that was refused because the import has no login (`needs_login`) is not retried, because it would
be refused again. An `Unconfirmed` error may also mean that the repository was deleted. So `Unconfirmed` errors end the
import only if GET `/v2/` fails, too.
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
Pause = Callable[[float], Awaitable[None]]
"""A function that waits for a number of seconds."""
RETRY_SECONDS: Final = (1.0, 2.0, 4.0, 8.0)
"""Pauses before the second and the later attempts of a request, in seconds."""
LONGEST_PAUSE_SECONDS: Final = 600.0
"""Longest pause before an attempt, even if the old registry asks for a longer one (Retry-After)."""
FAILURES_TO_END: Final = 8
"""The import may end if this number of repositories each have a failed request, or if this number of requests of one
repository have failed: see the module docstring."""
MAX_REFUSED_REQUESTS: Final = 50
"""After the old registry has refused this number of requests in a row, the import ends if GET `/v2/` refuses the login,
too. Each refused request can be a failed login, and a registry may lock the account after many of them. But a registry
also refuses requests for repositories from which the account may not pull."""


class RequestRetries:
    """Sends the requests of one import."""

    def __init__(self, client: HttpUpstreamClient, host: str, pause: Pause = asyncio.sleep) -> None:
        """`host`: the host of the old registry, for messages. `pause` waits for a number of seconds."""
        self._client = client
        self._host = host
        self._pause = pause
        self._failures: Counter[RepositoryName | None] = Counter()
        """For each repository: how many of its requests have failed since the last call of `_clear_failures`. The key
        None stands for the requests for the list of repositories."""
        self._repos_with_confirmed_failure: set[RepositoryName | None] = set()
        """The repositories in `_failures` with a failed request whose error was not `Unconfirmed`."""
        self._refusal_count = 0
        """The number of requests that the old registry has refused since the last successful request. A check of the
        login also sets the number to 0, unless this check fails."""

    async def run(self, repo: RepositoryName | None, attempt: Callable[[], Awaitable[T]]) -> T:
        """Calls `attempt`, repeats the call after errors that may be temporary, and returns its result. `repo`: the
        repository of the request; None for a request for the list of repositories. Raises the last error of `attempt`,
        OldRegistryDown if the old registry is down, and ImportInvalid if it refuses the login."""
        # A repository that is broken at the old registry may have thousands of tags. So after many failures, a request
        # is retried only once.
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
        """Returns whether at least FAILURES_TO_END requests of this repository have failed, or at least FAILURES_TO_END
        repositories each have a failed request."""
        return self._failures[repo] >= FAILURES_TO_END or len(self._failures) >= FAILURES_TO_END

    async def _count_failure(self, repo: RepositoryName | None, error: RegistryError) -> None:
        """Counts a failed request. Raises OldRegistryDown if the old registry is down."""
        self._failures[repo] += 1
        # An `Unconfirmed` error may also mean that the repository was deleted, but is still listed.
        if not isinstance(error, Unconfirmed):
            self._repos_with_confirmed_failure.add(repo)
        if not self._has_many_failures(repo):
            return
        if len(self._repos_with_confirmed_failure) >= FAILURES_TO_END or not await self._is_up():
            raise OldRegistryDown(f"{OldRegistryDown.default} ({error.message})") from None

    async def _is_up(self) -> bool:
        """Returns whether GET `/v2/` gets a response that a registry sends. First sends the request with the login,
        because a proxy may respond to a request without a login, and ask for one, even while the registry is down.

        If the login is refused, or `/v2/` is not found, repeats the request without the login. A response that asks for
        a login then counts as a response of the registry. A proxy may have sent it, but there is no better check."""
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
        """Counts the request if the old registry has refused it. After MAX_REFUSED_REQUESTS refused requests in a row,
        checks the login, and raises ImportInvalid if the login is refused. If the login is accepted, the account only
        lacks the right to pull from these repositories, and the count starts again."""
        # QuotaExceeded is a Denied, but this registry raises it, not the old registry.
        if not isinstance(error, Denied) or isinstance(error, QuotaExceeded):
            return
        self._refusal_count += 1
        if self._refusal_count < MAX_REFUSED_REQUESTS:
            return
        self._refusal_count = 0  # before the check, so that concurrent requests do not check the login, too
        try:
            await self._client.check_login()
        except Denied:
            raise ImportInvalid(
                f"{self._host} refuses the login, so the import has ended after {MAX_REFUSED_REQUESTS} refused requests"
                " in a row, before the account is locked: check the user name and the password"
            ) from None
        except (UpstreamUnavailable, TooManyRequests):
            self._refusal_count = MAX_REFUSED_REQUESTS  # the check has failed: the next refusal checks the login again
        except NameUnknown:
            pass  # the old registry has no GET /v2/, and has not refused the login


def _is_temporary(error: RegistryError) -> bool:
    """Returns whether another attempt after this error may succeed."""
    if isinstance(error, Unconfirmed):
        return not error.needs_login  # a request without a login is refused again
    return isinstance(error, UpstreamUnavailable | TooManyRequests | PartialBlobLost) and not isinstance(
        error, UpstreamContentInvalid
    )
