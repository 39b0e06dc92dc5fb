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

from registry.cli.loading import Loaded, Names, fields, table_model
from registry.cli.options import ConfigFile, Data, InsecureOpen, Listen, Mirror, ReadOnly, Workers, load_or_fail
from registry.config import Settings, format_duration, format_size, is_duration

HELP = "Show each setting in force, and where it came from."
EXAMPLES = """\b
Examples:
  entrepot config
  ENTREPOT_GC__GRACE=1h entrepot config --config entrepot.toml
  entrepot config --format toml > entrepot.toml"""


class Format(StrEnum):
    table = "table"
    toml = "toml"
    json = "json"


def config(
    config: ConfigFile = None,
    data: Data = None,
    listen: Listen = None,
    workers: Workers = None,
    read_only: ReadOnly = None,
    mirror: Mirror = None,
    insecure_open: InsecureOpen = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    flags: dict[str, object] = {"data": data, "listen": listen, "workers": workers, "read_only": read_only}
    flags |= {"mirror": mirror or None, "insecure_open": insecure_open}
    loaded = load_or_fail(config, **flags)
    if as_json or form is Format.json:
        rows = {
            ".".join(path): {"value": plain(loaded.settings, path), "origin": loaded.origins[".".join(path)]}
            for path, _ in fields()
        }
        typer.echo(json.dumps(rows, indent=2))
    elif form is Format.toml:
        typer.echo(as_toml(loaded))
    else:
        _print_table(loaded)


def value_of(settings: Settings, path: Names) -> Any:
    return reduce(getattr, path, settings)


def plain(settings: Settings, path: Names) -> Any:
    """The value as JSON and TOML can carry it, in the form the file takes; a secret is masked. Tables of a list leave
    out what has no value."""
    value, field = value_of(settings, path), dict(fields())[path]
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


def shown(value: Any) -> str:
    """A plain value for a person."""
    if value in (None, [], {}):
        return "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(loaded: Loaded) -> str:
    """A file that sets what is in force; what has no value stands as a comment."""
    lines: list[str] = []
    tables: list[str] = []
    group: Names = ()
    for path, field in sorted(fields(), key=lambda item: item[0][:-1]):
        value, origin = plain(loaded.settings, path), loaded.origins[".".join(path)]
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


def _print_table(loaded: Loaded) -> None:
    from rich.text import Text

    from registry.cli.report import plain_console, table_of

    table = table_of("setting", "value", "from")
    for path, field in fields():
        name = ".".join(path)
        origin = loaded.origins[name]
        style = "dim" if origin == "default" else "bold"
        value = plain(loaded.settings, path)
        rows = {name: shown(value)}
        if table_model(field) and value:
            rows = {
                f"{name}[{item.get('name', place)}].{key}": shown(each)
                for place, item in enumerate(value, 1)
                for key, each in item.items()
            }
        for setting, text in rows.items():
            table.add_row(Text(setting), Text(text, style), Text(origin, style))
    plain_console().print(table)
