"""Decides to which servers requests for an upstream may be sent (protection against server-side request forgery).

An upstream chooses the URLs in its redirects and challenges. Such a URL must not make this server send requests to
services that the upstream cannot reach: services on this server's machine or in its private network, and the metadata
service of its cloud. Therefore each IP address has a network class (`NetworkClass`), and each request has a *reach*:
the set of addresses to which it may connect (`Reach`). `RedirectChain` limits the reach of requests after a redirect.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from urllib.parse import urljoin, urlsplit

from registry.config import MAX_HOST_LENGTH, normalized_host
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

MAX_LOGGED_REFUSALS = 100
"""Largest number of refused destinations that are logged for one upstream. The upstream chooses the destinations, so
without a limit it could fill the log."""


class NetworkClass(Enum):
    """The kind of network that an IP address belongs to."""

    PUBLIC = "public"
    PRIVATE = "private"
    LINK_LOCAL = "link-local"
    LOOPBACK = "loopback"
    SPECIAL = "special-purpose"
    """Multicast, broadcast, documentation, reserved, and unspecified addresses (on Linux, 0.0.0.0 is this machine). No
    upstream can have such an address, so requests to them are refused unless the settings name the destination."""


NetworkClassifier = Callable[[str], NetworkClass]
"""A function that returns the network class of an IP address. It raises ValueError if the text is not an IP address."""

_PRIVATE_NETWORKS = [
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15"),
        *("fc00::/7", "fec0::/10"),
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that embed an IPv4 address in their low 32 bits (RFC 6052)."""
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
"""IPv6 addresses for NAT64 inside one network (RFC 8215). Their class is SPECIAL, because the position of the embedded
IPv4 address depends on the network."""
_IPV4_COMPATIBLE = ipaddress.ip_network("::/96")
"""Deprecated IPv6 addresses that embed an IPv4 address in their low 32 bits (RFC 4291, 2.5.5.1)."""


def classify_address(address: str) -> NetworkClass:
    """Returns the network class of an IP address. An IPv6 address that embeds an IPv4 address has the class of the IPv4
    address. Raises ValueError if the text is not an IP address."""
    parsed_address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed_address, ipaddress.IPv6Address) and (embedded := _embedded_ipv4(parsed_address)) is not None:
        parsed_address = embedded
    if parsed_address.is_loopback:
        return NetworkClass.LOOPBACK
    if parsed_address.is_link_local:
        return NetworkClass.LINK_LOCAL
    if any(parsed_address.version == network.version and parsed_address in network for network in _PRIVATE_NETWORKS):
        return NetworkClass.PRIVATE
    is_special = (
        parsed_address.is_multicast
        or parsed_address.is_reserved
        or parsed_address.is_unspecified
        or not parsed_address.is_global
    )
    return NetworkClass.SPECIAL if is_special or parsed_address in _LOCAL_NAT64 else NetworkClass.PUBLIC


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Returns the IPv4 address that `address` embeds, and to which a connection to `address` leads. Knows mapped and
    compatible addresses (RFC 4291), 6to4 (RFC 3056) and NAT64 (RFC 6052). Returns None for other addresses."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    low_bits = int(address) & 0xFFFFFFFF
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and low_bits > 1):  # 0 and 1 are the addresses :: and ::1
        return ipaddress.IPv4Address(low_bits)
    return None


@dataclass(frozen=True, slots=True)
class Reach:
    """The addresses to which a request may connect. If `network` is None, every address is allowed. Otherwise, these
    addresses are allowed:

    - public addresses
    - addresses of the class `network`, unless this class is SPECIAL
    - all addresses of each host and port in `listed`."""

    network: NetworkClass | None
    listed: frozenset[tuple[str, int]] = frozenset()

    def after(self, network: NetworkClass) -> Reach:
        """Returns the reach of the next request in a chain of redirects. `self` is the reach of the previous request.
        `network` is the network class of the server that has responded to the previous request.

        Redirects may lead to public addresses and to the network class of the first server. After a response from a
        server of another class, redirects may only lead to public addresses. `listed` stays the same."""
        if self.network is None:
            return replace(self, network=network)
        return self if network is self.network else replace(self, network=NetworkClass.PUBLIC)

    def is_unrestricted(self, host: str, port: int) -> bool:
        """Returns whether every address of this host and port is allowed, so that the addresses need no check."""
        return self.network is None or (host.strip("[]").rstrip(".").lower(), port) in self.listed

    def is_allowed(self, network: NetworkClass) -> bool:
        """Returns whether addresses of this network class are allowed. Do not call it for a host and port for which
        `is_unrestricted` returns True: all of their addresses are allowed."""
        return network in (NetworkClass.PUBLIC, self.network) and network is not NetworkClass.SPECIAL


