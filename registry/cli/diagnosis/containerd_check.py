"""Checks whether containerd on a machine pulls through this registry. Reads `config.toml`, and the `hosts.toml` files
in the directories that the setting `config_path` in `config.toml` names.

The version of the format of `config.toml` determines the section that contains `config_path`. containerd 1.x reads
versions 1 and 2. containerd 2.x reads versions 1, 2 and 3.

`config_path` may be a list of directories, separated by colons:

- containerd 1.x searches each of these directories.
- containerd 2.1 and later pull images through the transfer service. This service treats the whole list as the path of
  one directory, without an error message (containerd #12415, #12636, #12808). In 2.1 and 2.2, the default of
  `config_path` is a list.

Sources: containerd, docs/hosts.md and docs/cri/registry.md; core/remotes/docker/config/hosts.go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.containerd_hosts import check_host, check_own_host
from registry.cli.diagnosis.finding import Finding, Level, ok, problem, warning
from registry.cli.diagnosis.k3s_check import check_k3s, distributions_on
from registry.clients.client_setup import MirroredHost

CHECK = "containerd"
CERTS_FOLDER = "/etc/containerd/certs.d"
_CONFIG_FILE = "/etc/containerd/config.toml"
_REGISTRY_PLUGINS = {1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.images"}
"""The name of the plugin that has the settings about registries, by the version of the format of `config.toml`."""
_RESTART = "then run: systemctl restart containerd"
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class ContainerdConfig:
    """The part of containerd's configuration that the checks need.

    - `file`: the path of `config.toml`.
    - `version`: the version of the format of `config.toml`.
    - `plugins`: the settings of each plugin, by the name of the plugin."""

    file: str
    version: int
    plugins: dict[str, Any]
    disabled_plugins: list[str]

    @property
    def registry_plugin(self) -> str:
        """The name of the plugin from which containerd reads the settings about registries."""
        return _REGISTRY_PLUGINS.get(self.version, _REGISTRY_PLUGINS[3])

    def registry_settings(self, plugin: str | None = None) -> dict[str, Any]:
        """Returns the settings about registries of a plugin; an empty dict if there are none. `plugin`: the name of the
        plugin. None means `registry_plugin`."""
        plugin_settings = self.plugins.get(plugin or self.registry_plugin)
        settings = plugin_settings.get("registry") if isinstance(plugin_settings, dict) else None
        return settings if isinstance(settings, dict) else {}

    @property
    def pulls_locally(self) -> bool:
        """Whether containerd pulls images without the transfer service, because a setting switches the service off. By
        default, containerd 2.1 and later pull through this service."""
        settings = self.plugins.get(self.registry_plugin)
        if self.version < 3 or not isinstance(settings, dict):
            return False
        return settings.get("use_local_image_pull") is True or settings.get("discard_unpacked_layers") is True


def check_containerd(files: ClientFiles, target: TargetRegistry) -> list[Finding]:
    """Returns the findings. `files`: the files of the machine on which containerd runs. `target`: the registry through
    which containerd should pull.

    k3s and RKE2 contain a containerd with its own files. If the machine has k3s or RKE2, this function checks these
    files. In this case, it checks a separate containerd only if `/etc/containerd/config.toml` exists."""
    findings: list[Finding] = []
    for distribution in distributions_on(files):
        findings += check_k3s(files, target, distribution)
    if findings and files.first_existing(_CONFIG_FILE) is None:
        return findings
    return [*findings, *_check_separate_containerd(files, target)]


def _check_separate_containerd(files: ClientFiles, target: TargetRegistry) -> list[Finding]:
    """Returns the findings about a containerd that is not part of k3s or RKE2."""
    file = files.first_existing(_CONFIG_FILE)
    try:
        config = None if file is None else _load(files, file)
    except FileUnusable as error:
        return [error.finding]
    if config is None:
        return [
            problem(
                CHECK,
                f"there is no {_CONFIG_FILE}, so containerd has its default for config_path",
                "containerd 1.x has an empty default; the default of 2.1 and later is a list of directories, which "
                "they take as the path of one directory: Kubernetes pulls straight from the upstreams",
                f"write this to {_CONFIG_FILE}, {_RESTART}",
                file=_CONFIG_FILE,
                lines=_config_lines(2),
            ),
            # Findings that a hosts.toml is correct are left out, because containerd reads no hosts.toml.
            *(finding for finding in _check_hosts(files, [CERTS_FOLDER], target) if finding.level is not Level.OK),
        ]
    findings = list(_check_config(config))
    # If `config.toml` has a problem, containerd does not read the hosts.toml files.
    are_hosts_files_ignored = any(finding.level is Level.PROBLEM for finding in findings)
    directories = [path for path in str(config.registry_settings().get("config_path") or "").split(":") if path]
    mirrors = config.registry_settings().get("mirrors")
    if not directories and isinstance(mirrors, dict) and mirrors:
        return [*findings, *_check_mirrors(config, mirrors, target)]
    host_findings = _check_hosts(files, directories or [CERTS_FOLDER], target)
    if are_hosts_files_ignored:  # leave out findings that a hosts.toml is correct
        return [*findings, *(finding for finding in host_findings if finding.level is not Level.OK)]
    return [*findings, *host_findings]


def _load(files: ClientFiles, file: str) -> ContainerdConfig | None:
    """Returns the configuration in the file with the path `file`, merged with the files that the setting `imports`
    names. Returns None if there is no such file. Raises FileUnusable."""
    document = files.read_toml(file)
    if document is None:
        return None
    merged = _plugins(file, document)
    for pattern in _text_list(file, document, "imports"):
        for path in _imported_paths(files, pattern):
            for plugin, settings in _plugins(path, files.read_toml(path) or {}).items():
                merged[plugin] = {**merged.get(plugin, {}), **settings}
    version = document.get("version", 1)
    if not isinstance(version, int):
        raise _wrong_type(file, "version", "is no number")
    # containerd reads the version 0 as 1.
    return ContainerdConfig(file, version or 1, merged, _text_list(file, document, "disabled_plugins"))


def _plugins(file: str, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the settings of each plugin in a file. Raises FileUnusable."""
    plugins = document.get("plugins", {})
    if not isinstance(plugins, dict) or not all(isinstance(settings, dict) for settings in plugins.values()):
        raise _wrong_type(file, "plugins", "does not have a table for each plugin")
    return dict(plugins)


