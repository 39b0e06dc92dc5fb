"""Which upstream's names a request speaks of: by `?ns=`, or by the host it was sent to. Both are keys in a closed list
and never addresses to dial.

Source: OCI distribution spec, "Registry Proxying".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from registry.http.exchange import Exchange
from storage.errors import NameUnknown
from storage.names import RepositoryName, shown


@dataclass(frozen=True)
class Namespaces:
    """`upstreams`: the names that `ns` may have. `hosts`: this server's own hosts that stand for one of them each.
    `own`: further hosts of this server, such as its public address's; `ns` with one of them means nothing. `aliases`:
    what `ns` may be instead of an upstream's name, such as its host and port."""

    upstreams: frozenset[str]
    hosts: Mapping[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def enter(self, exchange: Exchange) -> None:
        """Puts the request's repository below the upstream it speaks of. A name that has the upstream in its path
        already stays: clients whose mirror is set up with a path send both. Raises NameUnknown, RequestInvalid."""
        asked = exchange.query.one("ns") if exchange.scope.get("query_string") else None
        host = (exchange.header(b"host") or b"").decode("latin-1").lower() if asked or self.hosts else ""
        if asked:
            name = asked.lower()
            if (meant := self.aliases.get(name, name)) in self.upstreams:
                exchange.namespace = name
                exchange.repo = _below(meant, exchange.repo)
                return
            if name not in self.own and name not in self.hosts and name not in (host, without_port(host)):
                raise NameUnknown(f"{shown(asked)} is not mirrored here")
        upstream = self.hosts.get(host) or self.hosts.get(without_port(host))
        if upstream is not None:
            exchange.repo = _below(upstream, exchange.repo)


def hosts_of(public_url: str | None) -> frozenset[str]:
    """What `ns` may call the server at that address: with its port, and without."""
    host = urlsplit(public_url or "").netloc.lower()
    return frozenset({host, without_port(host)} - {""})


def without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _below(upstream: str, repo: RepositoryName) -> RepositoryName:
    return repo if repo.startswith(f"{upstream}/") else RepositoryName(f"{upstream}/{repo}")
