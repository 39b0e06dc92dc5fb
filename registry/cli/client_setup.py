"""The files that make a client pull through this registry: what stands in them, where they go, what to run then.

Sources: moby, "Registry as a pull through cache" (daemon.json); containerd, docs/hosts.md (hosts.toml);
containers-registries.conf(5); BuildKit, docs/buildkitd.toml.md.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from registry.config import Upstream
from registry.config.mirror_settings import DOCKER_HUB

DOCKER_HUB_SERVER = "https://registry-1.docker.io"
"""Where clients themselves go for `docker_setup.io`, which is a name and no registry's host."""


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """`files` by path; `hints` are for a person and stand in no file."""

    files: tuple[tuple[str, str], ...]
    hints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MirroredHost:
    """`prefix`: what images of an upstream begin with at the client (`registry.example.com:5000`); `name`: what this
    registry calls the upstream; `server`: where the client itself goes for it."""

    prefix: str
    name: str
    server: str


def mirrored_hosts(upstream: Upstream) -> list[MirroredHost]:
    """By its name and its aliases. A name without a dot is no host, so where there are aliases no client uses it."""
    hosts = upstream.aliases if upstream.aliases and "." not in upstream.name else [upstream.name, *upstream.aliases]
    return [MirroredHost(host, upstream.name, _server(host, upstream)) for host in hosts]


def _server(host: str, upstream: Upstream) -> str:
    if host == DOCKER_HUB:
        return DOCKER_HUB_SERVER
    return next((url for url in upstream.endpoints if urlsplit(url).netloc.lower() == host), f"https://{host}")


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """The registry as clients reach it; `url` has a scheme, a host, and a port where it is not the scheme's own."""

    url: str

    @property
    def host(self) -> str:
        """`host:port`, as it stands in an image's name."""
        return urlsplit(self.url).netloc

    @property
    def plain(self) -> bool:
        """Without TLS."""
        return urlsplit(self.url).scheme == "http"

    @property
    def trusted_by_docker(self) -> bool:
        """docker takes plain HTTP from 127.0.0.0/8, and from names that lead there, without being told to."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network("127.0.0.0/8")
        except ValueError:
            return host == "localhost"


def docker_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """daemon.json. docker knows mirrors of Docker Hub only; the other upstreams stand in the image's name."""
    daemon: dict[str, list[str]] = {}
    hints = [
        "merge this into /etc/docker/daemon.json, then run: systemctl reload docker",
        "in Docker Desktop it goes into Settings, Docker Engine",
    ]
    names = list(dict.fromkeys(each.name for each in upstreams))
    if DOCKER_HUB in names:
        daemon["registry-mirrors"] = [address.url]
        hints.append(f"try: docker pull ubuntu, and docker pull {address.host}/ubuntu")
    if address.plain and not address.trusted_by_docker:
        daemon["insecure-registries"] = [address.host]
    hints += [
        f"docker has mirrors of Docker Hub only; for {name}: docker pull {address.host}/{name}/NAME"
        for name in names
        if name != DOCKER_HUB
    ]
    return ClientSetup((("/etc/docker/daemon.json", json.dumps(daemon, indent=2) + "\n"),), tuple(hints))


def containerd_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """A hosts.toml for each upstream. containerd adds `?ns=` and the upstream's name to what it asks a mirror for."""
    files = []
    for each in upstreams:
        path = f"/etc/containerd/certs.d/{each.prefix}/hosts.toml"
        lines = [
            f"# {path}",
            "# containerd reads it at each pull; nothing needs to be restarted.",
            "# It asks this registry first, with `?ns=" + each.prefix + "`, and the server named here when that fails.",
            f"server = {_quoted(each.server)}",
            "",
            f"[host.{_quoted(address.url)}]",
            '  capabilities = ["pull", "resolve"]',
        ]
        files.append((path, _text(lines)))
    hints = [
        "Kubernetes (CRI) looks there when /etc/containerd/config.toml sets config_path to /etc/containerd/certs.d;",
        "nerdctl always does; ctr with --hosts-dir /etc/containerd/certs.d",
    ]
    if len(files) > 1:
        hints.append(f"these are {len(files)} files; --upstream NAME prints one of them")
    return ClientSetup(tuple(files), tuple(hints))


def podman_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """registries.conf, version 2. podman puts `library/` before Hub's own names itself and sends no `?ns=`, so the
    upstream's name stands in the mirror's path."""
    path = "/etc/containers/registries.conf.d/50-entrepot.conf"
    lines = [
        f"# {path}",
        "# (without root: ~/.config/containers/registries.conf.d/50-entrepot.conf)",
        "# podman, buildah and skopeo read it when they start; for CRI-O run: systemctl reload crio",
    ]
    for each in upstreams:
        lines += ["", "[[registry]]", f"prefix = {_quoted(each.prefix)}", f"location = {_quoted(each.prefix)}"]
        lines += ["", "[[registry.mirror]]", f"location = {_quoted(f'{address.host}/{each.name}')}"]
        if address.plain:
            lines.append("insecure = true")
    if address.plain:
        lines += ["", "[[registry]]", f"location = {_quoted(address.host)}", "insecure = true"]
    hints = [f"try: podman pull {upstreams[0].prefix}/NAME"] if upstreams else []
    return ClientSetup(((path, _text(lines)),), tuple(hints))


def buildkit_setup(address: RegistryAddress, upstreams: Sequence[MirroredHost]) -> ClientSetup:
    """buildkitd.toml. BuildKit adds `?ns=` as containerd does; how it reaches the mirror is said once, of its host."""
    path = "/etc/buildkit/buildkitd.toml"
    lines = [
        f"# {path} (without root: ~/.config/buildkit/buildkitd.toml)",
        "# Merge it with what is there, then restart buildkitd; or make a builder with it:",
        "#   docker buildx create --use --driver docker-container --buildkitd-config FILE",
    ]
    for each in upstreams:
        lines += ["", f"[registry.{_quoted(each.prefix)}]", f"  mirrors = [{_quoted(address.host)}]"]
    if address.plain:
        lines += ["", f"[registry.{_quoted(address.host)}]", "  http = true"]
    hints = ["a builder of the docker driver has no such file: it follows docker's own daemon.json"]
    if address.trusted_by_docker:
        hints.append(
            f"{address.host} is this machine's loopback address: a builder in a container reaches it only with "
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
    """As a TOML string: JSON's escapes are TOML's as well."""
    return json.dumps(text)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
