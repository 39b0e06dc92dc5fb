"""Checks whether docker sends its requests to this registry through a proxy.

dockerd reads its proxies from the key `proxies` in `daemon.json` (since version 23.0). If this key is missing, dockerd
reads its proxies from its environment, which systemd sets. The proxies in a user's `config.json` are for containers and
builds; dockerd does not use them. A *finding* is one result of the check.

Sources: Docker docs, "Daemon proxy configuration" and "Use a proxy server with the docker CLI"; systemd.exec(5),
"Environment"; golang.org/x/net/http/httpproxy, whose rules for NO_PROXY docker follows.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.finding import Finding, warning
from registry.client_addresses import is_loopback_host

CHECK = "docker"
_RESTART = "then run: systemctl restart docker"
_UNIT_FOLDERS = ("/usr/lib/systemd/system", "/run/systemd/system", "/etc/systemd/system", "~/.config/systemd/user")
"""The folders in which systemd searches for units and their drop-ins. A file in a later folder replaces a file with the
same name in an earlier folder."""
_NEW_DROP_IN = "/etc/systemd/system/docker.service.d/zz-entrepot.conf"
"""The path of the drop-in that a finding suggests. systemd applies drop-ins in the order of their names, so it applies
this drop-in after the others."""
_USER_CONFIG = "~/.docker/config.json"
"""The configuration of a user's docker CLI."""


@dataclass(frozen=True, slots=True)
class _Proxies:
    """The proxies that a file sets.

    - `file`: the path of the file.
    - `by_scheme`: the proxy for each of the keys `http` and `https`; an empty text if there is no proxy.
    - `no_proxy`: the hosts that are reached without a proxy, in the format of the variable NO_PROXY."""

    file: str
    by_scheme: Mapping[str, str]
    no_proxy: str

    def proxy_for(self, url: str) -> str | None:
        """Returns the URL of the proxy through which `url` is reached. The returned URL contains no user name and no
        password. Returns None if `url` is reached without a proxy."""
        parts = urlsplit(url)
        proxy = self.by_scheme.get(parts.scheme)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if not proxy or bypasses_proxy(self.no_proxy, parts.hostname or "", port):
            return None
        proxy_parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return f"{proxy_parts.scheme}://{proxy_parts.netloc.rpartition('@')[2]}"


def proxy_findings(
    files: ClientFiles, daemon_file: str, daemon_config: dict[str, Any], target: TargetRegistry
) -> Iterator[Finding]:
    """Yields one finding if dockerd uses a proxy for requests to this registry, and one if containers or builds do. If
    a file of docker cannot be used, yields only a finding about this file.

    `files`: reads docker's files. `daemon_file` and `daemon_config`: the path and the content of daemon.json.
    `target`: this registry."""
    url, host = target.address.url, target.address.host
    try:
        daemon_proxies = _proxies_in_daemon_json(daemon_file, daemon_config) or _proxies_from_systemd(files)
        user_proxies = _proxies_in_user_config(files)
    except FileUnusable as error:
        yield error.finding
        return
    if daemon_proxies is not None and (proxy := daemon_proxies.proxy_for(url)) is not None:
        no_proxy = ",".join(filter(None, (daemon_proxies.no_proxy, urlsplit(url).hostname)))
        if daemon_proxies.file == daemon_file:
            new_config = {**daemon_config, "proxies": {**daemon_config["proxies"], "no-proxy": no_proxy}}
            file, lines = daemon_file, json.dumps(new_config, indent=2) + "\n"
            next_step = f"write this to {file}, {_RESTART}"
        elif not daemon_proxies.file.endswith((".conf", ".service")):  # an EnvironmentFile, which overrides a drop-in
            file, lines = daemon_proxies.file, ""
            next_step = f"write NO_PROXY={no_proxy} in {file}, {_RESTART}"
        else:
            file, lines = _NEW_DROP_IN, f'[Service]\nEnvironment="NO_PROXY={no_proxy}" "no_proxy={no_proxy}"\n'
            next_step = f"write this to {file}, then run: systemctl daemon-reload && systemctl restart docker"
        what = f"{daemon_proxies.file} makes docker ask the proxy {proxy} for {host}"
        why = (
            "if the proxy does not reach this registry, pulls from this registry fail; if this registry is docker's "
            "mirror, docker then pulls from Docker Hub without a message"
        )
        yield warning(CHECK, what, why, next_step, file=file, lines=lines)
    if user_proxies is not None and (proxy := user_proxies.proxy_for(url)) is not None:
        what = f"{user_proxies.file} gives containers and builds the proxy {proxy}, also for {host}"
        why = "docker itself pulls without this proxy, but programs in containers reach this registry only through it"
        yield warning(CHECK, what, why, f"add {urlsplit(url).hostname} to noProxy in {user_proxies.file}")


