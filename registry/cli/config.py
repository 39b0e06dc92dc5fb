"""`entrepot config`."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, SecretStr

from registry.cli.loading import Loaded, Names, fields
from registry.cli.options import ConfigFile, Data, Listen, ReadOnly, Workers, load_or_fail
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
    form: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.table,
) -> None:
    loaded = load_or_fail(config, data=data, listen=listen, workers=workers, read_only=read_only)
    if form is Format.json:
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


def plain(settings: Settings, path: Names) -> str | int | float | bool | None:
    """The value as JSON and TOML can carry it, in the form the file takes; a secret is masked."""
    value, field = value_of(settings, path), dict(fields())[path]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, ByteSize):
        return format_size(value)
    if is_duration(field):
        return format_duration(value)
    return str(value) if isinstance(value, Path) else value


def shown(settings: Settings, path: Names) -> str:
    """The value for a person."""
    value = plain(settings, path)
    if value is None:
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(loaded: Loaded) -> str:
    """A file that sets what is in force; what has no value stands as a comment."""
    lines: list[str] = []
    group: Names = ()
    for path, field in sorted(fields(), key=lambda item: item[0][:-1]):
        if path[:-1] != group:
            group = path[:-1]
            lines += ["", f"[{'.'.join(group)}]"]
        value = plain(loaded.settings, path)
        lines.append(f"# {field.description} ({loaded.origins['.'.join(path)]})")
        lines.append(f"# {path[-1]} =" if value is None else f"{path[-1]} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)


def _print_table(loaded: Loaded) -> None:
    from rich.text import Text

    from registry.cli.report import plain_console, table_of

    table = table_of("setting", "value", "from")
    for path, _ in fields():
        name = ".".join(path)
        origin = loaded.origins[name]
        style = "dim" if origin == "default" else "bold"
        table.add_row(Text(name), Text(shown(loaded.settings, path), style), Text(origin, style))
    plain_console().print(table)
