"""`check_client`: checks the configuration of one client program on a machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from registry.cli.diagnosis.client_files import ClientFiles, TargetRegistry, probe_findings
from registry.cli.diagnosis.containerd_check import check_containerd
from registry.cli.diagnosis.docker_check import check_docker
from registry.cli.diagnosis.finding import Finding
from registry.cli.diagnosis.podman_check import check_podman
from registry.cli.diagnosis.probe import ProbeError, ProbeResult, probe
from registry.clients.client_setup import SETUPS, MirroredHost
from registry.clients.registry_address import RegistryAddress

CHECKS: Final[dict[str, Callable[[ClientFiles, TargetRegistry], list[Finding]]]] = {
    "docker": check_docker,
    "containerd": check_containerd,
    "podman": check_podman,
}
"""The checks, by the name of the client program."""
_INSTALLED_PATHS: Final = {
    "docker": ("/etc/docker/daemon.json", "/usr/bin/dockerd", "/usr/sbin/dockerd", "/var/snap/docker"),
    "containerd": (
        *("/etc/containerd/config.toml", "/etc/containerd/certs.d", "/etc/rancher/k3s", "/etc/rancher/rke2"),
        *("/var/lib/rancher/k3s/agent", "/var/lib/rancher/rke2/agent"),
    ),
    "podman": ("/usr/bin/podman", "/usr/bin/crio", "/usr/bin/buildah"),
}
"""For each client program: if a file or directory exists at one of these paths, the program counts as installed."""


def check_client(
    program: str,
    address: RegistryAddress,
    hosts: Sequence[MirroredHost],
    default_upstream: str | None,
    *,
    root: Path | None = None,
    offline: bool = False,
    probe_result: ProbeResult | None = None,
) -> list[Finding]:
    """Checks whether a client pulls the images of `hosts` through the registry at `address`. Returns the findings.
    Blocks.

    - `program`: a key of `CHECKS`.
    - `default_upstream`: the upstream that the registry uses for image names without a host.
    - `root`: the root directory of the client's file system; None: the client is on this machine.
    - `offline`: whether the check must not connect to the registry.
    - `probe_result`: the result of an earlier probe (requests to `/livez` and `/v2/` at the address). None: this
      function sends a probe, unless `offline` is True."""
    if probe_result is None and not offline:
        probe_result = probe(address.url)
    home = Path(os.path.expanduser("~")) if root is None else None
    files = ClientFiles(program, root or Path("/"), home)
    target = TargetRegistry(address, hosts, default_upstream, SETUPS[program](address, hosts), probe_result)
    findings = CHECKS[program](files, target)
    # UNTRUSTED means that this machine does not trust the registry's certificate. The client may still trust it: the
    # function in `CHECKS` has checked that in the client's files.
    if probe_result is not None and probe_result.error is not ProbeError.UNTRUSTED:
        findings = [*probe_findings(program, probe_result), *findings]
    return findings


def installed_programs(root: Path = Path("/")) -> list[str]:
    """Returns the names of the installed client programs. `root`: the root directory of the file system to search."""
    return [
        name for name, paths in _INSTALLED_PATHS.items() if any(_may_exist(root / path.lstrip("/")) for path in paths)
    ]


def _may_exist(path: Path) -> bool:
    """Returns False if there is no file or directory at the path. Returns True if there is one, or if this user has no
    permission to look."""
    try:
        return path.exists()
    except PermissionError:
        return True  # the check of the program then reports that a file cannot be read
    except OSError:
        return False
