"""The settings: one typed model, each setting with its help.

`Settings(...)` takes what it is given and defaults for the rest; it reads no environment and no file, so a test that
makes one depends on nothing else. `registry.config.settings_sources` builds it from flags, variables and a file, in
that order.

The settings of what stands between the network and the requests: `[tls]` and the proxies that are trusted.
"""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from registry.config.auth_settings import AuthSettings, Issuer, OIDCSettings
from registry.config.field_types import MIB, Duration
from registry.config.mirror_settings import (
    HostedSettings,
    SettingsGroup,
    Upstream,
    UpstreamName,
    WarmSettings,
    check_upstreams,
    split_commas,
    with_mirrors,
)


def _network(value: str) -> str:
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{value!r} is not a network like 10.0.0.0/8, nor an address") from None
    if ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f"{value!r} has more bits than its network; {network} is meant, or an address without /")
    if network.prefixlen == 0:
        raise ValueError(f"{value!r} is every address: then everybody could say who they are")
    return str(network)


NetworkList = Annotated[list[Annotated[str, AfterValidator(_network)]], NoDecode, BeforeValidator(split_commas)]


class TLSSettings(SettingsGroup):
    """TLS on the port that is listened on. Renewed files are read again without a restart."""

    certificate: Path | None = Field(
        default=None, description="The server's certificate and those up to its authority, PEM; with it TLS is on"
    )
    key: Path | None = Field(
        default=None, description="The certificate's key, PEM without a password; without it: in the same file"
    )
    client_ca: Path | None = Field(
        default=None, description="Authorities whose certificates clients may or must show, PEM"
    )
    client_auth: Literal["off", "optional", "required"] | None = Field(
        default=None, description="Whether clients show one; with `client_ca` and without this: `required`"
    )


ENV_PREFIX = "ENTREPOT_"
ENV_NESTED_DELIMITER = "__"


def _public_url(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{value!r} is not an address like https://registry.example.com")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{value!r} must end after the host and port: clients ask for /v2/ at the root")
    return f"{parts.scheme}://{parts.netloc}"


def _directory(value: object) -> object:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{value!r} is not a directory's path")
    return value


def default_workers() -> int:
    """One for each core this process may use, at most four."""
    return max(1, min(len(os.sched_getaffinity(0)), 4))


class CollectionSettings(SettingsGroup):
    """Removal of content that nothing refers to any more. It runs while the registry serves."""

    grace: Duration = Field(
        default=86400.0,
        description="How long content stays after the last reference to it is gone, or after it was pushed",
    )
    interval: Duration = Field(default=3600.0, gt=0, description="Time between two collections")


class UploadSettings(SettingsGroup):
    """Upload sessions."""

    expire: Duration = Field(
        default=604800.0, gt=0, description="An upload nobody has continued for this long is dropped with its bytes"
    )


class AuditSettings(SettingsGroup):
    """The log of who changed what, logged in, and was refused."""

    keep: Duration = Field(
        default=31536000.0,
        gt=0,
        description="How long its lines are kept; a collection drops older ones. What tags pointed at is kept for ever",
    )


class LimitSettings(SettingsGroup):
    """What a client may send, and how much of it."""

    manifest: ByteSize = Field(
        default=ByteSize(8 * MIB),
        ge=4 * MIB,
        le=64 * MIB,
        description="Largest manifest taken; a larger one gets 413",
    )
    connections_per_address: int = Field(
        default=0,
        ge=0,
        description="Connections at the same time from one address (IPv6: one /64), trusted proxies excepted; those "
        "beyond are closed; 0: any number",
    )
    requests_per_second: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Requests from one account to `/v2`, or from one address without an account and beside `/v2` "
        "(`/health` by itself); those beyond get 429 and Retry-After; 0: any number",
    )
    burst: int = Field(
        default=0, ge=0, description="How many of them may come at once; 0: as many as ten seconds allow, 1 at least"
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_NESTED_DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    data: Annotated[Path, BeforeValidator(_directory)] = Field(
        default=Path("data"),
        description="Directory that holds everything; a relative path starts at the working directory",
    )
    listen: str = Field(
        default="127.0.0.1:5000",
        description="Address to listen on, HOST:PORT; port 0 picks a free one. Beyond this machine only with accounts, "
        "or `insecure_open`",
    )
    workers: int = Field(default_factory=default_workers, ge=1, le=64, description="Server processes")
    public_url: Annotated[str | None, AfterValidator(_public_url)] = Field(
        default=None, description="The registry's address as clients see it, where a proxy stands before it"
    )
    insecure_open: bool = Field(
        default=False, description="Listen beyond this machine although there are no accounts: whoever comes may do all"
    )
    trusted_proxies: NetworkList = Field(
        default=[],
        description="Addresses and networks of proxies before this registry, such as `10.0.0.0/8`: from them "
        "X-Forwarded-For, -Proto and -Host are believed",
    )
    read_only: bool = Field(default=False, description="Refuse every push and delete")
    delete: bool = Field(default=True, description="Allow clients to delete tags, manifests and blobs")
    shutdown_grace: Duration = Field(
        default=30.0, description="How long running requests may go on after SIGTERM before they are cut"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity that is logged"
    )
    mirror: Annotated[list[UpstreamName], NoDecode, BeforeValidator(split_commas)] = Field(
        default=[],
        description="Registries to mirror as they come, such as `docker.io`: each as an `[[upstream]]` of that name. "
        "The first is the default upstream, unless one is",
    )
    tls: TLSSettings = TLSSettings()
    gc: CollectionSettings = CollectionSettings()
    uploads: UploadSettings = UploadSettings()
    audit: AuditSettings = AuditSettings()
    limits: LimitSettings = LimitSettings()
    hosted: HostedSettings = HostedSettings()
    warm: WarmSettings = WarmSettings()
    auth: AuthSettings = AuthSettings()
    oidc: OIDCSettings = OIDCSettings()
    upstream: list[Upstream] = Field(
        default=[], description="The registries mirrored here, and how; see below. As a variable: JSON"
    )
    issuer: list[Issuer] = Field(
        default=[], description="Others whose tokens are taken, and for whom; see below. As a variable: JSON"
    )

    @model_validator(mode="before")
    @classmethod
    def _add_mirrors(cls, given: Any) -> Any:
        return with_mirrors(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_upstreams(self) -> Self:
        check_upstreams(self.upstream, self.hosted)
        return self

    @property
    def default_upstream(self) -> str | None:
        """The name of the one that names without a host go to."""
        return next((upstream.name for upstream in self.upstream if upstream.default), None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives: the environment and the file are read, and named, by
        `registry.config.settings_sources`."""
        return (init_settings,)
