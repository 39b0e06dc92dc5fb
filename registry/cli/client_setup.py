"""Configuration files that make docker, containerd, podman and BuildKit pull through this registry.

Sources: moby, "Registry as a pull through cache" (daemon.json); containerd, docs/hosts.md (hosts.toml);
containers-registries.conf(5); BuildKit, docs/buildkitd.toml.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from registry.cli.registry_address import RegistryAddress
from registry.config import Upstream
from registry.config.mirror_settings import DOCKER_HUB

DOCKER_HUB_SERVER = "https://registry-1.docker.io"
"""The server that clients use for `docker.io`, which itself is not the host name of a registry."""


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """What to configure at one client."""

    files: tuple[tuple[str, str], ...]
    """Path and content of each file."""
    hints: tuple[str, ...]
    """Lines for people that belong in no file."""


@dataclass(frozen=True, slots=True)
class MirroredHost:
    """A host whose images a client can pull through this registry."""

    prefix: str
    """How the client's image names begin: `registry.example.com:5000`."""
    name: str
    """The upstream's name in this registry."""
    server: str
    """The address that the client uses without this registry."""


def mirrored_hosts(upstream: Upstream) -> list[MirroredHost]:
    """Returns one host for the upstream's name and one for each alias. A name without a dot cannot be a host, so it is
    left out when there are aliases."""
    hosts = upstream.aliases if upstream.aliases and "." not in upstream.name else [upstream.name, *upstream.aliases]
    return [MirroredHost(host, upstream.name, _server(host, upstream)) for host in hosts]


def _server(host: str, upstream: Upstream) -> str:
    if host == DOCKER_HUB:
        return DOCKER_HUB_SERVER
    return next((url for url in upstream.endpoints if urlsplit(url).netloc.lower() == host), f"https://{host}")


def docker_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """Returns docker's daemon.json. docker supports mirrors of Docker Hub alone; for other upstreams, people put this
    registry and the upstream's name into the image name."""
    daemon: dict[str, list[str]] = {}
    hints = [
        "merge this into /etc/docker/daemon.json, then run: systemctl reload docker",
        "in Docker Desktop, put it into Settings, Docker Engine",
    ]
    names = list(dict.fromkeys(each.name for each in upstreams))
    if DOCKER_HUB in names:
        daemon["registry-mirrors"] = [address.url]
        hints.append(f"try: docker pull ubuntu, and docker pull {address.host}/ubuntu")
    if address.is_plain_http and not address.is_trusted_by_docker:
        daemon["insecure-registries"] = [address.host]
    hints += [
        f"docker supports mirrors of Docker Hub only; for {name} use: docker pull {address.host}/{name}/NAME"
        for name in names
        if name != DOCKER_HUB
    ]
    return ClientSetup((("/etc/docker/daemon.json", json.dumps(daemon, indent=2) + "\n"),), tuple(hints))


def containerd_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """Returns one hosts.toml for each host. containerd adds `?ns=HOST` to each request that it sends to a mirror."""
    files = []
    for each in upstreams:
        path = f"/etc/containerd/certs.d/{each.prefix}/hosts.toml"
        lines = [
            f"# {path}",
            "# containerd reads this file at each pull; no restart is needed.",
            f"# It asks this registry first, with `?ns={each.prefix}`, and falls back to the server named here.",
            f"server = {_quoted(each.server)}",
            "",
            f"[host.{_quoted(address.url)}]",
            '  capabilities = ["pull", "resolve"]',
        ]
        files.append((path, _text(lines)))
    hints = [
        "Kubernetes (CRI) reads them if /etc/containerd/config.toml sets config_path to /etc/containerd/certs.d;",
        "nerdctl always reads them; ctr reads them with --hosts-dir /etc/containerd/certs.d",
    ]
    if len(files) > 1:
        hints.append(f"this output holds {len(files)} files; --upstream NAME prints one of them alone")
    return ClientSetup(tuple(files), tuple(hints))


def podman_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """Returns a registries.conf of version 2. podman adds `library/` to Docker Hub's short names by itself and sends no
    `?ns=`, so the upstream's name is part of the mirror's location."""
    path = "/etc/containers/registries.conf.d/50-entrepot.conf"
    lines = [
        f"# {path}",
        "# (without root: ~/.config/containers/registries.conf.d/50-entrepot.conf)",
        "# podman, buildah and skopeo read this file when they start; for CRI-O run: systemctl reload crio",
    ]
    for each in upstreams:
        lines += ["", "[[registry]]", f"prefix = {_quoted(each.prefix)}", f"location = {_quoted(each.prefix)}"]
        lines += ["", "[[registry.mirror]]", f"location = {_quoted(f'{address.host}/{each.name}')}"]
        if address.is_plain_http:
            lines.append("insecure = true")
    if address.is_plain_http:
        lines += ["", "[[registry]]", f"location = {_quoted(address.host)}", "insecure = true"]
    hints = [f"try: podman pull {upstreams[0].prefix}/NAME"] if upstreams else []
    return ClientSetup(((path, _text(lines)),), tuple(hints))


def buildkit_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """Returns a buildkitd.toml. BuildKit adds `?ns=` as containerd does. Plain HTTP is set once, for this registry's
    host."""
    path = "/etc/buildkit/buildkitd.toml"
    lines = [
        f"# {path} (without root: ~/.config/buildkit/buildkitd.toml)",
        "# Merge this into the existing file, then restart buildkitd; or create a builder that uses it:",
        "#   docker buildx create --use --driver docker-container --buildkitd-config FILE",
    ]
    for each in upstreams:
        lines += ["", f"[registry.{_quoted(each.prefix)}]", f"  mirrors = [{_quoted(address.host)}]"]
    if address.is_plain_http:
        lines += ["", f"[registry.{_quoted(address.host)}]", "  http = true"]
    hints = ["a builder with the docker driver does not read this file: it uses docker's own daemon.json"]
    if address.is_trusted_by_docker:
        hints.append(
            f"{address.host} is a loopback address: a builder in a container reaches it only with "
            "--driver-opt network=host"
        )
    return ClientSetup(((path, _text(lines)),), tuple(hints))


SETUPS: Mapping[str, Callable[[RegistryAddress, Sequence[MirroredHost]], ClientSetup]] = {
    "docker": docker_setup,
    "containerd": containerd_setup,
    "podman": podman_setup,
    "buildkit": buildkit_setup,
}


def _quoted(text: str) -> str:
    """Returns a TOML string. JSON's escapes are valid in TOML."""
    return json.dumps(text)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