def _text_list(file: str, document: dict[str, Any], key: str) -> list[str]:
    """Returns the list under `key` in a file as texts; an empty list if the key is missing. Raises FileUnusable."""
    values = document.get(key, [])
    if not isinstance(values, list):
        raise _wrong_type(file, key, "is no list")
    return [str(value) for value in values]


def _imported_paths(files: ClientFiles, pattern: str) -> list[str]:
    """Returns the paths of the files that match a pattern of `imports`; an empty list if the pattern is empty or not
    valid.

    If a directory exists, but this user may not list it:

    - Raises FileUnusable if the part of the pattern before the last `/` is an absolute path without wildcards.
    - Otherwise, leaves out the files in the directory."""
    folder, _, name = pattern.rpartition("/")
    try:
        if folder.startswith("/") and not _WILDCARDS & set(folder):
            return files.matching_files(folder, name)
        return sorted("/" + str(path.relative_to(files.root)) for path in files.root.glob(pattern.lstrip("/")))
    except (OSError, ValueError):  # a directory cannot be read; the pattern is empty or not valid
        return []


def _wrong_type(file: str, key: str, what: str) -> FileUnusable:
    return FileUnusable(
        problem(
            CHECK,
            f"{key} in {file} {what}",
            "containerd does not start with this file",
            f"correct the file, {_RESTART}",
        )
    )


