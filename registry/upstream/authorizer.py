"""Chooses the `Authorization` header for requests to an endpoint of the upstream, for one scope (the access that a
token grants, such as `repository:library/ubuntu:pull`).

An endpoint says in a challenge what it requires: a token from a token service, or the password itself (RFC 9110, 11;
RFC 6750). A challenge is cached for its endpoint and scope once the endpoint has accepted a token obtained for it. For
other scopes of that endpoint, the same token service is used as a guess, which saves the request that would bring the
same challenge. If the guess fails, the request is sent without a token, and the endpoint's response contains the
challenge.
"""

from __future__ import annotations

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
from registry.upstream.request_limits import REQUEST_TIMEOUT_SECONDS, time_limit
from registry.upstream.token_client import AnonymousRefused, TokenClient, TokenEndpoint
from registry.upstream.upstream_responses import UpstreamResponse
from storage.errors import Denied, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import UpstreamRecords

PING_VALID_SECONDS = 600.0
"""Time for which the response to GET `/v2/` is used, if it shows whether a login is required."""
UNCLEAR_PING_VALID_SECONDS = 60.0
"""Time for which the response to GET `/v2/` is used, if it was a refusal without a challenge."""
MAX_CACHED_CHALLENGES = 1000
"""Pairs of endpoint and scope whose challenge is cached."""
CHALLENGE_VALID_SECONDS = 3600.0
"""Time for which a cached challenge is used."""
OFFER_SECONDS = 3.0
"""Time limit for the steps before the request itself: GET `/v2/`, and getting a token for a cached challenge. After
that time the request is sent without a token, and its response contains the challenge."""
OFFER_TIME_DIVISOR = 3
"""The steps before the request take at most a third of the endpoint's time limit, so that the request itself has
time."""
GUESS_SECONDS = 2.0
"""Time limit for getting a token from a guessed token service."""
MAX_WRONG_GUESSES = 3
"""Failed guesses in a row after which a token service is no longer guessed. More than one, because a single repository
may use another token service than the other repositories of the endpoint."""
MAX_PARAMETER_LENGTH = 4096
"""Longest realm, service or scope in a challenge, in characters."""

_NO_TOKEN_ERRORS = (AnonymousRefused, Denied, TooManyRequests, UpstreamUnavailable)
"""Errors after which the request is sent without a token."""


@dataclass(frozen=True, slots=True)
class LoginRequirement:
    """What an endpoint requires for a scope: a token from `service`; None: the password itself (Basic)."""

    service: TokenEndpoint | None
    scope: str


@dataclass(slots=True)
class TokenServiceGuess:
    """The token service whose token an endpoint has accepted, and how many guesses in a row have failed since."""

    service: TokenEndpoint
    failures: int = 0


@dataclass(slots=True)
class AuthorizationOffer:
    """The `Authorization` to send with a request, and how it was chosen. If the endpoint refuses it, another offer may
    be tried (`UpstreamAuthorizer.renew`)."""

    authorization: str | None = None
    """The header's value; None: send the request without it."""
    requirement: LoginRequirement | None = None
    """What the header is meant to fulfil. It may be a guess, so the endpoint may require something else."""
    failure: Exception | None = None
    """Why no header could be obtained for `requirement`."""
    guess: TokenServiceGuess | None = None
    """The guess that `requirement` is based on; None: it comes from a challenge."""
    has_new_token: bool = False
    """Whether the token service has just issued the token in `authorization`, so that it was in no cache."""


@dataclass(frozen=True, slots=True)
class PingResult:
    """An endpoint's response to GET `/v2/`. With a `requirement`, the endpoint requires a login. Without one, `status`
    200 means that it requires none; any other status leaves that unclear."""

    status: int
    requirement: LoginRequirement | None
    valid_until: float
    """Seconds since 1970."""


