"""Finds the upstream registry that a request names, by the query parameter `ns` or by the host that it was sent to.

Both are only looked up among the upstreams in the settings. The server never connects to a host that a request names.

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
    """The upstreams that requests may name.

    `naming`: has the names of the upstreams; each is a value of `ns`. `upstream_by_host`: host names of this server
    that stand for one upstream each, with that upstream's name. `own_hosts`: further host names of this server, such as
    the public one; `ns` with one of them has no effect. `upstream_by_alias`: other values of `ns` for an upstream, such
    as its host and port, with that upstream's name."""

    naming: NamingRules
    upstream_by_host: Mapping[str, str] = field(default_factory=dict)
    own_hosts: frozenset[str] = frozenset()
    upstream_by_alias: Mapping[str, str] = field(default_factory=dict)

    def apply(self, exchange: Exchange) -> None:
        """Puts the upstream that the request names before `exchange.repo`: with `?ns=ghcr.io`, `org/app` becomes
        `ghcr.io/org/app`. A name that begins with the upstream already stays, because some clients send both. Sets
        `exchange.namespace` if `ns` names the upstream. Does nothing if the request names no upstream. Raises
        NameUnknown for an `ns` that is not mirrored, and RequestInvalid for several values of `ns`."""
        requested = exchange.query.one("ns") if exchange.scope.get("query_string") else None
        host = ""
        if requested or self.upstream_by_host:
            host = (exchange.header(b"host") or b"").decode("latin-1").lower()
        if requested:
            namespace = requested.lower()
            upstream = self.upstream_by_alias.get(namespace, namespace)
            if upstream in self.naming.upstreams:
                exchange.namespace = namespace
                exchange.repo = self.naming.with_upstream(upstream, exchange.repo)
                return
            if not self._is_own_host(namespace) and namespace not in (host, without_port(host)):
                raise NameUnknown(f"{shown(requested)} is not mirrored here")
        by_host = self.upstream_by_host.get(host) or self.upstream_by_host.get(without_port(host))
        if by_host is not None:
            exchange.repo = self.naming.with_upstream(by_host, exchange.repo)

    def _is_own_host(self, host: str) -> bool:
        return host in self.own_hosts or host in self.upstream_by_host


def hosts_of(public_url: str | None) -> frozenset[str]:
    """Returns the host in a URL, in lower case, in two forms: with its port and without. Returns an empty set without a
    URL."""
    host = urlsplit(public_url or "").netloc.lower()
    return frozenset({host, without_port(host)} - {""})


def without_port(host: str) -> str:
    """Returns `host` without its port, if it has one."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