def _check_config(config: ContainerdConfig) -> Iterator[Finding]:
    """Yields problems and warnings about `config.toml` itself."""
    file, config_lines = config.file, _config_lines(config.version)
    step = f"write this to {file}, {_RESTART}"
    if any(plugin.rpartition(".")[2] in ("cri", "images") for plugin in config.disabled_plugins):
        yield warning(
            CHECK,
            f"{file} switches the plugin for Kubernetes off (disabled_plugins)",
            "Docker's package containerd.io installs such a file; without the plugin, only nerdctl and ctr can pull",
            f"remove cri from disabled_plugins if Kubernetes uses this containerd, {_RESTART}",
        )
    path = config.registry_settings().get("config_path")
    for version, plugin in _REGISTRY_PLUGINS.items():
        if plugin != config.registry_plugin and config.registry_settings(plugin).get("config_path") and not path:
            version_text = f"version {config.version}" if config.version > 1 else "no version, which means version 1"
            yield problem(
                CHECK,
                f"{file} has {version_text}, but sets config_path in the section of version {version}",
                f"containerd does not read [plugins.{plugin!r}.registry] in such a file",
                step,
                file=file,
                lines=config_lines,
            )
            return
    if path and config.registry_settings().get("mirrors"):
        yield problem(
            CHECK,
            f"{file} has both config_path and registry.mirrors",
            "the plugin for Kubernetes does not start: `mirrors` cannot be set when `config_path` is provided",
            f"remove the sections [plugins.{config.registry_plugin!r}.registry.mirrors…] from {file}, {_RESTART}",
        )
    if not path and not config.registry_settings().get("mirrors"):
        yield problem(
            CHECK,
            f"{file} does not set config_path",
            "so Kubernetes reads no hosts.toml files, and pulls straight from the upstreams; nerdctl reads the files",
            step,
            file=file,
            lines=config_lines,
        )
    elif path and ":" in str(path):
        yield _directory_list_finding(config, str(path))


def _directory_list_finding(config: ContainerdConfig, path: str) -> Finding:
    """Returns the finding for a `config_path` with several directories."""
    what = f'{config.file} sets config_path = "{path}", a list of directories'
    step = f"name one directory, {_RESTART}"
    lines = _config_lines(config.version, path.split(":")[0])
    if config.pulls_locally:
        why = "a list works here only because use_local_image_pull or discard_unpacked_layers is set"
        return warning(CHECK, what, why, step, file=config.file, lines=lines)
    if config.version < 3:
        why = "containerd 1.x reads each directory; 2.1 and later take the list as one directory, which does not exist"
        return warning(CHECK, what, why, step, file=config.file, lines=lines)
    why = (
        "containerd 2.1 and later take the list as the path of one directory, which does not exist: they ignore all "
        "hosts.toml, and say nothing"
    )
    return problem(CHECK, what, why, step, file=config.file, lines=lines)


def _check_hosts(files: ClientFiles, directories: list[str], target: TargetRegistry) -> Iterator[Finding]:
    for host in target.hosts:
        yield from check_host(files, directories, host, target)
    yield from check_own_host(files, directories, target)


def _check_mirrors(config: ContainerdConfig, mirrors: dict[str, Any], target: TargetRegistry) -> Iterator[Finding]:
    """Yields findings that say whether the mirrors in `config.toml` lead to this registry. These mirrors are the
    deprecated alternative to `hosts.toml` files."""
    yield warning(
        CHECK,
        f"{config.file} sets registry.mirrors",
        "containerd calls this deprecated: 2.x does not support registry.configs any more, and a later version will "
        "drop registry.mirrors",
        f"write hosts.toml files (entrepot client containerd) and set config_path instead, {_RESTART}",
        file=config.file,
        lines=_config_lines(config.version),
    )
    for host in target.hosts:
        yield _mirror_finding(config, mirrors, host, target)


def _mirror_finding(
    config: ContainerdConfig, mirrors: dict[str, Any], host: MirroredHost, target: TargetRegistry
) -> Finding:
    mirror = mirrors.get(host.prefix) or mirrors.get("*")
    urls = mirror.get("endpoint") if isinstance(mirror, dict) else None
    endpoints = [str(url) for url in urls] if isinstance(urls, list) else []
    if endpoints and target.is_at(endpoints[0]):
        return ok(CHECK, f"pulls of {host.prefix} come through {target.address.url} ({config.file})")
    what = f"registry.mirrors in {config.file} sends pulls of {host.prefix} to {', '.join(endpoints) or 'no mirror'}"
    path = f"{CERTS_FOLDER}/{host.prefix}/hosts.toml"
    step = f"write this to {path}, and set config_path in place of registry.mirrors, {_RESTART}"
    return problem(CHECK, what, "", step, file=path, lines=target.content_for(path))


def _config_lines(version: int, directory: str = CERTS_FOLDER) -> str:
    """Returns the lines that set `config_path` in a `config.toml` with this version of the format. In place of version
    1, uses version 2."""
    version = max(2, version)
    return f'version = {version}\n\n[plugins."{_REGISTRY_PLUGINS.get(version, _REGISTRY_PLUGINS[3])}".registry]\n' + (
        f'  config_path = "{directory}"\n'
    )
