"""Repeats failed requests to the *old registry*, whose content is imported, and ends the import if the old registry is
down or refuses the login (`RequestRetries`).

A request is retried with growing pauses after errors that may be temporary. It *fails* if all its attempts get such
errors. Failed requests show that the old registry is down, or that one repository is broken there. So they are counted
for each repository. When a request succeeds or gets an error that is not temporary, all counts return to 0. There are
three reasons to suspect that the old registry is down:

- `FAILURES_TO_END` repositories each have a failed request whose error was not `Unconfirmed` (see below). The import
  then ends with `SourceDown`.
- `FAILURES_TO_END` repositories each have a failed request, with any error. The import then ends with `SourceDown` if
  GET `/v2/` fails, too. Otherwise the import continues, but retries all requests only once.
- `FAILURES_TO_END` requests of one repository have failed, with any errors. Again, the import ends with `SourceDown` if
  GET `/v2/` fails, too. Otherwise the import continues, but retries the requests of this repository only once.

The requests are retried as usual again when the counts have returned to 0. After an import has ended, the next one
continues where it stopped.

An `Unconfirmed` error means that the response possibly does not come from the registry. An example is a 404 without the
error code of a registry: while a registry restarts, a proxy in front of it may send such a response. So the request is
retried like one that got no response. There is one exception: an import may have no login for the old registry, and a
request may be refused for this reason (`is_refusal`). It would be refused again, so it is not retried. A 404 is also
possibly the response to a request for a deleted repository, so `Unconfirmed` errors end the import only if GET `/v2/`
fails, too.
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
from storage.imports import ImportInvalid, SourceDown
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
repository have failed. Only failures in a row count. The module docstring says when the import ends."""
MAX_REFUSED_REQUESTS: Final = 50
"""After the old registry has refused the login for this number of requests in a row, the import ends if GET `/v2/`
refuses the login, too. Each refusal can be a failed login, after which a registry may lock the account. But a registry
also refuses the requests for repositories from which the account may not pull."""


class RequestRetries:
    """Sends the requests of one import."""

    def __init__(self, client: HttpUpstreamClient, host: str, pause: Pause = asyncio.sleep) -> None:
        """`host`: the host of the old registry, for messages. `pause`: waits for a number of seconds."""
        self._client = client
        self._host = host
        self._pause = pause
        self._failures: Counter[RepositoryName | None] = Counter()
        """For each repository: how many of its requests have failed since the last call of `_clear_failures`. The key
        None stands for the requests for the list of repositories."""
        self._surely_failing: set[RepositoryName | None] = set()
        """The repositories in `_failures` for which a request has failed with another error than `Unconfirmed`."""
        self._refusal_count = 0
        """The number of requests for which the login was refused, since the last request that succeeded or the last
        check that showed whether the login works."""

    async def run(self, repo: RepositoryName | None, attempt: Callable[[], Awaitable[T]]) -> T:
        """Calls `attempt`, repeats the call after errors that may be temporary, and returns its result. `repo`: the
        repository of the request; None: it is for the list of repositories. Raises the last error of `attempt`;
        SourceDown if the old registry is down; ImportInvalid if it refuses the login."""
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
        """Forgets the failed requests, after a request has succeeded or got an error that is not temporary: the
        failures are no longer in a row."""
        self._failures.clear()
        self._surely_failing.clear()

    def _has_many_failures(self, repo: RepositoryName | None) -> bool:
        """Returns whether FAILURES_TO_END requests of this repository, or requests of that number of repositories, have
        failed in a row."""
        return self._failures[repo] >= FAILURES_TO_END or len(self._failures) >= FAILURES_TO_END

    async def _count_failure(self, repo: RepositoryName | None, error: RegistryError) -> None:
        """Counts a failed request. Raises SourceDown if the old registry is down."""
        self._failures[repo] += 1
        # The requests for repositories that were deleted, but are still listed, get `Unconfirmed` errors.
        if not isinstance(error, Unconfirmed):
            self._surely_failing.add(repo)
        if not self._has_many_failures(repo):
            return
        if len(self._surely_failing) >= FAILURES_TO_END or not await self._is_up():
            raise SourceDown(f"{SourceDown.default} ({error.message})") from None

    async def _is_up(self) -> bool:
        """Returns whether GET `/v2/` gets a response that a registry sends. First sends the request with the login.
        Without a login, a proxy in front of the registry may respond and ask for one, even while the registry is down.

        If the login is refused, or `/v2/` is not found, repeats the request without the login. A response that asks for
        a login then counts as the response of a registry. It may come from such a proxy, but there is no better
        check."""
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
        """Counts the request if the login was refused for it. After MAX_REFUSED_REQUESTS in a row, checks the login,
        and raises ImportInvalid if it is refused. If the login is accepted, the count starts again: the account only
        lacks the right to pull from these repositories."""
        # This registry itself raises QuotaExceeded, when it stores a blob.
        if not isinstance(error, Denied) or isinstance(error, QuotaExceeded):
            return
        self._refusal_count += 1
        if self._refusal_count < MAX_REFUSED_REQUESTS:
            return
        self._refusal_count = 0  # before the check, so that requests at the same time do not check the login, too
        try:
            await self._client.check_login()
        except Denied:
            raise ImportInvalid(
                f"{self._host} refuses the login, so the import has ended after {MAX_REFUSED_REQUESTS} refused requests"
                " in a row, before the account is locked: check the user name and the password"
            ) from None
        except (UpstreamUnavailable, TooManyRequests):
            self._refusal_count = MAX_REFUSED_REQUESTS  # unclear: the next refusal checks the login again
        except NameUnknown:
            pass  # there is no GET /v2/, but this response does not refuse the login


def _is_temporary(error: RegistryError) -> bool:
    """Returns whether another attempt after this error may succeed."""
    if isinstance(error, Unconfirmed):
        return not error.is_refusal  # a request without a login is refused again
    return isinstance(error, UpstreamUnavailable | TooManyRequests | PartialBlobLost) and not isinstance(
        error, UpstreamContentInvalid
    )
