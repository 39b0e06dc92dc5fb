"""The doctor's checks of container clients, if this user may not list a directory of the client. `Path.glob` finds no
file in such a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from registry.cli.diagnosis.finding import Finding
from registry.cli.diagnosis.probe import ProbeError, ProbeResult
from registry.clients.client_setup import SETUPS, mirrored_hosts
from registry.clients.registry_address import RegistryAddress
from registry.config import Upstream
from tests.fakes.forbidden_files import ForbiddenFiles
from tests.unit.registry.cli.diagnosis import client_file_texts as texts
from tests.unit.registry.cli.diagnosis.client_place import CONFIG, SECURE, findings_of, problems_in, write_files

UNTRUSTED = ProbeResult(SECURE, ProbeError.UNTRUSTED, "unable to get local issuer certificate")
"""A probe has found that this machine does not trust the registry's certificate."""
FOLDERS = {
    "docker": "etc/docker/certs.d/registry.example.com",
    "containerd": "etc/containerd/certs.d/registry.example.com",
    "podman": "etc/containers/certs.d/registry.example.com",
}


def write_setup(root: Path, program: str) -> None:
    """Writes the files that `entrepot client` prints for the program."""
    hosts = mirrored_hosts(Upstream(name="docker.io"))
    for name, text in SETUPS[program](RegistryAddress(SECURE), hosts).files:
        write_files(root, **{name.lstrip("/"): text})
    write_files(root, **{CONFIG: texts.CONTAINERD_GOOD_2_2})


def unreadable(findings: Sequence[Finding]) -> list[str]:
    """Returns what the findings say about files that cannot be read."""
    return [finding.what for finding in findings if "cannot be read" in finding.what]


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> ForbiddenFiles:
    return ForbiddenFiles(monkeypatch)


@pytest.mark.parametrize("program", FOLDERS)
def test_a_directory_of_certificates(tmp_path: Path, forbidden: ForbiddenFiles, program: str) -> None:
    """A directory of certificates that cannot be listed may have the certificate: a finding says that it cannot be
    read, and none says to write a file there."""
    write_setup(tmp_path, program)
    folder = FOLDERS[program]
    write_files(tmp_path, **{f"{folder}/ca.crt": ""})
    forbidden.paths.add(tmp_path / folder)
    findings = findings_of(program, tmp_path, SECURE, answer=UNTRUSTED)
    # The doctor reads containerd's hosts.toml before it lists the directory.
    first = f"{folder}/hosts.toml" if program == "containerd" else folder
    assert unreadable(findings) == [f"/{first} cannot be read: Permission denied"]
    (finding,) = [finding for finding in findings if finding.what in unreadable(findings)]
    assert finding.next_step == "run this command as root, or as the user who runs the client"
    assert not any(other.file.startswith(f"/{folder}/") for other in findings if other is not finding)


def test_a_certificate_in_another_directory_suffices(tmp_path: Path, forbidden: ForbiddenFiles) -> None:
    """podman searches several directories. If one of them has the certificate, no finding is about the others."""
    write_setup(tmp_path, "podman")
    write_files(tmp_path, **{f"{FOLDERS[program]}/ca.crt": "" for program in ("docker", "podman")})
    forbidden.paths.add(tmp_path / FOLDERS["podman"])
    findings = findings_of("podman", tmp_path, SECURE, answer=UNTRUSTED)
    assert unreadable(findings) == []
    assert not any("does not trust" in finding.what for finding in findings)


def test_a_directory_of_settings(tmp_path: Path, forbidden: ForbiddenFiles) -> None:
    """If a directory of settings of podman, docker's service or containerd cannot be listed, a finding says so."""
    folders = {
        "podman": "etc/containers/registries.conf.d",
        "docker": "etc/systemd/system/docker.service.d",
        "containerd": "etc/containerd/conf.d",
    }
    write_files(tmp_path, **{CONFIG: 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n'})
    for program, folder in folders.items():
        write_files(tmp_path, **{f"{folder}/a.conf": ""})
        forbidden.paths.add(tmp_path / folder)
        findings = problems_in(findings_of(program, tmp_path))
        assert unreadable(findings) == [f"/{folder} cannot be read: Permission denied"]
