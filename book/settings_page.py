"""Generates the page settings.md in each language from the pydantic model of the settings. `make docs` writes the
files, and a test checks that they are up to date.

The texts in the model are English. Each paragraph of the page and each description of a setting is one message of the
catalogue `locale/zh.po`, which has the Chinese translations. A message without a translation stays in English. A test
fails if there is such a message.

The *path* of a setting is its name as a tuple: `("gc", "grace")` for `gc.grace`.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getdoc

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from registry.cli.settings_text import toml_lines, toml_value
from registry.config import Settings, format_byte_size, format_duration, is_duration, is_size
from registry.config.setting_changes import effective_at
from registry.config.settings_sources import SettingPath, setting_fields, table_model, variable_name

_INTRODUCTION = """# Settings

A setting takes its value from the first of these that has one:

1. the flag, if there is one for it (see `entrepot serve --help`),
2. the variable `ENTREPOT_…`: a dot in the setting's name becomes `__`, and an empty variable counts as not set,
3. the TOML file that `--config FILE` names or, without that flag, `ENTREPOT_CONFIG`; no other file is read,
4. the default.

`entrepot config` shows all values and where each comes from. `entrepot config --format toml` prints them as a file.
`entrepot reload` puts a changed file in force while the server runs; settings with *Needs a restart* take effect with
`entrepot restart` ([operations.md](operations.md#changing-a-running-server)), and those with *Needs a stop and a start*
only when the server is stopped and started again.

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
- Until one of these other names belongs to this registry, it is pulled from the default upstream, if there is one. But
  no upstream is asked for a name that begins with the host of a registry that is not mirrored.

If a client pulls the name of a private image before its first push, this registry asks the default upstream for that
name, so the upstream learns the name. To prevent that, add the name to `hosted.prefixes`. A push contacts an upstream
only if content was pulled under the same name before.
"""
"""The end of the page. `render_settings_page` replaces the line `TOML` with an example file."""


Translate = Callable[[str], str]
"""A function that translates a text of the page into the language of the page."""


def render_settings_page(translate: Translate = str) -> str:
    """Returns the whole page as Markdown, with all texts translated by `translate`. By default, the page is in
    English."""
    parts = [_paragraphs(_INTRODUCTION, translate), "\n", _group_table((), translate)]
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            text, table = _documentation(group, translate), _group_table((name,), translate)
            parts.append(f"\n## `[{name}]`\n\n{text}\n\n{table}")
        elif model := table_model(field):
            text, table = _documentation(model, translate), _list_item_table(model, translate)
            parts.append(f"\n## `[[{name}]]`\n\n{text}\n\n{table}")
    return "".join([*parts, _paragraphs(_EXAMPLES_AND_RULES, translate).replace("TOML", _example_file())])


def _paragraphs(text: str, translate: Translate) -> str:
    """Returns the text with each paragraph translated. Blocks of code stay as they are."""
    is_code = False
    paragraphs = []
    for paragraph in text.split("\n\n"):
        is_code |= paragraph.startswith("```")
        leading, trailing = ("\n" if paragraph.startswith("\n") else ""), ("\n" if paragraph.endswith("\n") else "")
        paragraphs.append(paragraph if is_code else f"{leading}{translate(paragraph.strip())}{trailing}")
        is_code &= not paragraph.rstrip().endswith("```")
    return "\n\n".join(paragraphs)


def _documentation(model: type[BaseModel], translate: Translate) -> str:
    """Returns the translated docstring of a model, which says what a group or a list of settings is for."""
    return "\n\n".join(translate(paragraph) for paragraph in (getdoc(model) or "").split("\n\n"))


def _header(translate: Translate, *columns: str) -> list[str]:
    """Returns the first two lines of a table."""
    return [f"| {' | '.join(map(translate, columns))} |", f"|{'---|' * len(columns)}"]


def _group_table(group: SettingPath, translate: Translate) -> str:
    """Returns a Markdown table of the settings in one group: `("gc",)` is the group `[gc]`, and the empty tuple is the
    top level of the file."""
    rows = _header(translate, "Setting", "Default", "Variable", "What it does")
    for path, field in setting_fields():
        if path[:-1] == group:
            default, text = _default_cell(path, field, translate), _description(path, field, translate)
            rows.append(f"| `{'.'.join(path)}` | {default} | `{variable_name(path)}` | {text} |")
    return "\n".join(rows) + "\n"


def _list_item_table(model: type[BaseModel], translate: Translate) -> str:
    """Returns a Markdown table of the settings in one item of a list, such as `[[upstream]]`. The table has no column
    for environment variables, because no variable sets a single setting of an item."""
    rows = _header(translate, "Setting", "Default", "What it does")
    for path, field in setting_fields(model):
        default = translate("(must be set)") if field.is_required() else _default_cell(path, field, translate)
        rows.append(f"| `{'.'.join(path)}` | {default} | {translate(field.description or '')} |")
    return "\n".join(rows) + "\n"


def _description(path: SettingPath, field: FieldInfo, translate: Translate) -> str:
    """Returns the description of a setting. If a reload does not put a change of the setting in force, adds a note: it
    needs `entrepot restart`, or the server must be stopped and started."""
    note = {
        "reload": "{text}",
        "restart": translate("{text}. *Needs a restart*"),
        "start": translate("{text}. *Needs a stop and a start*"),
    }[effective_at(Settings, path)]
    return note.replace("{text}", translate(field.description or ""))


def _default_cell(path: SettingPath, field: FieldInfo, translate: Translate) -> str:
    """Returns the table cell with the default of a setting: a value in code style, a description in words as plain
    text, or `none` if there is no default."""
    text = default_text(path, field)
    return f"`{text}`" if text and " " not in text else translate(text or "none")


def default_text(path: SettingPath, field: FieldInfo) -> str:
    """Returns the default of a setting as a settings file would have it. If the default depends on the machine, returns
    a description in words. If there is no default, returns an empty string."""
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
    return format_byte_size(value) if is_size(field) else f"{value:g}" if isinstance(value, float) else str(value)


def _example_file() -> str:
    """Returns a TOML file with every setting at its default. Leaves out the lists of tables, such as `[[upstream]]`."""
    settings = ((path, [_example_line(path, field)]) for path, field in setting_fields() if not table_model(field))
    return "\n".join(toml_lines(settings))


def _example_line(path: SettingPath, field: FieldInfo) -> str:
    """Returns the line of one setting in the example file. If the setting has no default, or its default is described
    in words, the line is a comment."""
    name, text = path[-1], default_text(path, field)
    if isinstance(field.default, list):
        return f"{name} = {toml_value(field.default)}"
    if not text or " " in text:
        return f"# {name} =" + (f"  # {text}" if text else "")
    is_number = isinstance(field.default, int | float) and not is_size(field) and not is_duration(field)
    return f"{name} = {text}" if is_number else f'{name} = "{text}"'
