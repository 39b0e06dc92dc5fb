"""Chooses the `Authorization` header for an endpoint and a scope.

Sources: RFC 9110, 11 and RFC 6750 (challenges). A challenge applies to the endpoint and scope it was sent for, and is
cached only once it led to an accepted token. For other scopes of that endpoint, the token service that worked is used
as a guess, which saves the request that would bring the same challenge. If the guess fails in any way, the request is
sent without a token, and the endpoint's response says what it requires.
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
from registry.upstream.quota import RateLimitBackoff, RequestKind
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, time_limit
from registry.upstream.token_client import AnonymousRefused, TokenClient, TokenEndpoint
from registry.upstream.upstream_responses import UpstreamResponse
from storage.errors import Denied, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import UpstreamRecords

PING_VALID_SECONDS = 600.0
"""Time for which the response at `/v2/` is used: a login is required, or none."""
UNCLEAR_PING_VALID_SECONDS = 60.0
"""The same if the response was a refusal without a challenge."""
MAX_KNOWN_CHALLENGES = 1000
"""Scopes whose challenge is cached."""
CHALLENGE_VALID_SECONDS = 3600.0
OFFER_SECONDS = 3.0
"""Time limit for steps before the request itself: asking the endpoint how to log in, and getting a token for a cached
challenge. After that the request is sent without a token, and the response says what is required."""
OFFER_SHARE = 3
"""These steps take at most this part (a third) of the endpoint's time limit."""
GUESS_SECONDS = 2.0
"""The same limit for a token from a guessed service."""
MAX_WRONG_GUESSES = 3
"""Failed guesses in a row until another token service is guessed: those of one repository must not be enough."""
MAX_PARAMETER_LENGTH = 4096
"""Longest realm, service or scope in a challenge, in characters."""

_LOGIN_FAILURES = (AnonymousRefused, Denied, TooManyRequests, UpstreamUnavailable)


@dataclass(frozen=True, slots=True)
class LoginRequirement:
    """What an endpoint requires. `service` is None if it wants the password itself (Basic)."""

    service: TokenEndpoint | None
    scope: str


@dataclass(slots=True)
class TokenServiceGuess:
    """The token service that worked at an endpoint, and how often it has failed since."""

    service: TokenEndpoint
    failures: int = 0


@dataclass(slots=True)
class AuthorizationOffer:
    """The `Authorization` to send first. `failure`: why none could be obtained for `requirement`, which may not be the
    endpoint's. `guess`: the guess it is based on."""

    authorization: str | None = None
    requirement: LoginRequirement | None = None
    failure: Exception | None = None
    guess: TokenServiceGuess | None = None
    is_new: bool = False
    """The token service issued the token for this offer."""


@dataclass(frozen=True, slots=True)
class PingResult:
    """An endpoint's response at `/v2/`: `requirement` for a login; None with status 200: no login required; None
    otherwise: unclear."""

    status: int
    requirement: LoginRequirement | None
    until: float


