"""Generates the page docs/en/settings.md from the pydantic model of the settings. `make docs` writes the file, and a
test checks that the file is up to date.

The *path* of a setting is its name as a tuple: `("gc", "grace")` for `gc.grace`.
"""

from __future__ import annotations

from inspect import getdoc

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from registry.cli.settings_text import toml_lines, toml_value
from registry.config import Settings, format_duration, format_size, is_duration, is_size
from registry.config.setting_changes import takes_effect
from registry.config.settings_sources import SettingPath, setting_fields, table_model, variable_name

_INTRODUCTION = """# Settings

A setting takes its value from the first of these that has one:

1. the flag, if there is one for it (see `entrepot serve --help`),
2. the variable `ENTREPOT_…`: a dot in the setting's name becomes `__`, and an empty variable counts as not set,
3. the TOML file that `--config FILE` names or, without that flag, `ENTREPOT_CONFIG`; no other file is read,
4. the default.

`entrepot config` shows all values and where each comes from. `entrepot config --format toml` prints them as a file.
`entrepot reload` puts a changed file in force while the server runs; settings with *Needs a restart* take effect with
`entrepot restart` ([operations.md](operations.md#changing-a-running-server)).

Times are written as `90s`, `5m`, `1h30m` or `7d`; a plain number means seconds. Sizes are written as `8MiB`; a plain
number means bytes. An unknown name in the file is an error. An unknown `ENTREPOT_…` variable only causes a warning,
since other programs may set such variables; those that Kubernetes sets for a service named `entrepot` cause none.
"""

_EXAMPLES_AND_RULES = """
## Example files

A file with all settings at their defaults:

```toml
TOML
```

A file that mirrors Docker Hub with a login and GitHub's registry without one, and reserves names for this registry:

```toml
[[upstream]]
name = "docker.io"
default = true
username = "somebody"
password_file = "/etc/entrepot/docker.io.password"
tag_ttl = "15m"
tag_ttls = { "*-nightly" = "1m", "v*" = "1h" }

[[upstream]]
name = "ghcr.io"

[hosted]
prefixes = ["team/**"]
```

If an upstream needs no more than its defaults, `mirror = ["docker.io"]`, `--mirror docker.io` or
`ENTREPOT_MIRROR=docker.io` suffices: it adds that upstream and makes it the default.

## Which names are mirrored, and which are hosted here

- Names that begin with an upstream's name (`ghcr.io/org/app`) are mirrored and cannot be pushed to. If there is a
  default upstream, this also applies to `library/*`.
- All other names can be pushed to. A name that was pushed belongs to this registry from then on, even after its content
  is deleted: no upstream is ever asked for it. A name that `hosted.prefixes` matches belongs to this registry from the
  start.
- A name that neither begins with an upstream's name nor belongs to this registry is pulled from the default upstream,
  if there is one. But no upstream is asked for a name that begins with the host of a registry that is not mirrored.

If a client pulls the name of a private image before its first push, this registry asks the default upstream for that
name, so the upstream learns the name. To prevent that, add the name to `hosted.prefixes`. A push contacts an upstream
only if content was pulled under the same name before.
"""
"""The end of the page. `render_settings_page` replaces the line `TOML` with an example file."""


def render_settings_page() -> str:
    """Returns the whole page as Markdown."""
    parts = [_INTRODUCTION, "\n", _group_table(group=())]
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            parts.append(f"\n## `[{name}]`\n\n{getdoc(group)}\n\n{_group_table((name,))}")
        elif model := table_model(field):
            parts.append(f"\n## `[[{name}]]`\n\n{getdoc(model)}\n\n{_list_item_table(model)}")
    return "".join([*parts, _EXAMPLES_AND_RULES.replace("TOML", _example_file())])


def _group_table(group: SettingPath) -> str:
    """Returns a Markdown table of the settings in one group: `("gc",)` is the group `[gc]`, and the empty tuple is the
    top level of the file."""
    rows = ["| Setting | Default | Variable | What it does |", "|---|---|---|---|"]
    rows += [
        f"| `{'.'.join(path)}` | {_default_cell(path, field)} | `{variable_name(path)}` | {_description(path, field)} |"
        for path, field in setting_fields()
        if path[:-1] == group
    ]
    return "\n".join(rows) + "\n"


def _list_item_table(model: type[BaseModel]) -> str:
    """Returns a Markdown table of the settings in one item of a list, such as `[[upstream]]`. The table has no column
    for environment variables, because no variable sets a single setting of an item."""
    rows = ["| Setting | Default | What it does |", "|---|---|---|"]
    for path, field in setting_fields(model):
        default = "(must be set)" if field.is_required() else _default_cell(path, field)
        rows.append(f"| `{'.'.join(path)}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _description(path: SettingPath, field: FieldInfo) -> str:
    """Returns what a setting does, and when a change takes effect if a reload is not enough."""
    note = {"reload": "", "restart": ". *Needs a restart*", "start": ". *Needs a stop and a start*"}
    return f"{field.description}{note[takes_effect(Settings, path)]}"


def _default_cell(path: SettingPath, field: FieldInfo) -> str:
    """Returns the text of a table cell with the default: a value as code, a description in words as plain text, `none`
    if there is no default."""
    text = default_text(path, field)
    return f"`{text}`" if text and " " not in text else text or "none"


def default_text(path: SettingPath, field: FieldInfo) -> str:
    """Returns a setting's default as it is written in a settings file. Returns a description in words if the default
    depends on the machine, and an empty string if there is no default."""
    if path == ("workers",):
        return "one for each core, at most 4"
    value = field.default
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if is_duration(field):
        return format_duration(value)
    return format_size(value) if is_size(field) else f"{value:g}" if isinstance(value, float) else str(value)


def _example_file() -> str:
    """Returns a TOML file with every setting at its default. Leaves out the lists of tables, such as `[[upstream]]`."""
    settings = ((path, [_example_line(path, field)]) for path, field in setting_fields() if not table_model(field))
    return "\n".join(toml_lines(settings))


def _example_line(path: SettingPath, field: FieldInfo) -> str:
    """Returns the line of one setting. A setting without a default, or whose default is described in words, becomes a
    comment."""
    name, text = path[-1], default_text(path, field)
    if isinstance(field.default, list):
        return f"{name} = {toml_value(field.default)}"
    if not text or " " in text:
        return f"# {name} =" + (f"  # {text}" if text else "")
    is_number = isinstance(field.default, int | float) and not is_size(field) and not is_duration(field)
    return f"{name} = {text}" if is_number else f'{name} = "{text}"'


if __name__ == "__main__":
    print(render_settings_page(), end="")
