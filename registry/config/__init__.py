"""The registry's settings: the model `Settings`, the models of its parts, and functions that parse and format
durations, sizes and hosts."""

from registry.config.auth_settings import AuthSettings, Issuer, OIDCSettings
from registry.config.field_types import (
    MAX_HOST_LENGTH,
    format_byte_size,
    format_duration,
    is_duration,
    is_size,
    normalized_host,
    parse_duration,
)
from registry.config.mirror_settings import DOCKER_HUB, HUB_LIBRARY, HostedSettings, Upstream
from registry.config.retention_settings import RetentionRule
from registry.config.settings import ENV_NESTED_DELIMITER, ENV_PREFIX, Settings, TLSSettings
from registry.config.upkeep_settings import CacheSettings, DiskSettings, Quota, UpkeepSettings

__all__ = [
    "DOCKER_HUB",
    "ENV_NESTED_DELIMITER",
    "ENV_PREFIX",
    "HUB_LIBRARY",
    "MAX_HOST_LENGTH",
    "AuthSettings",
    "CacheSettings",
    "DiskSettings",
    "HostedSettings",
    "Issuer",
    "OIDCSettings",
    "Quota",
    "RetentionRule",
    "Settings",
    "TLSSettings",
    "UpkeepSettings",
    "Upstream",
    "format_byte_size",
    "format_duration",
    "is_duration",
    "is_size",
    "normalized_host",
    "parse_duration",
]
