"""Generates the configuration files that make docker, containerd, podman and BuildKit pull through this registry. The
commands `entrepot client PROGRAM` print them, and the set-up page shows them.

An *upstream* is a remote registry that this registry mirrors. Client programs tell this registry the
upstream of a request in different ways:

- containerd and BuildKit name the upstream's host in the query, as `?ns=HOST`.
- podman puts the upstream's name in front of the repository name.
- docker names no upstream: it uses mirrors for Docker Hub only.

Sources: moby, "Registry as a pull through cache" (daemon.json); containerd, docs/hosts.md (hosts.toml);
containers-registries.conf(5); BuildKit, docs/buildkitd.toml.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from registry.clients.registry_address import RegistryAddress
from registry.config import Upstream
from registry.config.mirror_settings import DOCKER_HUB

_CERTS_D = {"folder": "/etc/containerd/certs.d"}
"""A placeholder of hints with its value: `{folder}` stands for the directory with containerd's hosts.toml files."""
DOCKER_HUB_SERVER = "https://registry-1.docker.io"
"""The registry server of Docker Hub. The host `docker.io` itself serves no registry."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A sentence for people, which a page shows in their language. `text`: the English sentence with placeholders in
    braces. `values`: the values of the placeholders. Create hints only with the function `hint`."""

    text: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        """The sentence in English."""
        return self.text.format_map(self.values)


def hint(text: str, **values: str) -> Hint:
    """Returns a hint. `text` has to be a string literal, because a tool collects the texts of all calls of `hint` for
    translation."""
    return Hint(text, values)


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """The configuration of one client program."""

    files: tuple[tuple[str, str], ...]
    """The files to write, as pairs of path and content."""
    hints: tuple[Hint, ...]
    """Instructions for people, one line each, such as a command to try."""
    commands: tuple[str, ...] = field(default=())
    """Commands to run once the files are in place."""


@dataclass(frozen=True, slots=True)
class MirroredHost:
    """A remote registry host whose images a client can pull through this registry."""

    prefix: str
    """The host at the beginning of the client's image names, such as `docker.io` or `registry.example.com:5000`."""
    upstream: str
    """The name of the upstream in this registry's settings."""
    server: str
    """The URL from which the client would pull without this registry."""
    has_short_names: bool = True
    """True if clients can omit the upstream's name at the beginning of a repository name, for example `library/ubuntu`
    for `docker.io/library/ubuntu`. Docker sends such short names when it asks its mirror for an image of Docker Hub."""


def mirrored_hosts(upstream: Upstream) -> list[MirroredHost]:
    """Returns one host for the upstream's name, and one for each alias of the upstream (further host names). Leaves out
    the name if it has no dot and the upstream has aliases, because the name is then not a host name."""
    name_is_host = "." in upstream.name or not upstream.aliases
    prefixes = [upstream.name, *upstream.aliases] if name_is_host else upstream.aliases
    return [MirroredHost(prefix, upstream.name, _server_url(prefix, upstream)) for prefix in prefixes]


def _server_url(host: str, upstream: Upstream) -> str:
    """Returns the URL of the upstream's endpoint on `host`. If no endpoint is on `host`, returns `https://HOST`."""
    if host == DOCKER_HUB:
        return DOCKER_HUB_SERVER
    return next((url for url in upstream.endpoints if urlsplit(url).netloc.lower() == host), f"https://{host}")


