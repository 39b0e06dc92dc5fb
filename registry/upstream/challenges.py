"""Parses `WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750, 3) and decides which token services may be used.

An *endpoint* is a URL of an upstream (a mirrored registry). A challenge of an endpoint contains a *realm*, the URL of a
token service, to which this server may send the upstream's password. `RealmPolicy` decides which realms are allowed, so
that an endpoint cannot make this server send the password to a foreign server. The first case that fits decides:

- The realm contains a user name, or the realm is http and the endpoint is https: refused.
- The setting `realms` lists the realm: allowed, and may get the password on any port.
- The realm is on the endpoint's host: allowed, but may get the password only on the endpoint's port.
- The realm is https, and its registrable domain (such as `docker.io`) is that of an endpoint or of the upstream's name:
  allowed, but may get the password only on the endpoint's port or on port 443.
- Any other realm: refused.

The ports are limited because a service on another port may belong to somebody else.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from registry.config import Upstream
from registry.upstream.destinations import loggable_origin, origin, registrable_domain
from storage.errors import UpstreamUnavailable

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""A word without quotes in a header. RFC 9110, 5.6.2 calls it a token, but it has nothing to do with token services."""
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,|$))")
"""The scheme of a challenge, such as `Bearer`, and the spaces after it."""
_TOKEN68 = re.compile(r"[0-9A-Za-z._~+/-]+=*[ \t]*(?=,|$)")
"""A value without a parameter name (a token68), as in `Negotiate a87421000492aa==` (RFC 9110, 11.2)."""
MAX_FIELD_LENGTH = 16 << 10
"""Longest `WWW-Authenticate` field, in characters, that is parsed. Parsing 95 KB blocked the event loop for 200 ms."""
MAX_CHALLENGES = 16
"""Largest number of challenges of one field that are parsed. Further challenges are ignored."""
MAX_LOGGED_REALMS = 100
"""Largest number of refused realms that are logged for one upstream. The upstream chooses the realms, and must not be
able to fill the log."""
_GAP = re.compile(r"[ \t,]*")
"""The characters between two challenges or parameters."""


class RealmProblem(NamedTuple):
    """Why a realm must not be used."""

    text: str
    """The end of a sentence whose subject is the token service, such as `has a user name in its address`."""
    is_solved_by_listing: bool
    """Whether the realm may be used once it is added to the setting `realms`."""


@dataclass(frozen=True, slots=True)
class LoginChallenge:
    """One challenge: its scheme in lower case (`bearer`, `basic`), and its parameters by name in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(text: str) -> list[LoginChallenge]:
    """Returns the challenges of a `WWW-Authenticate` field in the order of the field, up to the first one that cannot
    be parsed. Returns an empty list for a field longer than MAX_FIELD_LENGTH."""
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
            quoted_value = parameter[2]
            value = parameter[3] if quoted_value is None else re.sub(r"\\(.)", r"\1", quoted_value)
            parameters.setdefault(parameter[1].lower(), value)
            offset = parameter.end()
        elif not parameters and (token68 := _TOKEN68.match(text, offset)) and not _SCHEME.fullmatch(token68[0].strip()):
            offset = token68.end()  # skipped: no scheme that uses a token68 is supported
        else:
            return parameters, offset


def choose_challenge(challenges: list[LoginChallenge], has_password: bool) -> LoginChallenge | None:
    """Returns the first Bearer challenge with a realm. Without such a challenge, returns the first Basic challenge if
    a password is configured (`has_password`). Returns None in all other cases."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((challenge for challenge in challenges if challenge.scheme == "basic" and has_password), None)


log = logging.getLogger("registry.upstream")


