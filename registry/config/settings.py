"""The model of all settings (`Settings`), each with its type, its default and its help text.

`Settings(...)` uses only its arguments and the defaults. `registry.config.settings_sources` collects these arguments
from command-line flags, environment variables and the settings file. Durations are in seconds, sizes in bytes. The
`description` of a setting is its text in `--help` and in docs/en/settings.md.

Most settings take effect at a reload (`entrepot reload`). A setting or group with `AT_RESTART` takes effect at
`entrepot restart`, but not at a reload. At a restart, the process that starts the worker processes loads the program
again, and then replaces the worker processes one after the other. So the server does not stop. A setting with
`AT_START` takes effect only when the whole server is stopped and started again.

The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from registry.config.auth_settings import AuthSettings, Issuer, OIDCSettings
from registry.config.default_worker_count import default_worker_count
from registry.config.event_settings import EventSettings, Webhook, check_webhooks
from registry.config.field_types import (
    AT_RESTART,
    AT_START,
    MIB,
    Duration,
    NetworkList,
    SettingsGroup,
    split_commas,
    split_http_url,
)
from registry.config.mirror_settings import (
    HostedSettings,
    HostName,
    Upstream,
    UpstreamName,
    WarmSettings,
    add_mirror_upstreams,
    check_upstreams,
)
from registry.config.retention_settings import RetentionRule, check_retention
from registry.config.telemetry_settings import MetricsSettings, OtelSettings
from registry.config.upkeep_settings import (
    BackupSettings,
    CacheSettings,
    DiskSettings,
    ImmutableRule,
    Quota,
    ScrubSettings,
    UpkeepSettings,
    check_immutable_rules,
    check_quotas,
)
from registry.printable import is_utf8


class PageSettings(SettingsGroup):
    """The pages for people, below `/ui`. They show each visitor what the visitor may pull."""

    enabled: bool = Field(default=True, description="Serve the pages")


class TLSSettings(SettingsGroup):
    """TLS on the registry's port. The server reads renewed files without a restart."""

    certificate: Path | None = Field(
        default=None, description="The server's certificate and its chain, in PEM. If it is set, the port speaks TLS"
    )
    key: Path | None = Field(
        default=None,
        description="File with the certificate's key, in PEM without a password. Default: the certificate's file",
    )
    client_ca: Path | None = Field(
        default=None, description="File with the authorities that sign the certificates of clients, in PEM"
    )
    client_auth: Literal["off", "optional", "required"] | None = Field(
        default=None,
        description="Client certificates: `off`, `optional` or `required`. Default: `required` if `client_ca` is set, "
        "otherwise `off`",
    )

    @property
    def effective_client_auth(self) -> Literal["off", "optional", "required"]:
        """The value of `client_auth`, or its default."""
        return self.client_auth or ("off" if self.client_ca is None else "required")


ENV_PREFIX = "ENTREPOT_"
"""Prefix of the environment variables that set settings."""
ENV_NESTED_DELIMITER = "__"
"""Separates the names of groups and settings in a variable: `ENTREPOT_GC__GRACE` sets `gc.grace`."""


_HOST_AND_PORT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")


def _check_public_url(value: str | None) -> str | None:
    """Returns the registry's address as scheme, host and port; None for None. Raises ValueError if the address is not
    an http or https URL, has a query, a fragment, a user name or a path other than `/`, or has a host with characters
    that a URL cannot have."""
    if value is None:
        return None
    parts = split_http_url(value, "https://registry.example.com")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{value!r} must end after the host and port, since clients ask for /v2/ at the root")
    if not _HOST_AND_PORT.fullmatch(parts.netloc):
        raise ValueError(
            f"{value!r} has a host with characters that a URL cannot have; write an internationalized name in its "
            "ASCII form, which begins with xn--"
        )
    return f"{parts.scheme}://{parts.netloc.removesuffix(':')}"


