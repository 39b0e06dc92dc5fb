"""The command `entrepot config`: prints each setting with its value and its origin.

The *origin* of a value says where it comes from: a flag, an environment variable, the settings file or the default. The
*path* of a setting is its name as a tuple: `("gc", "grace")` for `gc.grace`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from registry.cli.options import (
    ConfigOption,
    DataOption,
    InsecureOpenOption,
    ListenOption,
    MirrorOption,
    ReadOnlyOption,
    WorkersOption,
    load_server_settings_or_fail,
)
from registry.cli.output import print_json_value, print_text
from registry.cli.settings_text import display_text, plain_value, toml_lines, toml_value
from registry.config.settings_sources import LoadedSettings, SettingPath, setting_fields, table_model

HELP = "Show the value of each setting and where the value comes from."
EXAMPLES = """\b
Examples:
  entrepot config
  ENTREPOT_GC__GRACE=1h entrepot config --config entrepot.toml
  entrepot config --format toml > entrepot.toml"""


class OutputFormat(StrEnum):
    """The values of the option --format."""

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
    output_format: Annotated[OutputFormat, typer.Option("--format", "-f", help="Output format.")] = OutputFormat.table,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
) -> None:
    """Prints the settings that `entrepot serve` would use with the same options."""
    loaded = load_server_settings_or_fail(
        config,
        data=data,
        listen=listen,
        workers=workers,
        read_only=read_only,
        mirror=mirror,
        insecure_open=insecure_open,
    )
    if as_json or output_format is OutputFormat.json:
        settings = {
            ".".join(path): {"value": plain_value(loaded.settings, path), "origin": loaded.origins[".".join(path)]}
            for path, _ in setting_fields()
        }
        print_json_value(settings, indent=2)
    elif output_format is OutputFormat.toml:
        print_text(settings_as_toml(loaded))
    else:
        _print_table(loaded)


def settings_as_toml(loaded: LoadedSettings) -> str:
    """Returns a TOML settings file with the loaded values. A comment above each setting contains the description and
    the origin. A comment above each table in a list of tables, such as `[[upstream]]`, contains only the origin. A
    setting without a value is commented out.

    Lists of tables come last, because TOML would read a top-level setting after a table as part of that table."""
    settings: list[tuple[SettingPath, list[str]]] = []
    tables: list[str] = []
    # Sorts by group: the group of `gc.grace` is `("gc",)`. The group of a top-level setting is `()`, which comes first.
    for path, field in sorted(setting_fields(), key=lambda path_and_field: path_and_field[0][:-1]):
        value, origin = plain_value(loaded.settings, path), loaded.origins[".".join(path)]
        if table_model(field):
            for table in value:
                tables += ["", f"# ({origin})", f"[[{'.'.join(path)}]]"]
                tables += [f"{name} = {toml_value(table_value)}" for name, table_value in table.items()]
            continue
        line = f"# {path[-1]} =" if value is None else f"{path[-1]} = {toml_value(value)}"
        settings.append((path, [f"# {field.description} ({origin})", line]))
    return "\n".join([*toml_lines(settings), *tables])


def _print_table(loaded: LoadedSettings) -> None:
    """Prints one row for each setting. For a list of tables, prints one row for each setting in each table, such as
    `upstream[docker.io].tag_ttl`. Values that are not defaults are bold."""
    from rich.text import Text

    from registry.cli.output import new_table, plain_console

    table = new_table("setting", "value", "from")
    for path, field in setting_fields():
        name = ".".join(path)
        origin = loaded.origins[name]
        style = "dim" if origin == "default" else "bold"
        value = plain_value(loaded.settings, path)
        texts = {name: display_text(value)}
        if table_model(field) and value:
            texts = {
                f"{name}[{entry.get('name', number)}].{key}": display_text(entry_value)
                for number, entry in enumerate(value, 1)
                for key, entry_value in entry.items()
            }
        for setting, text in texts.items():
            table.add_row(Text(setting), Text(text, style), Text(origin, style))
    plain_console().print(table)
