"""Addresses: what is one origin, and where a redirect leads."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

from registry.config import plain_host
from registry.upstream.networks import ANYWHERE, Network, Reach
from storage.errors import UpstreamUnavailable

LONGEST = 8 << 10
"""Characters of an address that a redirect or a list's next page leads to: reading one of 60 KiB holds the event loop
for 80 ms."""
REDIRECTS = 5
"""Followed at the most, for one request."""

_SENDS_ON = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an http(s) address (RFC 6454, 4); the host as `plain_host` has it. Raises ValueError
    for any other."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("not an http address")
    return parts.scheme, plain_host(parts.hostname), parts.port or _PORTS[parts.scheme]


def place(url: str) -> str:
    """The origin as a message may show it: paths and queries of redirects can hold signatures."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class Route:
    """Where a request goes, redirect by redirect. `Authorization` goes to the first origin alone: once a redirect has
    left it, none is sent any more, wherever the next one leads. `reach`: where the next request may connect."""

    def __init__(self, url: str, headers: Mapping[str, str], reach: Reach = ANYWHERE) -> None:
        self.url = url
        self.headers = dict(headers)
        self.reach = reach
        self.moved = False
        """It has followed a redirect."""
        self._home = origin(url)
        self._left = REDIRECTS

    @property
    def foreign(self) -> bool:
        """It has left the origin it started at."""
        return origin(self.url) != self._home

    def answered(self, network: Network) -> None:
        """A host in `network` has answered the request."""
        self.reach = self.reach.after(network)

    def follow(self, status: int, location: str | None) -> bool:
        """Whether that answer sends us on; `url` and `headers` are then those of the next request. Raises
        UpstreamUnavailable: too many redirects, an address that is none, or from https to http."""
        if status not in _SENDS_ON:
            return False
        source = place(self.url)
        if not self._left:
            raise UpstreamUnavailable(f"{source} redirects more than {REDIRECTS} times")
        if not location:
            raise UpstreamUnavailable(f"{source} redirects without saying where to ({status})")
        if len(location) > LONGEST:
            raise UpstreamUnavailable(f"{source} redirects to an address of more than {LONGEST} characters")
        try:
            target = urlsplit(urljoin(self.url, location))
            following = target._replace(netloc=target.netloc.rpartition("@")[2], fragment="").geturl()
            scheme, _, _ = origin(following)
        except ValueError:
            raise UpstreamUnavailable(f"{source} redirects to what is no http address") from None
        if scheme == "http" and self.url.startswith("https:"):
            raise UpstreamUnavailable(f"{source} redirects from https to http, which is refused")
        self.url = following
        self.moved = True
        self._left -= 1
        if self.foreign:
            self.headers.pop("Authorization", None)
        return True
