"""The settings for mirroring: `[[upstream]]` (the registries to mirror), `[hosted]` (names that belong to this registry
and are never mirrored) and `[warm]` (images to fetch ahead of the first pull).

The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError for an invalid
value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import NoDecode

from registry.config.cooldown_settings import CooldownExemption, TagPattern
from registry.config.field_types import Duration, SettingsGroup, normalized_host, split_commas, split_http_url
from storage.errors import RegistryError
from storage.names import parse_reference
from storage.patterns import NamePattern

DOCKER_HUB = "docker.io"
"""The name of Docker Hub in image names."""
HUB_LIBRARY = "library"
"""The first part of the full name of a Docker Hub image whose short name has no slash: `ubuntu` is `library/ubuntu`."""

_HUB_HOSTS = ("registry-1.docker.io", "index.docker.io", "hub.docker.com", "registry.hub.docker.com")
"""Hosts of Docker Hub. They cannot be names of upstreams, because image names contain `docker.io` instead."""
_PRESETS: Mapping[str, Mapping[str, list[str]]] = {
    DOCKER_HUB: {"endpoints": ["https://registry-1.docker.io"], "realms": ["https://auth.docker.io/token"]}
}
"""Default settings of some upstreams, by name. For all other upstreams, the default of `endpoints` is
`https://NAME`."""
_NAME = re.compile(r"[a-z0-9]+((?:[._]|__|-+)[a-z0-9]+)*")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[1-9][0-9]{0,4})?")


def _split_upstream_url(value: str, example: str) -> SplitResult:
    """Returns the parts of an http or https URL. Raises ValueError for any other value, and for a URL with a user name,
    query or fragment. `example`: a valid URL for the error message."""
    if "@" in value:  # the message does not repeat the URL, which may contain a password
        raise ValueError("an address must not contain a user name or password; set username and password_file")
    url_parts = split_http_url(value, example, allow_query=False, allow_fragment=False)
    try:
        normalized_host(url_parts.hostname or "")
    except ValueError:
        raise ValueError(f"{value!r} is not an address like {example}") from None
    return url_parts


def _check_endpoint(value: str) -> str:
    url_parts = _split_upstream_url(value, "https://registry-1.docker.io")
    if url_parts.path not in ("", "/"):
        raise ValueError(f"{value!r} must end after the host and port; the registry adds /v2/ itself")
    return f"{url_parts.scheme}://{url_parts.netloc}"


def _check_realm(value: str) -> str:
    _split_upstream_url(value, "https://auth.docker.io/token")
    return value


def _check_search(value: str) -> str:
    _split_upstream_url(value, "https://index.docker.io/v1/search")
    return value


def _check_redirect_host(value: str) -> str:
    try:
        url = urlsplit(f"//{value}")
        # The last condition refuses port 0.
        is_valid = url.hostname and url.netloc == value and "@" not in value and (url.port is None or url.port)
        normalized_host(url.hostname or "")
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{value!r} is not a host like storage.corp:9000; write it without a scheme and a path")
    return value.lower()


def _check_upstream_name(value: str) -> str:
    if value in _HUB_HOSTS:
        raise ValueError(
            f"{value!r} is a host of Docker Hub; write {DOCKER_HUB!r}; the setting endpoints can set another address"
        )
    if value == HUB_LIBRARY:
        raise ValueError(f"{value!r} cannot be an upstream's name: names of Docker Hub's own images begin with it")
    if not _NAME.fullmatch(value) or len(value) > 100:
        raise ValueError(f"{value!r} is not a name like docker.io or ghcr.io; to set an address, use endpoints")
    return value


def _check_host(value: str) -> str:
    if not _HOST.fullmatch(value.lower()):
        raise ValueError(f"{value!r} is not a host's name like hub.example.com")
    return value.lower()


def _check_name_pattern(value: str) -> str:
    return NamePattern(value)


UpstreamName = Annotated[str, AfterValidator(_check_upstream_name)]
"""The name of an upstream in image names, such as `ghcr.io`."""
HostName = Annotated[str, AfterValidator(_check_host)]
"""A host name in lower case, with a port if it has one, such as `registry.corp:5000`."""


class Upstream(SettingsGroup):
    """A registry that this one mirrors. For Docker Hub and many other registries, the setting `name` suffices."""

    name: UpstreamName = Field(description="Its name in image names (`localhost:5000/ghcr.io/org/app`) and in `?ns=`")
    endpoints: list[Annotated[str, AfterValidator(_check_endpoint)]] = Field(
        default=[],
        description="Its URLs. The mirror first tries those that answered last time. Default: `https://` and the name; "
        "for `docker.io` the URL of Docker Hub",
    )
    default: bool = Field(
        default=False, description="Whether names without a host, such as `ubuntu`, are pulled from it"
    )
    hosts: list[HostName] = Field(
        default=[], description="Host names of this server (Host header). A request to one of them is for this upstream"
    )
    aliases: list[HostName] = Field(
        default=[],
        description="Further values of `?ns=` that mean this upstream. In `?ns=`, containerd and BuildKit send the "
        "host in the image name, with the port if it has one: `registry.corp:5000`",
    )
    realms: list[Annotated[str, AfterValidator(_check_realm)]] = Field(
        default=[],
        description="URLs of further token services that the mirror may use and may send the password to. Two kinds of "
        "services need no entry: those on the endpoint's host and port, and those at `https`, port 443, on the "
        "registrable domain (such as `example.com`) of an endpoint or of `name`",
    )
    redirects: list[Annotated[str, AfterValidator(_check_redirect_host)]] = Field(
        default=[],
        description="Hosts to which redirects may always lead, such as `storage.corp:9000`. A host without a port "
        "means its ports 80 and 443. A redirect to any other host is followed only if the host has a public address, "
        "or if the host and the endpoint both have private addresses",
    )
    username: str | None = Field(default=None, min_length=1, description="User name for its login. Default: no login")
    password_file: Path | None = Field(default=None, description="File with the password and nothing else")
    password_env: str | None = Field(default=None, description="Environment variable with the password")
    docker_config: Path | None = Field(
        default=None, description="A docker `config.json` with the login for this upstream's name"
    )
    require_grant: bool | None = Field(
        default=None,
        description="Whether pulls need a grant whose pattern begins with the upstream's name, so that `**` is not "
        "enough. Default: true if it has a login, because content fetched with a login may be private",
    )
    ca_file: Path | None = Field(
        default=None, description="Certificate authorities to trust instead of the system's, in PEM"
    )
    tag_ttl: Duration = Field(
        default=300.0, description="How long a cached tag is fresh. After that the upstream is asked again"
    )
    tag_ttls: dict[TagPattern, Duration] = Field(
        default={},
        description='`tag_ttl` by tag pattern; the first match is used: `{ "v*" = "1h", "*-nightly" = "1m" }`',
    )
    miss_ttl: Duration = Field(default=60.0, description="How long a 'not found' answer is cached")
    cooldown: Duration = Field(
        default=0.0,
        description="How long a tag at the upstream must point at a digest, without a break, until the digest is "
        "mature. Pulls of the tag get the newest mature digest. 0: no delay. Pulls by digest, and pulls of the tags of "
        "signatures, are never delayed",
    )
    cooldown_tags: list[TagPattern] = Field(
        default=["*"], min_length=1, description="Patterns of the tags to which `cooldown` applies, such as `v*`"
    )
    cooldown_exempt: list[CooldownExemption] = Field(
        default=[],
        description="What `cooldown` does not apply to: patterns of repositories as the upstream names them, each with "
        'a pattern of tags if needed: `["library/**", "team/app:nightly-*", "**:edge"]`',
    )
    cooldown_new: Literal["serve", "refuse"] = Field(
        default="serve",
        description="What happens if no digest of a tag is mature yet (see `cooldown`), for example because the mirror "
        "has just seen the tag for the first time: with `serve`, pulls of the tag get the first digest that the mirror "
        "saw; with `refuse`, pulls are refused",
    )
    connections: int = Field(
        default=8, ge=1, le=64, description="Maximum number of connections for blobs at a time, of all workers together"
    )
    prefetch: Literal["off", "config", "layers"] = Field(
        default="layers",
        description="What to fetch ahead once a client has started to pull an image: `off`, `config` or `layers`",
    )
    cache_max: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Largest size of its content in the cache. If it is exceeded, the images that were not pulled for "
        "the longest time are evicted. Default: no limit",
    )
    search: Annotated[str, AfterValidator(_check_search)] | None = Field(
        default=None,
        description="URL of its search, such as `https://index.docker.io/v1/search` for Docker Hub. This registry "
        "passes searches by `docker search` and `podman search` on to the URL. Only one upstream can have this "
        "setting. Default: only this registry is searched",
    )
    connect_timeout: Duration = Field(default=5.0, gt=0, description="Timeout for opening a connection")
    idle_timeout: Duration = Field(default=20.0, gt=0, description="Timeout for a connection on which no bytes arrive")

    @model_validator(mode="before")
    @classmethod
    def _add_presets(cls, values: Any) -> Any:
        """If no endpoints are given, adds the default endpoints, and for Docker Hub also the default realms."""
        if not isinstance(values, Mapping) or values.get("endpoints"):
            return values
        name = values.get("name")
        if not isinstance(name, str):
            return values
        presets = {"endpoints": [f"https://{name}"], **_PRESETS.get(name, {})}
        return {**presets, **{field: value for field, value in values.items() if field != "endpoints"}}

    @model_validator(mode="after")
    def _check_login(self) -> Self:
        fields = ("password_file", "password_env", "docker_config")
        sources = [field for field in fields if getattr(self, field) is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both set; a login has only one source, so keep one")
        if self.username is not None and sources == ["docker_config"]:
            raise ValueError("username and docker_config are both set; docker_config brings its own user name")
        if self.username is not None and not sources:
            raise ValueError(f"username {self.username!r} has no password; set password_file or password_env")
        if self.username is None and sources and sources != ["docker_config"]:
            raise ValueError(f"{sources[0]} is set without a username")
        return self

    @model_validator(mode="after")
    def _check_cooldown(self) -> Self:
        dependents = sorted({"cooldown_tags", "cooldown_exempt", "cooldown_new"} & self.model_fields_set)
        if dependents and "cooldown" not in self.model_fields_set:
            raise ValueError(f'{dependents[0]} has no effect without a cooldown; set one, such as cooldown = "3d"')
        return self

    @property
    def redirect_host_ports(self) -> frozenset[tuple[str, int]]:
        """The host and port of each entry of `redirects`. An entry without a port yields two pairs: the host with port
        80, and the host with port 443."""
        entries = [urlsplit(f"//{entry}") for entry in self.redirects]
        return frozenset(
            (normalized_host(entry.hostname or ""), port)
            for entry in entries
            for port in ([entry.port] if entry.port else [80, 443])
        )

    @property
    def realm_host_ports(self) -> frozenset[tuple[str, int]]:
        """Host and port of each URL in `realms`."""
        urls = [urlsplit(realm) for realm in self.realms]
        return frozenset(
            (normalized_host(url.hostname or ""), url.port or (80 if url.scheme == "http" else 443)) for url in urls
        )

    @property
    def needs_upstream_grant(self) -> bool:
        """True if a pull from this upstream needs a grant whose pattern begins with the upstream's name. A grant for
        `**` (all names) is then not enough.

        - If `require_grant` is set, returns `require_grant`.
        - If `require_grant` is None, returns True if the settings have a login for the upstream."""
        return self._has_login if self.require_grant is None else self.require_grant

    @property
    def has_private_repositories(self) -> bool:
        """Whether this upstream may have repositories that only some clients may read: True if the upstream has a
        login, or if pulls need a grant for the upstream. The mirror then serves a cached blob from a repository only
        after the upstream has confirmed that the repository has the blob."""
        return self._has_login or self.needs_upstream_grant

    @property
    def _has_login(self) -> bool:
        return self.username is not None or self.docker_config is not None


class HostedSettings(SettingsGroup):
    """Names that always belong to this registry and never to an upstream."""

    prefixes: Annotated[
        list[Annotated[str, AfterValidator(_check_name_pattern)]], NoDecode, BeforeValidator(split_commas)
    ] = Field(
        default=[],
        description="Patterns of names for which no upstream is asked, such as `team/**` (any text) or `team/*` (any "
        "text without a slash). A name to which clients have pushed needs no pattern: it belongs to this registry",
    )


def add_mirror_upstreams(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of `values` (the values of all settings) in which the setting `upstream` has an entry for each
    name in the setting `mirror`. If no upstream is the default, the first name in `mirror` becomes the default. If
    `mirror` or `upstream` is malformed, the copy is unchanged, and the model `Settings` refuses the values later."""
    names, upstreams = split_commas(values.get("mirror", [])), values.get("upstream", [])
    if not isinstance(names, list) or not isinstance(upstreams, list):
        return dict(values)
    if not names or not all(map(_is_upstream_name, names)):
        return dict(values)
    configured = [_field_value(upstream, "name") for upstream in upstreams]
    upstreams = [*upstreams, *({"name": name} for name in dict.fromkeys(names) if name not in configured)]
    if not any(_field_value(upstream, "default") for upstream in upstreams):
        upstreams = [
            _as_default(upstream) if _field_value(upstream, "name") == names[0] else upstream for upstream in upstreams
        ]
    return {**values, "upstream": upstreams}


