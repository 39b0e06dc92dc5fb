"""Getting let in: what `Authorization` an endpoint wants for a scope.

Sources: RFC 9110, 11 and RFC 6750 (challenges). A challenge counts for the endpoint and the scope it was given for, and
is remembered only once it led to a token. For other scopes of that endpoint the token service that worked is a guess:
it saves the request that would only bring the same challenge. Where the guess fails, in whatever way, the request is
sent without a token, and the endpoint says itself what it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from registry.config import Upstream
from registry.upstream.api_client import ApiClient
from registry.upstream.challenges import RealmPolicy, choose_challenge, parse_challenges
from registry.upstream.configured_login import ConfiguredLogin, UpstreamLogin
from registry.upstream.destinations import Reach, loggable_origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.quota import RateLimitBackoff, RequestKind
from registry.upstream.request_limits import ANSWER_TIMEOUT_SECONDS, UpstreamSingleFlight, time_limit
from registry.upstream.token_client import AnonymousRefused, TokenClient, TokenEndpoint
from registry.upstream.upstream_responses import UpstreamResponse
from storage.errors import Denied, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.leases import Leases
from storage.upstream_records import UpstreamRecords

PING_VALID_SECONDS = 600.0
"""For how long what an endpoint asked for at `/v2/` is believed: a login, or none."""
UNCLEAR_PING_VALID_SECONDS = 60.0
"""The same where it said neither: it refused, without saying what it wants."""
MAX_KNOWN_CHALLENGES = 1000
"""Scopes whose challenge is remembered, the most."""
CHALLENGE_VALID_SECONDS = 3600.0
OFFER_SECONDS = 3.0
"""For what is done before the endpoint is asked: asking it how to log in, and getting a token for what it asked for
earlier. Then the request is sent without a token, and the endpoint says what it wants."""
OFFER_SHARE = 3
"""It takes at most this part (a third) of the time that an endpoint has."""
GUESS_SECONDS = 2.0
"""The same for a token from a service that may not be the scope's."""
MAX_WRONG_GUESSES = 3
"""Guesses that fail in a row until another token service is guessed: those of one repository must not be enough."""
MAX_PARAMETER_LENGTH = 4096
"""Characters of a realm, a service or a scope in a challenge."""

_LOGIN_FAILURES = (AnonymousRefused, Denied, TooManyRequests, UpstreamUnavailable)


@dataclass(frozen=True, slots=True)
class LoginRequirement:
    """What an endpoint wants. `service` is None where it wants the password itself (Basic)."""

    service: TokenEndpoint | None
    scope: str


@dataclass(slots=True)
class TokenServiceGuess:
    """The token service that worked at an endpoint. `misses`: how often it did not since."""

    service: TokenEndpoint
    misses: int = 0


@dataclass(slots=True)
class AuthorizationOffer:
    """The `Authorization` to begin with. `failure`: none could be got for the `wish`, which may not be the endpoint's.
    `guess`: what it comes from, where it is a guess."""

    authorization: str | None = None
    wish: LoginRequirement | None = None
    failure: Exception | None = None
    guess: TokenServiceGuess | None = None


@dataclass(frozen=True, slots=True)
class PingResult:
    """What an endpoint said at `/v2/`: it wants a login (`wish`), or it is open, or neither."""

    status: int
    wish: LoginRequirement | None
    until: float


