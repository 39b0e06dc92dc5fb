"""What stands between the network and the requests: TLS, proxies that are trusted, a limit of connections."""

from __future__ import annotations

from dataclasses import dataclass

from registry.server.certificates import Certificates
from registry.server.crowd import Crowd
from registry.server.proxies import TrustedProxies


@dataclass(frozen=True, slots=True)
class Door:
    """All of it made before the fork. What is None is not wanted, and costs nothing."""

    certificates: Certificates | None = None
    proxies: TrustedProxies | None = None
    crowd: Crowd | None = None
