"""docs/settings.md, written from the model: `make docs` prints it there, and a test demands that the two agree."""

from __future__ import annotations

from inspect import getdoc

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from registry.config import Settings, format_duration, format_size, is_duration, is_size
from registry.config.settings_sources import SettingPath, setting_fields, table_model, variable_name

_HEAD = """# Settings

Each setting can be given as a flag, as a variable, in a TOML file, or not at all. The first of these that has it wins:

1. the flag (`entrepot serve --help` lists those there are),
2. the variable `ENTREPOT_…`; a dot in the name becomes `__`; an empty variable counts as not set,
3. the file that `--config FILE` or, without that flag, the variable `ENTREPOT_CONFIG` names; no other file is read,
4. the default.

`entrepot config` shows what is in force and where it came from; `entrepot config --format toml` prints it as a file.

Times are written `90s`, `5m`, `1h30m`, `7d`; a plain number is seconds. Sizes are written `8MiB`; a plain number is
bytes. An unknown name in the file is an error. An unknown `ENTREPOT_…` variable is only warned about, since other
programs set such variables too; those that Kubernetes sets for a service named `entrepot` are passed over in silence.
"""

_FOOT = """
A file with all of it at its default:

```toml
TOML
```

One that mirrors Docker Hub with a login and GitHub's registry without, and keeps names for this registry:

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

Where defaults will do, `mirror = ["docker.io"]`, `--mirror docker.io` and `ENTREPOT_MIRROR=docker.io` are the same as
naming that upstream and making it the default.

## Who owns a name

Every name below an upstream's own (`ghcr.io/org/app`) is mirrored and takes no pushes; with a default upstream, so is
`library/*`. Every other name can be pushed to, and is this registry's own from then on, also after its content was
deleted: the upstream is never asked for it. A name that `hosted.prefixes` matches is so from the start. What is neither
is read from the default upstream; a name with the host of a registry that is not mirrored is asked of nobody.

A name that was not pushed yet is asked of the default upstream when somebody pulls by it, so a private name that is
pulled too early becomes known there; `hosted.prefixes` keeps it from that. A push asks the upstream nothing, unless
something was pulled by the same name before.
"""


def render_settings_page() -> str:
    """The whole page."""
    parts = [_HEAD, "\n", _table(())]
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            parts.append(f"\n## `[{name}]`\n\n{getdoc(group)}\n\n{_table((name,))}")
        elif model := table_model(field):
            parts.append(f"\n## `[[{name}]]`\n\n{getdoc(model)}\n\n{_table_of(model)}")
    return "".join([*parts, _FOOT.replace("TOML", _example())])


def _table(group: SettingPath) -> str:
    rows = ["| Setting | Default | Variable | What it does |", "|---|---|---|---|"]
    rows += [
        f"| `{'.'.join(path)}` | {_default_shown(path, field)} | `{variable_name(path)}` | {field.description} |"
        for path, field in setting_fields()
        if path[:-1] == group
    ]
    return "\n".join(rows) + "\n"


def _table_of(model: type[BaseModel]) -> str:
    """Of one table in a list: variables set such a list only as a whole."""
    rows = ["| Setting | Default | What it does |", "|---|---|---|"]
    for path, field in setting_fields(model):
        shown = "(must be set)" if field.is_required() else _default_shown(path, field)
        rows.append(f"| `{'.'.join(path)}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default_shown(path: SettingPath, field: FieldInfo) -> str:
    text = default_text(path, field)
    return f"`{text}`" if text and " " not in text else text or "none"


def default_text(path: SettingPath, field: FieldInfo) -> str:
    """A default as it is written in a file; what depends on the machine, in words; what is not set, empty."""
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


def _example() -> str:
    lines: list[str] = []
    group: SettingPath = ()
    for path, field in setting_fields():
        if table_model(field):
            continue
        if path[:-1] != group:
            group = path[:-1]
            lines += ["", f"[{'.'.join(group)}]"]
        text = default_text(path, field)
        bare = isinstance(field.default, int | float) and not is_size(field) and not is_duration(field)
        if isinstance(field.default, list):
            lines.append(f"{path[-1]} = []")
        elif not text or " " in text:
            lines.append(f"# {path[-1]} =" + (f"  # {text}" if text else ""))
        else:
            lines.append(f"{path[-1]} = {text}" if bare else f'{path[-1]} = "{text}"')
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_settings_page(), end="")
