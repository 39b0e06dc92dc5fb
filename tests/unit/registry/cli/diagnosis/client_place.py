"""Helpers for tests of the doctor's checks of container clients. A temporary directory stands for the root directory of
the client's machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from registry.cli.diagnosis.client_check import check_client
from registry.cli.diagnosis.finding import Finding, Level
from registry.cli.diagnosis.probe import ProbeResult
from registry.clients.client_setup import mirrored_hosts
from registry.clients.registry_address import RegistryAddress
from registry.config import Upstream

PLAIN, SECURE = "http://registry.example.com:5000", "https://registry.example.com"
"""The registry's URL, without and with TLS."""
DAEMON, CONFIG, HUB_FOLDER = "etc/docker/daemon.json", "etc/containerd/config.toml", "etc/containerd/certs.d/docker.io"
"""Paths of docker's settings, of containerd's settings, and of the folder of containerd's hosts.toml for Docker Hub."""


def write_files(root: Path, **files: str) -> None:
    """Writes the files below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def findings_of(
    program: str,
    root: Path,
    url: str = PLAIN,
    upstreams: Sequence[str] = ("docker.io",),
    default: str | None = "docker.io",
    answer: ProbeResult | None = None,
) -> list[Finding]:
    """Returns the findings of the check of `program` with the files below `root`."""
    hosts = [host for name in upstreams for host in mirrored_hosts(Upstream(name=name))]
    return check_client(program, RegistryAddress(url), hosts, default, root=root, offline=True, probe_result=answer)


def problems_in(findings: Sequence[Finding]) -> list[Finding]:
    return at_level(findings, Level.PROBLEM)


def at_level(findings: Sequence[Finding], level: Level) -> list[Finding]:
    """Returns the findings of this level."""
    return [finding for finding in findings if finding.level is level]
