"""Loads the settings from flags, environment variables and a file, and keeps where each value comes from.

A flag wins over a variable, a variable over the file, the file over the default. No other module reads the environment
or the file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from registry.config import ENV_NESTED_DELIMITER, ENV_PREFIX, Issuer, Settings, Upstream, format_size, is_size

CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
"""The variable that names the settings file."""

_KUBERNETES = re.compile(rf"{ENV_PREFIX}(SERVICE_(HOST|PORT.*)|PORT(_.*)?)")
"""Variables that Kubernetes sets in the pods of a namespace with a service named `entrepot`."""

_TABLE_LIST_HINTS = {
    "upstream": 'write it like [{"name": "docker.io", "tag_ttl": "1h"}]',
    "issuer": 'write it like [{"issuer": "https://ci.example.com", "audience": "registry", ...}]',
}
"""For each setting that is a list of tables: how to write one in a variable."""

SettingPath = tuple[str, ...]
"""The path of a setting: `("gc", "grace")` for `gc.grace`."""


class ConfigError(Exception):
    """The settings are wrong. The message is one line for people."""


@dataclass(frozen=True, slots=True)
class SettingsSource:
    """One source of settings, with the values that it sets."""

    values: Mapping[str, Any]
    kind: str
    """`flag`, `variable` or `file`."""
    name: str = ""
    """The file's path; empty for flags and variables."""

    def origin(self, path: SettingPath) -> str | None:
        """Returns the flag, variable or file that sets `path`, or None when this source does not set it."""
        if not _sets_path(self.values, path):
            return None
        if self.kind == "flag":
            return "--" + "-".join(path).replace("_", "-")
        if self.kind == "variable":
            return next((v for v in _variables(path) if _variable_set(v)), ENV_PREFIX + path[0].upper())
        return self.name


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings in force, and what is known about them."""

    settings: Settings
    origins: Mapping[str, str]
    """Where each value comes from, by the setting's dotted name."""
    warnings: tuple[str, ...]
    """Lines for people."""


