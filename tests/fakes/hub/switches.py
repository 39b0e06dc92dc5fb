"""The behaviour of the fake Hub. `Switches` apply to all requests until they are changed; a `Fault` applies to some
requests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

HubRequestKind = Literal["ping", "token", "manifest", "redirect", "blob", "tags", "referrers", "other"]
"""The kind of a request. `blob`: the response has the bytes of a blob. `redirect`: the response redirects the client to
the URL of these bytes, at the second port of the fake Hub (`Switches.redirects`). The next request, to that port, has
the kind `blob`."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The permanent behaviour. Each field can be set at the start (`hub(…, rate=…)`) and later (`hub.set(rate=…)`)."""

    auth: Literal["off", "bearer", "basic"] = "off"
    realm: str = ""
    """The URL of the token service that clients get in a challenge; empty: /token on the registry's own port. For a
    token service on another host, set `hub.auth_url + "/token"`."""
    realms: dict[str, str] = field(default_factory=dict)
    """The URLs of other token services, by the repository for which they are used."""
    service: str = "registry.docker.io"
    username: str = ""
    password: str = ""
    """`username` and `password` are the only valid login. A client that does not log in gets tokens for public
    repositories only."""
    private: tuple[str, ...] = ()
    """Repositories that need a login."""
    token_seconds: float = 300.0
    """Lifetime of a token in seconds. Clients get it as `expires_in`."""
    token_uses: int | None = None
    """The number of requests after which a token is refused, even before it expires; None: no limit."""
    hide_unknown: bool = False
    """Unknown repositories get 401 instead of 404, as on Hub."""

    redirects: bool = False
    """A request for a blob is redirected (307) to the second port, which refuses requests with Authorization."""
    cdn: str = ""
    """The target URL of redirects, such as the URL of a slow proxy in front of `hub.cdn_url`. Empty: `hub.cdn_url`
    itself."""
    link_uses: int | None = None
    """How often a client may request the target of one redirect. Later requests get 403; None: no limit."""
    ranges: bool = True
    """False: Range is ignored, and blobs are sent whole with 200."""
    referrers: bool = True
    """False: the referrers API answers 404, as in a registry without this API; see `upstream_content.fallback_tag`."""
    digests: bool = True
    """False: manifests are sent without Docker-Content-Digest."""
    heads: bool = True
    """False: HEAD of a manifest gets 405."""
    negotiates: bool = False
    """True: a request for a manifest gets 404 if its Accept does not list the manifest's media type."""
    lengths: bool = True
    """False: manifests and blobs are sent without Content-Length. The end of the connection marks the end of the
    body."""
    page: int = 1000
    """Largest number of entries on a page of tags or referrers."""

    limit: int | None = None
    """The number of GETs of manifests after which further GETs get 429; None: no limit. HEAD requests do not count.
    With a limit, all responses for manifests have `ratelimit-*` headers."""
    retry_after: int | None = 2
    """The Retry-After of these 429 responses in seconds; None: they have no such header."""

    latency: float = 0.0
    """Seconds before each response."""
    rate: float = 0.0
    """Bytes of body per second and connection, in slices of 10 ms; 0: no limit."""
    gzip: bool = False
    """True: responses are compressed with gzip if the client accepts it, so the bytes differ from those of the blob or
    manifest."""
    keep_alive: bool = True
    send_buffer: int = 0
    """SO_SNDBUF of the connections in bytes; 0: the system's default. Bytes in this buffer count as sent
    (`hub.sent_ranges`), but they do not reach a client that disconnects. A small value keeps their number small."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Switches:
        return cls(**{**value, "private": tuple(value.get("private", ()))})


SWITCHES = frozenset(each.name for each in fields(Switches))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and a description of the requests to which it applies. An authorized request gets the first fault that
    matches it and is not used up. A request does not match a fault whose `stall_after` or `drop_after` is larger than
    the number of bytes in the body of the response."""

    on: HubRequestKind | Literal["any"] = "blob"
    method: str = "GET"
    """The method of the requests; empty: any method."""
    match: str = ""
    """Text in the path of the requests, such as a digest, a tag or a repository."""
    skip: int = 0
    """The number of matching requests to which the fault does not apply yet."""
    times: int | None = 1
    """The number of requests to which the fault applies; None: no limit."""

    status: int = 0
    """The status of the response; 0: unchanged. If the spec has an error code for this status, the body is an error in
    the format of the spec. Otherwise, it is an HTML page."""
    retry_after: str = ""
    page: bool = False
    """True: the body is an HTML page for every status, as from a firewall or a proxy in front of the registry."""
    hangup: bool = False
    """The connection is closed without a response."""
    stall: bool = False
    """No response is sent until `hub.release()`."""
    stall_after: int | None = None
    """The number of body bytes after which nothing is sent until `hub.release()`."""
    drop_after: int | None = None
    """The number of body bytes after which the connection is closed, once they have reached the client. It is closed
    with FIN, or with RST if `reset` is true."""
    reset: bool = False
    corrupt: int | None = None
    """The offset of a byte of the blob or manifest that is changed. A request does not match if its response lacks this
    byte."""
    shift: int = 0
    """A range begins this many bytes later than requested. Content-Range has the shifted range."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
