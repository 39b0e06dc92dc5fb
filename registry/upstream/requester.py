"""Asking a far registry: the endpoints in their order, let in at each, and refusals turned into errors of ours."""

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
from registry.upstream.api_client import SMALL_ANSWER, ApiClient
from registry.upstream.authorizer import AuthorizationOffer, UpstreamAuthorizer
from registry.upstream.destinations import loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint, UpstreamEndpoints
from registry.upstream.quota import RateLimitBackoff, RemainingRequests, RequestKind
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, KeyedSemaphore, time_limit
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
from storage.interface import Leases, UpstreamRecords
from storage.names import RepositoryName

T = TypeVar("T")

REQUESTS_PER_REPOSITORY = 16
"""Small requests at once for one repository: those that hang must leave connections to the other repositories."""

EndpointOperation = Callable[[UpstreamEndpoint, EndpointAttempt], Awaitable[T]]
SendAuthorized = Callable[[Mapping[str, str]], Awaitable[UpstreamResponse]]

_TRY_NEXT = (
    UpstreamUnavailable,
    TooManyRequests,
    UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown,
    UnconfirmedNameUnknown,
)
"""What says nothing of the thing asked for."""
_NOT_AT_THIS_ENDPOINT = (BlobUnknown, ManifestUnknown, NameUnknown, Denied, RangesUnsupported)
"""Said by one endpoint, but another may have the same bytes."""
_REFUSAL_STATUSES = frozenset({400, 401, 403, 404, 410})
"""What a registry may say to hide from the anonymous what a login sees."""
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
"""What is told when no endpoint had it, each for its reason. "Unknown" is told only if all say so."""