def docker_setup(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> ClientSetup:
    """Returns docker's daemon.json. docker supports mirrors of Docker Hub only. For each other upstream, a hint shows
    how to write image names."""
    daemon = docker_daemon_settings(address, hosts)
    hints = [
        hint("merge this into /etc/docker/daemon.json, then run: systemctl reload docker"),
        hint("in Docker Desktop, put this into Settings, Docker Engine"),
    ]
    if is_docker_mirror(hosts):
        hints.append(hint("try `docker pull ubuntu` and `docker pull {host}/ubuntu`", host=address.host))
    hints += docker_image_name_hints(address, hosts)
    return ClientSetup((("/etc/docker/daemon.json", json.dumps(daemon, indent=2) + "\n"),), tuple(hints))


def docker_daemon_settings(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> dict[str, list[str]]:
    """Returns the content that docker's daemon.json needs; an empty dict if docker needs no such file."""
    daemon = {}
    if is_docker_mirror(hosts):
        daemon["registry-mirrors"] = [address.url]
    if address.is_plain_http and not address.docker_accepts_plain_http:
        daemon["insecure-registries"] = [address.host]
    return daemon


def is_docker_mirror(hosts: Sequence[MirroredHost]) -> bool:
    """Returns whether docker can use this registry as its mirror of Docker Hub."""
    return any(host.upstream == DOCKER_HUB and host.has_short_names for host in hosts)


def docker_image_name_hints(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> list[Hint]:
    """Returns a hint for each upstream for which docker cannot use this registry as its mirror. The hint shows an image
    name that begins with this registry's address."""
    hints = []
    for name in dict.fromkeys(host.upstream for host in hosts):
        if name != DOCKER_HUB:
            hints.append(
                hint(
                    "docker supports mirrors of Docker Hub only; for {upstream} use: "
                    "docker pull {host}/{upstream}/NAME",
                    upstream=name,
                    host=address.host,
                )
            )
        elif not is_docker_mirror(hosts):
            hints.append(
                hint(
                    "docker cannot use this registry as its mirror, because docker.io is not the default upstream; "
                    "use: docker pull {host}/docker.io/library/ubuntu",
                    host=address.host,
                )
            )
    return hints


def containerd_setup(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> ClientSetup:
    """Returns one hosts.toml for each host."""
    files = []
    for host in hosts:
        path = f"{_CERTS_D['folder']}/{host.prefix}/hosts.toml"
        lines = [
            f"# {path}",
            "# containerd reads this file at each pull; no restart is needed.",
            f"# It asks this registry first, with `?ns={host.prefix}`, and falls back to the server named here.",
            f"server = {_quoted(host.server)}",
            "",
            f"[host.{_quoted(address.url)}]",
            '  capabilities = ["pull", "resolve"]',
        ]
        files.append((path, _join_lines(lines)))
    hints = [
        hint(
            "Kubernetes (CRI) reads these files if /etc/containerd/config.toml sets config_path to {folder}; the "
            "section is {section_of_1} with containerd 1.7 and {section_of_2} with 2.x; then run: "
            "systemctl restart containerd",
            **_CERTS_D,
            section_of_1='[plugins."io.containerd.grpc.v1.cri".registry]',
            section_of_2='[plugins."io.containerd.cri.v1.images".registry]',
        ),
        hint("to check a node, run there: entrepot client check containerd --url {url}", url=address.url),
        hint("nerdctl always reads these files; ctr reads them with --hosts-dir {folder}", **_CERTS_D),
    ]
    return ClientSetup(tuple(files), tuple(hints))


def podman_setup(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> ClientSetup:
    """Returns a registries.conf of version 2. The location of each mirror contains the upstream's name. If the address
    has no TLS, the key `insecure` allows plain HTTP."""
    path = "/etc/containers/registries.conf.d/50-entrepot.conf"
    lines = [
        f"# {path}",
        "# (without root: ~/.config/containers/registries.conf.d/50-entrepot.conf)",
        "# podman, buildah and skopeo read this file when they start; for CRI-O run: systemctl reload crio",
    ]
    for host in hosts:
        lines += ["", "[[registry]]", f"prefix = {_quoted(host.prefix)}", f"location = {_quoted(host.prefix)}"]
        lines += ["", "[[registry.mirror]]", f"location = {_quoted(f'{address.host}/{host.upstream}')}"]
        if address.is_plain_http:
            lines.append("insecure = true")
    if address.is_plain_http:
        lines += ["", "[[registry]]", f"location = {_quoted(address.host)}", "insecure = true"]
    hints = [hint("try: podman pull {upstream}/NAME", upstream=hosts[0].prefix)] if hosts else []
    return ClientSetup(((path, _join_lines(lines)),), tuple(hints))


def buildkit_setup(address: RegistryAddress, hosts: Sequence[MirroredHost]) -> ClientSetup:
    """Returns a buildkitd.toml. If the address has no TLS, a section for this registry's own host allows plain HTTP."""
    path = "/etc/buildkit/buildkitd.toml"
    lines = [
        f"# {path} (without root: ~/.config/buildkit/buildkitd.toml)",
        "# Merge this into the existing file, then restart buildkitd; or create a builder that uses it:",
        "#   docker buildx create --use --driver docker-container --buildkitd-config FILE",
    ]
    for host in hosts:
        lines += ["", f"[registry.{_quoted(host.prefix)}]", f"  mirrors = [{_quoted(address.host)}]"]
    if address.is_plain_http:
        lines += ["", f"[registry.{_quoted(address.host)}]", "  http = true"]
    hints = [hint("a builder with the docker driver does not read this file: it uses docker's own daemon.json")]
    if address.docker_accepts_plain_http:  # true only for loopback addresses
        hints.append(
            hint(
                "{host} is a loopback address: a builder in a container reaches it only with --driver-opt network=host",
                host=address.host,
            )
        )
    return ClientSetup(((path, _join_lines(lines)),), tuple(hints))


SETUPS: Mapping[str, Callable[[RegistryAddress, Sequence[MirroredHost]], ClientSetup]] = {
    "docker": docker_setup,
    "containerd": containerd_setup,
    "podman": podman_setup,
    "buildkit": buildkit_setup,
}
"""For the name of each client program, the function that generates the program's configuration."""


def _quoted(text: str) -> str:
    """Returns `text` as a TOML string. A JSON string is a valid TOML string."""
    return json.dumps(text)


def _join_lines(lines: Sequence[str]) -> str:
    """Returns the lines as the content of a file, with a newline at the end."""
    return "\n".join(lines) + "\n"
