"""docs/settings.md, written from the model: `make docs` prints it there, and a test demands that the two agree."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from registry.cli.loading import Names, fields, variable
from registry.config import Settings, format_duration, format_size, is_duration

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
{toml}
```
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD, "\n", _table(())]
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            parts.append(f"\n## `[{name}]`\n\n{group.__doc__}\n\n{_table((name,))}")
    return "".join([*parts, _FOOT.format(toml=_example())])


def _table(group: Names) -> str:
    rows = ["| Setting | Default | Variable | What it does |", "|---|---|---|---|"]
    rows += [
        f"| `{'.'.join(path)}` | {_default_shown(path, field)} | `{variable(path)}` | {field.description} |"
        for path, field in fields()
        if path[:-1] == group
    ]
    return "\n".join(rows) + "\n"


def _default_shown(path: Names, field: FieldInfo) -> str:
    text = default_text(path, field)
    return f"`{text}`" if text and " " not in text else text or "none"


def default_text(path: Names, field: FieldInfo) -> str:
    """A default as it is written in a file; what depends on the machine, in words; what is not set, empty."""
    if path == ("workers",):
        return "one for each core, at most 4"
    value = field.default
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if is_duration(field):
        return format_duration(value)
    return format_size(value) if path[0] == "limits" else str(value)


def _example() -> str:
    lines: list[str] = []
    group: Names = ()
    for path, field in fields():
        if path[:-1] != group:
            group = path[:-1]
            lines += ["", f"[{'.'.join(group)}]"]
        text = default_text(path, field)
        bare = isinstance(field.default, bool)
        if not text or " " in text:
            lines.append(f"# {path[-1]} =" + (f"  # {text}" if text else ""))
        else:
            lines.append(f"{path[-1]} = {text}" if bare else f'{path[-1]} = "{text}"')
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
