"""Getting let in: what `Authorization` an endpoint wants, and the tokens for it.

Sources: RFC 9110, 11 and RFC 6750 (challenges), the token specification of CNCF Distribution ("Token Authentication",
"OAuth2 Token Authentication"). A token is kept until shortly before it expires, in memory and in Records, and one
request for it is under way at a time, over all processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from registry.config import Upstream
from registry.upstream.addresses import place
from registry.upstream.answers import Answer, denied, from_registry
from registry.upstream.challenges import Challenge, choose, parse_challenges
from registry.upstream.credentials import Credentials, Login
from registry.upstream.exchange import KIB, Exchange
from registry.upstream.holds import Holds, Kind
from registry.upstream.realms import Realms
from registry.upstream.waiting import ANSWER_SECONDS, Flights, within
from storage.errors import StorageFailed, StorageFull, UpstreamUnavailable
from storage.interface import Records, Turns

log = logging.getLogger(__name__)

LIFETIME = 60.0
"""Seconds a token lives whose service does not say (the token specification's default)."""
MARGIN = 10.0
"""Seconds before its end from which on a token is not used, at most a fifth of its life."""
KEPT = 1000
"""Tokens in memory, the most."""
MOST = 256 * KIB
"""Bytes of a token service's answer."""

OPEN_SECONDS = 600.0
"""For how long an endpoint that asked for no login at `/v2/` is believed to want none."""
SHUT_SECONDS = 60.0
"""The same where it said neither: it refused, without saying what it wants."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
_BASIC = Challenge("basic")


class AnonymousRefused(Exception):
    """The token service gives nothing to somebody without a login. `proven`: its answer shows that it is a registry's,
    and not that of something before it."""

    def __init__(self, proven: bool) -> None:
        super().__init__("the token service gives nothing to the anonymous")
        self.proven = proven


class Auth:
    """One upstream's tokens."""

    def __init__(
        self,
        settings: Upstream,
        endpoints: list[str],
        exchange: Exchange,
        holds: Holds,
        records: Records,
        turns: Turns,
        clock: Callable[[], float],
    ) -> None:
        self._name = settings.name
        self._credentials = Credentials(settings)
        self._realms = Realms(settings, endpoints)
        self._exchange = exchange
        self._holds = holds
        self._records = records
        self._turns = turns
        self._clock = clock
        self._challenges: dict[str, Challenge] = {}
        self._looked: dict[str, tuple[bool, float]] = {}  # whether it is open, and until when that is believed
        self._tokens: dict[str, tuple[str, float]] = {}
        self._flights = Flights()

    @property
    def configured(self) -> bool:
        """Somebody logs in, so that a refusal is a refusal of the login."""
        return self._credentials.current() is not None

    async def header(self, endpoint: str, scope: str) -> str | None:
        """The `Authorization` for a request there; None as long as it has asked for none. Raises Denied,
        AnonymousRefused, TooManyRequests, UpstreamUnavailable, UpstreamTimeout."""
        login = self._credentials.current()
        key = self._key(endpoint, scope, login)
        if token := await self._kept(key):
            return f"Bearer {token}"
        challenge = self._challenges.get(endpoint)
        if challenge is None and login is not None and self._clock() >= self._looked.get(endpoint, (False, 0.0))[1]:
            # Some registries show public content to everybody and answer 404, not 401, for the rest: what the login
            # may see is seen only by asking with it. Clients look at `/v2/` for that.
            challenge = await self._flights.share(f"ping {endpoint}", lambda: self._ping(endpoint, login))
        if challenge is None:
            return None
        return await self._meet(endpoint, key, challenge, scope, login, None)

    def unasked(self, endpoint: str) -> str | None:
        """The `Authorization` to try where an endpoint refuses and says nowhere how to log in; None: there is nothing
        to try. It goes to the endpoint alone, which the settings name; no realm is asked."""
        login = self._credentials.current()
        if login is None or not login.username or login.identity or endpoint in self._challenges:
            return None
        return None if self._looked.get(endpoint, (True, 0.0))[0] else login.basic()

    def welcomed(self, endpoint: str) -> None:
        """What was `unasked` let us in: from now on it is sent at once."""
        self._challenges[endpoint] = _BASIC

    async def renew(self, endpoint: str, scope: str, answer: Answer, refused: str | None) -> str | None:
        """Another `Authorization`, after `answer` refused the one sent. None: there is no other. Raises as `header`."""
        login = self._credentials.current()
        key = self._key(endpoint, scope, login)
        challenge = choose(parse_challenges(answer.headers.get("www-authenticate", "")), bool(login and login.username))
        if challenge is None:
            return None
        self._challenges[endpoint] = challenge
        token = (refused or "").removeprefix("Bearer ")
        if refused and refused != token:
            await self._drop(key, token)
        header = await self._meet(endpoint, key, challenge, challenge.parameters.get("scope") or scope, login, token)
        return header if header != refused else None

    async def aclose(self) -> None:
        await self._flights.aclose()

    def _key(self, endpoint: str, scope: str, login: Login | None) -> str:
        who = f"{login.username}#{login.version}" if login else "anonymous"
        return f"{self._name} {endpoint} {scope} {who}"

    async def _ping(self, endpoint: str, login: Login) -> Challenge | None:
        """What `/v2/` asks for; None: nothing, or nothing that we know how to meet."""
        await self._holds.heed(endpoint, Kind.LOGIN)
        async with within(ANSWER_SECONDS, place(endpoint)):
            answer = await self._exchange.ask("GET", f"{endpoint}/v2/", {})
        if answer.status == 429 and not answer.foreign:
            raise await self._holds.hold(endpoint, Kind.LOGIN, answer.headers)
        if answer.status == 429 or answer.status >= 500:
            raise UpstreamUnavailable(f"the upstream registry {place(endpoint)} answers {answer.status}")
        asks = answer.status == 401 and not answer.foreign
        challenges = parse_challenges(answer.headers.get("www-authenticate", "")) if asks else []
        if challenge := choose(challenges, bool(login.username)):
            return self._challenges.setdefault(endpoint, challenge)
        is_open = answer.status == 200
        self._looked[endpoint] = is_open, self._clock() + (OPEN_SECONDS if is_open else SHUT_SECONDS)
        return None

    async def _meet(
        self, endpoint: str, key: str, challenge: Challenge, scope: str, login: Login | None, refused: str | None
    ) -> str | None:
        if challenge.scheme == "basic":
            return login.basic() if login else None
        realm = challenge.parameters["realm"]
        self._realms.check(realm, endpoint)
        service = challenge.parameters.get("service", "")
        token = await self._flights.share(key, lambda: self._obtain(key, realm, service, scope, login, refused))
        if token == refused:  # the flight had begun before this token was refused
            token = await self._flights.share(key, lambda: self._obtain(key, realm, service, scope, login, refused))
        return f"Bearer {token}"

    async def _kept(self, key: str) -> str | None:
        now = self._clock()
        token, expires = self._tokens.get(key, ("", 0.0))
        if now < expires:
            return token
        self._tokens.pop(key, None)
        if (found := await self._records.token(key)) and now < found[1]:
            self._remember(key, *found)
            return found[0]
        return None

    def _remember(self, key: str, token: str, expires: float) -> None:
        if len(self._tokens) >= KEPT:
            del self._tokens[min(self._tokens, key=lambda each: self._tokens[each][1])]
        self._tokens[key] = (token, expires)

    async def _drop(self, key: str, token: str) -> None:
        if self._tokens.get(key, ("",))[0] == token:
            del self._tokens[key]
        try:
            await self._records.drop_token(key, token)
        except (StorageFailed, StorageFull) as error:  # it is refused once more, and another one got
            log.warning("a token for %s could not be dropped for the other workers: %s", self._name, error)

    async def _obtain(
        self, key: str, realm: str, service: str, scope: str, login: Login | None, refused: str | None
    ) -> str:
        """A token that is not `refused`: one that another process got meanwhile, or a new one."""
        async with within(ANSWER_SECONDS, f"the token service {place(realm)}"), self._turns.take(f"token {key}"):
            if (known := await self._kept(key)) and known != refused:
                return known
            await self._holds.heed(realm, Kind.LOGIN)
            asked = self._clock()
            answer = await self._ask(realm, service, scope, login)
            if answer.status == 429:
                raise await self._holds.hold(realm, Kind.LOGIN, answer.headers)
            token, lifetime = self._read(answer, login)
            expires = asked + lifetime - min(MARGIN, lifetime / 5)
            self._remember(key, token, expires)
            try:
                await self._records.keep_token(key, token, expires)
            except (StorageFailed, StorageFull) as error:
                log.warning("a token for %s could not be kept for the other workers: %s", self._name, error)
            return token

    async def _ask(self, realm: str, service: str, scope: str, login: Login | None) -> Answer:
        """GET with the password; where that is not done, and for an identity token, POST."""
        if login is None or not login.identity:
            parts = urlsplit(realm)
            query = parse_qsl(parts.query, keep_blank_values=True)
            query += [("service", service)] if service else []
            query += [("scope", each) for each in scope.split()]
            query += [("account", login.username)] if login else []
            url = parts._replace(query=urlencode(query), fragment="").geturl()
            answer = await self._exchange.ask("GET", url, {"Authorization": login.basic()} if login else {}, most=MOST)
            if login is None or answer.status not in (404, 405):
                return answer
        form = {"client_id": "entrepot", "service": service, "scope": scope}
        if login.identity:
            form |= {"grant_type": "refresh_token", "refresh_token": login.identity}
        else:
            form |= {"grant_type": "password", "username": login.username, "password": login.password}
        return await self._exchange.ask("POST", realm, {}, form=form, most=MOST)

    def _read(self, answer: Answer, login: Login | None) -> tuple[str, float]:
        """Token and lifetime in seconds."""
        where = f"the token service {place(answer.url)}"
        if answer.status in (401, 403) or (answer.status == 400 and login and login.identity):
            if login is None:
                raise AnonymousRefused(from_registry(answer))
            raise denied(place(answer.url))
        if answer.status != 200:
            raise UpstreamUnavailable(f"{where} answers {answer.status}")
        try:
            document = json.loads(answer.body)
            token = document.get("token") or document.get("access_token")
            lifetime = document.get("expires_in")
        except (ValueError, AttributeError, RecursionError):
            raise UpstreamUnavailable(f"{where} answers with something that is no token") from None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise UpstreamUnavailable(f"{where} answers without a token")
        known = isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and 0 < lifetime < 1e9
        return token, float(lifetime) if known else LIFETIME