class UpstreamAuthorizer:
    """One upstream's logins."""

    def __init__(
        self,
        settings: Upstream,
        endpoints: list[str],
        exchange: ApiClient,
        holds: RateLimitBackoff,
        records: UpstreamRecords,
        turns: Leases,
        clock: Callable[[], float],
    ) -> None:
        self._name = settings.name
        self._credentials = ConfiguredLogin(settings)
        self._realms = RealmPolicy(settings, endpoints)
        self._listed = settings.redirect_host_ports | settings.realm_host_ports
        self._exchange = exchange
        self._holds = holds
        self._clock = clock
        self._tokens = TokenClient(settings.name, exchange, holds, records, turns, clock)
        self._known: dict[
            tuple[str, str], tuple[LoginRequirement, float]
        ] = {}  # and until when; the one used last is last
        self._guesses: dict[str, TokenServiceGuess] = {}
        self._pinged: dict[str, PingResult] = {}
        self._flights = UpstreamSingleFlight()

    @property
    def configured(self) -> bool:
        """Somebody logs in, so that a refusal is a refusal of the login."""
        return self._credentials.current() is not None

    @property
    def is_login_missing(self) -> bool:
        """Somebody is to log in, but the file holds no login any more."""
        return self._credentials.configured and not self.configured

    async def offer(self, endpoint: str, scope: str, trial: EndpointAttempt) -> AuthorizationOffer:
        """What to begin with. Nothing, as long as the endpoint has asked for nothing, or does not say in time what it
        wants: then the answer to the request itself says so. Raises UpstreamUnavailable: our login cannot be read;
        TooManyRequests: it limits that question."""
        login = self._credentials.current()
        key = self._key(endpoint, scope, login)
        if token := await self._tokens.kept(key):
            return AuthorizationOffer(f"Bearer {token}")
        wish, guess = self._remembered(endpoint, scope), None
        if wish is None:
            guess = self._guesses.get(endpoint)
            if guess is not None and guess.misses < MAX_WRONG_GUESSES:
                wish = LoginRequirement(guess.service, scope)
            else:
                guess = None
        seconds = GUESS_SECONDS if guess is not None else OFFER_SECONDS
        if trial.seconds is not None:
            seconds = min(seconds, trial.seconds / OFFER_SHARE)
        try:
            async with time_limit(seconds, f"a token service of {loggable_origin(endpoint)}"):
                if wish is None and login is not None:
                    wish = await self._asked(endpoint, scope, login, trial)
                if wish is None:
                    return AuthorizationOffer()
                return AuthorizationOffer(await self._meet(endpoint, key, wish, login, None), wish, guess=guess)
        except _LOGIN_FAILURES as error:
            if wish is None and isinstance(error, TooManyRequests):
                raise  # it may be asked in a moment
            if guess is None:
                self._known.pop((endpoint, scope), None)
            else:
                guess.misses += 1
            return AuthorizationOffer(None, wish, error)

    def offer_unchallenged(self, endpoint: str, scope: str) -> AuthorizationOffer | None:
        """What to try where an endpoint refuses and says nowhere how to log in; None: there is nothing. It goes to the
        endpoint alone, which the settings name; no realm is asked."""
        login = self._credentials.current()
        if login is None or not login.username or login.identity or (endpoint, scope) in self._known:
            return None
        pinged = self._pinged.get(endpoint)
        mute = pinged is not None and pinged.wish is None and pinged.status != 200
        return AuthorizationOffer(login.basic(), LoginRequirement(None, scope)) if mute else None

    async def renew(
        self, endpoint: str, scope: str, answer: UpstreamResponse, offer: AuthorizationOffer
    ) -> AuthorizationOffer | None:
        """Another offer, after `answer` refused that one. None: there is no other. Raises Denied, AnonymousRefused,
        TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        login = self._credentials.current()
        key = self._key(endpoint, scope, login)
        wish = self._read(answer, scope, login)
        if wish is None:
            return None
        self._known.pop((endpoint, scope), None)
        if offer.guess is not None and wish.service != offer.guess.service:
            offer.guess.misses += 1
        token = (offer.authorization or "").removeprefix("Bearer ")
        if offer.authorization and offer.authorization != token:
            await self._tokens.drop(key, token)
        if offer.failure is not None and wish == offer.wish and not isinstance(offer.failure, UpstreamTimeout):
            raise offer.failure  # the guess was right; a service that was slow may be ready by now
        authorization = await self._meet(endpoint, key, wish, login, token)
        return AuthorizationOffer(authorization, wish) if authorization != offer.authorization else None

    def accepted(self, endpoint: str, scope: str, offer: AuthorizationOffer) -> None:
        """The endpoint has let that in."""
        if offer.wish is None or offer.authorization is None:
            return
        self._known.pop((endpoint, scope), None)
        if len(self._known) >= MAX_KNOWN_CHALLENGES:
            del self._known[next(iter(self._known))]
        self._known[endpoint, scope] = offer.wish, self._clock() + CHALLENGE_VALID_SECONDS
        if offer.guess is not None:
            offer.guess.misses = 0
        elif offer.wish.service is not None:
            guess = self._guesses.get(endpoint)
            if guess is None or guess.misses >= MAX_WRONG_GUESSES:
                self._guesses[endpoint] = TokenServiceGuess(offer.wish.service)

    async def aclose(self) -> None:
        await self._flights.aclose()
        await self._tokens.aclose()

    def _key(self, endpoint: str, scope: str, login: UpstreamLogin | None) -> str:
        who = f"{login.username}#{login.version}" if login else "anonymous"
        return f"{self._name} {endpoint} {scope} {who}"

    def _remembered(self, endpoint: str, scope: str) -> LoginRequirement | None:
        wish, until = self._known.get((endpoint, scope), (None, 0.0))
        if not 0 < until - self._clock() <= CHALLENGE_VALID_SECONDS:
            self._known.pop((endpoint, scope), None)
            return None
        return wish

    async def _asked(
        self, endpoint: str, scope: str, login: UpstreamLogin, trial: EndpointAttempt
    ) -> LoginRequirement | None:
        """What the endpoint asks everybody for. Some registries show public content to everybody and answer 404, not
        401, for the rest: what the login may see is seen only by asking with it. Clients look at `/v2/` for that."""
        pinged = self._pinged.get(endpoint)
        if pinged is None or not 0 < pinged.until - self._clock() <= PING_VALID_SECONDS:
            trial.sent()
            pinged = await self._flights.share(endpoint, lambda: self._ping(endpoint, login))
            trial.headers(pinged.status)
        return LoginRequirement(pinged.wish.service, scope) if pinged.wish is not None else None

    async def _ping(self, endpoint: str, login: UpstreamLogin) -> PingResult:
        await self._holds.raise_if_limited(endpoint, RequestKind.LOGIN)
        async with time_limit(ANSWER_TIMEOUT_SECONDS, loggable_origin(endpoint)):
            answer = await self._exchange.ask("GET", f"{endpoint}/v2/", {})
        if answer.status == 429 and not answer.foreign:
            raise await self._holds.hold(endpoint, RequestKind.LOGIN, answer.headers)
        if answer.status == 429 or answer.status >= 500:
            raise UpstreamUnavailable(f"the upstream registry {loggable_origin(endpoint)} answers {answer.status}")
        asks = answer.status == 401 and not answer.foreign
        wish = self._read(answer, "", login) if asks else None
        sure = wish is not None or answer.status == 200
        pinged = PingResult(
            answer.status, wish, self._clock() + (PING_VALID_SECONDS if sure else UNCLEAR_PING_VALID_SECONDS)
        )
        self._pinged[endpoint] = pinged
        return pinged

    def _read(self, answer: UpstreamResponse, scope: str, login: UpstreamLogin | None) -> LoginRequirement | None:
        """What an answer's challenge wants; `scope` where it names none. None: nothing that can be met."""
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

    async def _meet(
        self, endpoint: str, key: str, wish: LoginRequirement, login: UpstreamLogin | None, refused: str | None
    ) -> str | None:
        if wish.service is None:
            return login.basic() if login else None
        self._realms.check(wish.service.realm, endpoint, login=login is not None)
        return f"Bearer {await self._tokens.obtain(key, wish.service, wish.scope, login, refused)}"
