"""Finds the upstream that a request names by `?ns=` or by the host it was sent to. Both are keys of a fixed list, never
addresses to connect to.

Source: OCI distribution spec, "Registry Proxying".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from registry.http.exchange import Exchange
from registry.naming import NamingRules
from storage.errors import NameUnknown
from storage.names import shown


@dataclass(frozen=True)
class Namespaces:
    """`naming`: has the names of the upstreams, which `ns` may be. `hosts`: hosts of this server that stand for one
    upstream each. `own`: further hosts of this server, such as its public one; `ns` with one of them has no effect.
    `aliases`: other values of `ns` for an upstream, such as its host and port."""

    naming: NamingRules
    hosts: Mapping[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def apply(self, exchange: Exchange) -> None:
        """Puts the request's repository below the upstream that the request names. A name that is below it already
        stays: clients with a path in their mirror's URL send both. Raises NameUnknown, RequestInvalid."""
        asked = exchange.query.one("ns") if exchange.scope.get("query_string") else None
        host = (exchange.header(b"host") or b"").decode("latin-1").lower() if asked or self.hosts else ""
        if asked:
            name = asked.lower()
            if (upstream := self.aliases.get(name, name)) in self.naming.upstreams:
                exchange.namespace = name
                exchange.repo = self.naming.below(upstream, exchange.repo)
                return
            if name not in self.own and name not in self.hosts and name not in (host, without_port(host)):
                raise NameUnknown(f"{shown(asked)} is not mirrored here")
        by_host = self.hosts.get(host) or self.hosts.get(without_port(host))
        if by_host is not None:
            exchange.repo = self.naming.below(by_host, exchange.repo)


def hosts_of(public_url: str | None) -> frozenset[str]:
    """Returns the hosts by which `ns` may name the server at that URL: with its port, and without."""
    host = urlsplit(public_url or "").netloc.lower()
    return frozenset({host, without_port(host)} - {""})


def without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