class UpstreamAuthorizer:
    """Chooses `Authorization` headers for the endpoints of one upstream, and caches their challenges."""

    def __init__(
        self,
        settings: Upstream,
        endpoints: list[str],
        api: ApiClient,
        backoff: RateLimitBackoff,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        self._name = settings.name
        self._login = ConfiguredLogin(settings)
        self._realms = RealmPolicy(settings, endpoints)
        self._allowed_hosts = settings.redirect_host_ports | settings.realm_host_ports
        self._api = api
        self._backoff = backoff
        self._clock = clock
        self._tokens = TokenClient(settings.name, api, backoff, records, leases, clock)
        self._requirements: dict[tuple[str, str], tuple[LoginRequirement, float]] = {}
        """By endpoint and scope: the requirement, and until when it is valid, in seconds since 1970. The requirement
        that was accepted most recently comes last."""
        self._guesses: dict[str, TokenServiceGuess] = {}
        """By endpoint."""
        self._pings: dict[str, PingResult] = {}
        """By endpoint."""
        self._running_pings: SingleFlight[PingResult] = SingleFlight()

    @property
    def has_login(self) -> bool:
        """Whether a login is configured and available now. Then a refusal is a refusal of that login."""
        return self._login.current() is not None

    @property
    def is_login_missing(self) -> bool:
        """Whether a login is configured, but its file contains none at the moment."""
        return self._login.is_configured and not self.has_login

    async def offer(self, endpoint: str, scope: str, attempt: EndpointAttempt) -> AuthorizationOffer:
        """Returns the offer for the first request. It is empty if the endpoint has asked for no login,
        and carries a `failure` if no token could be obtained in time. Raises UpstreamUnavailable if the configured
        login cannot be read; TooManyRequests if the endpoint answers GET `/v2/` with 429."""
        login = self._login.current()
        key = self._token_key(endpoint, scope, login)
        if token := await self._tokens.cached(key):
            return AuthorizationOffer(f"Bearer {token}")
        requirement, guess = self._cached_requirement(endpoint, scope), None
        if requirement is None:
            guess = self._guesses.get(endpoint)
            if guess is not None and guess.failures < MAX_WRONG_GUESSES:
                requirement = LoginRequirement(guess.service, scope)
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
                    return AuthorizationOffer()
                authorization, is_new = await self._authorization_for(endpoint, key, requirement, login, None)
                return AuthorizationOffer(authorization, requirement, guess=guess, has_new_token=is_new)
        except _NO_TOKEN_ERRORS as error:
            if requirement is None and isinstance(error, TooManyRequests):
                raise  # GET /v2/ got a 429; the client can try again after the pause
            if guess is None:
                self._requirements.pop((endpoint, scope), None)
            else:
                guess.failures += 1
            return AuthorizationOffer(None, requirement, error)

    def offer_without_challenge(self, endpoint: str, scope: str) -> AuthorizationOffer | None:
        """Returns the offer to try after an endpoint refused a request without a challenge: the password, sent to the
        endpoint itself. Returns None if there is no password, or if GET `/v2/` has shown what the endpoint requires."""
        login = self._login.current()
        if login is None or not login.username or login.identity or (endpoint, scope) in self._requirements:
            return None
        ping = self._pings.get(endpoint)
        is_unclear = ping is not None and ping.requirement is None and ping.status != 200
        return AuthorizationOffer(login.basic(), LoginRequirement(None, scope)) if is_unclear else None

    async def renew(
        self, endpoint: str, scope: str, response: UpstreamResponse, offer: AuthorizationOffer
    ) -> AuthorizationOffer | None:
        """Returns another offer after the endpoint refused `offer` with `response`; None if there is no other offer to
        try. Raises Denied, AnonymousRefused, TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        login = self._login.current()
        key = self._token_key(endpoint, scope, login)
        requirement = self._requirement_of(response, scope, login)
        if requirement is None:
            return None
        self._requirements.pop((endpoint, scope), None)
        if offer.guess is not None and requirement.service != offer.guess.service:
            offer.guess.failures += 1
        token = (offer.authorization or "").removeprefix("Bearer ")
        if offer.authorization and offer.authorization != token:
            await self._tokens.delete_refused(key, token)
        if (
            offer.failure is not None
            and requirement == offer.requirement
            and not isinstance(offer.failure, UpstreamTimeout)
        ):
            # The endpoint requires what was already tried, so trying again fails, too. After a timeout it may succeed.
            raise offer.failure
        authorization, is_new = await self._authorization_for(endpoint, key, requirement, login, token)
        if authorization == offer.authorization:
            return None
        return AuthorizationOffer(authorization, requirement, has_new_token=is_new)

    def on_accepted(self, endpoint: str, scope: str, offer: AuthorizationOffer) -> None:
        """Caches the requirement of an offer that the endpoint has accepted."""
        if offer.requirement is None or offer.authorization is None:
            return
        self._requirements.pop((endpoint, scope), None)
        if len(self._requirements) >= MAX_CACHED_CHALLENGES:
            del self._requirements[next(iter(self._requirements))]
        self._requirements[endpoint, scope] = offer.requirement, self._clock() + CHALLENGE_VALID_SECONDS
        if offer.guess is not None:
            offer.guess.failures = 0
        elif offer.requirement.service is not None:
            guess = self._guesses.get(endpoint)
            if guess is None or guess.failures >= MAX_WRONG_GUESSES:
                self._guesses[endpoint] = TokenServiceGuess(offer.requirement.service)

    async def aclose(self) -> None:
        """Cancels running requests."""
        await self._running_pings.aclose()
        await self._tokens.aclose()

    def _token_key(self, endpoint: str, scope: str, login: UpstreamLogin | None) -> str:
        """Returns the key under which tokens for this endpoint, scope and login are cached."""
        user = f"{login.username}#{login.version}" if login else "anonymous"
        return f"{self._name} {endpoint} {scope} {user}"

    def _cached_requirement(self, endpoint: str, scope: str) -> LoginRequirement | None:
        """Returns the requirement that the endpoint accepted for this scope; None if there is none that is valid."""
        requirement, valid_until = self._requirements.get((endpoint, scope), (None, 0.0))
        if not 0 < valid_until - self._clock() <= CHALLENGE_VALID_SECONDS:
            self._requirements.pop((endpoint, scope), None)
            return None
        return requirement

    async def _requirement_from_ping(
        self, endpoint: str, scope: str, login: UpstreamLogin, attempt: EndpointAttempt
    ) -> LoginRequirement | None:
        """Returns what the endpoint requires according to GET `/v2/`; None if it requires no login, or does not say so.

        Some registries answer requests without a login with 404 instead of 401 for content that is not public. Their
        response contains no challenge, so the challenge has to be found first. Clients send GET `/v2/` for the same
        reason."""
        ping = self._pings.get(endpoint)
        if ping is None or not 0 < ping.valid_until - self._clock() <= PING_VALID_SECONDS:
            attempt.on_sent()
            ping = await self._running_pings.run(endpoint, lambda: self._ping(endpoint, login))
            attempt.on_headers(ping.status)
        return LoginRequirement(ping.requirement.service, scope) if ping.requirement is not None else None

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
        requirement = self._requirement_of(response, "", login) if asks_for_login else None
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
        """Returns what the challenge of a response requires. Uses `scope` if the challenge names no scope. Returns None
        if there is no challenge that can be fulfilled."""
        challenges = parse_challenges(response.headers.get("www-authenticate", ""))
        challenge = choose_challenge(challenges, bool(login and login.username))
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            return LoginRequirement(None, scope)
        parameters = challenge.parameters
        if any(len(value) > MAX_PARAMETER_LENGTH for value in parameters.values()):
            return None
        reach = Reach(response.network, self._allowed_hosts)
        return LoginRequirement(
            TokenEndpoint(parameters["realm"], parameters.get("service", ""), reach),
            parameters.get("scope") or scope,
        )

    async def _authorization_for(
        self, endpoint: str, key: str, requirement: LoginRequirement, login: UpstreamLogin | None, refused: str | None
    ) -> tuple[str | None, bool]:
        """Returns the `Authorization` that fulfils the requirement, and whether its token was just issued (True for a
        password). `refused` is a token that the endpoint has refused and must not be returned. Raises Denied,
        AnonymousRefused, TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        if requirement.service is None:
            return (login.basic() if login else None), True
        self._realms.raise_if_refused(requirement.service.realm, endpoint, has_login=login is not None)
        token = await self._tokens.obtain(key, requirement.service, requirement.scope, login, refused)
        return f"Bearer {token.text}", token.is_new
