"""Loads the settings from command-line flags, environment variables and a file, and records the source of each value.

A flag takes precedence over a variable, a variable over the file, and the file over the default. No other module reads
settings from the environment or the file. A *variable* is an environment variable. A *group* is a table of settings in
the file, such as `[gc]`.
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

from registry.config import ENV_NESTED_DELIMITER, ENV_PREFIX, Settings, format_byte_size, is_size
from registry.small_files import read_small_text

CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
"""The environment variable with the path of the settings file."""

_KUBERNETES_VARIABLE = re.compile(rf"{ENV_PREFIX}(SERVICE_(HOST|PORT.*)|PORT(_.*)?)")
"""Names of variables that Kubernetes sets in each container if a service named `entrepot` exists. They are not
settings, and they cause no warning."""

_TABLE_LIST_HINTS = {
    "upstream": 'write it like [{"name": "docker.io", "tag_ttl": "1h"}]',
    "retention": 'write it like [{"repositories": "team/**", "keep_last": 10}]',
    "quota": 'write it like [{"prefix": "team/", "max_size": "100GiB"}]',
    "webhook": 'write it like [{"name": "ci", "url": "https://ci.example.com/hook"}]',
    "issuer": 'write it like [{"issuer": "https://ci.example.com", "audience": "registry", ...}]',
}
"""For each setting that is a list of tables: the hint in error messages that shows how to write the list as JSON in a
variable."""

SettingPath = tuple[str, ...]
"""The names that lead to a setting: `("gc", "grace")` for `gc.grace`."""


class ConfigError(Exception):
    """The settings are not valid. The message is one line of text, for the person who started the command."""


@dataclass(frozen=True, slots=True)
class SettingsSource:
    """The values from one source of settings: from all flags, from all variables, or from the file."""

    values: Mapping[str, Any]
    """The values by the name of the setting or group. The value of a group is a mapping from the names of its settings
    to their values."""
    kind: str
    """`flag`, `variable` or `file`."""
    name: str = ""
    """The file's path; empty for flags and variables."""

    def origin(self, path: SettingPath) -> str | None:
        """Returns what sets the setting at `path`: the name of a flag or variable, or the path of the file. Returns
        None if this source does not set it."""
        if not _sets_path(self.values, path):
            return None
        if self.kind == "flag":
            return "--" + "-".join(path).replace("_", "-")
        if self.kind == "variable":
            names = (name for name in _variable_candidates(path) if _is_variable_set(name))
            return next(names, ENV_PREFIX + path[0].upper())
        return self.name


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings, where each value comes from, and warnings about unknown variables."""

    settings: Settings
    origins: Mapping[str, str]
    """The origin of each setting: the flag, the variable or the path of the file that sets it, or `default`. The keys
    are the dotted names of the settings, such as `gc.grace`. If `upstream` is not set, the setting `mirror` determines
    its value, and `upstream` has the origin of `mirror`."""
    warnings: tuple[str, ...]
    """Each warning is one line of text."""


def setting_fields(model: type[BaseModel] = Settings, prefix: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    """Yields the path and the pydantic field of each setting of a model, including the settings in its groups. Each
    path starts with `prefix`."""
    for name, field in model.model_fields.items():
        field_type = field.annotation
        if isinstance(field_type, type) and issubclass(field_type, BaseModel):
            yield from setting_fields(field_type, (*prefix, name))
        else:
            yield (*prefix, name), field


def table_model(field: FieldInfo) -> type[BaseModel] | None:
    """If the setting is a list of tables, such as `[[upstream]]`, returns the model of one table; otherwise None."""
    item_types = get_args(field.annotation)
    return next(
        (item_type for item_type in item_types if isinstance(item_type, type) and issubclass(item_type, BaseModel)),
        None,
    )


def variable_name(path: SettingPath) -> str:
    """Returns the name of the variable that sets the setting or the group at `path`."""
    return ENV_PREFIX + ENV_NESTED_DELIMITER.join(path).upper()


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> LoadedSettings:
    """Returns the settings from all sources. `flags` maps the names of settings to the values of the flags that were
    given. `config` is the path of the settings file; None: the file that ENTREPOT_CONFIG names, if it is set. Raises
    ConfigError."""
    file = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    unknown_names = _unknown_variables()
    sources = [SettingsSource(flags, "flag"), SettingsSource(_read_environment(unknown_names), "variable")]
    if file is not None:
        sources.append(SettingsSource(_read_file(file), "file", str(file)))
    for source in sources:  # each source alone, so that the error message can name the source that is wrong
        _check_source(source)
    settings = _create_settings(sources)
    origins = {".".join(path): _origin(path, sources) or "default" for path, _ in setting_fields()}
    if origins["upstream"] == "default":
        origins["upstream"] = origins["mirror"]  # the model makes upstreams from the names in `mirror`
    return LoadedSettings(settings, origins, tuple(_unknown_variable_warning(name) for name in unknown_names))


def check_ports(loaded: LoadedSettings) -> None:
    """Raises ConfigError if `listen` is set and has the same port as `metrics.listen`. The hosts do not matter, because
    the server recognizes the socket for the metrics only by its port.

    `load_settings` does not check this, because it is also called by commands that have no flag `--listen`. If the
    server was started with `--listen`, the flag takes precedence over the file and the variables. A command without the
    flag would compare the port from these, which the server does not use.

    At its start, the server also compares the ports of its open sockets."""
    metrics, listen = loaded.settings.metrics, loaded.settings.listen
    if not metrics.enabled or metrics.listen is None or loaded.origins["listen"] == "default":
        return
    port, registry_port = (address.rpartition(":")[2] for address in (metrics.listen, listen))
    if port.isdecimal() and registry_port.isdecimal() and int(port) == int(registry_port) != 0:
        path = ("metrics", "listen")
        origin = loaded.origins[".".join(path)]
        name = "" if origin == variable_name(path) else f"{'.'.join(path)}: "
        raise ConfigError(
            f"{origin}: {name}port {int(port)} is also the port of listen = {listen!r}; give the metrics a port of "
            "their own"
        )


def _read_file(file: Path) -> dict[str, Any]:
    """Returns the values in the settings file, which is in TOML. Raises ConfigError."""
    try:
        return tomllib.loads(read_small_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the settings: {(error.strerror or str(error)).lower()}") from None


def _read_environment(unknown_names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the values that variables set. Ignores the variables in `unknown_names`. Raises ConfigError."""
    try:
        values: dict[str, Any] = EnvSettingsSource(Settings)()
    except SettingsError as error:
        # pydantic's message quotes the name of a group, or of a setting that is a list of tables.
        group = next((path[0] for path, _ in setting_fields() if f'"{path[0]}"' in str(error)), "")
        per_setting = variable_name((group, "NAME"))  # stands for the variables that set one setting each
        hint = f"set {per_setting} instead, where NAME is the name of a setting in {group}"
        hint = _TABLE_LIST_HINTS.get(group, hint)
        raise ConfigError(f"{variable_name((group,))}: not JSON; {hint}") from None
    # Remove the values of unknown variables. pydantic reads an unknown variable if its name begins with ENV_PREFIX and
    # the name of a group, as in ENTREPOT_GC__X.
    for name in unknown_names:
        group, *names_in_group = name.upper().removeprefix(ENV_PREFIX).lower().split(ENV_NESTED_DELIMITER)
        if names_in_group and isinstance(values.get(group), dict):
            values[group].pop(names_in_group[0], None)
    return values


