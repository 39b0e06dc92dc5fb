"""Parses `WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750, 3) and decides which token services may be used.

A challenge names the URL of a token service, the realm. The upstream chooses that URL, so without a rule it could have
the password sent to any server. A realm is used if it is https and on the upstream's own registrable domain (such as
`docker.io`), or if the setting `realms` lists it. The password is sent only to the endpoint's own port, to port 443 of
other hosts of that domain, or to listed realms, because another port may belong to another service.
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
"""The scheme of a challenge, such as `Bearer`, and the spaces after it."""
_TOKEN68 = re.compile(r"[0-9A-Za-z._~+/-]+=*[ \t]*(?=,|$)")
"""Credentials without a name, as in `Negotiate a87421000492aa==` (RFC 9110, 11.2)."""
MAX_FIELD_LENGTH = 16 << 10
"""Longest `WWW-Authenticate` field, in characters, that is parsed. Parsing 95 KB blocked the event loop for 200 ms."""
MAX_CHALLENGES = 16
"""Challenges of one field that are parsed; further ones are ignored."""
MAX_LOGGED_REALMS = 100
"""Refused realms that are logged. The upstream chooses them, so their number has to be limited."""
_GAP = re.compile(r"[ \t,]*")


@dataclass(frozen=True, slots=True)
class LoginChallenge:
    """One challenge: its scheme in lower case (`bearer`, `basic`), and its parameters by name in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(text: str) -> list[LoginChallenge]:
    """Returns the challenges of a `WWW-Authenticate` field, in order, up to the first one that cannot be parsed.
    Returns an empty list for a field that is too long."""
    challenges: list[LoginChallenge] = []
    if len(text) > MAX_FIELD_LENGTH:
        return challenges
    offset = _skip_gap(text, 0)
    while offset < len(text) and len(challenges) < MAX_CHALLENGES:
        scheme = _SCHEME.match(text, offset)
        if scheme is None:
            break
        parameters, offset = _parse_parameters(text, scheme.end())
        challenges.append(LoginChallenge(scheme[1].lower(), parameters))
    return challenges


def _skip_gap(text: str, offset: int) -> int:
    """Returns the offset of the next character that is not a space, a tab or a comma."""
    gap = _GAP.match(text, offset)
    return gap.end() if gap else offset


def _parse_parameters(text: str, offset: int) -> tuple[dict[str, str], int]:
    """Returns the parameters of the challenge whose scheme ends at `offset`, and the offset of the next challenge."""
    parameters: dict[str, str] = {}
    while True:
        offset = _skip_gap(text, offset)
        if parameter := _PARAMETER.match(text, offset):
            quoted = parameter[2]
            value = parameter[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(parameter[1].lower(), value)
            offset = parameter.end()
        elif not parameters and (unnamed := _TOKEN68.match(text, offset)) and not _SCHEME.fullmatch(unnamed[0].strip()):
            offset = unnamed.end()  # schemes with such credentials are not supported
        else:
            return parameters, offset


def choose_challenge(challenges: list[LoginChallenge], has_password: bool) -> LoginChallenge | None:
    """Returns the challenge to use: the first Bearer challenge with a realm; without one, the first Basic challenge if
    `has_password`; None if there is none of these."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((challenge for challenge in challenges if challenge.scheme == "basic" and has_password), None)


log = logging.getLogger("registry.upstream")


class RealmPolicy:
    """Decides which realms (URLs of token services) may be used for one upstream."""

    def __init__(self, settings: Upstream, endpoints: list[str]) -> None:
        self._name = settings.name
        self._listed_realms = settings.realms
        self._own_domains = {
            registrable_domain(settings.name),
            *(registrable_domain(origin(endpoint)[1]) for endpoint in endpoints),
        }
        self._logged_realms: set[str] = set()

    def raise_if_refused(self, realm: str, endpoint: str, *, has_login: bool) -> None:
        """Raises UpstreamUnavailable if a challenge of `endpoint` names a realm that must not be used; with
        `has_login`, also if the realm must not get the password. Logs each refused realm once."""
        if not self._is_allowed(realm, endpoint):
            why = "is neither on its own site nor in its realms"
        elif has_login and not self._may_see_password(realm, endpoint):
            why = "would get the password on another port and is not in its realms"
        else:
            return
        shown = _loggable_realm(realm)
        if shown not in self._logged_realms and len(self._logged_realms) < MAX_LOGGED_REALMS:
            self._logged_realms.add(shown)
            log.warning(
                "upstream %s: %s names the token service %r, which %s; if it is right, add it to the upstream's realms",
                self._name,
                loggable_origin(endpoint),
                shown,
                why,
            )
        raise UpstreamUnavailable(f"the upstream {self._name} names a token service that {why}")

    def _is_allowed(self, realm: str, endpoint: str) -> bool:
        """Returns whether requests without the password may be sent to the realm."""
        try:
            scheme, host, _ = origin(realm)
            own_scheme, own_host, _ = origin(endpoint)
        except ValueError:
            return False
        if urlsplit(realm).username is not None:
            return False
        if scheme == "http":
            # Allowed only if the endpoint uses http as well, because the password is then sent in clear text anyway.
            return own_scheme == "http" and (host == own_host or self._is_listed(realm))
        return self._is_listed(realm) or host == own_host or registrable_domain(host) in self._own_domains

    def _may_see_password(self, realm: str, endpoint: str) -> bool:
        """Returns whether an allowed realm may get the password."""
        _, host, port = origin(realm)
        _, own_host, own_port = origin(endpoint)
        return self._is_listed(realm) or port == own_port or (host != own_host and port == 443)

    def _is_listed(self, realm: str) -> bool:
        """Returns whether the setting `realms` has this URL, its host, or a path above it."""
        path = urlsplit(realm).path or "/"
        for listed in self._listed_realms:
            listed = listed if "://" in listed else f"https://{listed}"
            try:
                same_origin = origin(listed) == origin(realm)
            except ValueError:
                continue
            listed_path = urlsplit(listed).path.rstrip("/")
            if same_origin and (path == listed_path or path.startswith(f"{listed_path}/") or not listed_path):
                return True
        return False


def _loggable_realm(realm: str) -> str:
    """Returns the realm for logs: without the query, which may contain secrets, and without user name and password."""
    return realm.partition("?")[0].rpartition("@")[2][:200]
