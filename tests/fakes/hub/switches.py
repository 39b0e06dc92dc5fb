"""The behaviour of the fake Hub: `Switches` apply until they are changed, a `Fault` applies to some requests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

HubRequestKind = Literal["ping", "token", "manifest", "redirect", "blob", "tags", "referrers", "other"]
"""The kind of a request. `blob`: its response has the bytes of a blob, from whichever port. `redirect`: its response
has only the URL of these bytes."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The permanent behaviour. Each field can be set at the start (`hub(…, rate=…)`) and later (`hub.set(rate=…)`)."""

    auth: Literal["off", "bearer", "basic"] = "off"
    realm: str = ""
    """The token service's URL as told to clients; empty: /token on the registry's own port. `hub.auth_url` is one on
    another host."""
    realms: dict[str, str] = field(default_factory=dict)
    """The URL of another token service for some repositories."""
    service: str = "registry.docker.io"
    username: str = ""
    password: str = ""
    """With `username`, the only login. Without a login, a client gets tokens for public repositories only."""
    private: tuple[str, ...] = ()
    """Repositories that need a login."""
    token_seconds: float = 300.0
    """Lifetime of a token in seconds, which clients learn as `expires_in`."""
    token_uses: int | None = None
    """After this many requests, a token is refused, whatever its lifetime is. None: it is not refused."""
    hide_unknown: bool = False
    """Unknown repositories get 401 instead of 404, as on Hub."""

    redirects: bool = False
    """A request for a blob is redirected (307) to the second port, which refuses requests with Authorization."""
    cdn: str = ""
    """The URL to which redirects lead, such as that of a slow link in front of `hub.cdn_url`. Empty: `hub.cdn_url`
    itself."""
    link_uses: int | None = None
    """How often the target of one redirect may be requested. After that, it answers 403."""
    ranges: bool = True
    """Off: Range is ignored, and blobs are sent whole with 200."""
    referrers: bool = True
    """Off: the referrers API answers 404, as in a registry without this API; see `upstream_content.fallback_tag`."""
    digests: bool = True
    """Off: manifests are sent without Docker-Content-Digest."""
    heads: bool = True
    """Off: HEAD of a manifest gets 405."""
    negotiates: bool = False
    """A manifest gets 404 if the request does not list its media type in Accept."""
    lengths: bool = True
    """Off: manifests and blobs are sent without Content-Length, and end with the connection."""
    page: int = 1000
    """Largest number of entries on a page of tags or referrers."""

    limit: int | None = None
    """After this many GETs of manifests, further ones get 429. All responses have `ratelimit-*` headers. HEADs do not
    count."""
    retry_after: int | None = 2
    """The Retry-After of these 429s in seconds; None: they have none."""

    latency: float = 0.0
    """Seconds before each response."""
    rate: float = 0.0
    """Bytes of body per second and connection, in slices of 10 ms; 0: no limit."""
    gzip: bool = False
    """Responses are compressed for clients that accept this. Such a client gets wrong bytes."""
    keep_alive: bool = True
    send_buffer: int = 0
    """SO_SNDBUF of the connections in bytes; 0: the system's default. With a small value, few sent bytes are lost if
    the client disconnects."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Switches:
        return cls(**{**value, "private": tuple(value.get("private", ()))})


SWITCHES = frozenset(each.name for each in fields(Switches))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and the requests to which it applies. An authorized request gets the first fault that matches and is not
    used up. A response that ends before the offset of a stall or a drop does not match."""

    on: HubRequestKind | Literal["any"] = "blob"
    method: str = "GET"
    """The method of the requests; empty: any."""
    match: str = ""
    """Text in the path of the requests, such as a digest, a tag or a repository."""
    skip: int = 0
    """The first requests, to which the fault does not apply yet."""
    times: int | None = 1
    """The number of requests to which the fault applies; None: it is not limited."""

    status: int = 0
    """The status of the response. Its body is an error in the format of the spec if the spec defines the status, and
    otherwise an HTML page."""
    retry_after: str = ""
    page: bool = False
    """The body is an HTML page in any case, as from a firewall or proxy in front of the registry."""
    hangup: bool = False
    """The connection is closed without a response."""
    stall: bool = False
    """No response is sent until `hub.release()`."""
    stall_after: int | None = None
    """After this many bytes of the body, nothing is sent until `hub.release()`."""
    drop_after: int | None = None
    """After this many bytes of the body have arrived, the connection is closed: with FIN, or with RST if `reset` is
    true."""
    reset: bool = False
    corrupt: int | None = None
    """The byte of the blob or manifest at this offset is changed. Responses without this byte do not match."""
    shift: int = 0
    """A range begins this many bytes later than requested, and its Content-Range says so."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
