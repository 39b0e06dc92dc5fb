"""`entrepot config`."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from registry.cli.options import (
    ConfigOption,
    DataOption,
    InsecureOpenOption,
    ListenOption,
    MirrorOption,
    ReadOnlyOption,
    WorkersOption,
    load_or_fail,
)
from registry.config import Settings, format_duration, format_size, is_duration
from registry.config.settings_sources import LoadedSettings, SettingPath, setting_fields, table_model

HELP = "Show each setting in force, and where it came from."
EXAMPLES = """\b
Examples:
  entrepot config
  ENTREPOT_GC__GRACE=1h entrepot config --config entrepot.toml
  entrepot config --format toml > entrepot.toml"""


class OutputFormat(StrEnum):
    table = "table"
    toml = "toml"
    json = "json"


def config(
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    workers: WorkersOption = None,
    read_only: ReadOnlyOption = None,
    mirror: MirrorOption = None,
    insecure_open: InsecureOpenOption = None,
    form: Annotated[OutputFormat, typer.Option("--format", "-f", help="How to print it.")] = OutputFormat.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    flags: dict[str, object] = {"data": data, "listen": listen, "workers": workers, "read_only": read_only}
    flags |= {"mirror": mirror or None, "insecure_open": insecure_open}
    loaded = load_or_fail(config, **flags)
    if as_json or form is OutputFormat.json:
        rows = {
            ".".join(path): {"value": plain_value(loaded.settings, path), "origin": loaded.origins[".".join(path)]}
            for path, _ in setting_fields()
        }
        typer.echo(json.dumps(rows, indent=2))
    elif form is OutputFormat.toml:
        typer.echo(settings_as_toml(loaded))
    else:
        _print_table(loaded)


def setting_value(settings: Settings, path: SettingPath) -> Any:
    return reduce(getattr, path, settings)


def plain_value(settings: Settings, path: SettingPath) -> Any:
    """The value as JSON and TOML can carry it, in the form the file takes; a secret is masked. Tables of a list leave
    out what has no value."""
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
    if isinstance(value, dict):  # tables of settings are times, or lists of text
        return {key: each if isinstance(each, list) else format_duration(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def display_text(value: Any) -> str:
    """A plain value for a person."""
    if value in (None, [], {}):
        return "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {display_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings_as_toml(loaded: LoadedSettings) -> str:
    """A file that sets what is in force; what has no value stands as a comment."""
    lines: list[str] = []
    tables: list[str] = []
    group: SettingPath = ()
    for path, field in sorted(setting_fields(), key=lambda item: item[0][:-1]):
        value, origin = plain_value(loaded.settings, path), loaded.origins[".".join(path)]
        if table_model(field):
            for table in value:
                tables += ["", f"# ({origin})", f"[[{'.'.join(path)}]]"]
                tables += [f"{name} = {_toml(each)}" for name, each in table.items()]
            continue
        if path[:-1] != group:
            group = path[:-1]
            lines += ["", f"[{'.'.join(group)}]"]
        lines.append(f"# {field.description} ({origin})")
        lines.append(f"# {path[-1]} =" if value is None else f"{path[-1]} = {_toml(value)}")
    return "\n".join([*lines, *tables])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def _print_table(loaded: LoadedSettings) -> None:
    from rich.text import Text

    from registry.cli.output import new_table, plain_console

    table = new_table("setting", "value", "from")
    for path, field in setting_fields():
        name = ".".join(path)
        origin = loaded.origins[name]
        style = "dim" if origin == "default" else "bold"
        value = plain_value(loaded.settings, path)
        rows = {name: display_text(value)}
        if table_model(field) and value:
            rows = {
                f"{name}[{item.get('name', place)}].{key}": display_text(each)
                for place, item in enumerate(value, 1)
                for key, each in item.items()
            }
        for setting, text in rows.items():
            table.add_row(Text(setting), Text(text, style), Text(origin, style))
    plain_console().print(table)