def _check_directory(value: object) -> object:
    """Returns a path unchanged. Raises ValueError if the value is not a path, is empty, or is not UTF-8. SQLite cannot
    open a path that is not UTF-8, and pydantic would turn an empty path into the working directory."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{value!r} is not a directory's path")
    if not is_utf8(str(value)):
        raise ValueError(f"{value!r} is not text in UTF-8")
    return value


class GarbageCollectionSettings(SettingsGroup):
    """Garbage collection, which removes content that nothing refers to any more. It runs while the registry serves."""

    grace: Duration = Field(
        default=86400.0,
        description="How long content without references is kept. The time begins with the push of the content, and "
        "begins again when the last reference to it is removed",
    )
    interval: Duration = Field(default=3600.0, gt=0, description="Time between two collections")


class UploadSettings(SettingsGroup):
    """Uploads that clients have not finished."""

    expire: Duration = Field(
        default=604800.0, gt=0, description="How long an upload without progress is kept before it is deleted"
    )


class AuditSettings(SettingsGroup):
    """The audit log, which records changes, logins and refused requests."""

    keep: Duration = Field(
        default=31536000.0,
        gt=0,
        description="How long the lines of the log are kept. The history of tags is kept for ever",
    )


class DownloadSettings(SettingsGroup):
    """Downloads of images as tar archives for `docker load`, at `/api/v1/repositories/NAME/manifests/TAG/archive`."""

    allow: Literal["everyone", "accounts", "nobody"] = Field(
        default="accounts",
        description="Who may download images that they may pull: `everyone`, only clients that have logged in to an "
        "account, or `nobody`. While there are no accounts, `accounts` means everyone",
    )
    at_once: int = Field(
        default=4,
        ge=1,
        description="How many images each worker process sends at the same time; further downloads get 429. One "
        "account may have at most half of this number, rounded up. All clients without an account at one address "
        "count as one account",
    )


class LimitSettings(SettingsGroup):
    """Limits on what clients send."""

    manifest: ByteSize = Field(
        default=ByteSize(8 * MIB),
        ge=4 * MIB,
        le=64 * MIB,
        description="Largest manifest that can be pushed; a larger one gets 413",
    )
    connections_per_address: int = Field(
        default=0,
        ge=0,
        json_schema_extra=AT_RESTART,
        description="Maximum number of connections at a time from one address (IPv6: from one /64 network); further "
        "connections are closed. Trusted proxies have no limit. 0 means no limit",
    )
    requests_per_second: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Maximum number of requests per second from one account or address. Requests of an account to "
        "`/v2` count for the account, all other requests for the address. Health checks are counted separately. "
        "Further requests get 429 and Retry-After. 0 means no limit",
    )
    burst: int = Field(
        default=0,
        ge=0,
        description="How many requests an account or address may send at the same moment; on average, it may still "
        "send only `requests_per_second`. 0 means ten times `requests_per_second`, at least 1",
    )


class Settings(BaseSettings):
    """All settings of the registry."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_NESTED_DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    data: Annotated[Path, BeforeValidator(_check_directory)] = Field(
        default=Path("data"),
        json_schema_extra=AT_START,
        description="The data directory, with all content and accounts. A relative path is relative to the working "
        "directory",
    )
    listen: str = Field(
        default="127.0.0.1:5000",
        json_schema_extra=AT_RESTART,
        description="Address to listen on, HOST:PORT; port 0 picks a free port. An address that other machines reach "
        "needs accounts, or `insecure_open`",
    )
    workers: int = Field(
        default_factory=default_worker_count,
        ge=1,
        le=64,
        json_schema_extra=AT_RESTART,
        description="Number of server processes",
    )
    public_url: Annotated[str | None, AfterValidator(_check_public_url)] = Field(
        default=None, description="The registry's address as clients see it, for a registry behind a proxy"
    )
    host_names: Annotated[list[HostName], NoDecode, BeforeValidator(split_commas)] = Field(
        default=[],
        description="Further names of this registry in image names, with the port if they have one, such as "
        "`registry.corp:5000`. Needed if a client such as containerd or k3s connects to an address other than the "
        "name: the client then sends the name as `?ns=`",
    )
    insecure_open: bool = Field(
        default=False,
        description="Let other machines connect although there are no accounts: then anyone can push and delete",
    )
    trusted_proxies: NetworkList = Field(
        default=[],
        json_schema_extra=AT_RESTART,
        description="Addresses and networks of proxies in front of this registry, such as `10.0.0.0/8`. "
        "X-Forwarded-For, -Proto and -Host are used only if they come from one of these",
    )
    read_only: bool = Field(default=False, description="Refuse every push and every delete")
    delete: bool = Field(default=True, description="Allow clients to delete tags, manifests and blobs")
    shutdown_grace: Duration = Field(
        default=30.0,
        json_schema_extra=AT_RESTART,
        description="How long running requests may continue after SIGTERM before they are stopped",
    )
    restart_grace: Duration = Field(
        default=3600.0,
        json_schema_extra=AT_RESTART,
        description="How long a worker that a restart has replaced may take to finish its pulls, pushes and jobs",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest severity that is logged: `debug`, `info`, `warning` or `error`"
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        json_schema_extra=AT_RESTART,
        description="Form of the log: `text`, or `json` for one JSON object per line",
    )
    mirror: Annotated[list[UpstreamName], NoDecode, BeforeValidator(split_commas)] = Field(
        default=[],
        description="Registries to mirror with default settings, such as `docker.io`: short for an `[[upstream]]` of "
        "that name. The first one is the default upstream, unless an `[[upstream]]` has `default = true`",
    )
    tls: TLSSettings = Field(default=TLSSettings(), json_schema_extra=AT_RESTART)
    gc: GarbageCollectionSettings = GarbageCollectionSettings()
    scrub: ScrubSettings = ScrubSettings()
    uploads: UploadSettings = UploadSettings()
    audit: AuditSettings = AuditSettings()
    downloads: DownloadSettings = DownloadSettings()
    backup: BackupSettings = BackupSettings()
    limits: LimitSettings = LimitSettings()
    hosted: HostedSettings = HostedSettings()
    warm: WarmSettings = WarmSettings()
    cache: CacheSettings = CacheSettings()
    disk: DiskSettings = DiskSettings()
    upkeep: UpkeepSettings = UpkeepSettings()
    pages: PageSettings = PageSettings()
    metrics: MetricsSettings = MetricsSettings()
    otel: OtelSettings = OtelSettings()
    auth: AuthSettings = AuthSettings()
    oidc: OIDCSettings = OIDCSettings()
    events: EventSettings = EventSettings()
    upstream: list[Upstream] = Field(
        default=[], description="The registries to mirror, see below. The value of the environment variable is JSON"
    )
    retention: list[RetentionRule] = Field(
        default=[],
        description="Which tags of hosted repositories are kept, see below. The value of the environment "
        "variable is JSON",
    )
    issuer: list[Issuer] = Field(
        default=[],
        description="Outside services whose tokens are accepted, see below. The value of the environment "
        "variable is JSON",
    )
    immutable: list[ImmutableRule] = Field(
        default=[],
        description="Tags that clients cannot overwrite, see below. The value of the environment variable is JSON",
    )
    quota: list[Quota] = Field(
        default=[],
        description="Limits of what clients may store under a prefix, see below. The value of the environment "
        "variable is JSON",
    )
    webhook: list[Webhook] = Field(
        default=[],
        description="HTTP endpoints that receive events, see below. The value of the environment variable is JSON",
    )

    @model_validator(mode="before")
    @classmethod
    def _add_mirrors(cls, values: Any) -> Any:
        return add_mirror_upstreams(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_upstreams_and_rules(self) -> Self:
        check_upstreams(self.upstream, self.hosted, self.host_names)
        check_immutable_rules(self.immutable, (upstream.name for upstream in self.upstream))
        check_quotas(self.quota, [upstream.name for upstream in self.upstream])
        check_webhooks(self.webhook)
        return self

    @model_validator(mode="after")
    def _check_retention(self) -> Self:
        check_retention(self.retention, self.upstream)
        return self

    @property
    def default_upstream(self) -> str | None:
        """The name of the upstream for image names without a host, such as `ubuntu`; None if there is none."""
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
        """Makes pydantic use only the arguments of `Settings(...)`, and not the environment. The module
        `registry.config.settings_sources` reads the environment and the settings file, and records where each value
        comes from."""
        return (init_settings,)
