"""Sends requests to one upstream: tries its endpoints in order, logs in where required, and maps refusals to errors.

An upstream has one or more endpoints (URLs that serve the same content). "Unknown" stands for the errors
BlobUnknown, ManifestUnknown and NameUnknown. Their "unconfirmed" variants mean a "not found" answer that may not come
from the registry itself, but from something in front of it.
"""

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
from registry.upstream.rate_limits import RateLimitBackoff, RemainingRequests, RequestKind
from registry.upstream.request_limits import REQUEST_TIMEOUT_SECONDS, SMALL_BODY_BYTES, KeyedSemaphore, time_limit
from registry.upstream.token_client import AnonymousRefused
from registry.upstream.upstream_responses import UpstreamResponse, as_unconfirmed, error_for_response
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
"""Concurrent requests for one repository, other than for blobs. The limit leaves connections for other repositories if
these requests hang."""

MAX_RENEWALS = 3
"""How often one request is sent again with another token."""

EndpointOperation = Callable[[UpstreamEndpoint, EndpointAttempt], Awaitable[T]]
"""Gets something from one endpoint, with one or more requests. Reports to the attempt how the endpoint responds."""
SendAuthorized = Callable[[Mapping[str, str]], Awaitable[UpstreamResponse]]
"""Sends a request with the given headers, which hold `Authorization` if there is a login, and returns the response."""

_TRY_NEXT = (
    UpstreamUnavailable,
    TooManyRequests,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
)
"""Errors that say nothing about the requested content, so the next endpoint is tried."""
_NOT_AT_THIS_ENDPOINT = (BlobUnknown, ManifestUnknown, NameUnknown, Denied, RangesUnsupported)
"""Errors of an endpoint that does not have or does not give the content. Another endpoint may have it."""
_REFUSAL_STATUSES = frozenset({400, 401, 403, 404, 410})
"""Statuses with which a registry may hide content from anonymous clients that it would show to a login."""
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
"""Which error to raise when no endpoint succeeded: the first of these types that occurred. "Unknown" comes last, so it
is raised only if all endpoints say so."""