def _unknown_variables() -> tuple[str, ...]:
    """Returns the sorted names of the variables that begin with ENV_PREFIX but belong to no setting. Ignores variables
    that Kubernetes sets."""
    known_names = {variable_name(path[: end + 1]) for path, _ in setting_fields() for end in range(len(path))} | {
        CONFIG_VARIABLE
    }
    prefixed = (name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    return tuple(
        sorted(
            name
            for name in prefixed
            if name.upper() not in known_names and not _KUBERNETES_VARIABLE.fullmatch(name.upper())
        )
    )


def _unknown_variable_warning(name: str) -> str:
    """Returns the warning about a variable that belongs to no setting."""
    known_names = [variable_name(path) for path, _ in setting_fields()]
    return f"{name} is no setting and is ignored{_did_you_mean(name.upper(), known_names)}"


def _did_you_mean(name: str, known_names: list[str]) -> str:
    """Returns a text for the end of a message about an unknown name: "; did you mean …?" with the most similar known
    name. The text is empty if no known name is similar."""
    similar_names = difflib.get_close_matches(name, known_names, 1)
    return f"; did you mean {similar_names[0]}?" if similar_names else ""


def _variable_candidates(path: SettingPath) -> list[str]:
    """Returns the names of the variables that can set the setting at `path`: first the variable of the setting, then
    the variables of the groups that contain it. The value of a group's variable is JSON."""
    return [variable_name(path[:end]) for end in range(len(path), 0, -1)]


def _is_variable_set(name: str) -> bool:
    """Returns whether a variable is set and not empty. `name` is in upper case. The case of the name in the
    environment does not matter."""
    return any(key.upper() == name and value for key, value in os.environ.items())


def _sets_path(values: Mapping[str, Any], path: SettingPath) -> bool:
    """Returns whether the nested mappings of one source contain a value at `path`."""
    node: Any = values
    for name in path:
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True


def _merge(sources: list[SettingsSource]) -> dict[str, Any]:
    """Returns the values of all sources in one mapping. `sources` is sorted by precedence, the highest first."""
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        _merge_into(merged, source.values)
    return merged


def _merge_into(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets `values` in `target`. The values of a group are merged into the group in `target`. Any other value replaces
    the value in `target`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            group = target.get(name)
            target[name] = dict(group) if isinstance(group, dict) else {}
            _merge_into(target[name], value)
        else:
            target[name] = value


def _create_settings(sources: list[SettingsSource]) -> Settings:
    """Returns the settings from all sources together. Each source has passed `_check_source`. Raises ConfigError if the
    sources contradict each other. The message names the sources, such as "variables, flags together: …"."""
    try:
        return Settings(**_merge(sources))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        names = ", ".join(source.name or f"{source.kind}s" for source in reversed(sources) if source.values)
        raise ConfigError(f"{names} together: {_problem_text(problem)}") from None


def _origin(path: SettingPath, sources: list[SettingsSource]) -> str | None:
    """Returns what sets the setting at `path` (`SettingsSource.origin`); None if no source sets it."""
    return next((origin for source in sources if (origin := source.origin(path))), None)


def _check_source(source: SettingsSource) -> None:
    """Raises ConfigError if the values of one source are not valid. The message says where the first invalid value is:
    it names the flag, or the variable, or the file and the setting. Then the message says what is wrong."""
    try:
        Settings(**source.values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        return
    path = problems[0]["loc"]
    more_problems = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    setting = tuple(takewhile(lambda part: isinstance(part, str), path))  # `path` up to the first index of a list
    location = (source.origin(cast(SettingPath, setting)) if setting else None) or source.name or f"{source.kind}s"
    if path and (source.kind == "file" or (source.kind == "variable" and setting != path)):
        location += f": {_dotted_name(path, source.values)}"
    raise ConfigError(f"{location}: {_problem_text(problems[0])}{more_problems}".replace("\n", " "))


def _dotted_name(path: tuple[int | str, ...], values: object = None) -> str:
    """Returns the name of a setting for messages, such as `upstream[docker.io].tag_ttl` for the path `("upstream", 0,
    "tag_ttl")`. The brackets contain the name, issuer or prefix of the list's entry. If the entry has none of these,
    the brackets contain its position in the list, counted from 1. `values`: the values of the source."""
    text = ""
    for part in path:
        if isinstance(part, str):
            values = values.get(part) if isinstance(values, Mapping) else None
            text += f".{part}" if text else part
        else:
            values = values[part] if isinstance(values, list) and part < len(values) else None
            keys = ("name", "issuer", "prefix")
            name = next(filter(None, map(values.get, keys)), None) if isinstance(values, Mapping) else None
            text += f"[{name or part + 1}]"
    return text


def _problem_text(problem: ErrorDetails) -> str:
    """Returns pydantic's error about a setting as a message in the terms of the settings file."""
    if problem["type"] == "extra_forbidden":
        models = [(name, table_model(field)) for name, field in Settings.model_fields.items()]
        tables = [path for name, model in models if model for path, _ in setting_fields(model, (name,))]
        known_names = [".".join(path) for path in (*(path for path, _ in setting_fields()), *tables)]
        setting_name = ".".join(part for part in problem["loc"] if isinstance(part, str))
        return f"unknown setting{_did_you_mean(setting_name, known_names)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"].removeprefix("Input ")
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] == "model_type":
        message = "should be a table"
    if problem["type"] == "list_type":
        message = "is not a list" + (
            f"; write [[{problem['loc'][-1]}]]" if problem["loc"][-1] in _TABLE_LIST_HINTS else ""
        )
    if "ge" in problem.get("ctx", {}) and any(
        is_size(field) for path, field in setting_fields() if path == problem["loc"]
    ):
        message = f"should be at least {format_byte_size(problem['ctx']['ge'])}"
    input_text = "a table" if isinstance(problem["input"], Mapping) else repr(problem["input"])
    return f"{input_text} {message}"
