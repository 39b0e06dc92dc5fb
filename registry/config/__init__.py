"""The settings: one typed model (`Settings`), its groups, and how times and sizes are written in it."""

from registry.config.auth import Auth, Issuer
from registry.config.network import TLS
from registry.config.oidc import OIDC
from registry.config.settings import NESTED, PREFIX, Settings
from registry.config.units import format_duration, format_size, is_duration, is_size, parse_duration
from registry.config.upstream import HOST_LENGTH, HUB, LIBRARY, Hosted, Upstream, plain_host

__all__ = [
    "HOST_LENGTH",
    "HUB",
    "LIBRARY",
    "NESTED",
    "OIDC",
    "PREFIX",
    "TLS",
    "Auth",
    "Hosted",
    "Issuer",
    "Settings",
    "Upstream",
    "format_duration",
    "format_size",
    "is_duration",
    "is_size",
    "parse_duration",
    "plain_host",
]