ANYWHERE = Reach(None)
"""The reach of a request to a URL from the settings: any address."""


class AddressPolicy:
    """Checks the addresses to which requests for one upstream connect. Logs the first refusal of each destination, for
    at most MAX_LOGGED_REFUSALS destinations."""

    def __init__(self, upstream_name: str, classify: NetworkClassifier = classify_address) -> None:
        self._upstream_name = upstream_name
        self._classify = classify
        self._logged_refusals: set[tuple[str, int]] = set()

    def classify(self, address: str | None) -> NetworkClass:
        """Returns the network class of a server that has responded from this IP address. If the address is not known
        (None) or is no IP address, returns PUBLIC. This is the safe answer, because a public server may redirect only
        to public addresses (`Reach.after`)."""
        try:
            return self._classify(address) if address else NetworkClass.PUBLIC
        except ValueError:
            return NetworkClass.PUBLIC

    def allowed_addresses(self, reach: Reach, host: str, port: int, addresses: Sequence[str]) -> list[str]:
        """Returns those of `addresses` to which a request with this reach may connect. `addresses` are the IP addresses
        of `host`. Returns an empty list if `addresses` is empty. Raises UpstreamUnavailable if `addresses` is not empty
        and none of them is allowed."""
        if reach.is_unrestricted(host, port):
            return list(addresses)
        classes = {address: self._classify(address) for address in addresses}
        allowed = [address for address, network in classes.items() if reach.is_allowed(network)]
        if classes and not allowed:
            raise self._refusal(host, port, *next(iter(classes.items())))
        return allowed

    def check_proxied(self, reach: Reach, host: str, port: int) -> None:
        """Checks the destination of a request through a proxy. Raises UpstreamUnavailable if `host` is an IP address
        that is not allowed. A host name is not checked, because the proxy resolves it and this process does not see its
        addresses."""
        if (address := literal_address(host)) is not None:
            self.allowed_addresses(reach, host, port, [address])

    def classify_proxied(self, host: str) -> NetworkClass:
        """Returns the network class of a host that has responded through a proxy. If `host` is an IP address, returns
        the class of the address. If `host` is a name, returns PUBLIC, because its addresses are not known."""
        return self.classify(literal_address(host))

    def _refusal(self, host: str, port: int, address: str, network: NetworkClass) -> UpstreamUnavailable:
        """Returns the error to raise for a refused destination. Logs the destination, unless it was logged before or
        MAX_LOGGED_REFUSALS destinations were logged."""
        is_logged = (host, port) in self._logged_refusals
        if not is_logged and len(self._logged_refusals) < MAX_LOGGED_REFUSALS:
            self._logged_refusals.add((host, port))
            log.warning(
                "upstream %s redirects to %s:%d, or names it as its token service, but the address %s is %s: no "
                "request is sent there. If you trust this destination, add %r to the setting `redirects` of this "
                "upstream; if it is a token service, add its URL to the setting `realms`",
                self._upstream_name,
                host,
                port,
                address,
                network.value,
                f"{host}:{port}",
            )
        return UpstreamUnavailable(
            f"the upstream {self._upstream_name} redirects to an address, or names a token service, that is not "
            "public; the server's log says which"
        )


