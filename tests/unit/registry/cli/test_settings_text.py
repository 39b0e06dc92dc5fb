"""Values of settings as text: for JSON, for people, and for a TOML file."""

from __future__ import annotations

import tomllib

import pytest

from registry.cli.settings_text import display_text, plain_value, toml_lines, toml_value
from registry.config import RetentionRule, Settings, Upstream


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("gc", "grace"), "24h"),
        (("limits", "manifest"), "8MiB"),
        (("data",), "data"),
        (("public_url",), None),
        (("read_only",), False),
        (("upstream",), []),
    ],
)
def test_plain_values(path: tuple[str, ...], value: object) -> None:
    """Durations and sizes are written with units, as in a settings file. Paths are written as text. A setting without a
    value is None."""
    assert plain_value(Settings(), path) == value


def test_tables_have_only_settings_with_a_value() -> None:
    """In a list of tables, each table has only the settings with a value."""
    settings = Settings(upstream=[Upstream(name="ghcr.io", tag_ttls={"v*": 3600.0})])
    (table,) = plain_value(settings, ("upstream",))
    assert (table["name"], table["tag_ttl"], table["tag_ttls"]) == ("ghcr.io", "5m", {"v*": "1h"})
    assert "username" not in table


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "(none)"), ([], "(none)"), (True, "true"), (["a", 1], "a, 1"), ({"v*": "1h"}, "v* = 1h"), (0, "0")],
)
def test_display_text(value: object, text: str) -> None:
    """For people, booleans are written as in TOML, and lists with commas."""
    assert display_text(value) == text


def test_toml_lines() -> None:
    """In the lines of a TOML file, each group of settings has its header once. A parser reads the same values back."""
    lines = toml_lines(
        [
            (("data",), ["data = " + toml_value('a "b"')]),
            (("gc", "grace"), [f"grace = {toml_value('1h')}"]),
            (("gc", "interval"), ["# a comment", f"interval = {toml_value(5)}"]),
            (("limits", "burst"), [f"burst = {toml_value({'v*': ['x', True]})}"]),
        ]
    )
    assert lines.count("[gc]") == 1
    assert tomllib.loads("\n".join(lines)) == {
        "data": 'a "b"', "gc": {"grace": "1h", "interval": 5}, "limits": {"burst": {"v*": ["x", True]}},
    }  # fmt: skip


def test_durations_in_a_retention_rule() -> None:
    """A duration in a retention rule is written with its unit, even if the setting has no default."""
    rule = RetentionRule(repositories=["team/**"], keep_last=3, delete_untagged_after=604800.0)
    [table] = plain_value(Settings(retention=[rule]), ("retention",))
    assert (table["delete_untagged_after"], table["keep_pushed_within"], table["keep_last"]) == ("7d", "0s", 3)
    assert Settings(retention=[table]).retention == [rule]
