"""Sends requests to one upstream: tries its endpoints in order, logs in where required, and maps refusals to errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar

from registry.config import Upstream
from registry.memory_budget import ShareScope
from registry.mirror.upstream_client import (
    RangesUnsupported,
    UnconfirmedBlobUnknown,
    UnconfirmedManifestUnknown,
    UnconfirmedNameUnknown,
)
from registry.upstream.api_client import ApiClient
from registry.upstream.authorizer import AuthorizationOffer, UpstreamAuthorizer
from registry.upstream.destinations import loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint, UpstreamEndpoints
from registry.upstream.quota import RateLimitBackoff, RemainingRequests, RequestKind
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, SMALL_ANSWER, KeyedSemaphore, time_limit
from registry.upstream.token_client import AnonymousRefused
from registry.upstream.upstream_responses import UpstreamResponse, as_unconfirmed, error_of
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.leases import Leases
from storage.names import RepositoryName
from storage.upstream_records import UpstreamRecords

T = TypeVar("T")

REQUESTS_PER_REPOSITORY = 16
"""Small requests at a time for one repository. If they hang, connections are left for other repositories."""

MAX_RENEWALS = 3
"""Times that one request is sent again with another token."""

EndpointOperation = Callable[[UpstreamEndpoint, EndpointAttempt], Awaitable[T]]
SendAuthorized = Callable[[Mapping[str, str]], Awaitable[UpstreamResponse]]

_TRY_NEXT = (
    UpstreamUnavailable,
    TooManyRequests,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
)
"""Errors that say nothing about the requested content: the next endpoint is tried."""
_NOT_AT_THIS_ENDPOINT = (BlobUnknown, ManifestUnknown, NameUnknown, Denied, RangesUnsupported)
"""One endpoint does not have or give the content; another one may."""
_REFUSAL_STATUSES = frozenset({400, 401, 403, 404, 410})
"""Statuses with which a registry may hide from anonymous clients what a login could see."""
_ERROR_PRECEDENCE: tuple[type[RegistryError], ...] = (
    RangesUnsupported,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
    Denied,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
    ManifestUnknown,
    BlobUnknown,
    NameUnknown,
)
"""The error to report when no endpoint succeeded and the errors differ. "Unknown" is reported only if all endpoints
agree."""


class UpstreamRequester:
    """Requests to the endpoints of one upstream, with limits, circuit breakers and logins."""

    def __init__(
        self,
        settings: Upstream,
        api: ApiClient,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        self.allowances = RemainingRequests(settings.name, records, clock)
        self._backoff = RateLimitBackoff(settings.name, records, clock)
        self._api = api
        self._endpoints = UpstreamEndpoints(settings, clock)
        self._limit = KeyedSemaphore(REQUESTS_PER_REPOSITORY)
        self._auth = UpstreamAuthorizer(settings, self._endpoints.urls, api, self._backoff, records, leases, clock)

    async def try_endpoints(
        self,
        operation: EndpointOperation[T],
        repo: RepositoryName,
        kind: RequestKind,
        *,
        any_endpoint: bool = False,
        avoid: Collection[str] = (),
        seconds: float | None = ANSWER_TIMEOUT_SECONDS,
    ) -> T:
        """Returns the result of the first endpoint that succeeds. `any_endpoint`: the content has a digest, so
        "unknown" from one endpoint is not final. For names and tags the first endpoint of the settings is
        authoritative: its "unknown" is final, and the "unknown" of others counts for nothing. `seconds`: the limit for
        all endpoints together, shared so that a hanging endpoint leaves time for the next."""
        await self.allowances.refresh()
        order = self._endpoints.in_order(repo, avoid)
        open_circuits = self._endpoints.circuit_open_errors(order)
        failures: list[RegistryError] = []
        order = await self._without_limited(order, kind, failures)
        loop = asyncio.get_running_loop()
        ends = None if seconds is None else loop.time() + seconds
        for position, endpoint in enumerate(order):
            share = None if ends is None else (ends - loop.time()) / (len(order) - position)
            try:
                return await self._try(endpoint, operation, repo, share)
            except _TRY_NEXT as error:
                failures.append(_without_traceback(error))
            except _NOT_AT_THIS_ENDPOINT as error:
                if not any_endpoint and endpoint is self._endpoints.all[0]:
                    raise
                failures.append(_without_traceback(error))
        raise _error_to_report([*failures, *open_circuits])

    async def _without_limited(
        self, order: list[UpstreamEndpoint], kind: RequestKind, failures: list[RegistryError]
    ) -> list[UpstreamEndpoint]:
        """Returns the endpoints that accept this kind of request now. Adds the errors of the others to `failures`."""
        found = []
        for endpoint in order:
            try:
                await self._backoff.raise_if_limited(endpoint.url, kind)
                found.append(endpoint)
            except TooManyRequests as error:
                failures.append(error)
        return found

    async def _try(
        self, endpoint: UpstreamEndpoint, operation: EndpointOperation[T], repo: RepositoryName, seconds: float | None
    ) -> T:
        with endpoint.attempt(repo) as attempt:
            attempt.seconds = seconds
            if seconds is None:
                return await operation(endpoint, attempt)
            async with time_limit(seconds, loggable_origin(endpoint.url)):
                return await operation(endpoint, attempt)

    async def send_authorized(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        kind: RequestKind,
        send: SendAuthorized,
        unknown: RegistryError,
        accepted: Collection[int] = (),
    ) -> UpstreamResponse:
        """Returns the response of `send`, which is called with the headers of the login, and again when a token has to
        be obtained first. Raises the error for any response that is neither a success nor in `accepted`."""
        await self._backoff.raise_if_limited(endpoint.url, kind)
        if self._auth.is_login_missing:
            unknown = as_unconfirmed(unknown)
        try:
            answer, granted = await self._send_with_login(endpoint, attempt, f"repository:{repo}:pull", send)
        except AnonymousRefused:
            # The token service refused; the registry itself was not asked.
            raise as_unconfirmed(unknown) from None
        if answer.status < 500:
            attempt.on_alive()
        if answer.is_foreign and answer.status == 429:
            raise self._backoff.unrecorded_error(answer.headers)
        await self.allowances.note(answer.headers)
        if answer.status == 429:
            raise await self._backoff.record(endpoint.url, kind, answer.headers)
        if answer.status in (200, 206) or answer.status in accepted:
            return answer
        raise error_of(answer, unknown, self._auth.configured, granted)

    async def _send_with_login(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, scope: str, send: SendAuthorized
    ) -> tuple[UpstreamResponse, bool]:
        """Returns the last response of `send`, and whether the request carried a token."""
        url, auth = endpoint.url, self._auth
        offer = await auth.offer(url, scope, attempt)
        answer = await send(_headers(offer))
        if offer.authorization is None and _lacks_challenge(answer) and (other := auth.offer_unchallenged(url, scope)):
            offer, answer = other, await send(_headers(other))
        if _asks_for_login(answer):
            offer, answer = await self._renew(url, scope, send, offer, answer)
        elif isinstance(offer.failure, RegistryError) and auth.configured and answer.status in _REFUSAL_STATUSES:
            raise offer.failure  # the request was sent without the login, which might see more
        if answer.status in (200, 206):
            auth.on_accepted(url, scope, offer)
        return answer, (offer.authorization or "").startswith("Bearer ")

    async def _renew(
        self, url: str, scope: str, send: SendAuthorized, offer: AuthorizationOffer, answer: UpstreamResponse
    ) -> tuple[AuthorizationOffer, UpstreamResponse]:
        """Sends the request again with another token. A token that another request or process got before may be refused
        as well, so this is repeated until the token is new, MAX_RENEWALS times at most."""
        for _ in range(MAX_RENEWALS):
            other = await self._auth.renew(url, scope, answer, offer)
            if other is None:
                break
            offer, answer = other, await send(_headers(other))
            if offer.is_new or not _asks_for_login(answer):
                break
        return offer, answer

    async def request(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        kind: RequestKind,
        method: str,
        path: str,
        unknown: RegistryError,
        *,
        headers: Mapping[str, str] | None = None,
        most: int = SMALL_ANSWER,
        content: bool = True,
        accepted: Collection[int] = (),
        after: UpstreamResponse | None = None,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        """Sends a small request through `send_authorized`. `path` is relative to `/v2/` and the repository's name, or a
        whole URL there that the response `after` named."""
        url = path if "://" in path else f"{endpoint.url}/v2/{repo}/{path}"
        reach = self._api.reach_from(after) if after is not None else None

        async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
            async with self._limit.acquire(repo):
                return await self._api.ask(
                    method,
                    url,
                    {**(headers or {}), **authorization},
                    most=most,
                    content=content,
                    reach=reach,
                    attempt=attempt,
                    memory=memory,
                )

        return await self.send_authorized(endpoint, attempt, repo, kind, send, unknown, accepted)

    async def aclose(self) -> None:
        await self._auth.aclose()


def _without_traceback(error: RegistryError) -> RegistryError:
    """Returns the error without the frames it passed through. They hold the response, up to 8 MiB, and one of them
    holds the list of errors: this cycle would stay in memory until the garbage collector runs."""
    error.__traceback__ = error.__context__ = None
    return error


def _error_to_report(failures: list[RegistryError]) -> RegistryError:
    """Returns the most relevant error: of several of the same kind the first, of several TooManyRequests the one that
    ends first."""
    found = [error for kind in _ERROR_PRECEDENCE for error in failures if type(error) is kind]
    waits = [error for error in failures if isinstance(error, TooManyRequests)]
    return min(waits, key=lambda error: error.retry_after) if found[0] in waits else found[0]


def _headers(offer: AuthorizationOffer) -> dict[str, str]:
    return {"Authorization": offer.authorization} if offer.authorization else {}


def _lacks_challenge(answer: UpstreamResponse) -> bool:
    """Returns whether a refusal does not say how to log in."""
    return answer.status in (401, 403, 404) and not answer.is_foreign and "www-authenticate" not in answer.headers


def _asks_for_login(answer: UpstreamResponse) -> bool:
    """Returns whether the response asks for a login or a token (RFC 9110, 15.5.2; RFC 6750, 3.1). The target of a
    redirect cannot ask for one."""
    if answer.is_foreign:
        return False
    return answer.status == 401 or (
        answer.status == 403 and "insufficient_scope" in answer.headers.get("www-authenticate", "")
    )