class UpstreamAuthorizer:
    """The logins of one upstream."""

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
        self._listed = settings.redirect_host_ports | settings.realm_host_ports
        self._api = api
        self._backoff = backoff
        self._clock = clock
        self._tokens = TokenClient(settings.name, api, backoff, records, leases, clock)
        self._requirements: dict[tuple[str, str], tuple[LoginRequirement, float]] = {}
        """By endpoint and scope, each with the time it is valid until; the most recently used is last."""
        self._guesses: dict[str, TokenServiceGuess] = {}
        self._pings: dict[str, PingResult] = {}
        self._flights: SingleFlight[PingResult] = SingleFlight()

    @property
    def configured(self) -> bool:
        """Whether a login is available, so that a refusal is a refusal of that login."""
        return self._login.current() is not None

    @property
    def is_login_missing(self) -> bool:
        """Whether a login is configured, but its file holds none now."""
        return self._login.configured and not self.configured

    async def offer(self, endpoint: str, scope: str, attempt: EndpointAttempt) -> AuthorizationOffer:
        """Returns the `Authorization` to send first: none if the endpoint has not asked for one, or does not say in
        time what it requires. Raises UpstreamUnavailable if the configured login cannot be read; TooManyRequests if the
        endpoint limits that question."""
        login = self._login.current()
        key = self._key(endpoint, scope, login)
        if token := await self._tokens.cached(key):
            return AuthorizationOffer(f"Bearer {token}")
        requirement, guess = self._remembered(endpoint, scope), None
        if requirement is None:
            guess = self._guesses.get(endpoint)
            if guess is not None and guess.failures < MAX_WRONG_GUESSES:
                requirement = LoginRequirement(guess.service, scope)
            else:
                guess = None
        seconds = GUESS_SECONDS if guess is not None else OFFER_SECONDS
        if attempt.seconds is not None:
            seconds = min(seconds, attempt.seconds / OFFER_SHARE)
        try:
            async with time_limit(seconds, f"a token service of {loggable_origin(endpoint)}"):
                if requirement is None and login is not None:
                    requirement = await self._probe(endpoint, scope, login, attempt)
                if requirement is None:
                    return AuthorizationOffer()
                authorization, is_new = await self._authorization_for(endpoint, key, requirement, login, None)
                return AuthorizationOffer(authorization, requirement, guess=guess, is_new=is_new)
        except _LOGIN_FAILURES as error:
            if requirement is None and isinstance(error, TooManyRequests):
                raise  # the question can be repeated in a moment
            if guess is None:
                self._requirements.pop((endpoint, scope), None)
            else:
                guess.failures += 1
            return AuthorizationOffer(None, requirement, error)

    def offer_unchallenged(self, endpoint: str, scope: str) -> AuthorizationOffer | None:
        """Returns what to try when an endpoint refuses without a challenge; None: nothing. The password goes to the
        endpoint only, which the settings name; no realm is used."""
        login = self._login.current()
        if login is None or not login.username or login.identity or (endpoint, scope) in self._requirements:
            return None
        ping = self._pings.get(endpoint)
        mute = ping is not None and ping.requirement is None and ping.status != 200
        return AuthorizationOffer(login.basic(), LoginRequirement(None, scope)) if mute else None

    async def renew(
        self, endpoint: str, scope: str, answer: UpstreamResponse, offer: AuthorizationOffer
    ) -> AuthorizationOffer | None:
        """Returns another offer after `answer` refused `offer`; None: there is no other. Raises Denied,
        AnonymousRefused, TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        login = self._login.current()
        key = self._key(endpoint, scope, login)
        requirement = self._requirement_of(answer, scope, login)
        if requirement is None:
            return None
        self._requirements.pop((endpoint, scope), None)
        if offer.guess is not None and requirement.service != offer.guess.service:
            offer.guess.failures += 1
        token = (offer.authorization or "").removeprefix("Bearer ")
        if offer.authorization and offer.authorization != token:
            await self._tokens.drop(key, token)
        if (
            offer.failure is not None
            and requirement == offer.requirement
            and not isinstance(offer.failure, UpstreamTimeout)
        ):
            raise offer.failure  # the guess was right, so asking again fails, too; after a timeout it may succeed
        authorization, is_new = await self._authorization_for(endpoint, key, requirement, login, token)
        if authorization == offer.authorization:
            return None
        return AuthorizationOffer(authorization, requirement, is_new=is_new)

    def on_accepted(self, endpoint: str, scope: str, offer: AuthorizationOffer) -> None:
        """Called when the endpoint has accepted the offer: caches its requirement."""
        if offer.requirement is None or offer.authorization is None:
            return
        self._requirements.pop((endpoint, scope), None)
        if len(self._requirements) >= MAX_KNOWN_CHALLENGES:
            del self._requirements[next(iter(self._requirements))]
        self._requirements[endpoint, scope] = offer.requirement, self._clock() + CHALLENGE_VALID_SECONDS
        if offer.guess is not None:
            offer.guess.failures = 0
        elif offer.requirement.service is not None:
            guess = self._guesses.get(endpoint)
            if guess is None or guess.failures >= MAX_WRONG_GUESSES:
                self._guesses[endpoint] = TokenServiceGuess(offer.requirement.service)

    async def aclose(self) -> None:
        await self._flights.aclose()
        await self._tokens.aclose()

    def _key(self, endpoint: str, scope: str, login: UpstreamLogin | None) -> str:
        who = f"{login.username}#{login.version}" if login else "anonymous"
        return f"{self._name} {endpoint} {scope} {who}"

    def _remembered(self, endpoint: str, scope: str) -> LoginRequirement | None:
        requirement, until = self._requirements.get((endpoint, scope), (None, 0.0))
        if not 0 < until - self._clock() <= CHALLENGE_VALID_SECONDS:
            self._requirements.pop((endpoint, scope), None)
            return None
        return requirement

    async def _probe(
        self, endpoint: str, scope: str, login: UpstreamLogin, attempt: EndpointAttempt
    ) -> LoginRequirement | None:
        """Asks the endpoint what it requires of everybody. Some registries show public content to everybody and answer
        404 instead of 401 for the rest, so what the login can see is found only with the login. Clients ask `/v2/` for
        the same reason."""
        ping = self._pings.get(endpoint)
        if ping is None or not 0 < ping.until - self._clock() <= PING_VALID_SECONDS:
            attempt.on_sent()
            ping = await self._flights.run(endpoint, lambda: self._ping(endpoint, login))
            attempt.on_headers(ping.status)
        return LoginRequirement(ping.requirement.service, scope) if ping.requirement is not None else None

    async def _ping(self, endpoint: str, login: UpstreamLogin) -> PingResult:
        await self._backoff.raise_if_limited(endpoint, RequestKind.LOGIN)
        async with time_limit(ANSWER_TIMEOUT_SECONDS, loggable_origin(endpoint)):
            answer = await self._api.ask("GET", f"{endpoint}/v2/", {})
        if answer.status == 429 and not answer.is_foreign:
            raise await self._backoff.record(endpoint, RequestKind.LOGIN, answer.headers)
        if answer.status == 429 or answer.status >= 500:
            raise UpstreamUnavailable(f"the upstream registry {loggable_origin(endpoint)} answers {answer.status}")
        asks = answer.status == 401 and not answer.is_foreign
        requirement = self._requirement_of(answer, "", login) if asks else None
        sure = requirement is not None or answer.status == 200
        ping = PingResult(
            answer.status, requirement, self._clock() + (PING_VALID_SECONDS if sure else UNCLEAR_PING_VALID_SECONDS)
        )
        self._pings[endpoint] = ping
        return ping

    def _requirement_of(
        self, answer: UpstreamResponse, scope: str, login: UpstreamLogin | None
    ) -> LoginRequirement | None:
        """Returns what the challenge of a response requires, with `scope` if it names none; None: nothing that can be
        met."""
        challenges = parse_challenges(answer.headers.get("www-authenticate", ""))
        challenge = choose_challenge(challenges, bool(login and login.username))
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            return LoginRequirement(None, scope)
        named = challenge.parameters
        if any(len(value) > MAX_PARAMETER_LENGTH for value in named.values()):
            return None
        reach = Reach(answer.network, self._listed)
        return LoginRequirement(
            TokenEndpoint(named["realm"], named.get("service", ""), reach), named.get("scope") or scope
        )

    async def _authorization_for(
        self, endpoint: str, key: str, requirement: LoginRequirement, login: UpstreamLogin | None, refused: str | None
    ) -> tuple[str | None, bool]:
        """Returns the `Authorization` that meets the requirement, and whether its token is new. Raises what `renew`
        raises."""
        if requirement.service is None:
            return (login.basic() if login else None), True
        self._realms.check(requirement.service.realm, endpoint, login=login is not None)
        token = await self._tokens.obtain(key, requirement.service, requirement.scope, login, refused)
        return f"Bearer {token.text}", token.is_new