class UpstreamRequester:
    """One upstream's endpoints, and what is needed to be let in there."""

    def __init__(
        self,
        settings: Upstream,
        exchange: ApiClient,
        records: UpstreamRecords,
        turns: Leases,
        clock: Callable[[], float],
    ) -> None:
        self.allowances = RemainingRequests(settings.name, records, clock)
        self._holds = RateLimitBackoff(settings.name, records, clock)
        self._exchange = exchange
        self._endpoints = UpstreamEndpoints(settings, clock)
        self._limit = KeyedSemaphore(REQUESTS_PER_REPOSITORY)
        self._auth = UpstreamAuthorizer(settings, self._endpoints.urls, exchange, self._holds, records, turns, clock)

    async def first(
        self,
        attempt: EndpointOperation[T],
        repo: RepositoryName,
        kind: RequestKind,
        *,
        anywhere: bool = False,
        avoid: Collection[str] = (),
        seconds: float | None = ANSWER_TIMEOUT_SECONDS,
    ) -> T:
        """The outcome at the first endpoint that answers. `anywhere`: what is asked for has a digest, so one endpoint's
        "unknown" is not the last word. Of names and tags the first of the settings is the authority: its "unknown" is
        final, and that of the others counts for nothing, since they are asked only when it says nothing. `seconds`: for
        all of it, so that an endpoint that hangs leaves time for the next."""
        await self.allowances.look()
        order = self._endpoints.order(repo, avoid)
        resting = self._endpoints.circuit_open_errors(order)
        failures: list[RegistryError] = []
        order = await self._unheld(order, kind, failures)
        loop = asyncio.get_running_loop()
        ends = None if seconds is None else loop.time() + seconds
        for place_in_line, endpoint in enumerate(order):
            share = None if ends is None else (ends - loop.time()) / (len(order) - place_in_line)
            try:
                return await self._try(endpoint, attempt, repo, share)
            except _TRY_NEXT as error:
                failures.append(_without_traceback(error))
            except _NOT_AT_THIS_ENDPOINT as error:
                if not anywhere and endpoint is self._endpoints.all[0]:
                    raise
                failures.append(_without_traceback(error))
        raise _error_to_report([*failures, *resting])

    async def _unheld(
        self, order: list[UpstreamEndpoint], kind: RequestKind, failures: list[RegistryError]
    ) -> list[UpstreamEndpoint]:
        """Those that let us ask for that; what the others said goes to `failures`."""
        found = []
        for endpoint in order:
            try:
                await self._holds.raise_if_limited(endpoint.url, kind)
                found.append(endpoint)
            except TooManyRequests as error:
                failures.append(error)
        return found

    async def _try(
        self, endpoint: UpstreamEndpoint, attempt: EndpointOperation[T], repo: RepositoryName, seconds: float | None
    ) -> T:
        with endpoint.trial(repo) as trial:
            trial.seconds = seconds
            if seconds is None:
                return await attempt(endpoint, trial)
            async with time_limit(seconds, loggable_origin(endpoint.url)):
                return await attempt(endpoint, trial)

    async def send_authorized(
        self,
        endpoint: UpstreamEndpoint,
        trial: EndpointAttempt,
        repo: RepositoryName,
        kind: RequestKind,
        send: SendAuthorized,
        unknown: RegistryError,
        accepted: Collection[int] = (),
    ) -> UpstreamResponse:
        """The answer of `send`, called with the headers that let us in, again where a token has to be got first.
        Raises what any answer means that is neither a success nor among `accepted`."""
        await self._holds.raise_if_limited(endpoint.url, kind)
        if self._auth.is_login_missing:
            unknown = as_unconfirmed(unknown)
        try:
            answer, granted = await self._let_in(endpoint, trial, f"repository:{repo}:pull", send)
        except AnonymousRefused:
            # The token service refuses a login, whatever it says of it; the registry was not asked.
            raise as_unconfirmed(unknown) from None
        if answer.status < 500:
            trial.answered()
        if answer.foreign and answer.status == 429:
            raise self._holds.unrecorded_error(answer.headers)
        await self.allowances.note(answer.headers)
        if answer.status == 429:
            raise await self._holds.hold(endpoint.url, kind, answer.headers)
        if answer.status in (200, 206) or answer.status in accepted:
            return answer
        raise error_of(answer, unknown, self._auth.configured, granted)

    async def _let_in(
        self, endpoint: UpstreamEndpoint, trial: EndpointAttempt, scope: str, send: SendAuthorized
    ) -> tuple[UpstreamResponse, bool]:
        """The last answer of `send`, and whether it was asked with a token."""
        url, auth = endpoint.url, self._auth
        offer = await auth.offer(url, scope, trial)
        answer = await send(_headers(offer))
        if offer.authorization is None and _lacks_challenge(answer) and (other := auth.offer_unchallenged(url, scope)):
            offer, answer = other, await send(_headers(other))
        if _asks_for_login(answer):
            if other := await auth.renew(url, scope, answer, offer):
                offer, answer = other, await send(_headers(other))
        elif isinstance(offer.failure, RegistryError) and auth.configured and answer.status in _REFUSAL_STATUSES:
            raise offer.failure  # what the login might see was not asked for
        if answer.status in (200, 206):
            auth.accepted(url, scope, offer)
        return answer, (offer.authorization or "").startswith("Bearer ")

    async def ask(
        self,
        endpoint: UpstreamEndpoint,
        trial: EndpointAttempt,
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
        """A small request, `send_authorized`. `path` starts below `/v2/` and the repository's name, or is a whole
        address there, which the answer `after` that it comes has named."""
        url = path if "://" in path else f"{endpoint.url}/v2/{repo}/{path}"
        reach = self._exchange.reach_from(after) if after is not None else None

        async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
            async with self._limit.hold(repo):
                return await self._exchange.ask(
                    method,
                    url,
                    {**(headers or {}), **authorization},
                    most=most,
                    content=content,
                    reach=reach,
                    trial=trial,
                    memory=memory,
                )

        return await self.send_authorized(endpoint, trial, repo, kind, send, unknown, accepted)

    async def aclose(self) -> None:
        await self._auth.aclose()


def _without_traceback(error: RegistryError) -> RegistryError:
    """The error without the frames it came through. They hold the answer, of up to 8 MiB, and one of them holds the
    list of errors: such a circle would stay in memory until the garbage collector comes by."""
    error.__traceback__ = error.__context__ = None
    return error


def _error_to_report(failures: list[RegistryError]) -> RegistryError:
    """Of several that weigh the same the first; of several "too many requests" the one that ends first."""
    found = [error for kind in _ERROR_PRECEDENCE for error in failures if type(error) is kind]
    waits = [error for error in failures if isinstance(error, TooManyRequests)]
    return min(waits, key=lambda error: error.retry_after) if found[0] in waits else found[0]


def _headers(offer: AuthorizationOffer) -> dict[str, str]:
    return {"Authorization": offer.authorization} if offer.authorization else {}


def _lacks_challenge(answer: UpstreamResponse) -> bool:
    """It refuses, and does not say what would help."""
    return answer.status in (401, 403, 404) and not answer.foreign and "www-authenticate" not in answer.headers


def _asks_for_login(answer: UpstreamResponse) -> bool:
    """It asks for a login or a token (RFC 9110, 15.5.2; RFC 6750, 3.1); a redirect's target cannot."""
    if answer.foreign:
        return False
    return answer.status == 401 or (
        answer.status == 403 and "insufficient_scope" in answer.headers.get("www-authenticate", "")
    )
