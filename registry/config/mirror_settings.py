"""The settings of what is mirrored here, and of what is not: `[[upstream]]` and `[hosted]`.

The settings of what is fetched before anybody asks for it: `[warm]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import NoDecode

from registry.config.field_types import Duration
from storage.errors import RegistryError
from storage.names import parse_reference
from storage.patterns import NamePattern

DOCKER_HUB = "docker.io"
HUB_LIBRARY = "library"
"""Where Docker Hub keeps the names without a slash: `ubuntu` is `library/ubuntu` there."""

_HUB_ADDRESSES = ("registry-1.docker.io", "index.docker.io", "hub.docker.com", "registry.hub.docker.com")
_PRESETS: Mapping[str, Mapping[str, list[str]]] = {
    DOCKER_HUB: {"endpoints": ["https://registry-1.docker.io"], "realms": ["https://auth.docker.io/token"]}
}
_NAME = re.compile(r"[a-z0-9]+((?:[._]|__|-+)[a-z0-9]+)*")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[1-9][0-9]{0,4})?")
MAX_HOST_LENGTH = 253
"""Characters of a host's name, the most (RFC 1035, 2.3.4, as text)."""
_TAG_PATTERN = re.compile(r"[a-zA-Z0-9._*?\[\]!-]+")


class SettingsGroup(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def normalized_host(host: str) -> str:
    """A host's name in the one form that names are compared in: in lower case, as it stands in the DNS (IDNA), without
    the dot at its end. Raises ValueError: it is no name."""
    if len(host) <= MAX_HOST_LENGTH and not host.isascii():
        host = host.encode("idna").decode()
    host = host.lower().rstrip(".")
    if not 0 < len(host) <= MAX_HOST_LENGTH:
        raise ValueError("not a host's name")
    return host


def _split(value: str, example: str) -> SplitResult:
    if "@" in value:  # not shown again: it may be a password
        raise ValueError("an address holds no user and no password; set username and password_file")
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        normalized_host(parts.hostname or "")
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise ValueError(f"{value!r} is not an address like {example}")
    return parts


def _endpoint(value: str) -> str:
    parts = _split(value, "https://registry-1.docker.io")
    if parts.path not in ("", "/"):
        raise ValueError(f"{value!r} must end after the host and port: a registry answers at /v2/")
    return f"{parts.scheme}://{parts.netloc}"


def _realm(value: str) -> str:
    _split(value, "https://auth.docker.io/token")
    return value


def _redirect_host(value: str) -> str:
    try:
        parts = urlsplit(f"//{value}")
        known = parts.hostname and parts.netloc == value and "@" not in value and (parts.port is None or parts.port)
        normalized_host(parts.hostname or "")
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{value!r} is not a host like storage.corp:9000; it has no scheme and no path")
    return value.lower()


def _name(value: str) -> str:
    if value in _HUB_ADDRESSES:
        raise ValueError(f"{value!r} is called {DOCKER_HUB!r} in names; its address is set with endpoints")
    if value == HUB_LIBRARY:
        raise ValueError(f"{value!r} cannot be an upstream's name: it is where Docker Hub keeps its own images")
    if not _NAME.fullmatch(value) or len(value) > 100:
        raise ValueError(f"{value!r} is not a name like docker.io or ghcr.io; an address is set with endpoints")
    return value


def _host(value: str) -> str:
    if not _HOST.fullmatch(value.lower()):
        raise ValueError(f"{value!r} is not a host's name like hub.example.com")
    return value.lower()


def _pattern(value: str) -> str:
    return NamePattern(value)


def _tag_pattern(value: str) -> str:
    if not _TAG_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not a pattern of tags like v* or *-nightly")
    return value


def split_commas(value: object) -> object:
    """A list as a flag or variable gives it: parted by commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


UpstreamName = Annotated[str, AfterValidator(_name)]


class Upstream(SettingsGroup):
    """A far registry that this one mirrors. Docker Hub needs its name alone, `docker.io`; others may need no more."""

    name: UpstreamName = Field(description="Its name in paths (`localhost:5000/ghcr.io/org/app`) and in `?ns=`")
    endpoints: list[Annotated[str, AfterValidator(_endpoint)]] = Field(
        default=[],
        description="Where it answers, tried by health; without it: `https://` and the name, for `docker.io` Docker "
        "Hub's address",
    )
    default: bool = Field(default=False, description="Names without a host go here, such as `ubuntu`")
    hosts: list[Annotated[str, AfterValidator(_host)]] = Field(
        default=[], description="Names of this server (Host header) under which it is this upstream"
    )
    aliases: list[Annotated[str, AfterValidator(_host)]] = Field(
        default=[], description="What else clients call it in `?ns=`: its host, with the port where it has one"
    )
    realms: list[Annotated[str, AfterValidator(_realm)]] = Field(
        default=[], description="Token services that may see the password, beside those on the upstream's own site"
    )
    redirects: list[Annotated[str, AfterValidator(_redirect_host)]] = Field(
        default=[],
        description="Hosts (`storage.corp:9000`; without a port: 80 and 443) that redirects may lead to although their "
        "address is not public; without it only where the endpoint is in such a network itself",
    )
    username: str | None = Field(default=None, min_length=1, description="Who logs in there; without it nobody does")
    password_file: Path | None = Field(default=None, description="File that holds the password, and nothing else")
    password_env: str | None = Field(default=None, description="Environment variable that holds the password")
    docker_config: Path | None = Field(
        default=None, description="A docker `config.json` that holds the login for this upstream's name"
    )
    require_grant: bool | None = Field(
        default=None,
        description="Pulling from it takes a grant whose pattern begins with its name: `**` does not open it. Without "
        "it: true where it has a login, so that what was fetched with that stays private",
    )
    ca_file: Path | None = Field(default=None, description="Certificates to trust instead of the system's, PEM")
    tag_ttl: Duration = Field(default=300.0, description="How long a tag is trusted before it is asked for again")
    tag_ttls: dict[Annotated[str, AfterValidator(_tag_pattern)], Duration] = Field(
        default={}, description='The same by pattern, first match: `{ "v*" = "1h", "*-nightly" = "1m" }`'
    )
    miss_ttl: Duration = Field(default=60.0, description="How long it is remembered that something is not there")
    connections: int = Field(
        default=8, ge=1, le=64, description="Connections for blobs, the most at once, all workers together"
    )
    prefetch: Literal["off", "config", "layers"] = Field(
        default="layers", description="What is fetched before it is asked for, once an image is being pulled"
    )
    connect_timeout: Duration = Field(default=5.0, gt=0, description="How long a connection may take to come about")
    idle_timeout: Duration = Field(default=20.0, gt=0, description="How long it may send nothing")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """What is known of an upstream by its name, where no address is given."""
        if not isinstance(given, Mapping) or given.get("endpoints") or not isinstance(name := given.get("name"), str):
            return given
        known = {"endpoints": [f"https://{name}"], **_PRESETS.get(name, {})}
        return {**known, **{field: value for field, value in given.items() if field != "endpoints"}}

    @model_validator(mode="after")
    def _check_login(self) -> Self:
        sources = [f for f in ("password_file", "password_env", "docker_config") if getattr(self, f) is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both set; one login is meant")
        if self.username is not None and sources == ["docker_config"]:
            raise ValueError("username and docker_config are both set; docker_config brings its own user")
        if self.username is not None and not sources:
            raise ValueError(f"username {self.username!r} has no password; set password_file or password_env")
        if self.username is None and sources and sources != ["docker_config"]:
            raise ValueError(f"{sources[0]} is set without a username")
        return self

    @property
    def redirect_host_ports(self) -> frozenset[tuple[str, int]]:
        """The hosts and ports of `redirects`."""
        parts = [urlsplit(f"//{place}") for place in self.redirects]
        return frozenset(
            (normalized_host(part.hostname or ""), port)
            for part in parts
            for port in ([part.port] if part.port else [80, 443])
        )

    @property
    def realm_host_ports(self) -> frozenset[tuple[str, int]]:
        """The hosts and ports of `realms`."""
        parts = [urlsplit(realm) for realm in self.realms]
        return frozenset(
            (normalized_host(part.hostname or ""), part.port or (80 if part.scheme == "http" else 443))
            for part in parts
        )

    @property
    def guarded(self) -> bool:
        """Whether it takes a grant of its own to pull from it."""
        return self._has_login if self.require_grant is None else self.require_grant

    @property
    def private(self) -> bool:
        """Whether its repositories may be open to different readers: a repository then gets a blob only when the
        upstream says that this repository has it."""
        return self._has_login or self.guarded

    @property
    def _has_login(self) -> bool:
        return self.username is not None or self.docker_config is not None


class HostedSettings(SettingsGroup):
    """Names that are this registry's own."""

    prefixes: Annotated[list[Annotated[str, AfterValidator(_pattern)]], NoDecode, BeforeValidator(split_commas)] = (
        Field(
            default=[],
            description="Patterns of names never asked upstream, such as `team/**` (`**` spans slashes) or `*`; a name "
            "once pushed never is either",
        )
    )


def with_mirrors(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which each name of `mirror` has its upstream, and the first of them is the default where no other
    is. What is not well-formed stays as it is, for the model to refuse."""
    names, upstreams = split_commas(given.get("mirror", [])), given.get("upstream", [])
    if not isinstance(names, list) or not isinstance(upstreams, list) or not all(map(_is_name, names)) or not names:
        return dict(given)
    have = [_get(upstream, "name") for upstream in upstreams]
    upstreams = [*upstreams, *({"name": name} for name in dict.fromkeys(names) if name not in have)]
    if not any(_get(upstream, "default") for upstream in upstreams):
        upstreams = [_as_default(each) if _get(each, "name") == names[0] else each for each in upstreams]
    return {**given, "upstream": upstreams}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value not in (*_HUB_ADDRESSES, HUB_LIBRARY)


def _get(upstream: Any, field: str) -> Any:
    return upstream.get(field) if isinstance(upstream, Mapping) else getattr(upstream, field, None)


def _as_default(upstream: Any) -> Any:
    if isinstance(upstream, Upstream):
        return upstream.model_copy(update={"default": True})
    return {**upstream, "default": True}


def check_upstreams(upstreams: Sequence[Upstream], hosted: HostedSettings) -> None:
    """Raises ValueError for what is wrong between them."""
    names = [upstream.name for upstream in upstreams]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two upstreams named {twice}")
    defaults = [upstream.name for upstream in upstreams if upstream.default]
    if len(defaults) > 1:
        raise ValueError(f"{' and '.join(defaults)} are both the default; names without a host can go to one of them")
    hosts = [host for upstream in upstreams for host in upstream.hosts]
    if twice := next((host for host in hosts if hosts.count(host) > 1), None):
        raise ValueError(f"two upstreams have the host {twice}")
    aliases = [alias for upstream in upstreams for alias in upstream.aliases]
    if twice := next((alias for alias in aliases if [*aliases, *names].count(alias) > 1), None):
        raise ValueError(f"two upstreams are called {twice}, by name or alias")
    if own := next((alias for alias in aliases if alias in hosts), None):
        raise ValueError(f"{own} cannot be an alias, which is the upstream's own name, and in hosts, which are ours")
    taken = {*names, HUB_LIBRARY} if defaults else set(names)
    for pattern in hosted.prefixes:
        if pattern.partition("/")[0] in taken:
            raise ValueError(f"hosted.prefixes: {pattern!r} names what is mirrored; such names are never hosted here")


ALL_PLATFORMS = "all"
_PLATFORM = re.compile(rf"{ALL_PLATFORMS}|[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")


def _reference(value: str) -> str:
    try:
        parse_reference(value)
    except RegistryError as error:
        raise ValueError(error.message) from None
    return value


def _platform(value: str) -> str:
    if not _PLATFORM.fullmatch(value):
        raise ValueError(f"{value!r} is not a platform like linux/amd64 or linux/arm/v7, and not {ALL_PLATFORMS}")
    return value


class WarmSettings(SettingsGroup):
    """Images of upstreams that are fetched before anybody asks for them, and kept up to date."""

    references: Annotated[list[Annotated[str, AfterValidator(_reference)]], NoDecode, BeforeValidator(split_commas)] = (
        Field(default=[], description="Which, such as `ubuntu:24.04` or `ghcr.io/org/app:1`")
    )
    file: Path | None = Field(
        default=None, description="File of more of them, one a line, `#` begins a comment; read anew each time"
    )
    platforms: Annotated[list[Annotated[str, AfterValidator(_platform)]], NoDecode, BeforeValidator(split_commas)] = (
        Field(default=[], description="For which platforms, such as `linux/arm64`, or `all`; without it this machine's")
    )
    interval: Duration = Field(default=21600.0, gt=0, description="Time between two rounds")
