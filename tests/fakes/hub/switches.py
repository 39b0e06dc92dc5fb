"""The fake Hub's behaviour: `Switches` apply until they are changed, a `Fault` applies to some requests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

HubRequestKind = Literal["ping", "token", "manifest", "redirect", "blob", "tags", "referrers", "other"]
"""What was asked for. `blob` is an answer with a blob's bytes, wherever it comes from; `redirect` the one that only
says where they are."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The permanent behaviour. Each field can be set at the start (`hub(…, rate=…)`) and later (`hub.set(rate=…)`)."""

    auth: Literal["off", "bearer", "basic"] = "off"
    realm: str = ""
    """The token service's URL as told to clients; empty: /token on the registry's own port. `hub.auth_url` is one on
    another host."""
    realms: dict[str, str] = field(default_factory=dict)
    """Another one for some repositories."""
    service: str = "registry.docker.io"
    username: str = ""
    password: str = ""
    """The only login there is. Without a login, tokens for public repositories are given to everybody."""
    private: tuple[str, ...] = ()
    """Repositories for which one must have logged in."""
    token_seconds: float = 300.0
    """How long a token is good, as `expires_in` says."""
    token_uses: int | None = None
    """After so many requests a token is good no more, whatever `expires_in` said."""
    hide_unknown: bool = False
    """Unknown repositories get 401 instead of 404, as on Hub."""

    redirects: bool = False
    """Blobs are answered with 307 to the second port, which refuses requests that carry Authorization."""
    cdn: str = ""
    """The URL redirects begin with, such as that of a link before `hub.cdn_url`, which stands where this is empty."""
    link_uses: int | None = None
    """How often the target of one redirect may be asked; then it says 403."""
    ranges: bool = True
    """Off: Range is not looked at, blobs come whole with 200."""
    referrers: bool = True
    """Off: 404, as a registry without that API; see `upstream_content.fallback_tag`."""
    digests: bool = True
    """Off: manifests come without Docker-Content-Digest."""
    heads: bool = True
    """Off: HEAD of a manifest gets 405."""
    negotiates: bool = False
    """Manifests are 404 for whoever does not name their media type in Accept."""
    lengths: bool = True
    """Off: manifests and blobs come without Content-Length; the connection's end is theirs."""
    page: int = 1000
    """Most entries in a list of tags or referrers."""

    limit: int | None = None
    """So many GETs of manifests are answered, with `ratelimit-*` headers on all; then 429. HEADs are free."""
    retry_after: int | None = 2
    """The Retry-After of these 429s, in seconds; without: none."""

    latency: float = 0.0
    """Seconds before each answer."""
    rate: float = 0.0
    """Bytes of body per second and connection, in slices of 10 ms; 0: no limit."""
    gzip: bool = False
    """Answers are compressed for whoever accepts that: a client that does so gets wrong bytes."""
    keep_alive: bool = True
    send_buffer: int = 0
    """SO_SNDBUF of the connections in bytes, so that little is handed to the kernel that never arrives."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Switches:
        return cls(**{**value, "private": tuple(value.get("private", ()))})


SWITCHES = frozenset(each.name for each in fields(Switches))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and for which requests. An authorized request meets the first fault that matches and is not used
    up. A response that ends before the offset of a stall or a drop does not match."""

    on: HubRequestKind | Literal["any"] = "blob"
    method: str = "GET"
    """Empty: all."""
    match: str = ""
    """Text that is in the path, such as a digest, a tag or a repository."""
    skip: int = 0
    """So many requests are let off first."""
    times: int | None = 1
    """So many requests are hit; None: for ever."""

    status: int = 0
    """This status, with an error of the specification where it has one, else a page of HTML."""
    retry_after: str = ""
    page: bool = False
    """The status comes with a page of HTML, as from a firewall or proxy before the registry."""
    hangup: bool = False
    """The connection is closed without any answer."""
    stall: bool = False
    """No answer until `hub.release()`."""
    stall_after: int | None = None
    """After so many bytes of body nothing comes until `hub.release()`."""
    drop_after: int | None = None
    """After so many bytes of body have arrived the connection is closed: with FIN, or with RST where `reset`."""
    reset: bool = False
    corrupt: int | None = None
    """The byte of the blob or manifest at this offset is another one. Answers without that byte are no match."""
    shift: int = 0
    """A range begins so many bytes later than it was asked for, and says so."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
