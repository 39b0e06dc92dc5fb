"""Converts settings to text. A *plain value* is the value of a setting in the types of JSON (`plain_value`).
`display_text` turns a plain value into text for people, and `toml_value` turns a plain value into TOML.

The *path* of a setting is its name as a tuple: `("gc", "grace")` for `gc.grace`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from registry.config import Settings, format_byte_size, format_duration, is_duration
from registry.config.settings_sources import SettingPath, setting_fields, table_model
from registry.printable import printable_toml


def setting_value(settings: Settings, path: SettingPath) -> Any:
    """Returns the value of the setting at `path`."""
    return reduce(getattr, path, settings)


def plain_value(settings: Settings, path: SettingPath) -> Any:
    """Returns the plain value of the setting at `path`. A secret becomes `********`. All other values have the form
    that a settings file accepts, such as `1h` for a duration and `8MiB` for a size. A list of tables, such as
    `[[upstream]]`, becomes a list of dicts; each dict has only the settings that have a value."""
    value, field = setting_value(settings, path), dict(setting_fields())[path]
    if table_model(field):
        return [_plain_table(table) for table in value]
    return _plain(value, field)


def _plain_table(table: BaseModel) -> dict[str, Any]:
    """Returns one table of a list of tables as a dict, without the settings that have no value."""
    values = {name: _plain(getattr(table, name), field) for name, field in type(table).model_fields.items()}
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _plain(value: Any, field: FieldInfo) -> Any:
    """Returns the plain value of a setting that is not a list of tables. `value`: the setting's value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, ByteSize):
        return format_byte_size(value)
    if is_duration(field):
        return format_duration(value)
    if isinstance(value, dict):  # the values in the dict are durations or lists of strings
        return {key: item if isinstance(item, list) else format_duration(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def display_text(value: Any) -> str:
    """Returns a plain value as text for people."""
    if value in (None, [], {}):
        return "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {display_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def toml_value(value: Any) -> str:
    """Returns a plain value other than None as TOML. A dict becomes an inline table. Other values become JSON, because
    strings, numbers, booleans and lists have the same syntax in JSON and TOML. Control characters become escapes."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    return printable_toml(json.dumps(value, ensure_ascii=False))


def toml_lines(settings: Iterable[tuple[SettingPath, Sequence[str]]]) -> list[str]:
    """Returns the lines of a TOML file: the lines of the settings, with a header such as `[gc]` before each table.
    `settings`: the path and the lines of each setting. All settings of a table must be next to each other."""
    lines: list[str] = []
    table: SettingPath = ()
    for path, setting_lines in settings:
        if path[:-1] != table:
            table = path[:-1]
            lines += ["", f"[{'.'.join(table)}]"]
        lines += setting_lines
    return lines
