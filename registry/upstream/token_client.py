"""Gets tokens from token services and caches them until shortly before they expire.

A token grants a scope (access to a repository, such as `repository:library/ubuntu:pull`) at an endpoint (one of the
URLs of an upstream). Tokens are cached in the memory of this process, and for all worker processes in the metadata
store (`UpstreamRecords`). For each token, a lease (a lock across all processes) allows one request at a time.

Source: the token specification of CNCF Distribution ("Token Authentication", "OAuth2 Token Authentication").
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from registry.memory_budget import ShareScope
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.configured_login import UpstreamLogin
from registry.upstream.destinations import Reach, loggable_origin
from registry.upstream.rate_limits import RateLimitBackoff
from registry.upstream.request_limits import KIB, MIB, REQUEST_TIMEOUT_SECONDS, time_limit
from registry.upstream.sized_cache import SizedCache
from registry.upstream.upstream_responses import UpstreamResponse, login_denied
from storage.errors import StorageFailed, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import MAX_PAUSE_SECONDS, UpstreamRecords

log = logging.getLogger("registry.upstream")

DEFAULT_LIFETIME_SECONDS = 60.0
"""Lifetime of a token if the token service does not state one (the token specification's default)."""
EXPIRY_MARGIN_SECONDS = 10.0
"""Number of seconds before a token's expiry at which the process stops using the token. If the token's lifetime is less
than 50 s, the number is a fifth of the lifetime instead."""
MAX_CACHED_TOKENS = 1000
"""Largest number of tokens of one upstream in the memory of a process. The same number limits the token requests for
one upstream that a process remembers as paused after a 429."""
MAX_CACHED_TOKEN_BYTES = 8 * MIB
"""Largest total size of the tokens of one upstream in the memory of a process. A usual token has 1 to 4 KiB, but a
token service may issue tokens of 64 KiB."""
MAX_CACHED_PAUSE_BYTES = 2 * MIB
"""Largest total size of the keys of all paused token requests. A usual key has about 200 bytes, but a challenge with
a long scope makes keys of 16 KiB."""
MAX_TOKEN_RESPONSE_BYTES = 256 * KIB
"""Largest body of a response of a token service."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
"""A token that can be sent in a header: printable ASCII without spaces."""


class AnonymousRefused(Exception):
    """The token service refused a request that had no login."""


class ObtainedToken(NamedTuple):
    """A token. `is_new`: True if the token service has just issued the token; False if the token comes from a
    cache."""

    text: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class UpstreamTokenService:
    """A token service that an endpoint names in a challenge. `realm`: the URL of the token service. `service`: the
    parameter `service` of token requests; empty if the challenge has none. `reach`: the IP addresses to which token
    requests may connect."""

    realm: str
    service: str
    reach: Reach


class TokenClient:
    """Gets and caches the tokens for one upstream. Callers choose the key under which a token is cached. They must use
    another key for each combination of endpoint, scope and login."""

    def __init__(
        self,
        upstream_name: str,
        api: ApiClient,
        backoff: RateLimitBackoff,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        """`clock` returns seconds since 1970."""
        self._upstream_name = upstream_name
        self._api = api
        self._backoff = backoff
        self._records = records
        self._leases = leases
        self._clock = clock
        self._tokens: SizedCache[str, tuple[str, float]] = SizedCache(MAX_CACHED_TOKENS, MAX_CACHED_TOKEN_BYTES)
        """By key: the token, and the end of its use in seconds since 1970."""
        self._paused_until: SizedCache[str, float] = SizedCache(MAX_CACHED_TOKENS, MAX_CACHED_PAUSE_BYTES)
        """By the `request_key` of a token request that got a 429: the end of its pause in seconds since 1970."""
        self._running_requests: SingleFlight[ObtainedToken] = SingleFlight()

    async def cached(self, key: str) -> str | None:
        """Returns the token that is cached under `key` in memory or in the metadata store. Returns None if no token is
        cached, or if the cached token expires too soon (`EXPIRY_MARGIN_SECONDS`)."""
        now = self._clock()
        token, expires_at = self._tokens.get(key) or ("", 0.0)
        if now < expires_at:
            return token
        self._tokens.remove(key)
        if (stored := await self._records.token(key)) and now < stored[1]:
            self._cache(key, *stored)
            return stored[0]
        return None

    async def delete_refused(self, key: str, token: str) -> None:
        """Deletes `token`, which the endpoint has refused, from memory and from the metadata store. Does not delete
        another token that is cached under `key`."""
        if (cached := self._tokens.get(key)) and cached[0] == token:
            self._tokens.remove(key)
        try:
            await self._records.delete_token(key, token)
        except (StorageFailed, StorageFull) as error:  # the other workers may use the token, and are refused
            log.warning("cannot delete a token for %s for the other workers: %s", self._upstream_name, error)

    async def obtain(
        self, key: str, service: UpstreamTokenService, scope: str, login: UpstreamLogin | None, refused: str | None
    ) -> ObtainedToken:
        """Returns a token for `scope`, from the caches or from the token service, and caches it under `key`. `refused`:
        a token that the endpoint has refused and that must not be returned; None or "" if no token was refused.
        Concurrent callers that need the same token share one request. If one of them is cancelled, the request
        continues for the others. Raises Denied, AnonymousRefused, TooManyRequests, UpstreamUnavailable,
        UpstreamTimeout."""
        # Callers with different token services must not share a request, so the key contains the token service.
        request_key = f"{key} {scope} {service.service} {service.realm}"

        async def obtain_unshared() -> ObtainedToken:
            return await self._obtain(request_key, key, service, scope, login, refused)

        token = await self._running_requests.run(request_key, obtain_unshared)
        if token.text == refused:  # the shared request began for another caller, with another value of `refused`
            token = await self._running_requests.run(request_key, obtain_unshared)
        return token

    async def aclose(self) -> None:
        """Cancels running token requests. Their callers get UpstreamUnavailable."""
        await self._running_requests.aclose()

    async def _obtain(
        self,
        request_key: str,
        key: str,
        service: UpstreamTokenService,
        scope: str,
        login: UpstreamLogin | None,
        refused: str | None,
    ) -> ObtainedToken:
        """Does the work of `obtain` for one caller: returns a cached token other than `refused`, or requests and caches
        a new token."""
        service_name = f"the token service {loggable_origin(service.realm)}"
        async with time_limit(REQUEST_TIMEOUT_SECONDS, service_name), self._leases.take(f"token {request_key}"):
            if (cached := await self.cached(key)) and cached != refused:
                return ObtainedToken(cached, is_new=False)
            now = self._clock()
            if 0 < (pause := (self._paused_until.get(request_key) or 0.0) - now) <= MAX_PAUSE_SECONDS:
                raise self._backoff.error_for_pause(pause)
            with ShareScope() as memory:
                response = await self._request(service, scope, login, memory)
                if response.status == 429:
                    raise self._record_429(request_key, response)
                token, lifetime = _parse_token(response, login)
            expires_at = now + lifetime - min(EXPIRY_MARGIN_SECONDS, lifetime / 5)
            self._cache(key, token, expires_at)
            try:
                await self._records.save_token(key, token, expires_at)
            except (StorageFailed, StorageFull) as error:
                log.warning("cannot store a token for %s for the other workers: %s", self._upstream_name, error)
            return ObtainedToken(token, is_new=True)

    async def _request(
        self, service: UpstreamTokenService, scope: str, login: UpstreamLogin | None, memory: ShareScope
    ) -> UpstreamResponse:
        """Requests a token, and returns the response with any status. `memory`: the body of the response counts in the
        memory budget until the `with` block of this scope ends.

        - With an identity token, sends a POST.
        - With a password, sends a GET. If the status is 404 or 405, sends a POST, because some token services support
          only POST.
        - Without a login, sends a GET."""
        if login is None or not login.identity_token:
            realm_parts = urlsplit(service.realm)
            query = parse_qsl(realm_parts.query, keep_blank_values=True)
            query += [("service", service.service)] if service.service else []
            query += [("scope", single_scope) for single_scope in scope.split()]
            query += [("account", login.username)] if login else []
            url = realm_parts._replace(query=urlencode(query), fragment="").geturl()
            headers = {"Authorization": login.basic_authorization()} if login else {}
            response = await self._api.send(
                "GET", url, headers, max_bytes=MAX_TOKEN_RESPONSE_BYTES, reach=service.reach, memory=memory
            )
            if login is None or response.status not in (404, 405):
                return response
        form = {"client_id": "entrepot", "service": service.service, **({"scope": scope} if scope else {})}
        if login.identity_token:
            form |= {"grant_type": "refresh_token", "refresh_token": login.identity_token}
        else:
            form |= {"grant_type": "password", "username": login.username, "password": login.password}
        return await self._api.send(
            "POST", service.realm, {}, form=form, max_bytes=MAX_TOKEN_RESPONSE_BYTES, reach=service.reach, memory=memory
        )

    def _cache(self, key: str, token: str, expires_at: float) -> None:
        """Caches the token in memory. If memory has too many tokens, removes the ones that were cached first from
        memory."""
        self._tokens.put(key, (token, expires_at), sys.getsizeof(key) + sys.getsizeof(token))

    def _record_429(self, request_key: str, response: UpstreamResponse) -> TooManyRequests:
        """Pauses one token request in this process after a 429, and returns the error to raise. Does not pause other
        token requests, because a 429 for one repository must not affect other repositories."""
        error = self._backoff.error_for_429(response.headers)
        self._paused_until.put(request_key, self._clock() + error.retry_after, sys.getsizeof(request_key))
        return error


def _token_fields(body: bytes) -> tuple[Any, Any]:
    """Returns the token and the lifetime in the body of a token service's response. Both values may have any type. A
    missing token is "", and a missing lifetime is None. Returns (None, None) if the body is not a JSON object. Does not
    raise, because the traceback of an error would keep the whole document in memory."""
    try:
        document = json.loads(body)
        return document.get("token") or document.get("access_token") or "", document.get("expires_in")
    except (ValueError, AttributeError, RecursionError):
        return None, None


def _parse_token(response: UpstreamResponse, login: UpstreamLogin | None) -> tuple[str, float]:
    """Returns the token in a response of a token service, and the token's lifetime in seconds. `login`: the login in
    the request; None if the request had no login. Raises:

    - Denied if the token service refuses a request with a login.
    - AnonymousRefused if the token service refuses a request without a login.
    - UpstreamUnavailable for any other response without a token."""
    service_name = f"the token service {loggable_origin(response.url)}"
    if response.status in (401, 403) or (response.status == 400 and login and login.identity_token):
        raise login_denied(loggable_origin(response.url)) if login else AnonymousRefused
    if response.status != 200:
        raise UpstreamUnavailable(f"{service_name} answers {response.status}")
    token, lifetime = _token_fields(response.body)
    if token is None:
        raise UpstreamUnavailable(f"{service_name} answers with something that is not a JSON object")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UpstreamUnavailable(f"{service_name} answers without a valid token")
    is_valid = isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and 0 < lifetime < 1e9
    return token, float(lifetime) if is_valid else DEFAULT_LIFETIME_SECONDS