def setting_fields(model: type[BaseModel] = Settings, above: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    """Yields the path and the pydantic field of each setting, also of those inside groups."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from setting_fields(inner, (*above, name))
        else:
            yield (*above, name), field


def table_model(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the model of one table for a setting that is a list of tables (`[[upstream]]`), or None for other
    settings."""
    inner = get_args(field.annotation)
    return next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def variable_name(path: SettingPath) -> str:
    """Returns the name of the variable that sets `path`."""
    return ENV_PREFIX + ENV_NESTED_DELIMITER.join(path).upper()


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> LoadedSettings:
    """Loads the settings. `flags` holds the flags that were given. `config` is the settings file; None means the one
    that ENTREPOT_CONFIG names, if any. Raises ConfigError."""
    file = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    unknown = _unknown_variables()
    sources = [SettingsSource(flags, "flag"), SettingsSource(_environment(unknown), "variable")]
    if file is not None:
        sources.append(SettingsSource(_read_file(file), "file", str(file)))
    for source in sources:  # one by one, so that the message can name the source that is wrong
        _check_source(source)
    settings = _combine(sources)
    origins = {".".join(path): _origin(path, sources) or "default" for path, _ in setting_fields()}
    if origins["upstream"] == "default":
        origins["upstream"] = origins["mirror"]
    return LoadedSettings(settings, origins, tuple(_unknown_line(name) for name in unknown))


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the settings: {(error.strerror or str(error)).lower()}") from None


def _environment(unknown: tuple[str, ...]) -> dict[str, Any]:
    try:
        values: dict[str, Any] = EnvSettingsSource(Settings)()
    except SettingsError as error:
        group = next((path[0] for path, _ in setting_fields() if f'"{path[0]}"' in str(error)), "")
        better = f"set {variable_name((group, 'NAME'))} instead"
        better = _TABLE_LIST_HINTS.get(group, better)
        raise ConfigError(f"{variable_name((group,))}: not JSON; {better}") from None
    for name in unknown:
        group, *rest = name.removeprefix(ENV_PREFIX).lower().split(ENV_NESTED_DELIMITER)
        if rest and isinstance(values.get(group), dict):
            values[group].pop(rest[0], None)
    return values


def _unknown_variables() -> tuple[str, ...]:
    known = {variable_name(path[: end + 1]) for path, _ in setting_fields() for end in range(len(path))} | {
        CONFIG_VARIABLE
    }
    ours = (name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    return tuple(sorted(n for n in ours if n.upper() not in known and not _KUBERNETES.fullmatch(n.upper())))


def _unknown_line(name: str) -> str:
    known = [variable_name(path) for path, _ in setting_fields()]
    return f"{name} is no setting and is ignored{_nearest(name.upper(), known)}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _variables(path: SettingPath) -> list[str]:
    return [variable_name(path[:end]) for end in range(len(path), 0, -1)]


def _variable_set(name: str) -> bool:
    return any(key.upper() == name and value for key, value in os.environ.items())


def _sets_path(values: Mapping[str, Any], path: SettingPath) -> bool:
    node: Any = values
    for name in path:
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True


def _merged(sources: list[SettingsSource]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        _overlay(merged, source.values)
    return merged


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping):
            inner = below.get(name)
            below[name] = dict(inner) if isinstance(inner, dict) else {}
            _overlay(below[name], value)
        else:
            below[name] = value


def _combine(sources: list[SettingsSource]) -> Settings:
    """Merges sources that are each valid. Together they may still contradict each other. Raises ConfigError."""
    try:
        return Settings(**_merged(sources))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        names = ", ".join(source.name or f"{source.kind}s" for source in reversed(sources) if source.values)
        raise ConfigError(f"{names} together: {_problem_text(problem)}") from None


def _origin(path: SettingPath, sources: list[SettingsSource]) -> str | None:
    return next((origin for source in sources if (origin := source.origin(path))), None)


def _check_source(source: SettingsSource) -> None:
    """Checks one source alone. Raises ConfigError that names the place, the value and what would be right."""
    try:
        Settings(**source.values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        return
    path = problems[0]["loc"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    setting = tuple(takewhile(lambda part: isinstance(part, str), path))
    where = (source.origin(cast(SettingPath, setting)) if setting else None) or source.name or f"{source.kind}s"
    if path and (source.kind == "file" or (source.kind == "variable" and setting != path)):
        where += f": {_dotted(path, source.values)}"
    raise ConfigError(f"{where}: {_problem_text(problems[0])}{more}".replace("\n", " "))


def _dotted(path: tuple[int | str, ...], values: object = None) -> str:
    """Writes the place of a problem for people: `upstream[docker.io].tag_ttl`. A table without a name is counted from
    1."""
    text = ""
    for part in path:
        if isinstance(part, str):
            values = values.get(part) if isinstance(values, Mapping) else None
            text += f".{part}" if text else part
        else:
            values = values[part] if isinstance(values, list) and part < len(values) else None
            name = (values.get("name") or values.get("issuer")) if isinstance(values, Mapping) else None
            text += f"[{name or part + 1}]"
    return text


def _problem_text(problem: ErrorDetails) -> str:
    if problem["type"] == "extra_forbidden":
        tables = (*setting_fields(Upstream, ("upstream",)), *setting_fields(Issuer, ("issuer",)))
        known = [".".join(path) for path, _ in (*setting_fields(), *tables)]
        return f"unknown setting{_nearest('.'.join(p for p in problem['loc'] if isinstance(p, str)), known)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"].removeprefix("Input ")
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] == "model_type":
        message = "should be a table"
    if problem["type"] == "list_type":
        message = "is no list" + (
            f"; write [[{problem['loc'][-1]}]]" if problem["loc"][-1] in _TABLE_LIST_HINTS else ""
        )
    if "ge" in problem.get("ctx", {}) and any(is_size(f) for path, f in setting_fields() if path == problem["loc"]):
        message = f"should be at least {format_size(problem['ctx']['ge'])}"
    shown = "a table" if isinstance(problem["input"], Mapping) else repr(problem["input"])
    return f"{shown} {message}"
