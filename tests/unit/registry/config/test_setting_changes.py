"""`changed_settings` lists the settings that differ between two configurations, and what makes each change take effect:
a reload, a restart (the new version takes over from the running one), or a start after a stop."""

from __future__ import annotations

from typing import Any

import pytest

from registry.config import Settings
from registry.config.setting_changes import changed_settings, effective_at
from registry.config.settings_sources import setting_fields


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ({}, {}, []),
        ({}, {"read_only": True, "gc": {"grace": 1}}, [("read_only", "reload"), ("gc.grace", "reload")]),
        ({}, {"data": "a", "workers": 7}, [("data", "start"), ("workers", "restart")]),
        ({}, {"tls": {"key": "k"}}, [("tls.key", "restart")]),
        ({}, {"limits": {"connections_per_address": 1, "burst": 2}},
         [("limits.connections_per_address", "restart"), ("limits.burst", "reload")]),
        ({}, {"mirror": ["a.io"]}, [("mirror", "reload"), ("upstream[a.io]", "reload")]),
        ({"upstream": [{"name": "a.io"}]}, {"upstream": [{"name": "a.io", "tag_ttl": 5}]},
         [("upstream[a.io].tag_ttl", "reload")]),
        ({"upstream": [{"name": "a.io"}, {"name": "b.io"}]}, {"upstream": [{"name": "b.io"}, {"name": "a.io"}]},
         [("upstream", "reload")]),
        ({"retention": [{"repositories": "a/**", "keep_last": 1}]}, {}, [("retention[1]", "reload")]),
    ],
)  # fmt: skip
def test_changed_settings_are_listed(old: dict[str, Any], new: dict[str, Any], changes: list[tuple[str, str]]) -> None:
    """Each changed setting is listed with its name in the file, and with what makes the change take effect."""
    assert list(changed_settings(Settings(**{"workers": 2, **old}), Settings(**{"workers": 2, **new}))) == changes


def test_most_settings_take_effect_at_a_reload() -> None:
    """A reload changes all settings except those listed here, which belong to the processes, the ports and the data
    directory."""
    effects = {".".join(path): effective_at(Settings, path) for path, _ in setting_fields()}
    assert {name for name, effect in effects.items() if effect == "start"} == {"data"}
    assert {name for name, effect in effects.items() if effect == "restart"} == {
        *("listen", "workers", "trusted_proxies", "shutdown_grace", "restart_grace", "limits.connections_per_address"),
        *("tls.certificate", "tls.key", "tls.client_ca", "tls.client_auth"),
        *("log_format", "metrics.enabled", "metrics.listen", "metrics.distribution_names", "otel.endpoint"),
    }