def _is_upstream_name(value: Any) -> bool:
    """Returns whether a value is a valid name of an upstream. Does not check the length, which the validator
    `_check_upstream_name` checks later."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value not in (*_HUB_HOSTS, HUB_LIBRARY)


def _field_value(upstream: Any, field: str) -> Any:
    """Returns the value of a field of an upstream; None if the field is missing. `upstream`: a mapping or an
    `Upstream`."""
    return upstream.get(field) if isinstance(upstream, Mapping) else getattr(upstream, field, None)


def _as_default(upstream: Any) -> Any:
    """Returns a copy of the upstream with `default` set to true."""
    if isinstance(upstream, Upstream):
        return upstream.model_copy(update={"default": True})
    return {**upstream, "default": True}


def check_upstreams(upstreams: Sequence[Upstream], hosted: HostedSettings, host_names: Sequence[str]) -> None:
    """Raises ValueError if an upstream contradicts another upstream, or the settings `hosted` or `host_names`. Names,
    hosts and aliases must be unique. At most one upstream may be the default, and at most one may have `search`. No
    pattern of hosted names may begin with the name of an upstream."""
    names = [upstream.name for upstream in upstreams]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two upstreams named {duplicate}")
    defaults = [upstream.name for upstream in upstreams if upstream.default]
    if len(defaults) > 1:
        raise ValueError(
            f"{' and '.join(defaults)} are both the default; only one upstream can serve names without a host"
        )
    searchable = [upstream.name for upstream in upstreams if upstream.search is not None]
    if len(searchable) > 1:
        raise ValueError(f"{' and '.join(searchable)} both have a search; searches are passed on to one upstream only")
    hosts = [host for upstream in upstreams for host in upstream.hosts]
    if duplicate := next((host for host in hosts if hosts.count(host) > 1), None):
        raise ValueError(f"two upstreams have the host {duplicate}")
    aliases = [alias for upstream in upstreams for alias in upstream.aliases]
    if duplicate := next((alias for alias in aliases if [*aliases, *names].count(alias) > 1), None):
        raise ValueError(f"two upstreams are called {duplicate}, by name or alias")
    if conflict := next((alias for alias in aliases if alias in hosts), None):
        raise ValueError(
            f"{conflict} is in aliases and in hosts; aliases lists names of the upstream, hosts those of this server"
        )
    if conflict := next((host for host in host_names if host in (*names, *aliases, *hosts)), None):
        raise ValueError(f"host_names: {conflict} names an upstream; host_names lists names of this registry itself")
    mirrored_prefixes = {*names, HUB_LIBRARY} if defaults else set(names)  # a default upstream serves `library/…`
    for pattern in hosted.prefixes:
        if pattern.partition("/")[0] in mirrored_prefixes:
            raise ValueError(
                f"hosted.prefixes: {pattern!r} covers mirrored names; an upstream's repositories cannot be hosted here"
            )


ALL_PLATFORMS = "all"
"""The entry of `platforms` that means all platforms of an image."""
_PLATFORM = re.compile(rf"{ALL_PLATFORMS}|[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")


def _check_reference(value: str) -> str:
    try:
        parse_reference(value)
    except RegistryError as error:
        raise ValueError(error.message) from None
    return value


def _check_platform(value: str) -> str:
    if not _PLATFORM.fullmatch(value):
        raise ValueError(f"{value!r} is not a platform like linux/amd64 or linux/arm/v7, and not {ALL_PLATFORMS!r}")
    return value


class WarmSettings(SettingsGroup):
    """Images of upstreams to fetch before anyone pulls them, and to keep up to date."""

    references: Annotated[
        list[Annotated[str, AfterValidator(_check_reference)]], NoDecode, BeforeValidator(split_commas)
    ] = Field(default=[], description="The images, such as `ubuntu:24.04` or `ghcr.io/org/app:1`")
    file: Path | None = Field(
        default=None,
        description="File with more images, one in each line; `#` starts a comment. It is read again in each round",
    )
    platforms: Annotated[
        list[Annotated[str, AfterValidator(_check_platform)]], NoDecode, BeforeValidator(split_commas)
    ] = Field(
        default=[], description="The platforms to fetch, such as `linux/arm64`, or `all`. Default: this machine's"
    )
    interval: Duration = Field(default=21600.0, gt=0, description="Time between two rounds of fetching")
