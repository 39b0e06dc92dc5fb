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
"""For each client program, paths of files and directories. If at least one of them exists, the program counts as
installed."""


def check_client(
    program: str,
    address: RegistryAddress,
    hosts: Sequence[MirroredHost],
    default: str | None,
    *,
    root: Path | None = None,
    offline: bool = False,
    answer: ProbeResult | None = None,
) -> list[Finding]:
    """Checks whether a client pulls the images of `hosts` through the registry at `address`. Returns the findings.
    Blocks.

    `program`: a key of `CHECKS`. `default`: the upstream that the registry asks for names without a host. `root`: the
    root directory of the client's file system; None: the client is on this machine. `offline`: the check does not
    connect to the registry. `answer`: the result of an earlier probe (requests to `/livez` and `/v2/` at the address);
    None: this function sends a probe, unless `offline`."""
    if answer is None and not offline:
        answer = probe(address.url)
    home = Path(os.path.expanduser("~")) if root is None else None
    files = ClientFiles(program, root or Path("/"), home)
    target = TargetRegistry(address, hosts, default, SETUPS[program](address, hosts), answer)
    findings = CHECKS[program](files, target)
    # This machine need not trust the certificate, so UNTRUSTED is no finding. Whether the client trusts it has been
    # checked above, in the client's files.
    if answer is not None and answer.error is not ProbeError.UNTRUSTED:
        findings = [*probe_findings(program, answer), *findings]
    return findings


def programs_on_this_machine(root: Path = Path("/")) -> list[str]:
    """Returns the names of the client programs that are on this machine. `root`: the root directory of its file
    system."""
    return [
        name for name, paths in _INSTALLED_PATHS.items() if any(_is_there(root / path.lstrip("/")) for path in paths)
    ]


def _is_there(path: Path) -> bool:
    """Returns whether a file or directory exists at the path. Also returns True if this user has no permission to find
    out."""
    try:
        return path.exists()
    except PermissionError:
        return True  # the check of the program then finds that it cannot read the file
    except OSError:
        return False