def bypasses_proxy(no_proxy: str, host: str, port: int) -> bool:
    """Returns whether docker reaches `host` and `port` without a proxy if the variable NO_PROXY has the value
    `no_proxy`. Always returns True for a loopback host."""
    host = host.lower().rstrip(".")
    if is_loopback_host(host):
        return True
    address = _address(host)
    return any(_matches(entry.strip().lower(), host, address, port) for entry in no_proxy.split(","))


def _matches(entry: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    """Returns whether an entry of NO_PROXY applies to `host` and `port`. An entry is `*`, a network, an IP address or a
    domain. An address or a domain may have a port. `address`: the host as an IP address; None if the host is a name."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    if entry.count(":") == 1 or entry.startswith("["):
        entry, _, entry_port = entry.rpartition(":") if not entry.endswith("]") else (entry, "", "")
        if entry_port and entry_port != str(port):
            return False
    entry = entry.strip("[]")
    if address is not None:
        return _address(entry) == address
    name = entry.removeprefix("*")
    return bool(name) and (host == name or host.endswith(name if name.startswith(".") else f".{name}"))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _proxies_in_daemon_json(file: str, config: dict[str, Any]) -> _Proxies | None:
    """Returns the proxies in daemon.json; None if daemon.json sets no proxy."""
    proxies = config.get("proxies")
    if not isinstance(proxies, dict):
        return None
    by_scheme = {scheme: str(proxies.get(f"{scheme}-proxy") or "") for scheme in ("http", "https")}
    return _Proxies(file, by_scheme, str(proxies.get("no-proxy") or "")) if any(by_scheme.values()) else None


def _proxies_from_systemd(files: ClientFiles) -> _Proxies | None:
    """Returns the proxies in the environment that systemd sets for docker; None if this environment has no proxy.
    Raises FileUnusable."""
    drop_ins: dict[str, str] = {}  # file name -> path; a file replaces a file with the same name in an earlier folder
    units = [f"{folder}/docker.service" for folder in _UNIT_FOLDERS]
    for folder in _UNIT_FOLDERS:
        paths = files.matching_files(f"{folder}/docker.service.d", "*.conf")
        drop_ins |= {path.rpartition("/")[2]: path for path in paths}
    unit = next((path for path in reversed(units) if files.first_existing(path)), None)
    variables: dict[str, tuple[str, str]] = {}  # variable -> its value, and the file that sets it
    environment_files: list[str] = []
    for path in [*([] if unit is None else [unit]), *(drop_ins[key] for key in sorted(drop_ins))]:
        for key, value in _unit_settings(files.read_text(path) or ""):
            if key == "Environment":
                variables = {**variables, **_assignments(value, path)} if value else {}
            elif key == "EnvironmentFile":
                environment_files = [*environment_files, value.removeprefix("-")] if value else []
    for path in environment_files:  # these files override `Environment`
        for line in (files.read_text(path) or "").splitlines():
            if not line.lstrip().startswith(("#", ";")):
                variables |= _assignments(line, path)

    def find(name: str) -> tuple[str, str]:
        """Returns the value of the variable `name`, and the file that sets it. The variable with the name in upper case
        takes precedence over the one in lower case. Returns two empty texts if both are missing."""
        return variables.get(name.upper()) or variables.get(name) or ("", "")

    found = {scheme: find(f"{scheme}_proxy") for scheme in ("http", "https")}
    file = next((path for value, path in found.values() if value), None)
    by_scheme = {scheme: value for scheme, (value, _) in found.items()}
    return None if file is None else _Proxies(file, by_scheme, find("no_proxy")[0])


def _unit_settings(text: str) -> Iterator[tuple[str, str]]:
    """Yields the keys and values of a systemd unit, in the order of the file."""
    for line in text.replace("\\\n", " ").splitlines():
        key, separator, value = line.strip().partition("=")
        if separator:
            yield key.strip(), value.strip()


def _assignments(text: str, file: str) -> dict[str, tuple[str, str]]:
    """Returns the variables in a line such as `"A=1 2" B=3`, each with its value and `file`. Ignores words that are not
    assignments."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that does not end
        return {}
    return {name: (value, file) for name, separator, value in (word.partition("=") for word in words) if separator}


def _proxies_in_user_config(files: ClientFiles) -> _Proxies | None:
    """Returns the proxies in the user's config.json; None if config.json sets no proxies. Raises FileUnusable."""
    if files.home is None:
        return None
    proxies = (files.read_json(_USER_CONFIG) or {}).get("proxies")
    default = proxies.get("default") if isinstance(proxies, dict) else None
    if not isinstance(default, dict):
        return None
    by_scheme = {scheme: str(default.get(f"{scheme}Proxy") or "") for scheme in ("http", "https")}
    return _Proxies(_USER_CONFIG, by_scheme, str(default.get("noProxy") or ""))
