"""The doctor's check of docker's proxy settings. It warns if docker sends its requests for this registry through a
proxy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.cli.diagnosis.client_check import CHECKS
from registry.cli.diagnosis.client_files import ClientFiles, TargetRegistry
from registry.cli.diagnosis.docker_proxies import bypasses_proxy
from registry.cli.diagnosis.finding import Level
from registry.clients.client_setup import SETUPS, mirrored_hosts
from registry.clients.registry_address import RegistryAddress
from registry.config import Upstream
from tests.unit.registry.cli.diagnosis.client_place import (
    DAEMON,
    SECURE,
    at_level,
    findings_of,
    problems_in,
    write_files,
)

PROXY = "http://me:secret@proxy.example:3128"
UNIT_FOLDER = "etc/systemd/system/docker.service.d"
PROXIES = [
    ({DAEMON: {"proxies": {"https-proxy": PROXY}}}, "/etc/docker/daemon.json"),
    ({f"{UNIT_FOLDER}/a.conf": f'[Service]\nEnvironment="HTTPS_PROXY={PROXY}" A=1\n'}, f"/{UNIT_FOLDER}/a.conf"),
    (
        {
            f"{UNIT_FOLDER}/a.conf": "[Service]\nEnvironmentFile=-/etc/default/docker\n",
            "etc/default/docker": f"# proxies\nhttps_proxy={PROXY}\n",
        },
        "/etc/default/docker",
    ),
]
"""Files with a proxy setting, and the file that the finding names."""


@pytest.mark.parametrize(("files", "source"), PROXIES, ids=["daemon.json", "drop-in", "environment file"])
@pytest.mark.slow
def test_a_proxy_for_the_registry_is_a_warning(tmp_path: Path, files: dict[str, Any], source: str) -> None:
    """If docker uses a proxy for this registry, the finding names the file of the setting, and does not show the
    proxy's password. With the lines in the finding, docker no longer uses the proxy for this registry."""
    daemon = {"registry-mirrors": [SECURE], **files.get(DAEMON, {})}
    write_files(tmp_path, **{**files, DAEMON: json.dumps(daemon)})
    (finding,) = at_level(findings_of("docker", tmp_path, SECURE), Level.WARNING)
    expected = f"{source} makes docker ask the proxy http://proxy.example:3128 for registry.example.com"
    assert finding.what == expected
    assert "secret" not in finding.next_step
    if finding.lines:
        write_files(tmp_path, **{finding.file.lstrip("/"): finding.lines})
    else:
        with (tmp_path / source.lstrip("/")).open("a") as file:
            file.write("NO_PROXY=registry.example.com\n")
    assert not at_level(findings_of("docker", tmp_path, SECURE), Level.WARNING)
    assert not problems_in(findings_of("docker", tmp_path, SECURE))


def test_proxies_that_do_not_matter(tmp_path: Path) -> None:
    """There is no finding in two cases: daemon.json sets its own proxies, so that the environment has no effect; or a
    later drop-in file removes the proxy. Here the proxy in daemon.json is for plain HTTP, and the registry uses
    HTTPS."""
    daemon: dict[str, Any] = {"registry-mirrors": [SECURE], "proxies": {"http-proxy": PROXY}}
    write_files(tmp_path, **{f"{UNIT_FOLDER}/a.conf": f"[Service]\nEnvironment=HTTPS_PROXY={PROXY}\n"})
    write_files(tmp_path, **{DAEMON: json.dumps(daemon)})
    assert not at_level(findings_of("docker", tmp_path, SECURE), Level.WARNING)
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": [SECURE]})})
    assert at_level(findings_of("docker", tmp_path, SECURE), Level.WARNING)
    write_files(tmp_path, **{f"{UNIT_FOLDER}/b.conf": "[Service]\nEnvironment=\n"})
    assert not at_level(findings_of("docker", tmp_path, SECURE), Level.WARNING)


def test_proxies_in_the_home_directory(tmp_path: Path) -> None:
    """The proxies in ~/.docker/config.json are for containers and builds, and not for docker's own pulls. The warning
    says so."""
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": [SECURE]})})
    hosts = mirrored_hosts(Upstream(name="docker.io"))
    address = RegistryAddress(SECURE)
    target = TargetRegistry(address, hosts, "docker.io", SETUPS["docker"](address, hosts))
    for exempt, count in (("", 1), ("*.example.com", 0)):
        proxies = {"default": {"httpsProxy": PROXY, "noProxy": exempt}}
        write_files(tmp_path, **{"home/.docker/config.json": json.dumps({"proxies": proxies})})
        findings = at_level(CHECKS["docker"](ClientFiles("docker", tmp_path, tmp_path / "home"), target), Level.WARNING)
        assert ["programs in containers" in finding.why for finding in findings] == [True] * count


@pytest.mark.parametrize(
    ("no_proxy", "exempt", "proxied"),
    [
        ("example.com", ["example.com", "a.example.com"], ["badexample.com", "example.com.org", "192.0.2.1"]),
        (".example.com", ["a.example.com"], ["example.com"]),
        ("*.example.com", ["a.example.com"], ["example.com"]),
        ("192.0.2.0/24, 2001:db8::1", ["192.0.2.1", "2001:db8::1"], ["198.51.100.1", "a.example"]),
        ("example.com:5000", ["example.com"], []),
        ("example.com:5001", [], ["example.com"]),
        ("[2001:db8::1]:5000,1.2.3.4/x", ["2001:db8::1"], ["1.2.3.4"]),
        ("*", ["a.example", "192.0.2.1"], []),
        ("", ["localhost", "127.0.0.1"], ["example.com"]),
    ],
)
def test_hosts_without_a_proxy(no_proxy: str, exempt: list[str], proxied: list[str]) -> None:
    """NO_PROXY is parsed by the rules of Go's library. The hosts in `exempt` use no proxy at port 5000, and those in
    `proxied` do."""
    assert [host for host in [*exempt, *proxied] if bypasses_proxy(no_proxy, host, 5000)] == exempt
