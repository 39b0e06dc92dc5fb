"""Tokens: asking a token service for one, and keeping it until shortly before it expires.

Sources: the token specification of CNCF Distribution ("Token Authentication", "OAuth2 Token Authentication"). Tokens
are kept in memory and in Records, and one request for a token is under way at a time, over all processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from registry.memory_budget import ShareScope
from registry.upstream.api_client import KIB, ApiClient
from registry.upstream.configured_login import UpstreamLogin
from registry.upstream.destinations import Reach, loggable_origin
from registry.upstream.quota import MAX_RETRY_AFTER_SECONDS, RateLimitBackoff
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, UpstreamSingleFlight, time_limit
from registry.upstream.upstream_responses import UpstreamResponse, login_denied
from storage.errors import StorageFailed, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.interface import Leases, UpstreamRecords

log = logging.getLogger(__name__)

DEFAULT_LIFETIME_SECONDS = 60.0
"""Seconds a token lives whose service does not say (the token specification's default)."""
EXPIRY_MARGIN_SECONDS = 10.0
"""Seconds before its end from which on a token is not used, at most a fifth of its life."""
MAX_CACHED_TOKENS = 1000
"""Tokens in memory, the most; and requests for tokens that are held back."""
MAX_TOKEN_ANSWER = 256 * KIB
"""Bytes of a token service's answer."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")


class AnonymousRefused(Exception):
    """The token service gives nothing to somebody without a login."""


@dataclass(frozen=True, slots=True)
class TokenEndpoint:
    """A token service as a challenge names it, and where it may be."""

    realm: str
    service: str
    reach: Reach


class TokenClient:
    """One upstream's. A key is of one endpoint, scope and login."""

    def __init__(
        self,
        name: str,
        exchange: ApiClient,
        holds: RateLimitBackoff,
        records: UpstreamRecords,
        turns: Leases,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._exchange = exchange
        self._holds = holds
        self._records = records
        self._turns = turns
        self._clock = clock
        self._tokens: dict[str, tuple[str, float]] = {}
        self._held: dict[str, float] = {}  # until when a request is not sent again
        self._flights = UpstreamSingleFlight()

    async def kept(self, key: str) -> str | None:
        now = self._clock()
        token, expires = self._tokens.get(key, ("", 0.0))
        if now < expires:
            return token
        self._tokens.pop(key, None)
        if (found := await self._records.token(key)) and now < found[1]:
            self._remember(key, *found)
            return found[0]
        return None

    async def drop(self, key: str, token: str) -> None:
        """The endpoint has refused it."""
        if self._tokens.get(key, ("",))[0] == token:
            del self._tokens[key]
        try:
            await self._records.drop_token(key, token)
        except (StorageFailed, StorageFull) as error:  # it is refused once more, and another one got
            log.warning("a token for %s could not be dropped for the other workers: %s", self._name, error)

    async def obtain(
        self, key: str, service: TokenEndpoint, scope: str, login: UpstreamLogin | None, refused: str | None
    ) -> str:
        """A token that is not `refused`. Raises Denied, AnonymousRefused, TooManyRequests, UpstreamUnavailable,
        UpstreamTimeout."""
        # Whoever was sent to another service must not wait for what this one does.
        flight = f"{key} {scope} {service.service} {service.realm}"

        async def obtain() -> str:
            return await self._obtain(flight, key, service, scope, login, refused)

        token: str = await self._flights.share(flight, obtain)
        if token == refused:  # the flight had begun before this token was refused
            token = await self._flights.share(flight, obtain)
        return token

    async def aclose(self) -> None:
        await self._flights.aclose()

    async def _obtain(
        self,
        flight: str,
        key: str,
        service: TokenEndpoint,
        scope: str,
        login: UpstreamLogin | None,
        refused: str | None,
    ) -> str:
        """A token that is not `refused`: one that another process got meanwhile, or a new one."""
        where = f"the token service {loggable_origin(service.realm)}"
        async with time_limit(ANSWER_TIMEOUT_SECONDS, where), self._turns.take(f"token {flight}"):
            if (known := await self.kept(key)) and known != refused:
                return known
            asked = self._clock()
            if 0 < (wait := self._held.get(flight, 0.0) - asked) <= MAX_RETRY_AFTER_SECONDS:
                raise self._holds.refusal(wait)
            with ShareScope() as memory:
                answer = await self._ask(service, scope, login, memory)
                if answer.status == 429:
                    raise self._hold(flight, answer)
                token, lifetime = _parse_token(answer, login)
            expires = asked + lifetime - min(EXPIRY_MARGIN_SECONDS, lifetime / 5)
            self._remember(key, token, expires)
            try:
                await self._records.keep_token(key, token, expires)
            except (StorageFailed, StorageFull) as error:
                log.warning("a token for %s could not be kept for the other workers: %s", self._name, error)
            return token

    async def _ask(
        self, service: TokenEndpoint, scope: str, login: UpstreamLogin | None, memory: ShareScope
    ) -> UpstreamResponse:
        """GET with the password; where that is not done, and for an identity token, POST."""
        if login is None or not login.identity:
            parts = urlsplit(service.realm)
            query = parse_qsl(parts.query, keep_blank_values=True)
            query += [("service", service.service)] if service.service else []
            query += [("scope", each) for each in scope.split()]
            query += [("account", login.username)] if login else []
            url = parts._replace(query=urlencode(query), fragment="").geturl()
            headers = {"Authorization": login.basic()} if login else {}
            answer = await self._exchange.ask(
                "GET", url, headers, most=MAX_TOKEN_ANSWER, reach=service.reach, memory=memory
            )
            if login is None or answer.status not in (404, 405):
                return answer
        form = {"client_id": "entrepot", "service": service.service, "scope": scope}
        if login.identity:
            form |= {"grant_type": "refresh_token", "refresh_token": login.identity}
        else:
            form |= {"grant_type": "password", "username": login.username, "password": login.password}
        return await self._exchange.ask(
            "POST", service.realm, {}, form=form, most=MAX_TOKEN_ANSWER, reach=service.reach, memory=memory
        )

    def _remember(self, key: str, token: str, expires: float) -> None:
        if len(self._tokens) >= MAX_CACHED_TOKENS:
            del self._tokens[min(self._tokens, key=lambda each: self._tokens[each][1])]
        self._tokens[key] = (token, expires)

    def _hold(self, flight: str, answer: UpstreamResponse) -> TooManyRequests:
        """The error for a 429. It holds back the request that got it and no other: whoever answers for one repository
        must not keep the others from logging in."""
        error = self._holds.unrecorded_error(answer.headers)
        if len(self._held) >= MAX_CACHED_TOKENS:
            del self._held[min(self._held, key=lambda each: self._held[each])]
        self._held[flight] = self._clock() + error.retry_after
        return error


def _token_fields(body: bytes) -> tuple[Any, Any]:
    """What a token service's answer names as token and lifetime; no token: it is no JSON object. Errors are raised
    elsewhere, since they would hold the whole document for as long as they are on their way."""
    try:
        document = json.loads(body)
        return document.get("token") or document.get("access_token") or "", document.get("expires_in")
    except (ValueError, AttributeError, RecursionError):
        return None, None


def _parse_token(answer: UpstreamResponse, login: UpstreamLogin | None) -> tuple[str, float]:
    """Token and lifetime in seconds."""
    where = f"the token service {loggable_origin(answer.url)}"
    if answer.status in (401, 403) or (answer.status == 400 and login and login.identity):
        raise login_denied(loggable_origin(answer.url)) if login else AnonymousRefused
    if answer.status != 200:
        raise UpstreamUnavailable(f"{where} answers {answer.status}")
    token, lifetime = _token_fields(answer.body)
    if token is None:
        raise UpstreamUnavailable(f"{where} answers with something that is no token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UpstreamUnavailable(f"{where} answers without a token")
    known = isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and 0 < lifetime < 1e9
    return token, float(lifetime) if known else DEFAULT_LIFETIME_SECONDS
