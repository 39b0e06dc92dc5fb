"""Parses `WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750, 3) and decides which token services may be used.

A challenge names a token service (the realm), and whoever answers for the upstream writes the challenge. Without a
rule, a registry could have the password sent anywhere. A realm is used if it is https and on the upstream's own
registrable domain, or listed in `realms`. Another port may be another service: a password goes to the endpoint's own
port, to port 443 of other hosts of the domain, or to what `realms` lists.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from registry.config import Upstream
from registry.upstream.destinations import loggable_origin, origin, registrable_domain
from storage.errors import UpstreamUnavailable

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,|$))")
_TOKEN68 = re.compile(r"[0-9A-Za-z._~+/-]+=*[ \t]*(?=,|$)")
MAX_FIELD_LENGTH = 16 << 10
"""Longest field, in characters, that is parsed. Parsing 95 KB blocked the event loop for 200 ms."""
MAX_CHALLENGES = 16
"""Challenges that are parsed."""
_GAP = re.compile(r"[ \t,]*")


@dataclass(frozen=True, slots=True)
class LoginChallenge:
    """One challenge: its scheme in lower case, and its parameters by lower-case name."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(text: str) -> list[LoginChallenge]:
    """Returns the challenges of a `WWW-Authenticate` field, in order. Stops at what cannot be parsed; returns none for
    a field that is too long."""
    found: list[LoginChallenge] = []
    if len(text) > MAX_FIELD_LENGTH:
        return found
    at = _past_gap(text, 0)
    while at < len(text) and len(found) < MAX_CHALLENGES:
        scheme = _SCHEME.match(text, at)
        if scheme is None:
            break
        parameters, at = _parameters(text, scheme.end())
        found.append(LoginChallenge(scheme[1].lower(), parameters))
    return found


def _past_gap(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap else at


def _parameters(text: str, at: int) -> tuple[dict[str, str], int]:
    """Returns the parameters from `at` on, and where the next challenge starts."""
    parameters: dict[str, str] = {}
    while True:
        at = _past_gap(text, at)
        if found := _PARAMETER.match(text, at):
            quoted = found[2]
            value = found[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(found[1].lower(), value)
            at = found.end()
        elif not parameters and (single := _TOKEN68.match(text, at)) and not _SCHEME.fullmatch(single[0].strip()):
            at = single.end()  # `Negotiate a87421000492aa==` is not supported
        else:
            return parameters, at


def choose_challenge(challenges: list[LoginChallenge], basic: bool) -> LoginChallenge | None:
    """Returns the challenge to use: Bearer with a realm, else Basic if there is a password for it (`basic`)."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((c for c in challenges if c.scheme == "basic" and basic), None)


log = logging.getLogger("registry.upstream")


class RealmPolicy:
    """Decides which token services of one upstream may be used."""

    def __init__(self, settings: Upstream, endpoints: list[str]) -> None:
        self._name = settings.name
        self._listed = settings.realms
        self._sites = {
            registrable_domain(settings.name),
            *(registrable_domain(origin(endpoint)[1]) for endpoint in endpoints),
        }
        self._logged: set[str] = set()

    def check(self, realm: str, endpoint: str, *, login: bool) -> None:
        """Raises UpstreamUnavailable if `endpoint` names a realm that must not be used, or not with a `login`. Logs
        each realm once."""
        if not self._allowed(realm, endpoint):
            why = "is neither on its own site nor in its realms"
        elif login and not self._may_see_password(realm, endpoint):
            why = "would get the password on another port and is not in its realms"
        else:
            return
        shown = _loggable_realm(realm)
        if shown not in self._logged and len(self._logged) < 100:
            self._logged.add(shown)
            log.warning(
                "upstream %s: %s names the token service %r, which %s; if it is right, add it to the upstream's realms",
                self._name,
                loggable_origin(endpoint),
                shown,
                why,
            )
        raise UpstreamUnavailable(f"the upstream {self._name} names a token service that {why}")

    def _allowed(self, realm: str, endpoint: str) -> bool:
        try:
            scheme, host, _ = origin(realm)
            own_scheme, own_host, _ = origin(endpoint)
        except ValueError:
            return False
        if urlsplit(realm).username is not None:
            return False
        if scheme == "http":
            # Over plain http, the password is as exposed at the endpoint itself.
            return own_scheme == "http" and (host == own_host or self._is_listed(realm))
        return self._is_listed(realm) or host == own_host or registrable_domain(host) in self._sites

    def _may_see_password(self, realm: str, endpoint: str) -> bool:
        """Returns whether an allowed realm may get the password."""
        _, host, port = origin(realm)
        _, own_host, own_port = origin(endpoint)
        return self._is_listed(realm) or port == own_port or (host != own_host and port == 443)

    def _is_listed(self, realm: str) -> bool:
        path = urlsplit(realm).path or "/"
        for listed in self._listed:
            listed = listed if "://" in listed else f"https://{listed}"
            try:
                same = origin(listed) == origin(realm)
            except ValueError:
                continue
            below = urlsplit(listed).path.rstrip("/")
            if same and (path == below or path.startswith(f"{below}/") or not below):
                return True
        return False


def _loggable_realm(realm: str) -> str:
    """Returns the realm without its query, which may hold anything."""
    return realm.partition("?")[0].rpartition("@")[2][:200]
