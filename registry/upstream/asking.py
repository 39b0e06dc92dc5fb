"""Asking a far registry: the endpoints in their order, let in at each, and refusals turned into errors of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar

from registry.config import Upstream
from registry.mirror.source import RangesUnsupported
from registry.upstream.addresses import place
from registry.upstream.allowance import Allowances
from registry.upstream.answers import Answer, refusal
from registry.upstream.auth import AnonymousRefused, Auth
from registry.upstream.endpoints import Endpoint, Endpoints, Trial
from registry.upstream.exchange import SMALL, Exchange
from registry.upstream.waiting import ANSWER_SECONDS, within
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    RegistryError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import Records, Turns
from storage.names import RepositoryName

T = TypeVar("T")

Attempt = Callable[[Endpoint, Trial], Awaitable[T]]
Send = Callable[[Mapping[str, str]], Awaitable[Answer]]

_WITHOUT = (BlobUnknown, ManifestUnknown, Denied, RangesUnsupported)
"""Said by one endpoint, but another may have the same bytes."""
_GRAVITY: tuple[type[RegistryError], ...] = (
    RangesUnsupported,
    UpstreamTimeout,
    UpstreamUnavailable,
    Denied,
    ManifestUnknown,
    BlobUnknown,
)
"""What is told when all endpoints failed, each in its way. "Unknown" is told only if all say so."""


class Asking:
    """One upstream's endpoints, and what is needed to be let in there."""

    def __init__(
        self, settings: Upstream, exchange: Exchange, records: Records, turns: Turns, clock: Callable[[], float]
    ) -> None:
        self.allowances = Allowances(settings.name, records, clock)
        self._exchange = exchange
        self._endpoints = Endpoints(settings, clock)
        self._auth = Auth(settings, self._endpoints.urls, exchange, self.allowances, records, turns, clock)

    async def first(
        self,
        attempt: Attempt[T],
        *,
        anywhere: bool = False,
        avoid: Collection[str] = (),
        seconds: float | None = ANSWER_SECONDS,
    ) -> T:
        """The outcome at the first endpoint that answers. `anywhere`: what is asked for has a digest, so one endpoint's
        "unknown" is not the last word. `seconds`: for all of it, so that an endpoint that hangs leaves time for the
        next."""
        await self.allowances.heed()
        order = self._endpoints.order(avoid)
        loop = asyncio.get_running_loop()
        ends = None if seconds is None else loop.time() + seconds
        failures: list[RegistryError] = []
        for place_in_line, endpoint in enumerate(order):
            share = None if ends is None else (ends - loop.time()) / (len(order) - place_in_line)
            try:
                return await self._try(endpoint, attempt, share)
            except UpstreamUnavailable as error:
                failures.append(error)
            except _WITHOUT as error:
                if not anywhere:
                    raise
                failures.append(error)
        raise next(error for kind in _GRAVITY for error in failures if type(error) is kind)

    async def _try(self, endpoint: Endpoint, attempt: Attempt[T], seconds: float | None) -> T:
        with endpoint.trial() as trial:
            if seconds is None:
                return await attempt(endpoint, trial)
            async with within(seconds, place(endpoint.url)):
                return await attempt(endpoint, trial)

    async def admitted(
        self,
        endpoint: Endpoint,
        trial: Trial,
        repo: RepositoryName,
        send: Send,
        unknown: RegistryError,
        accepted: Collection[int] = (),
    ) -> Answer:
        """The answer of `send`, called with the headers that let us in, once more where a token has to be got first.
        Raises what any answer means that is neither a success nor among `accepted`."""
        scope = f"repository:{repo}:pull"
        try:
            authorization = await self._auth.header(endpoint.url, scope)
            answer = await send(_headers(authorization))
            if _wants_more(answer):
                other = await self._auth.renew(endpoint.url, scope, answer, authorization)
                answer = await send(_headers(other)) if other else answer
        except AnonymousRefused:
            trial.answered()
            raise unknown from None
        if answer.status < 501:  # 500 is about this request, the others about the server
            trial.answered()
        if answer.status == 429:
            raise await self.allowances.refused(answer.headers)
        await self.allowances.note(answer.headers)
        if answer.status in (200, 206) or answer.status in accepted:
            return answer
        raise refusal(answer, unknown, self._auth.configured)

    async def ask(
        self,
        endpoint: Endpoint,
        trial: Trial,
        repo: RepositoryName,
        method: str,
        path: str,
        unknown: RegistryError,
        *,
        headers: Mapping[str, str] | None = None,
        most: int = SMALL,
        content: bool = True,
        accepted: Collection[int] = (),
    ) -> Answer:
        """A small request, `admitted`. `path` starts below `/v2/` and the repository's name, or is a whole address
        there."""
        url = path if "://" in path else f"{endpoint.url}/v2/{repo}/{path}"

        async def send(authorization: Mapping[str, str]) -> Answer:
            return await self._exchange.ask(
                method, url, {**(headers or {}), **authorization}, most=most, content=content
            )

        return await self.admitted(endpoint, trial, repo, send, unknown, accepted)

    async def aclose(self) -> None:
        await self._auth.aclose()


def _headers(authorization: str | None) -> dict[str, str]:
    return {"Authorization": authorization} if authorization else {}


def _wants_more(answer: Answer) -> bool:
    """It asks for a login or a token (RFC 9110, 15.5.2; RFC 6750, 3.1); a redirect's target cannot."""
    if answer.foreign:
        return False
    return answer.status == 401 or (
        answer.status == 403 and "insufficient_scope" in answer.headers.get("www-authenticate", "")
    )
