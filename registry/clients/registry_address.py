"""The URL at which clients reach this registry. Image names begin with the host of this URL. The host also determines
whether docker accepts plain HTTP."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from registry.config import Settings

_WILDCARD_HOSTS = ("", "0.0.0.0", "[::]", "::", "*")
"""Hosts in the setting `listen` that mean all addresses of the machine."""


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """The URL at which clients reach the registry. `url`: the scheme, the host and, if there is one, the port, such as
    `http://localhost:5000`. It has no path."""

    url: str

    @property
    def host(self) -> str:
        """The host and port with which image names of this registry begin, such as `localhost:5000`."""
        return urlsplit(self.url).netloc

    @property
    def is_plain_http(self) -> bool:
        """Whether clients connect without TLS."""
        return urlsplit(self.url).scheme == "http"

    @property
    def docker_accepts_plain_http(self) -> bool:
        """Whether docker accepts plain HTTP from the registry's host without configuration: the host is `localhost` or
        in 127.0.0.0/8."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network("127.0.0.0/8")
        except ValueError:
            return host == "localhost"


def listens_everywhere(settings: Settings) -> bool:
    """Returns whether the setting `listen` has a wildcard host, such as 0.0.0.0."""
    return settings.listen.rpartition(":")[0] in _WILDCARD_HOSTS


def registry_address(settings: Settings) -> RegistryAddress:
    """Returns the address in the setting `public_url`. If `public_url` is not set, returns the address in the setting
    `listen`, with `localhost` in place of a wildcard host."""
    if settings.public_url:
        return RegistryAddress(settings.public_url)
    host, _, port = settings.listen.rpartition(":")
    scheme = "http" if settings.tls.certificate is None else "https"
    return RegistryAddress(f"{scheme}://{'localhost' if listens_everywhere(settings) else host}:{port}")
