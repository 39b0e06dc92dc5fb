"""The settings `[metrics]` (Prometheus) and `[otel]` (OpenTelemetry)."""

from __future__ import annotations

from pydantic import Field

from registry.config.field_types import AT_RESTART, NetworkList, SettingsGroup


class MetricsSettings(SettingsGroup):
    """Metrics for Prometheus, at `/metrics`. On the registry's port, two kinds of clients may read them: accounts with
    the right to administrate the registry, and every client at the addresses in `allow`."""

    enabled: bool = Field(default=True, json_schema_extra=AT_RESTART, description="Serve `/metrics`")
    allow: NetworkList = Field(
        default=[], description="Addresses and networks of clients that may read the metrics without a login"
    )
    listen: str | None = Field(
        default=None,
        json_schema_extra=AT_RESTART,
        description="An additional address, HOST:PORT, that serves only the metrics. Every client that reaches this "
        "address may read them. The address uses TLS if the registry does",
    )
    distribution_names: bool = Field(
        default=False,
        json_schema_extra=AT_RESTART,
        description="Also serve metrics with the names of CNCF Distribution, such as `registry_http_requests_total`, "
        "for dashboards that use these names",
    )


class OtelSettings(SettingsGroup):
    """Traces and metrics for OpenTelemetry. They need the extra `entrepot[otel]`. The environment variables `OTEL_*` of
    the OpenTelemetry specification apply as well. `OTEL_EXPORTER_OTLP_ENDPOINT` can replace the setting `endpoint`."""

    endpoint: str | None = Field(
        default=None,
        json_schema_extra=AT_RESTART,
        description="URL of a collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`. Nothing is "
        "sent if neither this setting nor a variable such as `OTEL_EXPORTER_OTLP_ENDPOINT` is set",
    )
