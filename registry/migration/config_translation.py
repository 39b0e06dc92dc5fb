"""`translate`: translates the settings of a CNCF Distribution registry (the image `registry:2` or `registry:3`) into
the settings of this registry. In this module, the *old registry* is the Distribution registry.

The input is the text of the old registry's `config.yml`, and the environment variables `REGISTRY_…` that override
single keys, such as `REGISTRY_HTTP_ADDR`. The output is a settings file in TOML. A key without a counterpart becomes a
comment that says why there is none, or what to do instead. The output contains no password or secret. For example, it
leaves out the value of `proxy.password` and the password in a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import yaml

from registry.client_addresses import is_loopback_host
from registry.config.field_types import MAX_DURATION_SECONDS, parse_duration
from registry.migration.config_reasons import UNKNOWN_KEY, reason_for
from registry.printable import printable_json, printable_line, printable_toml
from storage.imports import ImportInvalid

PREFIX: Final = "REGISTRY_"
PASSWORD_VARIABLE: Final = "UPSTREAM_PASSWORD"
"""The environment variable from which the translated settings take the password of `proxy.username`."""
MAX_KEYS: Final = 10_000
"""Largest number of keys in the old settings."""
MAX_NUMBER_CHARACTERS: Final = 100
"""Largest number of characters of one number in the old settings."""
_KUBERNETES_VARIABLE: Final = re.compile(r"REGISTRY_(SERVICE_(HOST|PORT.*)|PORT(_.*)?)")
"""Matches the variables that Kubernetes sets in each container if a service named `registry` exists. These
variables are no settings."""
_LOG_LEVELS: Final = {
    "panic": "error",
    "fatal": "error",
    "error": "error",
    "warn": "warning",
    "warning": "warning",
    "info": "info",
    "debug": "debug",
    "trace": "debug",
}
"""Maps the log levels of the old registry to the log levels of this registry."""
_CLIENT_AUTH: Final = {"verify-client-cert-if-given": "optional", "require-and-verify-client-cert": "required"}
"""Maps values of `http.tls.clientauth` to values of `tls.client_auth`."""
_HUB_HOSTS: Final = ("registry-1.docker.io", "docker.io", "index.docker.io", "registry.hub.docker.com")
"""Hosts of Docker Hub. In this registry, the upstream of Docker Hub has the name `docker.io`."""
_UPSTREAM_NAME: Final = re.compile(r"[a-z0-9]+((?:[._]|__|-+)[a-z0-9]+)*")
_USER_IN_URL: Final = re.compile(r"//[^/\s]*@")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_MISSING: Final = object()
"""The value of a key that the old settings do not have."""
Value = Any
"""A value of a YAML document."""


def translate(text: str, environment: Mapping[str, str]) -> str:
    """Returns the text of the settings file. `text`: the content of config.yml; empty: translates only the environment
    variables. Raises ImportInvalid if the input is not the settings of a registry."""
    try:
        document = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ImportInvalid(f"the file is not YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ImportInvalid("the file is nested too deeply to be the settings of a registry") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ImportInvalid("the file contains no settings of a registry: it should begin like 'version: 0.1'")
    for name in sorted(environment):
        if name.startswith(PREFIX) and not _KUBERNETES_VARIABLE.fullmatch(name):
            _set_variable(document, name, environment[name])
    if not document:
        raise ImportInvalid("there is nothing to translate: the file is empty, and no REGISTRY_ variable is set")
    return _Translation(document).run()


class _Loader(yaml.SafeLoader):
    """Reads YAML with plain values only. Refuses:

    - Numbers with more than `MAX_NUMBER_CHARACTERS` characters. Python reads very long numbers slowly, and cannot
      convert them back to text.
    - Texts with half of a surrogate pair, such as `"\\ud800"`, which TOML does not allow."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_NUMBER_CHARACTERS:
            problem = f"found a number with more than {MAX_NUMBER_CHARACTERS} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value = super().construct_yaml_str(node)
        if _SURROGATE.search(value):
            raise yaml.constructor.ConstructorError(None, None, "found half of a surrogate pair", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def _parse_yaml(text: str) -> Value:
    """Returns the value of a YAML document. Raises YAMLError, and RecursionError if the text is nested too deeply."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # PyYAML raises these for a value that does not fit its tag, such as `!!int x`, and for a date with a month 13.
        raise yaml.YAMLError(f"it has a value that cannot be read: {error}") from error


class _Translation:
    """One translation. `_remaining` has the keys that are not translated yet: each method removes the keys that it
    translates. The keys that remain at the end have no counterpart."""

    def __init__(self, document: dict[str, Value]) -> None:
        self._remaining = dict(_leaves(document))  # path of a key, such as `http.addr` -> value
        self._top: list[str] = []  # the lines before the first table
        self._tables: dict[str, list[str]] = {}  # header of a table, such as `[tls]` -> lines
        self._comments: list[str] = []

    def run(self) -> str:
        """Returns the text of the settings file."""
        self._take("version")
        self._translate_storage()
        self._translate_http()
        self._translate_auth()
        self._translate_proxy()
        self._add_setting(
            "log_level", self._take_first("log.level", "loglevel"), lambda value: _LOG_LEVELS.get(str(value))
        )
        for path in self._remaining:
            self._comments.append(f"# {_comment_text(path)}: {reason_for(path) or UNKNOWN_KEY}")
        lines = ["# Translated from the settings of a CNCF Distribution registry.", *self._top]
        for name, settings in self._tables.items():
            lines += ["", name, *settings]
        if self._comments:
            lines += ["", "# Without a counterpart:", *dict.fromkeys(self._comments)]
        return "\n".join(lines) + "\n"

    def _translate_storage(self) -> None:
        rootdirectory = self._take("storage.filesystem.rootdirectory")
        if rootdirectory is not _MISSING:
            self._top.append(
                f"# storage.filesystem.rootdirectory: to take its content over, run: entrepot import-registry "
                f"{_comment_text(rootdirectory)}"
            )
        # This line is always written, because the defaults differ: the old registry refuses deletes, and this registry
        # allows them.
        allows_deletes = _is_true(self._take("storage.delete.enabled"))
        self._top.append(f"delete = {_toml(allows_deletes)}")
        _, readonly = self._take_first("storage.maintenance.readonly.enabled", "storage.maintenance.readonly")
        if _is_true(readonly):
            self._top.append("read_only = true")
        purging = self._take("storage.maintenance.uploadpurging.enabled")
        if purging is not _MISSING and not _is_true(purging):
            self._comments.append(
                "# storage.maintenance.uploadpurging.enabled: unfinished uploads are always deleted here; "
                "`expire` in [uploads] sets when"
            )
        age = self._take_first("storage.maintenance.uploadpurging.age")
        self._add_setting("expire", age, _duration_above_zero, table="[uploads]")

    def _translate_http(self) -> None:
        sets_insecure_open = False
        address = self._take("http.addr")
        if address is not _MISSING:
            host, colon, port = str(address).rpartition(":")
            if colon and port.isdigit() and not self._is_unix_socket():
                listen = f"{host or '0.0.0.0'}:{port}"
                self._top.append(f"listen = {_toml(listen)}")
                if not self._has_accounts() and not is_loopback_host(host.strip("[]")):
                    self._top += [
                        "# There are no accounts, so everybody who reaches this address can push and delete:",
                        "insecure_open = true",
                    ]
                    sets_insecure_open = True
            else:
                self._comments.append("# http.addr: this is not HOST:PORT; set listen")
        old_host = self._take_first("http.host")
        self._add_setting("public_url", old_host, _public_url)
        public_host = urlsplit(_public_url(old_host[1]) or "").hostname
        if public_host and not (sets_insecure_open or self._has_accounts() or is_loopback_host(public_host)):
            # Only the operator can decide on `insecure_open`: the old settings do not say whether a reverse proxy in
            # front of the old registry asks clients for a login.
            self._top += [
                "# This registry does not start: other machines reach it by public_url, and there are no accounts.",
                "# Add an account with `entrepot user add NAME --admin`. Or, to let everybody push and delete, set:",
                "# insecure_open = true",
            ]
        self._add_setting("shutdown_grace", self._take_first("http.draintimeout"), _duration)
        self._add_setting("certificate", self._take_first("http.tls.certificate"), _nonempty_text, table="[tls]")
        self._add_setting("key", self._take_first("http.tls.key"), _nonempty_text, table="[tls]")
        authorities = self._take_list("http.tls.clientcas")
        if authorities:
            self._add_line("[tls]", f"client_ca = {_toml(str(authorities[0]))}")
        if len(authorities) > 1:
            self._comments.append(
                "# http.tls.clientcas: only one file is accepted here; append the other files to the first"
            )
        self._add_setting(
            "client_auth",
            self._take_first("http.tls.clientauth"),
            lambda value: _CLIENT_AUTH.get(str(value)),
            table="[tls]",
        )

    def _is_unix_socket(self) -> bool:
        return str(self._remaining.get("http.net", "tcp")) == "unix"

    def _has_accounts(self) -> bool:
        """Returns whether clients of the old registry have to log in. Must be called before `_translate_auth`, which
        removes the key `auth.htpasswd.path`."""
        return any(path.startswith(("auth.htpasswd", "auth.token")) for path in self._remaining)

    def _translate_auth(self) -> None:
        path = self._take("auth.htpasswd.path")
        if path is not _MISSING:
            self._add_line("[auth]", f"htpasswd = {_toml(str(path))}")
            self._add_line("[auth]", "# These accounts have no rights yet. To give them the rights that they had, run:")
            self._add_line("[auth]", "#   entrepot grant add '**' pull,push,delete authenticated")

    def _translate_proxy(self) -> None:
        url = self._take("proxy.remoteurl")
        if url in (_MISSING, None, ""):
            return
        parts = _split_url(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or not _UPSTREAM_NAME.fullmatch(host):
            self._comments.append("# proxy.remoteurl: this is not the URL of a registry; set [[upstream]]")
            return
        name = "docker.io" if host in _HUB_HOSTS else host
        self._add_line("[[upstream]]", f"name = {_toml(name)}")
        endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if name != "docker.io" and endpoint != f"https://{name}":
            self._add_line("[[upstream]]", f"endpoints = [{_toml(endpoint)}]")
        self._add_line("[[upstream]]", "default = true")
        username = self._take("proxy.username")
        password = self._take("proxy.password")
        if username not in (_MISSING, None, ""):
            self._add_line("[[upstream]]", f"username = {_toml(str(username))}")
            self._add_line("[[upstream]]", f"password_env = {_toml(PASSWORD_VARIABLE)}")
            if password is not _MISSING:
                self._add_line(
                    "[[upstream]]", f"# Set the variable {PASSWORD_VARIABLE} to the value of proxy.password."
                )

    def _add_setting(
        self,
        name: str,
        old_setting: tuple[str, Value],
        convert: Callable[[Value], str | None],
        table: str | None = None,
    ) -> None:
        """Adds the setting `name`. `old_setting`: a key in the old settings, and the value of the key. `convert`:
        returns the value of the new setting, or None if there is no such value. If `convert` returns None, adds a
        comment instead of the setting. If the old value is None or _MISSING, does nothing."""
        path, value = old_setting
        if value is _MISSING or value is None:
            return
        converted = convert(value)
        if converted is None:
            self._comments.append(f"# {path}: its value {_comment_text(value)} has no counterpart; set {name}")
        elif table is None:
            self._top.append(f"{name} = {_toml(converted)}")
        else:
            self._add_line(table, f"{name} = {_toml(converted)}")

    def _add_line(self, table: str, line: str) -> None:
        """Adds a line to a table of the settings file. `table`: the header of the table, such as `[tls]`."""
        self._tables.setdefault(table, []).append(line)

    def _take(self, path: str) -> Value:
        """Removes a key from `_remaining` and returns its value. Returns _MISSING if the key is not there."""
        return self._remaining.pop(path, _MISSING)

    def _take_first(self, *paths: str) -> tuple[str, Value]:
        """Removes the keys `paths` from `_remaining`. Returns the path and the value of the first key that was there.
        If no key was there, returns the first path and _MISSING."""
        present = [(path, value) for path in paths if (value := self._take(path)) is not _MISSING]
        return present[0] if present else (paths[0], _MISSING)

    def _take_list(self, path: str) -> list[Value]:
        """Removes a key whose value is a list from `_remaining`, and returns the list. If the value is not a list,
        returns a list with only this value. If the key is not there, returns an empty list."""
        single = self._take(path)
        items = [self._take(key) for key in list(self._remaining) if key.startswith(f"{path}.")]
        return items if single is _MISSING else [single]


def _leaves(value: Value, path: str = "", depth: int = 0) -> Iterator[tuple[str, Value]]:
    """Yields the path, such as `http.addr`, and the value of each key that contains no further keys. The path of an
    entry of a list has the entry's position in the place of a name, as in `http.tls.clientcas.0`. Raises ImportInvalid
    if there are more than `MAX_KEYS` keys, or if the keys are nested too deeply."""
    count = 0
    items: Iterator[tuple[Value, Value]]
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    else:
        yield path, value
        return
    if depth > 20:
        raise ImportInvalid("the file is nested too deeply to be the settings of a registry")
    for name, child in items:
        for leaf in _leaves(child, f"{path}.{name}" if path else str(name), depth + 1):
            count += 1
            if count > MAX_KEYS:
                raise ImportInvalid(f"the file has more than {MAX_KEYS} keys, so it is not the settings of a registry")
            yield leaf


def _set_variable(document: dict[str, Value], variable: str, text: str) -> None:
    """Sets the key that an environment variable names. `text`: the value of the variable. Reads `text` as YAML, as the
    old registry does; if `text` is no YAML, the key gets `text` itself. Raises ImportInvalid if `text` is not UTF-8."""
    if _SURROGATE.search(text):  # Python decodes a byte that is not UTF-8 to half of a surrogate pair
        raise ImportInvalid(f"the variable {printable_line(variable)} is not UTF-8")
    *parents, last_name = variable.removeprefix(PREFIX).lower().split("_")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, RecursionError):
        value = text
    group = document
    for name in parents:
        name = _matching_key(group, name)
        child_group = group.get(name)
        if not isinstance(child_group, dict):
            # `storage: filesystem` is short for `storage: {filesystem: {}}`.
            child_group = {child_group: {}} if isinstance(child_group, str) else {}
            group[name] = child_group
        group = child_group
    group[_matching_key(group, last_name)] = value


def _matching_key(document: Mapping[str, Value], name: str) -> str:
    """Returns the key of `document` whose lower-case form is `name`. Returns `name` if there is no such key."""
    return next((key for key in document if str(key).lower() == name), name)


def _is_true(value: Value) -> bool:
    return value is True or str(value).lower() in ("true", "yes", "on", "1")


def _nonempty_text(value: Value) -> str | None:
    return str(value) if isinstance(value, str) and value else None


def _duration(value: Value) -> str | None:
    """Returns a duration in Go's form, such as `168h`. Returns None if this registry does not accept the duration."""
    return None if _seconds(value) is None else str(value)


def _duration_above_zero(value: Value) -> str | None:
    return _duration(value) if _seconds(value) else None


def _seconds(value: Value) -> float | None:
    """Returns a duration in seconds. Returns None if this registry does not accept the duration."""
    try:
        seconds = parse_duration(str(value))
    except ValueError:
        return None
    return seconds if isinstance(seconds, float) and seconds <= MAX_DURATION_SECONDS else None


def _public_url(value: Value) -> str | None:
    parts = _split_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return None
    return f"{parts.scheme}://{parts.netloc}" if parts.path in ("", "/") else None


def _split_url(value: Value) -> SplitResult:
    """Returns the parts of a URL. Returns empty parts if the value is no URL."""
    try:
        parts = urlsplit(str(value))
        _ = parts.port  # raises ValueError if the port is no number
    except ValueError:
        return urlsplit("")
    return parts


def _toml(value: str | bool) -> str:
    """Returns a value in TOML: the value's JSON text, with the character DEL escaped, as TOML requires."""
    return printable_toml(json.dumps(value, ensure_ascii=False))


def _comment_text(value: Value) -> str:
    """Returns a value as text of one line, for a comment. Leaves out the user name and the password in a URL."""
    text = _USER_IN_URL.sub("//", str(value))
    return printable_json(json.dumps(text, ensure_ascii=False))[1:-1][:200]


def _one_line(error: Exception) -> str:
    return printable_line(" ".join(str(error).split()))[:200]
