"""Sends requests to one upstream (`UpstreamRequester`): tries its endpoints one after another, logs in where required,
and raises errors for refusals.

- An upstream has one or more *endpoints*: URLs that serve the same content.
- The error for a response "not found" is BlobUnknown, ManifestUnknown or NameUnknown. Each of these errors has an
  *unconfirmed* variant, for a response that does not show whether the content exists. Such a response possibly comes
  from a proxy or firewall, or the registry possibly hides the content from a request without a login or token.
- An *offer* (`AuthorizationOffer`) says which `Authorization` header, if any, to send with a request, and how this
  header was chosen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar

from registry.config import Upstream
from registry.memory_budget import ShareScope
from registry.mirror.observer import MirrorObserver
from registry.mirror.upstream_client import (
    BlobSizeUnknown,
    EndpointHealth,
    RangesUnsupported,
    UnconfirmedBlobUnknown,
    UnconfirmedManifestUnknown,
    UnconfirmedNameUnknown,
    UpstreamContentInvalid,
)
from registry.upstream.api_client import ApiClient
from registry.upstream.authorizer import AuthorizationOffer, UpstreamAuthorizer
from registry.upstream.destinations import is_same_origin, loggable_origin
from registry.upstream.endpoints import EndpointAttempt, EndpointSet, UpstreamEndpoint
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
"""Largest number of concurrent requests for one repository, not counting requests for the bytes of blobs. Even if the
requests for one repository hang, connections are left for other repositories."""

MAX_RENEWALS = 3
"""Largest number of times that one request is sent again with another `Authorization` header."""

EndpointOperation = Callable[[UpstreamEndpoint, EndpointAttempt], Awaitable[T]]
"""A function that gets content or a list from one endpoint, with one or more requests. The function reports to the
EndpointAttempt how the endpoint responds."""
SendAuthorized = Callable[[Mapping[str, str]], Awaitable[UpstreamResponse]]
"""A function that sends a request and returns the response. Its argument has the headers to add to the request:
`Authorization`, or no header."""

_INCONCLUSIVE_ERRORS = (
    UpstreamUnavailable,
    TooManyRequests,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
)
"""Errors that do not show whether the content exists. After such an error, the next endpoint is always tried."""
_NOT_AT_THIS_ENDPOINT = (BlobUnknown, ManifestUnknown, NameUnknown, Denied, RangesUnsupported)
"""Errors of an endpoint that does not have the content, does not give it to this registry, or cannot send a part of it.
If the first endpoint raises such an error, `continue_after_refusal` decides whether the next endpoint is tried."""
_REFUSAL_STATUSES = frozenset({400, 401, 403, 404, 410})
"""Statuses with which a registry may refuse a request without a login, even if it accepts the request with a login."""
_HIDING_STATUSES = frozenset({403, 404, 410})
"""Statuses with which a registry may hide content from a request without a token. The set lacks 400, which is about the
form of a request. If no token could be obtained for a request, `UpstreamRequester.send_authorized` raises an error for
these statuses, also for those that its caller accepts (`accepted_statuses`)."""
_ERROR_PRECEDENCE: tuple[type[RegistryError], ...] = (
    BlobSizeUnknown,
    RangesUnsupported,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamContentInvalid,
    Denied,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
    ManifestUnknown,
    BlobUnknown,
    NameUnknown,
)
"""If no endpoint succeeded, the error whose type comes first in this list is raised. BlobSizeUnknown comes first,
because it says that the upstream has the blob. ManifestUnknown, BlobUnknown and NameUnknown come last, so that they are
raised only if all endpoints say that the content does not exist."""


class UpstreamRequester:
    """Sends requests to the endpoints of one upstream. Logs in, keeps to the upstream's rate limits, and sends no
    requests to endpoints whose circuit breaker is open."""

    def __init__(
        self,
        settings: Upstream,
        api: ApiClient,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
        observer: MirrorObserver,
        configured_name: str | None = None,
    ) -> None:
        """`clock` returns seconds since 1970. `configured_name`: the name under which docker's `config.json` has the
        login, and in whose registrable domain token services are allowed; None: `settings.name`."""
        self._observer = observer
        self.remaining_requests = RemainingRequests(settings.name, records, clock)
        self._backoff = RateLimitBackoff(settings.name, records, clock)
        self._api = api
        self._endpoints = EndpointSet(settings, clock, observer)
        self._repository_limit = KeyedSemaphore(REQUESTS_PER_REPOSITORY)
        self._auth = UpstreamAuthorizer(
            settings, self._endpoints.urls, api, self._backoff, records, leases, clock, configured_name
        )

    def endpoint_health(self) -> list[EndpointHealth]:
        """Returns the health of each endpoint, as this process has observed it, in the order of the settings."""
        return [endpoint.health for endpoint in self._endpoints.all]

    async def try_endpoints(
        self,
        operation: EndpointOperation[T],
        repo: RepositoryName,
        kind: RequestKind,
        *,
        continue_after_refusal: bool = False,
        avoid: Collection[str] = (),
        untrusted: Collection[str] = (),
        timeout_seconds: float | None = REQUEST_TIMEOUT_SECONDS,
    ) -> T:
        """Calls `operation` for one endpoint after another until a call succeeds, and returns the result of this call.
        If no call succeeds, raises one of the errors that occurred (see _ERROR_PRECEDENCE).

        - `kind`: endpoints that are paused for this kind of request after a 429 are not tried.
        - `continue_after_refusal`: False (for tags and lists): if the first endpoint in the settings raises an error of
          _NOT_AT_THIS_ENDPOINT, this error is raised at once. True (for content with a digest): the next endpoint is
          tried.
        - `avoid`: URLs of endpoints that are tried after the other endpoints.
        - `untrusted`: URLs of endpoints whose content the caller does not accept. They are tried last of all.
        - `timeout_seconds`: time limit for all endpoints together; None: no limit. The time that remains is divided
          equally among the endpoints that are not tried yet."""
        await self.remaining_requests.refresh()
        order = self._endpoints.in_order(repo, avoid, untrusted)  # leaves out endpoints whose circuit breaker is open
        circuit_errors = self._endpoints.circuit_open_errors(repo, order)
        if not order:  # the circuit breakers of all endpoints are open
            self._observer.on_refused()
        failures: list[RegistryError] = []
        order = await self._without_rate_limited(order, kind, failures)
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        for position, endpoint in enumerate(order):
            remaining_endpoints = len(order) - position
            endpoint_seconds = None if deadline is None else (deadline - loop.time()) / remaining_endpoints
            try:
                return await self._try_endpoint(endpoint, operation, repo, endpoint_seconds)
            except _INCONCLUSIVE_ERRORS as error:
                self._observer.on_error(error)
                failures.append(_without_traceback(error))
            except _NOT_AT_THIS_ENDPOINT as error:
                self._observer.on_error(error)
                if not continue_after_refusal and endpoint is self._endpoints.all[0]:
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
        """Returns the result of `operation` at one endpoint. Raises UpstreamTimeout after `timeout_seconds`, and the
        errors of `operation`. The circuit breaker of the endpoint counts the failure or success."""
        with self._observer.trace_request(loggable_origin(endpoint.url), repo), endpoint.attempt(repo) as attempt:
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
        scope: str | None = None,
    ) -> UpstreamResponse:
        """Calls `send` with one `Authorization` header after another, until the endpoint accepts a header or there is
        no other header to try. Returns the last response if its status is 200, 206 or in `accepted_statuses` (for an
        exception, see _HIDING_STATUSES). Raises an error for any other response. For a 404, the error is
        `not_found_error` or its unconfirmed variant. If the login that the settings ask for is missing, or no token
        could be obtained, the error for a 404 is always the unconfirmed variant.

        If the endpoint is paused for this kind of request after a 429, sends no request and raises TooManyRequests.
        `scope`: the scope of the token to send; None: the scope for pulls from `repo`; an empty text: a token without a
        scope, as for a login."""
        await self._backoff.raise_if_limited(endpoint.url, kind)
        if self._auth.is_login_missing:
            # With a login, the endpoint might return the content. `needs_login`: a retry without a login does not help.
            not_found_error = as_unconfirmed(not_found_error, needs_login=True)
        scope = f"repository:{repo}:pull" if scope is None else scope
        try:
            response, offer = await self._send_with_login(endpoint, attempt, scope, send)
        except AnonymousRefused:
            # The token service gives no token to anonymous clients, so whether the content exists remains unknown.
            # `needs_login`: a retry without a login does not help.
            raise as_unconfirmed(not_found_error, needs_login=True) from None
        if response.status < 500:
            attempt.on_working()
        if response.is_cross_origin:  # the target of a redirect has other rate limits than the endpoint
            if response.status == 429:
                raise self._backoff.error_for_429(response.headers)
        else:
            await self.remaining_requests.record(response.headers)
            if response.status == 429:
                raise await self._backoff.record_429(endpoint.url, kind, response.headers)
        if offer.lacks_token:
            not_found_error = as_unconfirmed(not_found_error, needs_login=isinstance(offer.failure, AnonymousRefused))
        is_accepted = response.status in accepted_statuses and not (
            offer.lacks_token and response.status in _HIDING_STATUSES
        )
        if response.status in (200, 206) or is_accepted:
            return response
        had_token = (offer.authorization or "").startswith("Bearer ")
        raise error_for_response(response, not_found_error, self._auth.has_login, had_token)

    async def _send_with_login(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, scope: str, send: SendAuthorized
    ) -> tuple[UpstreamResponse, AuthorizationOffer]:
        """Calls `send`. If the endpoint refuses the `Authorization` header, calls `send` again with another header.
        Returns the last response, and the offer that was sent with the last request."""
        url, auth = endpoint.url, self._auth
        offer = await auth.offer(url, scope, attempt)
        response, first_failure = await send(_headers(offer)), offer.failure
        if offer.authorization is None and _lacks_challenge(response):
            basic_offer = auth.offer_password(url, scope)
            if basic_offer is not None:
                offer, response = basic_offer, await send(_headers(basic_offer))
        if _asks_for_login(response):
            offer, response = await self._resend_with_new_token(url, scope, send, offer, response)
        elif isinstance(first_failure, RegistryError) and auth.has_login and response.status in _REFUSAL_STATUSES:
            # No token could be obtained with the login, so the request was sent without a token. With a token, the
            # endpoint might have accepted the request.
            raise first_failure
        if response.status in (200, 206):
            auth.on_accepted(url, scope, offer)
        return response, offer

    async def _resend_with_new_token(
        self, url: str, scope: str, send: SendAuthorized, offer: AuthorizationOffer, response: UpstreamResponse
    ) -> tuple[AuthorizationOffer, UpstreamResponse]:
        """Sends the request again with other `Authorization` headers, after the endpoint has refused `offer` with
        `response`. Tries up to MAX_RENEWALS headers, because cached tokens may be too old. Stops earlier if the
        endpoint accepts a header or refuses a token that was just issued. Returns the last offer and the response to
        it. If there is no other header to try, returns `offer` and `response` unchanged."""
        for _ in range(MAX_RENEWALS):
            new_offer = await self._auth.renew(url, scope, response, offer)
            if new_offer is None:
                break
            offer, response = new_offer, await send(_headers(new_offer))
            if offer.is_fresh or not _asks_for_login(response):
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
        scope: str | None = None,
    ) -> UpstreamResponse:
        """Sends a request for anything but the bytes of a blob. Returns the response and raises errors as
        `send_authorized` does.

        - `path`: relative to `/v2/<repository>/`, or a complete URL. Raises UpstreamUnavailable for a URL of another
          origin, which must not get the login of the endpoint.
        - `max_bytes`: the largest body. `read_body`: if False, a successful response is returned without its body.
        - `linked_from`: the response that has `path` as a link; None: `path` is not a link. A request for a link may
          connect only to the addresses that `ApiClient.addresses_allowed_for_links` returns (`reach`), because a link
          of an upstream on the internet could otherwise lead to a private address.
        - `memory`: a large body counts against the memory budget until the `with` block of this `ShareScope` ends.
          None: the body counts only while it is received.
        - `scope`: see `send_authorized`."""
        url = path if "://" in path else f"{endpoint.url}/v2/{repo}/{path}"
        if not is_same_origin(url, endpoint.url):
            raise UpstreamUnavailable(f"{loggable_origin(endpoint.url)} links to a page on another origin")
        addresses = self._api.addresses_allowed_for_links(linked_from) if linked_from is not None else None

        async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
            async with self._repository_limit.acquire(repo):
                return await self._api.send(
                    method,
                    url,
                    {**(headers or {}), **authorization},
                    max_bytes=max_bytes,
                    read_body=read_body,
                    reach=addresses,
                    attempt=attempt,
                    memory=memory,
                )

        return await self.send_authorized(
            endpoint, attempt, repo, kind, send, not_found_error, accepted_statuses, scope
        )

    async def delete_token(self, endpoint: UpstreamEndpoint, scope: str) -> None:
        """Deletes the cached token for this endpoint and scope, if there is one. The next request gets a new token.
        Raises UpstreamUnavailable if the configured login cannot be read."""
        await self._auth.delete_token(endpoint.url, scope)

    async def aclose(self) -> None:
        """First removes the open circuit breakers of the endpoints from the metrics. Then cancels running logins (GET
        `/v2/`, and requests for tokens). Only the second step can be cancelled. Idempotent."""
        self._endpoints.close()
        await self._auth.aclose()


def _without_traceback(error: RegistryError) -> RegistryError:
    """Removes the traceback from the error and returns the error. Otherwise the traceback would form a reference cycle,
    which would keep the response (up to 8 MiB) in memory until the garbage collector runs."""
    error.__traceback__ = error.__context__ = None
    return error


def _error_to_report(failures: list[RegistryError]) -> RegistryError:
    """Returns the error whose type comes first in _ERROR_PRECEDENCE. If several errors have this type, returns the
    first of them, or the one with the shortest pause if the type is TooManyRequests."""
    # `is` and not `isinstance`, because the list has both classes and their subclasses, such as UpstreamTimeout.
    by_precedence = [error for error_type in _ERROR_PRECEDENCE for error in failures if type(error) is error_type]
    rate_limits = [error for error in failures if isinstance(error, TooManyRequests)]
    if by_precedence[0] in rate_limits:
        return min(rate_limits, key=lambda error: error.retry_after)
    return by_precedence[0]


def _headers(offer: AuthorizationOffer) -> dict[str, str]:
    """Returns the `Authorization` header of the offer; empty if the offer has no header."""
    return {"Authorization": offer.authorization} if offer.authorization else {}


def _lacks_challenge(response: UpstreamResponse) -> bool:
    """Returns whether the endpoint itself has refused the request (401, 403, 404) without saying how to log in."""
    if response.is_cross_origin or response.status not in (401, 403, 404):
        return False
    return "www-authenticate" not in response.headers


def _asks_for_login(response: UpstreamResponse) -> bool:
    """Returns whether the response asks for a login, or for a token with more rights (RFC 9110, 15.5.2; RFC 6750, 3.1).
    Returns False for a response from another origin after a redirect, because the login must not be sent there."""
    if response.is_cross_origin:
        return False
    return response.status == 401 or (
        response.status == 403 and "insufficient_scope" in response.headers.get("www-authenticate", "")
    )