class RealmPolicy:
    """Decides which realms (URLs of token services) may be used for one upstream."""

    def __init__(self, settings: Upstream, endpoints: list[str], configured_name: str | None = None) -> None:
        """`endpoints`: the URLs of the upstream. `configured_name`: a name whose registrable domain counts as the
        upstream's own, such as `ghcr.io`. None: `settings.name` is used. An import makes up its `settings.name`,
        such as `import-ghcr-io`, so it can give the upstream's real name here."""
        self._name = settings.name
        self._listed_realms = settings.realms
        self._own_domains = {
            registrable_domain(configured_name or settings.name),
            *(registrable_domain(origin(endpoint)[1]) for endpoint in endpoints),
        }
        self._logged_realms: set[str] = set()

    def raise_if_refused(self, realm: str, endpoint: str, *, sends_password: bool) -> None:
        """Raises UpstreamUnavailable if the realm must not be used. `endpoint`: the endpoint that sent the challenge.
        `sends_password`: whether the request to the realm will contain the password or the identity token of a login.
        Logs the first refusal of each realm, for at most MAX_LOGGED_REALMS realms."""
        problem = self._problem(realm, endpoint, sends_password)
        if problem is None:
            return
        loggable = _loggable_realm(realm)
        if loggable not in self._logged_realms and len(self._logged_realms) < MAX_LOGGED_REALMS:
            self._logged_realms.add(loggable)
            log.warning(
                "upstream %s: %s names the token service %r, which %s, so it is not used%s",
                self._name,
                loggable_origin(endpoint),
                loggable,
                problem.text,
                "; if you trust that service, add it to the upstream's realms" if problem.is_solved_by_listing else "",
            )
        raise UpstreamUnavailable(f"the upstream {self._name} names a token service that {problem.text}")

    def _problem(self, realm: str, endpoint: str, sends_password: bool) -> RealmProblem | None:
        """Returns why the realm must not be used; None if it may be used. `raise_if_refused` describes the
        arguments."""
        try:
            scheme, host, port = origin(realm)
            endpoint_scheme, endpoint_host, endpoint_port = origin(endpoint)
        except ValueError:
            return RealmProblem("has no valid http or https address", is_solved_by_listing=False)
        if urlsplit(realm).username is not None:
            return RealmProblem("has a user name in its address", is_solved_by_listing=False)
        is_listed, is_on_own_host = self._is_listed(realm), host == endpoint_host
        if scheme == "http" and endpoint_scheme == "https":
            # An https endpoint protects the password, so the token service must protect it as well.
            return RealmProblem("uses http although the endpoint uses https", is_solved_by_listing=False)
        is_on_own_domain = scheme == "https" and registrable_domain(host) in self._own_domains
        if not (is_listed or is_on_own_host or is_on_own_domain):
            return RealmProblem(
                "is neither on a registrable domain of the upstream nor in its realms", is_solved_by_listing=True
            )
        if sends_password and not (is_listed or port == endpoint_port or (not is_on_own_host and port == 443)):
            return RealmProblem(
                "would get the password on another port than the endpoint's and is not in the upstream's realms",
                is_solved_by_listing=True,
            )
        return None

    def _is_listed(self, realm: str) -> bool:
        """Returns whether the setting `realms` has a URL that covers `realm`. A listed URL covers only URLs of its
        origin. Queries are ignored. The path of `realm` must fit one of these cases:

        - The listed URL has no path.
        - The path is that of the listed URL.
        - The path is below that of the listed URL, and both paths are unambiguous (`_unambiguous_path`)."""
        path = _unambiguous_path(realm)
        for listed_realm in self._listed_realms:
            listed_url = listed_realm if "://" in listed_realm else f"https://{listed_realm}"
            try:
                same_origin = origin(listed_url) == origin(realm)
            except ValueError:
                continue
            if not same_origin:
                continue
            if urlsplit(listed_url).path in ("", "/", urlsplit(realm).path):
                return True
            listed_path = _unambiguous_path(listed_url)
            if path is not None and listed_path is not None and f"{path}/".startswith(f"{listed_path.rstrip('/')}/"):
                return True
        return False


def _unambiguous_path(url: str) -> str | None:
    """Returns the decoded path of a URL, without empty segments and without segments `.`. Returns None if servers can
    read the path in different ways: if the decoded path contains `%`, `;`, `\\` or a segment `..`."""
    path = unquote(urlsplit(url).path)
    if any(character in path for character in "%;\\") or ".." in path.split("/"):
        return None
    return posixpath.normpath("/" + path.lstrip("/"))


def _loggable_realm(realm: str) -> str:
    """Returns the realm for the log, cut to 200 characters, without user name, password and query. A query may contain
    secrets."""
    return realm.partition("?")[0].rpartition("@")[2][:200]
