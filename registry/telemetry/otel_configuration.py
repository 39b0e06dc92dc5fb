"""Finds out whether traces and metrics are sent to an OpenTelemetry collector. Reads the setting `otel.endpoint` and
the environment variables of the OpenTelemetry specification ("OpenTelemetry Environment Variable Specification",
"OpenTelemetry Protocol Exporter")."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

_DEFAULT_INTERVAL_SECONDS: Final = 60.0
"""Interval at which metrics are sent, if the environment variable does not set it."""


class OtelUnavailable(Exception):
    """A collector is configured, but the libraries of the extra `entrepot[otel]` are not installed. The error's message
    is one line for the operator."""


def are_traces_sent(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether traces are sent to a collector. `endpoint`: the setting `otel.endpoint`."""
    return _is_sent("TRACES", endpoint, environment)


def are_metrics_sent(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether metrics are sent to a collector. `endpoint`: the setting `otel.endpoint`."""
    return _is_sent("METRICS", endpoint, environment)


def metrics_interval(environment: Mapping[str, str] = os.environ) -> float:
    """Returns the interval at which metrics are sent, in seconds. Reads the milliseconds in
    `OTEL_METRIC_EXPORT_INTERVAL`; the default is 60 seconds, and the minimum 0.1 seconds."""
    try:
        milliseconds = float(environment.get("OTEL_METRIC_EXPORT_INTERVAL", ""))
    except ValueError:
        return _DEFAULT_INTERVAL_SECONDS
    return max(milliseconds / 1000, 0.1)


def check_otel(endpoint: str | None) -> None:
    """Raises OtelUnavailable if a collector is configured and the libraries are missing. `endpoint`: the setting
    `otel.endpoint`."""
    if not are_traces_sent(endpoint) and not are_metrics_sent(endpoint):
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.metric_exporter
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError:
        raise OtelUnavailable(
            "an OpenTelemetry collector is configured, but the libraries are not installed: install entrepot[otel], or "
            "remove otel.endpoint and the variables OTEL_EXPORTER_OTLP_*"
        ) from None


def _is_sent(signal: str, endpoint: str | None, environment: Mapping[str, str]) -> bool:
    """Returns whether a signal is sent to a collector. `signal`: `TRACES` or `METRICS`, as in the names of the
    environment variables."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get(f"OTEL_{signal}_EXPORTER", "otlp").lower() == "none":
        return False
    variables = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return endpoint is not None or any(environment.get(name) for name in variables)