class UpstreamRequester:
    """Sends requests to the endpoints of one upstream. Applies rate limits, circuit breakers and logins."""

    def __init__(
        self,
        settings: Upstream,
        api: ApiClient,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        self.remaining_requests = RemainingRequests(settings.name, records, clock)
        self._backoff = RateLimitBackoff(settings.name, records, clock)
        self._api = api
        self._endpoints = UpstreamEndpoints(settings, clock)
        self._repository_limit = KeyedSemaphore(REQUESTS_PER_REPOSITORY)
        self._auth = UpstreamAuthorizer(settings, self._endpoints.urls, api, self._backoff, records, leases, clock)

    async def try_endpoints(
        self,
        operation: EndpointOperation[T],
        repo: RepositoryName,
        kind: RequestKind,
        *,
        any_endpoint: bool = False,
        avoid: Collection[str] = (),
        timeout_seconds: float | None = REQUEST_TIMEOUT_SECONDS,
    ) -> T:
        """Returns the result of `operation` at the first endpoint where it succeeds. If it succeeds nowhere, raises the
        most relevant of the errors.

        `any_endpoint`: whether any endpoint may have the content, as for content with a digest. Then "unknown" from one
        endpoint is not final, and the next endpoint is tried. Otherwise (names and tags) "unknown" from the first
        endpoint of the settings is raised at once. Endpoints in `avoid` (URLs) are tried last. `timeout_seconds` limits
        all endpoints together (None: no limit). Each endpoint gets an equal part of the remaining time, so that a
        hanging endpoint leaves time for the next.
        """
        await self.remaining_requests.refresh()
        order = self._endpoints.in_order(repo, avoid)  # without endpoints whose circuit breaker is open
        circuit_errors = self._endpoints.circuit_open_errors(order)
        failures: list[RegistryError] = []
        order = await self._without_rate_limited(order, kind, failures)
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        for position, endpoint in enumerate(order):
            endpoint_seconds = None if deadline is None else (deadline - loop.time()) / (len(order) - position)
            try:
                return await self._try_endpoint(endpoint, operation, repo, endpoint_seconds)
            except _TRY_NEXT as error:
                failures.append(_without_traceback(error))
            except _NOT_AT_THIS_ENDPOINT as error:
                if not any_endpoint and endpoint is self._endpoints.all[0]:
                    raise
                failures.append(_without_traceback(error))
        raise _error_to_report([*failures, *circuit_errors])

    async def _without_rate_limited(
        self, order: list[UpstreamEndpoint], kind: RequestKind, failures: list[RegistryError]
    ) -> list[UpstreamEndpoint]:
        """Returns the endpoints that are not paused for this kind of request after a 429. Adds the errors of the paused
        endpoints to `failures`."""
        usable = []
        for endpoint in order:
            try:
                await self._backoff.raise_if_limited(endpoint.url, kind)
                usable.append(endpoint)
            except TooManyRequests as error:
                failures.append(error)
        return usable

    async def _try_endpoint(
        self,
        endpoint: UpstreamEndpoint,
        operation: EndpointOperation[T],
        repo: RepositoryName,
        timeout_seconds: float | None,
    ) -> T:
        with endpoint.attempt(repo) as attempt:
            attempt.timeout_seconds = timeout_seconds
            if timeout_seconds is None:
                return await operation(endpoint, attempt)
            async with time_limit(timeout_seconds, loggable_origin(endpoint.url)):
                return await operation(endpoint, attempt)

    async def send_authorized(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        kind: RequestKind,
        send: SendAuthorized,
        not_found_error: RegistryError,
        accepted_statuses: Collection[int] = (),
    ) -> UpstreamResponse:
        """Returns the response of `send` if its status is 200, 206 or in `accepted_statuses`; raises the error for any
        other response, such as `not_found_error` for a 404. Calls `send` with the headers of the login, and once more
        if the endpoint first asks for a token."""
        await self._backoff.raise_if_limited(endpoint.url, kind)
        if self._auth.is_login_missing:
            not_found_error = as_unconfirmed(not_found_error)
        try:
            response, sent_token = await self._send_with_login(endpoint, attempt, f"repository:{repo}:pull", send)
        except AnonymousRefused:
            # The token service refused to issue a token, which says nothing about the content.
            raise as_unconfirmed(not_found_error) from None
        if response.status < 500:
            attempt.on_working()
        if response.is_cross_origin and response.status == 429:
            raise self._backoff.unrecorded_error(response.headers)
        await self.remaining_requests.record(response.headers)
        if response.status == 429:
            raise await self._backoff.record_429(endpoint.url, kind, response.headers)
        if response.status in (200, 206) or response.status in accepted_statuses:
            return response
        raise error_for_response(response, not_found_error, self._auth.has_login, sent_token)

    async def _send_with_login(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, scope: str, send: SendAuthorized
    ) -> tuple[UpstreamResponse, bool]:
        """Returns the last response of `send`, and whether that request carried a token."""
        url, auth = endpoint.url, self._auth
        offer = await auth.offer(url, scope, attempt)
        response = await send(_headers(offer))
        if offer.authorization is None and _lacks_challenge(response):
            basic_offer = auth.offer_without_challenge(url, scope)
            if basic_offer is not None:
                offer, response = basic_offer, await send(_headers(basic_offer))
        if _asks_for_login(response):
            offer, response = await self._resend_with_new_token(url, scope, send, offer, response)
        elif isinstance(offer.failure, RegistryError) and auth.has_login and response.status in _REFUSAL_STATUSES:
            raise offer.failure  # the request was sent without the login, which may be allowed to see the content
        if response.status in (200, 206):
            auth.on_accepted(url, scope, offer)
        return response, (offer.authorization or "").startswith("Bearer ")

    async def _resend_with_new_token(
        self, url: str, scope: str, send: SendAuthorized, offer: AuthorizationOffer, response: UpstreamResponse
    ) -> tuple[AuthorizationOffer, UpstreamResponse]:
        """Sends the request again with another token, at most MAX_RENEWALS times, and returns the last offer and its
        response. Stops when the endpoint accepts a token, or refuses one that was just issued. A token from the cache
        may be refused because it is old, so it is replaced by another one."""
        for _ in range(MAX_RENEWALS):
            other = await self._auth.renew(url, scope, response, offer)
            if other is None:
                break
            offer, response = other, await send(_headers(other))
            if offer.has_new_token or not _asks_for_login(response):
                break
        return offer, response

    async def request(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        kind: RequestKind,
        method: str,
        path: str,
        not_found_error: RegistryError,
        *,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = SMALL_BODY_BYTES,
        read_body: bool = True,
        accepted_statuses: Collection[int] = (),
        linked_from: UpstreamResponse | None = None,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        """Sends a request that is not for the bytes of a blob, and returns its response as `send_authorized` does.

        `path` is relative to `/v2/<repository>/`, or a whole URL. A whole URL comes from the response `linked_from`,
        and may lead only to addresses that this response may name. `max_bytes` is the largest body. Without
        `read_body`, a successful response is returned without its body. A large body counts against the memory budget
        until the block of `memory` ends.
        """
        url = path if "://" in path else f"{endpoint.url}/v2/{repo}/{path}"
        reach = self._api.reach_from(linked_from) if linked_from is not None else None

        async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
            async with self._repository_limit.acquire(repo):
                return await self._api.send(
                    method,
                    url,
                    {**(headers or {}), **authorization},
                    max_bytes=max_bytes,
                    read_body=read_body,
                    reach=reach,
                    attempt=attempt,
                    memory=memory,
                )

        return await self.send_authorized(endpoint, attempt, repo, kind, send, not_found_error, accepted_statuses)

    async def aclose(self) -> None:
        """Cancels running logins."""
        await self._auth.aclose()


def _without_traceback(error: RegistryError) -> RegistryError:
    """Returns the error without its traceback. The frames of the traceback refer to the response, up to 8 MiB, and to
    the list that holds the error. This reference cycle would stay in memory until the garbage collector runs."""
    error.__traceback__ = error.__context__ = None
    return error


def _error_to_report(failures: list[RegistryError]) -> RegistryError:
    """Returns the error that comes first in _ERROR_PRECEDENCE. Of several errors of that type, returns the first; of
    several TooManyRequests, the one with the shortest pause."""
    by_precedence = [error for kind in _ERROR_PRECEDENCE for error in failures if type(error) is kind]
    rate_limits = [error for error in failures if isinstance(error, TooManyRequests)]
    if by_precedence[0] in rate_limits:
        return min(rate_limits, key=lambda error: error.retry_after)
    return by_precedence[0]


def _headers(offer: AuthorizationOffer) -> dict[str, str]:
    return {"Authorization": offer.authorization} if offer.authorization else {}


def _lacks_challenge(response: UpstreamResponse) -> bool:
    """Returns whether a refusal does not say how to log in."""
    is_refusal = response.status in (401, 403, 404) and not response.is_cross_origin
    return is_refusal and "www-authenticate" not in response.headers


def _asks_for_login(response: UpstreamResponse) -> bool:
    """Returns whether the response asks for a login or a token (RFC 9110, 15.5.2; RFC 6750, 3.1). False for a response
    from another origin after a redirect, because the login is not for that origin."""
    if response.is_cross_origin:
        return False
    return response.status == 401 or (
        response.status == 403 and "insufficient_scope" in response.headers.get("www-authenticate", "")
    )
