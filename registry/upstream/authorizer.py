"""Chooses the `Authorization` header for a request to an *endpoint*, one of the URLs of an upstream.

- A *scope* is the access that a token grants, such as `repository:library/ubuntu:pull`.
- A *requirement* is what an endpoint requires in the header for a scope: a token from a token service, or the password
  itself. The endpoint states it in a challenge (RFC 9110, 11; RFC 6750). It is cached when the endpoint has accepted a
  header that fulfils it.
- A *guess* is a token service whose token the endpoint has accepted for another scope. It is used for a scope without a
  cached requirement. A right guess saves a request, because the endpoint would refuse a request without a token.
- An *offer* (`AuthorizationOffer`) is the header for one request, with information on how it was chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from registry.config import Upstream
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.challenges import RealmPolicy, choose_challenge, parse_challenges
from registry.upstream.configured_login import ConfiguredLogin, UpstreamLogin
from registry.upstream.destinations import Reach, loggable_origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.rate_limits import RateLimitBackoff, RequestKind
from registry.upstream.request_limits import MIB, REQUEST_TIMEOUT_SECONDS, time_limit
from registry.upstream.sized_cache import SizedCache
from registry.upstream.token_client import AnonymousRefused, TokenClient, UpstreamTokenService
from registry.upstream.upstream_responses import UpstreamResponse
from storage.errors import Denied, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import UpstreamRecords

PING_VALID_SECONDS = 600.0
"""How long a response to GET `/v2/` (a *ping*) is cached if it shows whether the endpoint requires a login."""
UNCLEAR_PING_VALID_SECONDS = 60.0
"""How long a response to GET `/v2/` is cached if it does not show whether the endpoint requires a login."""
MAX_CACHED_REQUIREMENTS = 1000
"""Largest number of cached requirements."""
MAX_CACHED_REQUIREMENT_BYTES = 2 * MIB
"""Largest size of all cached requirements together. It protects against an upstream that sends large challenges."""
REQUIREMENT_VALID_SECONDS = 3600.0
"""How long a requirement is cached after the endpoint has last accepted a header that fulfils it."""
OFFER_SECONDS = 3.0
"""Time limit for making the first offer, including GET `/v2/` and the request for a token. After this time, the request
is sent without a token."""
OFFER_TIME_DIVISOR = 3
"""The first offer may take at most the endpoint's time limit, divided by this number. The rest of the time is for the
request itself. An endpoint without a time limit has no such limit."""
GUESS_SECONDS = 2.0
"""Replaces `OFFER_SECONDS` if the token service is a guess."""
MAX_GUESS_FAILURES = 3
"""Number of failures in a row after which a guess is not used any more. One failure is not enough, because a single
repository may use a different token service."""
MAX_PARAMETER_LENGTH = 4096
"""Longest parameter of a challenge, such as its realm, in characters. A challenge with a longer parameter is
ignored."""

_NO_TOKEN_ERRORS = (AnonymousRefused, Denied, TooManyRequests, UpstreamUnavailable)
"""If the first offer fails with one of these errors, the request is sent without a token."""


@dataclass(frozen=True, slots=True)
class LoginRequirement:
    """What an endpoint requires in the `Authorization` header of a request."""

    token_service: UpstreamTokenService | None
    """The token service that issues the required token; None: the password itself is required (Basic)."""
    scope: str
    """The scope that the token must have."""

    @property
    def size_bytes(self) -> int:
        """The size of the texts in memory."""
        service = self.token_service
        texts = [self.scope] if service is None else [self.scope, service.realm, service.service]
        return sum(map(sys.getsizeof, texts))


@dataclass(slots=True)
class TokenServiceGuess:
    """A token service that an endpoint may also require for other scopes. `failures`: how many times in a row the guess
    has failed. `gave_no_token`: whether it failed the last time because no token could be obtained."""

    token_service: UpstreamTokenService
    failures: int = 0
    gave_no_token: bool = False


@dataclass(slots=True)
class AuthorizationOffer:
    """The `Authorization` header for a request, and how it was chosen."""

    authorization: str | None = None
    """The header's value; None: send the request without the header."""
    requirement: LoginRequirement | None = None
    """The requirement that the header fulfils. None: no requirement is known, or `UpstreamAuthorizer.offer` has found a
    cached token."""
    failure: Exception | None = None
    """The error that prevented a header; None: there was no error."""
    guess: TokenServiceGuess | None = None
    """The guess from which `requirement` was made. None if `requirement` has another origin, or if `failure` is set."""
    is_fresh: bool = False
    """Whether `authorization` contains a password or a token that was just issued. If the endpoint refuses a fresh
    header, another try is useless."""
    has_given_up_guessing: bool = False
    """True if all of these conditions hold, otherwise False:

    - The offer has no header, because no requirement is known.
    - The endpoint's guess is not used any more, because it has failed `MAX_GUESS_FAILURES` times in a row.
    - At the last of these failures, no token could be obtained."""

    @property
    def lacks_token(self) -> bool:
        """Whether the offer has no header because no token could be obtained. Another request with a token may still
        succeed."""
        return self.authorization is None and (self.failure is not None or self.has_given_up_guessing)


