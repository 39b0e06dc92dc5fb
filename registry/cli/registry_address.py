"""The address of this registry as its clients reach it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from registry.config import Settings

_EVERY_ADDRESS = ("", "0.0.0.0", "[::]", "::", "*")
"""Hosts in `listen` that mean every address of the machine."""


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """The registry's address as a URL: scheme, host, and the port where it is not the scheme's default."""

    url: str

    @property
    def host(self) -> str:
        """`HOST:PORT`, the form in which it begins an image name."""
        return urlsplit(self.url).netloc

    @property
    def is_plain_http(self) -> bool:
        """Whether clients reach it without TLS."""
        return urlsplit(self.url).scheme == "http"

    @property
    def is_trusted_by_docker(self) -> bool:
        """Whether docker accepts plain HTTP from it without configuration: 127.0.0.0/8 and `localhost`."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network("127.0.0.0/8")
        except ValueError:
            return host == "localhost"


def listens_everywhere(settings: Settings) -> bool:
    """Returns whether `listen` means every address of the machine, which is no address that a client can use."""
    return settings.listen.rpartition(":")[0] in _EVERY_ADDRESS


def client_address(settings: Settings) -> RegistryAddress:
    """Returns `public_url` if it is set, otherwise the address for clients on this machine."""
    if settings.public_url:
        return RegistryAddress(settings.public_url)
    host, _, port = settings.listen.rpartition(":")
    scheme = "http" if settings.tls.certificate is None else "https"
    return RegistryAddress(f"{scheme}://{'localhost' if listens_everywhere(settings) else host}:{port}")
