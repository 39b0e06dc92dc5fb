"""Values of settings as text: plain values for JSON and TOML, text for people, lines of a TOML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from registry.config import Settings, format_duration, format_size, is_duration
from registry.config.settings_sources import SettingPath, setting_fields, table_model


def setting_value(settings: Settings, path: SettingPath) -> Any:
    """Returns the value of the setting at `path`."""
    return reduce(getattr, path, settings)


def plain_value(settings: Settings, path: SettingPath) -> Any:
    """Returns a setting's value in the form that a settings file takes, as plain JSON types; a secret is masked. In a
    list of tables, each table has only the settings that have a value."""
    value, field = setting_value(settings, path), dict(setting_fields())[path]
    if table_model(field):
        return [_table(item) for item in value]
    return _plain(value, field)


def _table(item: BaseModel) -> dict[str, Any]:
    values = {name: _plain(getattr(item, name), field) for name, field in type(item).model_fields.items()}
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _plain(value: Any, field: FieldInfo) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, ByteSize):
        return format_size(value)
    if is_duration(field):
        return format_duration(value)
    if isinstance(value, dict):  # such a setting holds durations or lists of text
        return {key: each if isinstance(each, list) else format_duration(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def display_text(value: Any) -> str:
    """Writes a plain value for people."""
    if value in (None, [], {}):
        return "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {display_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def toml_value(value: Any) -> str:
    """Writes a plain value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def toml_lines(settings: Iterable[tuple[SettingPath, Sequence[str]]]) -> list[str]:
    """Returns the lines of a TOML file: those of each setting, below the header of its group. The settings of a group
    must follow one another."""
    lines: list[str] = []
    group: SettingPath = ()
    for path, own in settings:
        if path[:-1] != group:
            group = path[:-1]
            lines += ["", f"[{'.'.join(group)}]"]
        lines += own
    return lines