@dataclass(frozen=True, slots=True)
class PingResult:
    """The result of GET `/v2/` at an endpoint. There are three cases:

    - `requirement` is set: the endpoint requires a login.
    - `requirement` is None, and `status` is 200: the endpoint requires no login.
    - `requirement` is None, and `status` is not 200: the endpoint may require a login."""

    status: int
    requirement: LoginRequirement | None
    valid_until: float
    """When the cached result expires, in seconds since 1970."""


class UpstreamAuthorizer:
    """Chooses `Authorization` headers for the endpoints of one upstream, and caches the requirements of the endpoints.
    The argument `endpoint` of a method is the URL of an endpoint."""

    def __init__(
        self,
        settings: Upstream,
        endpoints: list[str],
        api: ApiClient,
        backoff: RateLimitBackoff,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
        configured_name: str | None = None,
    ) -> None:
        """`endpoints`: the URLs of the endpoints. `clock` returns seconds since 1970. `configured_name`: a name of the
        upstream, such as `ghcr.io`; None: `settings.name`. The login is looked up under this name in docker's
        `config.json`. Token services in the registrable domain of this name are allowed."""
        self._name = settings.name
        self._login = ConfiguredLogin(settings, configured_name)
        self._realms = RealmPolicy(settings, endpoints, configured_name)
        self._allowed_hosts = settings.redirect_host_ports | settings.realm_host_ports
        self._api = api
        self._backoff = backoff
        self._clock = clock
        self._tokens = TokenClient(settings.name, api, backoff, records, leases, clock)
        self._requirements: SizedCache[tuple[str, str], tuple[LoginRequirement, float]] = SizedCache(
            MAX_CACHED_REQUIREMENTS, MAX_CACHED_REQUIREMENT_BYTES
        )
        """By endpoint and scope: the cached requirement, and when it expires, in seconds since 1970."""
        self._guesses: dict[str, TokenServiceGuess] = {}
        """By endpoint: the guess for scopes without a cached requirement."""
        self._pings: dict[str, PingResult] = {}
        """By endpoint: the result of the last GET `/v2/`."""
        self._running_pings: SingleFlight[PingResult] = SingleFlight()

    @property
    def has_login(self) -> bool:
        """Whether there is a login for this upstream at the moment. Raises UpstreamUnavailable if the configured login
        cannot be read."""
        return self._login.current() is not None

    @property
    def is_login_missing(self) -> bool:
        """Whether a login is configured, but docker's `config.json` contains none for this upstream at the moment.
        Raises UpstreamUnavailable if the configured login cannot be read."""
        return self._login.is_configured and not self.has_login

    async def offer(self, endpoint: str, scope: str, attempt: EndpointAttempt) -> AuthorizationOffer:
        """Returns the first offer for a request. `attempt` has the time limit for the endpoint, and is told when GET
        `/v2/` is sent and answered. The offer has no header in these cases:

        - No requirement is known, and there is no usable guess.
        - No token could be obtained. The offer then has a `failure`.
        - The endpoint requires the password, and there is no login.

        Raises UpstreamUnavailable if the configured login cannot be read, and TooManyRequests if the endpoint answers
        GET `/v2/` with 429."""
        login = self._login.current()
        key = self._token_key(endpoint, scope, login)
        if token := await self._tokens.cached(key):
            return AuthorizationOffer(f"Bearer {token}")
        requirement, guess = self._cached_requirement(endpoint, scope), None
        if requirement is None:
            guess = self._guesses.get(endpoint)
            if guess is not None and guess.failures < MAX_GUESS_FAILURES:
                requirement = LoginRequirement(guess.token_service, scope)
            else:
                guess = None
        seconds = GUESS_SECONDS if guess is not None else OFFER_SECONDS
        if attempt.timeout_seconds is not None:
            seconds = min(seconds, attempt.timeout_seconds / OFFER_TIME_DIVISOR)
        try:
            async with time_limit(seconds, f"a token service of {loggable_origin(endpoint)}"):
                if requirement is None and login is not None:
                    requirement = await self._requirement_from_ping(endpoint, scope, login, attempt)
                if requirement is None:
                    last_guess = self._guesses.get(endpoint)
                    return AuthorizationOffer(has_given_up_guessing=last_guess is not None and last_guess.gave_no_token)
                authorization, is_fresh = await self._authorization_for(endpoint, key, requirement, login, refused=None)
                return AuthorizationOffer(authorization, requirement, guess=guess, is_fresh=is_fresh)
        except _NO_TOKEN_ERRORS as error:
            if requirement is None and isinstance(error, TooManyRequests):
                raise  # the answer to GET /v2/ was 429; the client gets this error and can try again after the pause
            if guess is None:
                self._requirements.remove((endpoint, scope))
            else:
                guess.failures += 1
                guess.gave_no_token = True
            return AuthorizationOffer(authorization=None, requirement=requirement, failure=error)

    def offer_password(self, endpoint: str, scope: str) -> AuthorizationOffer | None:
        """Returns an offer with the password, for an endpoint that has sent a refusal but no challenge. Returns None in
        these cases:

        - There is no login with a password, or the login has an identity token.
        - A requirement for this scope is cached.
        - There is no response to GET `/v2/`, or the response shows whether the endpoint requires a login."""
        login = self._login.current()
        if login is None or not login.username or login.identity_token or (endpoint, scope) in self._requirements:
            return None
        ping = self._pings.get(endpoint)
        is_unclear = ping is not None and ping.requirement is None and ping.status != 200
        if not is_unclear:
            return None
        return AuthorizationOffer(login.basic_authorization(), LoginRequirement(token_service=None, scope=scope))

    async def renew(
        self, endpoint: str, scope: str, response: UpstreamResponse, offer: AuthorizationOffer
    ) -> AuthorizationOffer | None:
        """Returns another offer after the endpoint has refused `offer` with `response`. Returns None if the response
        has no challenge that can be fulfilled, or if the new header would equal the refused header. Raises Denied,
        AnonymousRefused, TooManyRequests, UpstreamUnavailable, UpstreamTimeout if no token can be obtained."""
        login = self._login.current()
        key = self._token_key(endpoint, scope, login)
        requirement = self._requirement_of(response, scope, login)
        if requirement is None:
            return None
        self._requirements.remove((endpoint, scope))
        if offer.guess is not None and requirement.token_service != offer.guess.token_service:
            offer.guess.failures += 1
            offer.guess.gave_no_token = False
        token = (offer.authorization or "").removeprefix("Bearer ")
        if offer.authorization and offer.authorization != token:  # a Bearer token, not a password
            await self._tokens.delete_refused(key, token)
        if (
            offer.failure is not None
            and requirement == offer.requirement
            and not isinstance(offer.failure, UpstreamTimeout)
        ):
            # The endpoint requires the token that could not be obtained for the first offer. The error was not a
            # timeout, so a second try would most likely fail, too.
            raise offer.failure
        authorization, is_fresh = await self._authorization_for(endpoint, key, requirement, login, refused=token)
        if authorization == offer.authorization:
            return None
        return AuthorizationOffer(authorization, requirement, is_fresh=is_fresh)

    def on_accepted(self, endpoint: str, scope: str, offer: AuthorizationOffer) -> None:
        """Caches the requirement of an offer that the endpoint has accepted. Does nothing if the offer has no
        requirement or no header.

        - If the requirement was made from a guess, resets the failures of the guess.
        - Otherwise, makes the token service the endpoint's guess if the endpoint has no usable guess."""
        if offer.requirement is None or offer.authorization is None:
            return
        cached = offer.requirement, self._clock() + REQUIREMENT_VALID_SECONDS
        self._requirements.put((endpoint, scope), cached, sys.getsizeof(scope) + offer.requirement.size_bytes)
        if offer.guess is not None:
            offer.guess.failures, offer.guess.gave_no_token = 0, False
        elif offer.requirement.token_service is not None:
            guess = self._guesses.get(endpoint)
            if guess is None or guess.failures >= MAX_GUESS_FAILURES:
                self._guesses[endpoint] = TokenServiceGuess(offer.requirement.token_service)

    async def delete_token(self, endpoint: str, scope: str) -> None:
        """Deletes the cached token for this endpoint and scope. Does nothing if no token is cached. Raises
        UpstreamUnavailable if the configured login cannot be read."""
        key = self._token_key(endpoint, scope, self._login.current())
        if token := await self._tokens.cached(key):
            await self._tokens.delete_refused(key, token)

    async def aclose(self) -> None:
        """Cancels running pings and requests for tokens."""
        await self._running_pings.aclose()
        await self._tokens.aclose()

    def _token_key(self, endpoint: str, scope: str, login: UpstreamLogin | None) -> str:
        """Returns the key under which tokens for this endpoint, scope and login are cached."""
        user = f"{login.username}#{login.version}" if login else "anonymous"
        return f"{self._name} {endpoint} {scope} {user}"

    def _cached_requirement(self, endpoint: str, scope: str) -> LoginRequirement | None:
        """Returns the cached requirement of the endpoint for this scope. Returns None if no requirement is cached or if
        it has expired. A requirement also counts as expired if it would expire later than `REQUIREMENT_VALID_SECONDS`
        from now. This happens if the clock was set back after the requirement was cached."""
        requirement, valid_until = self._requirements.get((endpoint, scope)) or (None, 0.0)
        if not 0 < valid_until - self._clock() <= REQUIREMENT_VALID_SECONDS:
            self._requirements.remove((endpoint, scope))
            return None
        return requirement

    async def _requirement_from_ping(
        self, endpoint: str, scope: str, login: UpstreamLogin, attempt: EndpointAttempt
    ) -> LoginRequirement | None:
        """Returns the requirement from the endpoint's response to GET `/v2/`, which may be cached. Returns None if the
        response contains no challenge that can be fulfilled.

        GET `/v2/` is necessary because some registries answer a request for private content without a login with 404,
        which contains no challenge."""
        ping = self._pings.get(endpoint)
        if ping is None or not 0 < ping.valid_until - self._clock() <= PING_VALID_SECONDS:
            attempt.on_send()
            ping = await self._running_pings.run(endpoint, lambda: self._ping(endpoint, login))
            attempt.on_headers(ping.status)
        return LoginRequirement(ping.requirement.token_service, scope) if ping.requirement is not None else None

    async def _ping(self, endpoint: str, login: UpstreamLogin) -> PingResult:
        """Sends GET `/v2/` and caches the result. Raises TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        await self._backoff.raise_if_limited(endpoint, RequestKind.LOGIN)
        async with time_limit(REQUEST_TIMEOUT_SECONDS, loggable_origin(endpoint)):
            response = await self._api.send("GET", f"{endpoint}/v2/", {})
        if response.status == 429 and not response.is_cross_origin:
            raise await self._backoff.record_429(endpoint, RequestKind.LOGIN, response.headers)
        if response.status == 429 or response.status >= 500:
            raise UpstreamUnavailable(f"the upstream registry {loggable_origin(endpoint)} answers {response.status}")
        asks_for_login = response.status == 401 and not response.is_cross_origin
        # The scope is empty, because the result is cached for all scopes. `_requirement_from_ping` adds the scope.
        requirement = self._requirement_of(response, scope="", login=login) if asks_for_login else None
        is_clear = requirement is not None or response.status == 200
        ping = PingResult(
            response.status,
            requirement,
            self._clock() + (PING_VALID_SECONDS if is_clear else UNCLEAR_PING_VALID_SECONDS),
        )
        self._pings[endpoint] = ping
        return ping

    def _requirement_of(
        self, response: UpstreamResponse, scope: str, login: UpstreamLogin | None
    ) -> LoginRequirement | None:
        """Returns the requirement in the challenge of a response. If the challenge names no scope, the requirement has
        `scope`. Returns None if the response has no challenge that can be fulfilled."""
        challenges = parse_challenges(response.headers.get("www-authenticate", ""))
        challenge = choose_challenge(challenges, bool(login and login.username))
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            return LoginRequirement(token_service=None, scope=scope)
        parameters = challenge.parameters
        if any(len(value) > MAX_PARAMETER_LENGTH for value in parameters.values()):
            return None
        # `reach`: the addresses to which requests to the token service may connect.
        reach = Reach(response.network, self._allowed_hosts)
        return LoginRequirement(
            UpstreamTokenService(parameters["realm"], parameters.get("service", ""), reach),
            parameters.get("scope") or scope,
        )

    async def _authorization_for(
        self, endpoint: str, key: str, requirement: LoginRequirement, login: UpstreamLogin | None, refused: str | None
    ) -> tuple[str | None, bool]:
        """Returns the value of the `Authorization` header that fulfils the requirement, and the value of
        `AuthorizationOffer.is_fresh`. The header's value is None if it would be a password and there is no login. `key`
        is the result of `_token_key`. `refused`: a token that the endpoint has refused, and that is not returned again;
        None or "": no token was refused. Raises Denied, AnonymousRefused, TooManyRequests, UpstreamUnavailable,
        UpstreamTimeout."""
        if requirement.token_service is None:
            return (login.basic_authorization() if login else None), True
        self._realms.raise_if_refused(requirement.token_service.realm, endpoint, sends_password=login is not None)
        token = await self._tokens.obtain(key, requirement.token_service, requirement.scope, login, refused)
        return f"Bearer {token.text}", token.is_new
