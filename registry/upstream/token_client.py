"""Gets tokens from token services and caches them until shortly before they expire.

Sources: the token specification of CNCF Distribution ("Token Authentication", "OAuth2 Token Authentication"). Tokens
are cached in memory and in Records. For each token, one request runs at a time over all processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from registry.memory_budget import ShareScope
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.configured_login import UpstreamLogin
from registry.upstream.destinations import Reach, loggable_origin
from registry.upstream.quota import MAX_RETRY_AFTER_SECONDS, RateLimitBackoff
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, KIB, time_limit
from registry.upstream.upstream_responses import UpstreamResponse, login_denied
from storage.errors import StorageFailed, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import UpstreamRecords

log = logging.getLogger("registry.upstream")

DEFAULT_LIFETIME_SECONDS = 60.0
"""Lifetime of a token whose service names none (the token specification's default)."""
EXPIRY_MARGIN_SECONDS = 10.0
"""A token is not used in this time before its end, at most a fifth of its lifetime."""
MAX_CACHED_TOKENS = 1000
"""Tokens in memory; also the requests for tokens that are paused after a 429."""
MAX_TOKEN_ANSWER = 256 * KIB
"""Largest response of a token service, in bytes."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")


class AnonymousRefused(Exception):
    """The token service refuses clients without a login."""


class ObtainedToken(NamedTuple):
    """A token for a request. `is_new`: the token service issued it just now; otherwise this or another process got it
    before, and the registry may refuse it by now."""

    text: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class TokenEndpoint:
    """A token service as a challenge names it, and where it may be."""

    realm: str
    service: str
    reach: Reach


class TokenClient:
    """The tokens of one upstream. A key stands for one endpoint, scope and login."""

    def __init__(
        self,
        name: str,
        api: ApiClient,
        backoff: RateLimitBackoff,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._api = api
        self._backoff = backoff
        self._records = records
        self._leases = leases
        self._clock = clock
        self._tokens: dict[str, tuple[str, float]] = {}
        self._limited_until: dict[str, float] = {}
        """For each token request that got a 429, when it may be sent again."""
        self._flights: SingleFlight[ObtainedToken] = SingleFlight()

    async def cached(self, key: str) -> str | None:
        """Returns a cached token that has not expired; None: there is none."""
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
        """Drops a token that the endpoint has refused."""
        if self._tokens.get(key, ("",))[0] == token:
            del self._tokens[key]
        try:
            await self._records.delete_token(key, token)
        except (StorageFailed, StorageFull) as error:  # it will be refused again, and another one obtained
            log.warning("cannot drop a token for %s for the other workers: %s", self._name, error)

    async def obtain(
        self, key: str, service: TokenEndpoint, scope: str, login: UpstreamLogin | None, refused: str | None
    ) -> ObtainedToken:
        """Returns a token other than `refused`. Raises Denied, AnonymousRefused, TooManyRequests, UpstreamUnavailable,
        UpstreamTimeout."""
        # Separate flights for different services: a request must not wait for a service it does not use.
        flight = f"{key} {scope} {service.service} {service.realm}"

        async def obtain() -> ObtainedToken:
            return await self._obtain(flight, key, service, scope, login, refused)

        token = await self._flights.run(flight, obtain)
        if token.text == refused:  # the flight started before this token was refused
            token = await self._flights.run(flight, obtain)
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
    ) -> ObtainedToken:
        """Returns a token other than `refused`: one that another process has obtained, or a new one."""
        where = f"the token service {loggable_origin(service.realm)}"
        async with time_limit(ANSWER_TIMEOUT_SECONDS, where), self._leases.take(f"token {flight}"):
            if (known := await self.cached(key)) and known != refused:
                return ObtainedToken(known, is_new=False)
            asked = self._clock()
            if 0 < (wait := self._limited_until.get(flight, 0.0) - asked) <= MAX_RETRY_AFTER_SECONDS:
                raise self._backoff.error(wait)
            with ShareScope() as memory:
                answer = await self._ask(service, scope, login, memory)
                if answer.status == 429:
                    raise self._note_limit(flight, answer)
                token, lifetime = _parse_token(answer, login)
            expires = asked + lifetime - min(EXPIRY_MARGIN_SECONDS, lifetime / 5)
            self._remember(key, token, expires)
            try:
                await self._records.save_token(key, token, expires)
            except (StorageFailed, StorageFull) as error:
                log.warning("cannot store a token for %s for the other workers: %s", self._name, error)
            return ObtainedToken(token, is_new=True)

    async def _ask(
        self, service: TokenEndpoint, scope: str, login: UpstreamLogin | None, memory: ShareScope
    ) -> UpstreamResponse:
        """Sends a GET with the password; a POST for an identity token, or if the service does not support GET."""
        if login is None or not login.identity:
            parts = urlsplit(service.realm)
            query = parse_qsl(parts.query, keep_blank_values=True)
            query += [("service", service.service)] if service.service else []
            query += [("scope", each) for each in scope.split()]
            query += [("account", login.username)] if login else []
            url = parts._replace(query=urlencode(query), fragment="").geturl()
            headers = {"Authorization": login.basic()} if login else {}
            answer = await self._api.ask("GET", url, headers, most=MAX_TOKEN_ANSWER, reach=service.reach, memory=memory)
            if login is None or answer.status not in (404, 405):
                return answer
        form = {"client_id": "entrepot", "service": service.service, "scope": scope}
        if login.identity:
            form |= {"grant_type": "refresh_token", "refresh_token": login.identity}
        else:
            form |= {"grant_type": "password", "username": login.username, "password": login.password}
        return await self._api.ask(
            "POST", service.realm, {}, form=form, most=MAX_TOKEN_ANSWER, reach=service.reach, memory=memory
        )

    def _remember(self, key: str, token: str, expires: float) -> None:
        if len(self._tokens) >= MAX_CACHED_TOKENS:
            del self._tokens[min(self._tokens, key=lambda each: self._tokens[each][1])]
        self._tokens[key] = (token, expires)

    def _note_limit(self, flight: str, answer: UpstreamResponse) -> TooManyRequests:
        """Returns the error for a 429. It pauses this token request only: the answer for one repository must not keep
        others from logging in."""
        error = self._backoff.unrecorded_error(answer.headers)
        if len(self._limited_until) >= MAX_CACHED_TOKENS:
            del self._limited_until[min(self._limited_until, key=lambda each: self._limited_until[each])]
        self._limited_until[flight] = self._clock() + error.retry_after
        return error


def _token_fields(body: bytes) -> tuple[Any, Any]:
    """Returns token and lifetime of a token service's response; None as the token: the response is no JSON object.
    Errors are raised elsewhere, since their traceback would keep the whole document in memory."""
    try:
        document = json.loads(body)
        return document.get("token") or document.get("access_token") or "", document.get("expires_in")
    except (ValueError, AttributeError, RecursionError):
        return None, None


def _parse_token(answer: UpstreamResponse, login: UpstreamLogin | None) -> tuple[str, float]:
    """Returns the token and its lifetime in seconds. Raises AnonymousRefused, Denied, UpstreamUnavailable."""
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