def literal_address(host: str) -> str | None:
    """Returns the IP address that `host`, the host part of a URL, denotes. The result has the usual notation. `host`
    can have any notation that resolvers accept, such as `127.1` and `0x7f000001`. Returns 127.0.0.1 for `localhost` and
    its subdomains. Returns None for other host names."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


MAX_URL_LENGTH = 8 << 10
"""Longest URL of a redirect, and longest `Link` header (which names the next page of a list), in characters. Parsing a
URL of 60 KiB blocks the event loop for 80 ms."""
MAX_REDIRECTS = 5
"""Largest number of redirects that are followed for one request."""

_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
"""A host, which is in brackets if it is an IPv6 address, and optionally a port."""


def origin(url: str) -> tuple[str, str, int]:
    """Returns the scheme, host and port of a URL (RFC 6454, 4). The host and port are those to which an HTTP client
    connects for this URL. The host is in lower case, IDNA-encoded, without a dot at the end. Raises ValueError if the
    scheme is not http or https, if the host is missing or invalid, or if the port is invalid."""
    parts = urlsplit(url)
    host_and_port = _HOST_AND_PORT.fullmatch(parts.netloc.rpartition("@")[2])
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or host_and_port is None or parts.port == 0:
        raise ValueError("not an http address with a host and a port")
    return parts.scheme, normalized_host(parts.hostname), parts.port or _DEFAULT_PORTS[parts.scheme]


def is_same_origin(url: str, other_url: str) -> bool:
    """Returns whether both URLs have the same origin. Returns False if `origin` raises ValueError for one of them."""
    try:
        return origin(url) == origin(other_url)
    except ValueError:
        return False


SHARED_DOMAINS = frozenset(
    {
        *("amazonaws.com", "azurecr.io", "azurewebsites.net", "windows.net", "pkg.dev", "run.app", "appspot.com"),
        *("googleapis.com", "github.io", "gitlab.io", "cloudfront.net", "herokuapp.com", "workers.dev", "r2.dev"),
        *("fly.dev", "onrender.com", "vercel.app", "netlify.app", "digitaloceanspaces.com", "ngrok.io", "ngrok.app"),
        *("duckdns.org", "nip.io", "sslip.io"),
    }
)
"""Domains whose subdomains belong to different owners: a password for one subdomain must not be sent to another
subdomain. The public suffix list has thousands of such domains. This set has those on which people run registries."""


def registrable_domain(host: str) -> str:
    """Returns the part of a host name that belongs to one owner, such as `docker.io` for `registry-1.docker.io`.
    Returns the whole `host` if it is an IP address or has more than MAX_HOST_LENGTH characters. The result is in lower
    case, without a dot at the end."""
    host = host.rstrip(".").lower()
    if len(host) > MAX_HOST_LENGTH:
        return host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return host
    labels = host.split(".")
    label_count = 2
    if len(labels) > 2 and len(labels[-1]) == 2 and (len(labels[-2]) <= 3 or labels[-2] in ("gouv", "govt")):
        label_count = 3  # as in `example.co.uk`; any short label before a country code is treated like `co`
    for suffix_length in range(2, len(labels)):
        if ".".join(labels[-suffix_length:]) in SHARED_DOMAINS:
            label_count = suffix_length + 1
    return ".".join(labels[-label_count:])


def loggable_origin(url: str) -> str:
    """Returns the origin of a URL for logs and messages, without user name and password. Leaves out the path and the
    query, because they may contain a signature that gives access."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class RedirectChain:
    """Follows the redirects of one request. A *step* is the original request, or a request after a redirect. `url`,
    `headers` and `reach` (the allowed addresses) are those of the next step, which the caller sends.

    `Authorization` is sent to the first origin only. After a redirect to another origin, the header is not sent again,
    even if a later redirect leads back to the first origin."""

    def __init__(self, url: str, headers: Mapping[str, str], reach: Reach = ANYWHERE) -> None:
        self.url = url
        self.headers = dict(headers)
        self.reach = reach
        self.has_moved = False
        """Whether a redirect was followed. If True, `url` is the target of the last redirect."""
        self._first_origin = origin(url)
        self._remaining_redirects = MAX_REDIRECTS

    @property
    def is_cross_origin(self) -> bool:
        """Whether `url` is on another origin than the first URL."""
        return origin(self.url) != self._first_origin

    def on_response(self, network: NetworkClass) -> None:
        """Limits `reach` for the next step. Must be called for each response, before `follow`. `network` is the class
        of the server that has responded."""
        self.reach = self.reach.after(network)

    def follow(self, status: int, location: str | None) -> bool:
        """Returns whether a response with this status and `Location` header is a redirect. If so, sets `url` and
        `headers` to those of the next step. Raises UpstreamUnavailable for more than MAX_REDIRECTS redirects, for a
        missing, invalid or too long URL, and for a redirect from https to http."""
        if status not in _REDIRECT_STATUSES:
            return False
        source = loggable_origin(self.url)
        if not self._remaining_redirects:
            raise UpstreamUnavailable(f"{source} redirects more than {MAX_REDIRECTS} times")
        if not location:
            raise UpstreamUnavailable(f"{source} redirects without saying where to ({status})")
        if len(location) > MAX_URL_LENGTH:
            raise UpstreamUnavailable(f"{source} redirects to an address of more than {MAX_URL_LENGTH} characters")
        try:
            target = urlsplit(urljoin(self.url, location))
            next_url = target._replace(netloc=target.netloc.rpartition("@")[2], fragment="").geturl()
            scheme, _, _ = origin(next_url)
        except ValueError:
            raise UpstreamUnavailable(f"{source} redirects to something that is no http address") from None
        if scheme == "http" and self.url.startswith("https:"):
            raise UpstreamUnavailable(f"{source} redirects from https to http, which is refused")
        self.url = next_url
        self.has_moved = True
        self._remaining_redirects -= 1
        if self.is_cross_origin:
            self.headers.pop("Authorization", None)
        return True
