"""Finds the upstream that a request names. An *upstream* is a registry that this one mirrors.

A request can name an upstream by the query parameter `ns`, or by the host name to which the client sends the request.
The server only compares these values with its settings. It never connects to a host because a request names it.

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
    """The upstreams that requests can name.

    - `naming`: the rules for repository names. They contain the names of the upstreams, which are valid values of `ns`.
    - `upstream_by_host`: maps host names of this server to names of upstreams. A request to one of these host names is
      for the upstream with this name.
    - `own_hosts`: other host names of this server, from the settings `public_url` and `host_names`. Some clients send
      such a name as `ns`. It names no upstream.
    - `upstream_by_alias`: maps further values of `ns`, such as the upstream's host and port, to names of upstreams."""

    naming: NamingRules
    upstream_by_host: Mapping[str, str] = field(default_factory=dict)
    own_hosts: frozenset[str] = frozenset()
    upstream_by_alias: Mapping[str, str] = field(default_factory=dict)

    def apply(self, exchange: Exchange) -> None:
        """Adds the name of the upstream that the request names to the start of `exchange.repo`: with `?ns=ghcr.io`,
        `org/app` becomes `ghcr.io/org/app`. Leaves `exchange.repo` unchanged in two cases:

        - The request names no upstream.
        - `exchange.repo` begins with the upstream's name already. Some clients send this name in `ns` and in the path.

        If `ns` names the upstream, also sets `exchange.namespace`, so that the response repeats `ns`.

        Raises NameUnknown if `ns` is neither an upstream, nor a host of this server, nor the request's Host header.
        Raises NameInvalid if the longer repository name is too long. Raises RequestInvalid if `ns` occurs twice."""
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
                raise NameUnknown(
                    f"{shown(requested)} is not mirrored here; if it is a host name of this registry, the operator of "
                    "this registry can add it to the setting host_names"
                )
        upstream_of_host = self.upstream_by_host.get(host) or self.upstream_by_host.get(without_port(host))
        if upstream_of_host is not None:
            exchange.repo = self.naming.with_upstream(upstream_of_host, exchange.repo)

    def _is_own_host(self, host: str) -> bool:
        return host in self.own_hosts or host in self.upstream_by_host


def hosts_of(public_url: str | None) -> frozenset[str]:
    """Returns the host in a URL, with and without the port of the URL, in lower case. Returns an empty set for None."""
    host = urlsplit(public_url or "").netloc.lower()
    return frozenset({host, without_port(host)} - {""})


def without_port(host: str) -> str:
    """Returns `host` without its port, if it has one."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
