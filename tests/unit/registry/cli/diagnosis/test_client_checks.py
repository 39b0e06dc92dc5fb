"""The checks of `entrepot doctor` for the configuration files of docker, containerd and podman. A finding names the
cause and the lines to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.cli.diagnosis.client_check import CHECKS, installed_programs
from registry.cli.diagnosis.client_files import ClientFiles, TargetRegistry
from registry.cli.diagnosis.finding import Level
from registry.cli.diagnosis.probe import ProbeError, ProbeResult
from registry.clients.client_setup import SETUPS, mirrored_hosts
from registry.clients.registry_address import RegistryAddress
from registry.config import Upstream
from tests.unit.registry.cli.diagnosis import client_file_texts as texts
from tests.unit.registry.cli.diagnosis.client_place import (
    CONFIG,
    DAEMON,
    HUB_FOLDER,
    PLAIN,
    SECURE,
    at_level,
    findings_of,
    problems_in,
    write_files,
)

DROP_IN = "etc/containers/registries.conf.d/50-entrepot.conf"
"""A file of podman, into which the tests write the lines of a finding."""


def test_the_files_of_the_client_command_are_right(tmp_path: Path) -> None:
    """The files that `entrepot client` prints pass all checks."""
    upstreams = [Upstream(name="docker.io", default=True), Upstream(name="ghcr.io")]
    hosts = [host for upstream in upstreams for host in mirrored_hosts(upstream)]
    for url in (PLAIN, SECURE, "http://127.0.0.1:5000"):
        root = tmp_path / url.replace("/", "_")
        for program in CHECKS:
            for name, text in SETUPS[program](RegistryAddress(url), hosts).files:
                write_files(root, **{name.lstrip("/"): text})
        write_files(root, **{CONFIG: texts.CONTAINERD_GOOD_1_7})
        for program in CHECKS:
            findings = findings_of(program, root, url, [upstream.name for upstream in upstreams])
            assert not problems_in(findings), findings
            names = [finding.what for finding in findings if "come through" in finding.what]
            assert len(names) == (1 if program == "docker" else 2), findings


DOCKER_PROBLEMS = [
    (None, "there is no /etc/docker/daemon.json", "straight from Docker Hub"),
    ("{}", "names no mirror", "straight from Docker Hub"),
    ('{"registry-mirrors": ["https://mirror.gcr.io"]}', "only other mirrors: https://mirror.gcr.io", "does not know"),
    ('{"registry-mirrors": ["https://registry.example.com:5000"]}', "the registry is at http://", "without a message"),
    ('{"registry-mirrors": ["registry.example.com:5000"]}', "is not a mirror's address", "does not start"),
    ('{"registry-mirrors": ["http://registry.example.com:5000/v2"]}', "is not a mirror's address", "not have a path"),
    ('{"registry-mirrors": "http://registry.example.com:5000"}', "is no list of URLs", "does not start"),
    ('{"registry-mirrors": ["http://registry.example.com:5000",]}', "is not valid JSON", "does not use the file"),
]
"""The text of daemon.json (None: no file), and parts of the finding."""


@pytest.mark.parametrize(("text", "problem_text", "reason_text"), DOCKER_PROBLEMS)
def test_docker_findings(tmp_path: Path, text: str | None, problem_text: str, reason_text: str) -> None:
    """The finding says why docker does not use this registry as a mirror. With the proposed daemon.json, docker uses
    the registry."""
    if text is not None:
        write_files(tmp_path, **{DAEMON: text})
    first = problems_in(findings_of("docker", tmp_path))[0]
    assert problem_text in first.what
    assert reason_text in first.why
    assert first.next_step
    if "not valid JSON" not in problem_text:
        write_files(tmp_path, **{DAEMON: first.lines})
        assert not problems_in(findings_of("docker", tmp_path)), first.lines


def test_docker_keeps_other_settings(tmp_path: Path) -> None:
    """The proposed daemon.json keeps the other settings. Other mirrors come after this registry."""
    old_settings = {
        "log-driver": "journald",
        "registry-mirrors": ["https://m.example"],
        "insecure-registries": ["10.0.0.0/8"],
    }
    write_files(tmp_path, **{DAEMON: json.dumps(old_settings)})
    assert json.loads(problems_in(findings_of("docker", tmp_path))[0].lines) == {
        "log-driver": "journald",
        "registry-mirrors": [PLAIN, "https://m.example"],
        "insecure-registries": ["registry.example.com:5000", "10.0.0.0/8"],
    }


def test_docker_needs_an_insecure_registry_for_plain_http(tmp_path: Path) -> None:
    """To pull from the registry's own host over plain HTTP, docker needs the host in `insecure-registries`. A loopback
    address needs no entry."""
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": [PLAIN]})})
    (finding,) = problems_in(findings_of("docker", tmp_path))
    assert "gave HTTP response to HTTPS client" in finding.why
    url = "http://10.1.2.3:5000"
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": [url], "insecure-registries": ["10.0.0.0/8"]})})
    assert not problems_in(findings_of("docker", tmp_path, url))
    url = "http://localhost:5000"
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": ["http://127.0.0.1:5000/"]})})
    assert not problems_in(findings_of("docker", tmp_path, url))


def test_docker_order_login_and_spelling(tmp_path: Path) -> None:
    """Another mirror before this registry is a warning. A registry that asks for a login is a warning. A misspelt key
    is a problem."""
    daemon = {"registry-mirrors": ["https://m.example", SECURE], "registry-mirror": [SECURE]}
    write_files(tmp_path, **{DAEMON: json.dumps(daemon)})
    findings = findings_of("docker", tmp_path, SECURE)
    assert "before this registry" in at_level(findings, Level.WARNING)[0].what
    assert "'registry-mirror' in /etc/docker/daemon.json is not a key" in problems_in(findings)[0].what
    write_files(tmp_path, **{DAEMON: json.dumps({"registry-mirrors": [SECURE]})})
    answer = ProbeResult(SECURE, status=401, is_registry=True, instance="x")
    (finding,) = at_level(findings_of("docker", tmp_path, SECURE, answer=answer), Level.WARNING)
    assert "moby #30880" in finding.why
    assert "entrepot grant add 'docker.io/**' pull everyone" in finding.next_step


def test_docker_needs_docker_hub_as_the_default_upstream(tmp_path: Path) -> None:
    """Docker can use the registry as a mirror only if the default upstream is Docker Hub."""
    (finding,) = problems_in(findings_of("docker", tmp_path, "http://127.0.0.1:5000", default="ghcr.io"))
    assert "default = true" in finding.next_step


@pytest.mark.parametrize("program", CHECKS)
def test_an_unknown_certificate_authority(tmp_path: Path, program: str) -> None:
    """If the client does not trust the registry's certificate, the finding names the file for the authority's
    certificate."""
    hosts = mirrored_hosts(Upstream(name="docker.io"))
    for name, text in SETUPS[program](RegistryAddress(SECURE), hosts).files:
        write_files(tmp_path, **{name.lstrip("/"): text})
    write_files(tmp_path, **{CONFIG: texts.CONTAINERD_GOOD_2_2})
    answer = ProbeResult(SECURE, ProbeError.UNTRUSTED, "unable to get local issuer certificate")
    findings = problems_in(findings_of(program, tmp_path, SECURE, answer=answer))
    assert findings
    assert all("unable to get local issuer certificate" in finding.why for finding in findings)
    if program == "containerd":
        for finding in findings:
            write_files(tmp_path, **{finding.file.lstrip("/"): finding.lines})
    else:
        write_files(tmp_path, **{findings[0].file.lstrip("/"): "PEM"})
    assert not problems_in(findings_of(program, tmp_path, SECURE, answer=answer))


CONTAINERD_PROBLEMS = [
    (None, "there is no /etc/containerd/config.toml", "as the path of one directory"),
    (texts.CONTAINERD_1_7_DEFAULT, "does not set config_path", "reads no hosts.toml"),
    (texts.CONTAINERD_IO_PACKAGE, "does not set config_path", "reads no hosts.toml"),
    (texts.CONTAINERD_2_2_DEFAULT, "a list of directories", "they ignore all hosts.toml, and say nothing"),
    (texts.CONTAINERD_MIXED, "sets config_path in the section of version 2", "does not read"),
    (texts.CONTAINERD_WITHOUT_VERSION, "no version, which means version 1", "does not read"),
    (texts.CONTAINERD_BOTH, "both config_path and registry.mirrors", "does not start"),
    (texts.CONTAINERD_INLINE_MIRRORS, "sends pulls of docker.io to https://registry-1.docker.io", ""),
    ("version = 2\n[plugins", "is not valid TOML", "does not use the file"),
]
"""The text of config.toml (None: no file), and parts of the finding."""


@pytest.mark.parametrize(("text", "what", "why"), CONTAINERD_PROBLEMS)
def test_containerd_config(tmp_path: Path, text: str | None, what: str, why: str) -> None:
    """There is a finding if, because of config.toml, containerd ignores hosts.toml when Kubernetes pulls an image."""
    write_files(tmp_path, **{f"{HUB_FOLDER}/hosts.toml": texts.HOSTS_TOML})
    if text is not None:
        write_files(tmp_path, **{CONFIG: text})
    findings = findings_of("containerd", tmp_path)
    (finding,) = problems_in(findings)
    assert what in finding.what
    assert why in finding.why
    assert finding.next_step
    assert not any("come through" in each.what for each in findings)


@pytest.mark.parametrize("text", [None, *(case[0] for case in CONTAINERD_PROBLEMS[1:6])])
def test_containerd_lines_to_write(tmp_path: Path, text: str | None) -> None:
    """The finding has a whole config.toml. With this file, pulls come through the registry."""
    write_files(tmp_path, **{f"{HUB_FOLDER}/hosts.toml": texts.HOSTS_TOML, **({CONFIG: text} if text else {})})
    (finding,) = problems_in(findings_of("containerd", tmp_path))
    write_files(tmp_path, **{finding.file.lstrip("/"): finding.lines})
    findings = findings_of("containerd", tmp_path)
    assert not problems_in(findings)
    assert any("pulls of docker.io come through" in each.what for each in findings)
    assert ("version = 3" in finding.lines) == (text is not None and "version = 3" in text)


def test_a_list_of_directories_that_works_is_a_warning(tmp_path: Path) -> None:
    """A list of directories in `config_path` works if config.toml has version 2, or if it sets
    `discard_unpacked_layers`. Then the list is only a warning."""
    write_files(tmp_path, **{f"{HUB_FOLDER}/hosts.toml": texts.HOSTS_TOML})
    version_2 = (
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/none:/etc/containerd/certs.d"\n'
    )
    for text, why in ((texts.CONTAINERD_EKS, "discard_unpacked_layers"), (version_2, "1.x reads each directory")):
        write_files(tmp_path, **{CONFIG: text})
        findings = findings_of("containerd", tmp_path)
        assert not problems_in(findings)
        assert why in at_level(findings, Level.WARNING)[0].why
        assert any("pulls of docker.io come through" in each.what for each in findings)


def test_containerd_imports(tmp_path: Path) -> None:
    """Files that config.toml imports are read as well."""
    write_files(tmp_path, **{CONFIG: 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n'})
    write_files(tmp_path, **{"etc/containerd/conf.d/a.toml": texts.CONTAINERD_GOOD_1_7})
    write_files(tmp_path, **{f"{HUB_FOLDER}/hosts.toml": texts.HOSTS_TOML})
    assert not problems_in(findings_of("containerd", tmp_path))


HOSTS_PROBLEMS = [
    ({}, "is for docker.io, and there is no _default", "straight from https://registry-1.docker.io"),
    (
        {"docker.io/ca.crt": "PEM"},
        "there is no /etc/containerd/certs.d/docker.io/hosts.toml",
        "only for certificates",
    ),
    (
        {"docker.io/hosts.toml": 'server = "https://registry-1.docker.io"\n'},
        "does not name this registry",
        "pulls images",
    ),
    (
        {"docker.io/hosts.toml": texts.HOSTS_TOML.replace("http://", "https://")},
        "names https://registry.example.com:5000, but the registry is at http://",
        "cannot connect",
    ),
    (
        {"docker.io/hosts.toml": texts.HOSTS_TOML.replace('"pull", "resolve"', '"pull"')},
        "only the capabilities pull",
        "without resolve",
    ),
    ({"docker.io/hosts.toml": f"{texts.HOSTS_TOML}  override_path = true\n"}, "sets override_path", "gets 404"),
    ({"docker.io/hosts.toml": "[host.http://x]\n"}, "is not valid TOML", ""),
]
"""Files below certs.d with their texts, and parts of the finding."""


@pytest.mark.parametrize(("files", "what", "why"), HOSTS_PROBLEMS)
def test_containerd_hosts(tmp_path: Path, files: dict[str, str], what: str, why: str) -> None:
    """There is a finding if hosts.toml does not lead to this registry. With the lines in the finding, containerd uses
    the registry."""
    write_files(tmp_path, **{CONFIG: texts.CONTAINERD_GOOD_2_2})
    write_files(tmp_path, **{f"etc/containerd/certs.d/{name}": text for name, text in files.items()})
    (finding,) = problems_in(findings_of("containerd", tmp_path))
    assert what in finding.what
    assert why in finding.why
    if finding.lines.startswith("# "):
        write_files(tmp_path, **{finding.file.lstrip("/"): finding.lines})
        assert not problems_in(findings_of("containerd", tmp_path))


def test_containerd_default_directory(tmp_path: Path) -> None:
    """`_default` applies to every host without a directory of its own. A `server` in `_default` is a warning."""
    write_files(tmp_path, **{CONFIG: texts.CONTAINERD_GOOD_2_2, f"{HUB_FOLDER}/hosts.toml": texts.HOSTS_TOML})
    (finding,) = problems_in(findings_of("containerd", tmp_path, upstreams=("docker.io", "ghcr.io")))
    assert "is for ghcr.io" in finding.what
    default = "etc/containerd/certs.d/_default/hosts.toml"
    write_files(tmp_path, **{default: texts.HOSTS_TOML.replace('server = "https://registry-1.docker.io"\n', "")})
    assert not problems_in(findings_of("containerd", tmp_path, upstreams=("docker.io", "ghcr.io")))
    write_files(tmp_path, **{default: texts.HOSTS_TOML})
    findings = at_level(findings_of("containerd", tmp_path, upstreams=("docker.io", "ghcr.io")), Level.WARNING)
    assert any("for every host that has no directory of its own" in finding.what for finding in findings)


def test_containerd_plugin_is_off(tmp_path: Path) -> None:
    """There is a warning if the plugin for Kubernetes is switched off, as in the package of Docker."""
    write_files(tmp_path, **{CONFIG: texts.CONTAINERD_IO_PACKAGE})
    assert "disabled_plugins" in at_level(findings_of("containerd", tmp_path), Level.WARNING)[0].what


MIRROR = 'location = "registry.example.com:5000/docker.io"\ninsecure = true'
PODMAN_PROBLEMS = [
    (texts.PODMAN_FEDORA, "no file of podman has a [[registry]] for docker.io", "podman pulls from"),
    (texts.PODMAN_OLD_FORMAT, "has the old format (version 1)", "mixing sysregistry v1/v2"),
    (texts.PODMAN_GOOD.replace(f"{MIRROR}", MIRROR.partition("\n")[0]), "lacks insecure = true", "tries TLS"),
    (texts.PODMAN_GOOD.replace("5000/docker.io", "5000/hub"), "has the wrong path", "below registry.example.com:5000/"),
    (texts.PODMAN_GOOD.replace('"registry.example', '"http://registry.example'), "has location = 'http://", "scheme"),
    (texts.PODMAN_GOOD.replace('prefix = "docker.io"', 'blocked = true\nprefix = "docker.io"'), "blocks docker.io", ""),
    (
        texts.PODMAN_GOOD.replace('prefix = "docker.io"', 'mirror-by-digest-only = true\nprefix = "docker.io"'),
        "only for pulls by digest",
        "tags are pulled from",
    ),
    (texts.PODMAN_GOOD.replace(f"[[registry.mirror]]\n{MIRROR}", ""), "has no mirror for docker.io", ""),
    ("[[registry]\n", "is not valid TOML", ""),
]
"""The text of registries.conf, and parts of the finding."""


@pytest.mark.parametrize(("text", "what", "why"), PODMAN_PROBLEMS)
def test_podman(tmp_path: Path, text: str, what: str, why: str) -> None:
    """There is a finding if registries.conf does not lead to this registry."""
    write_files(tmp_path, **{"etc/containers/registries.conf": text})
    finding = problems_in(findings_of("podman", tmp_path))[0]
    assert what in finding.what
    assert why in finding.why
    if finding.lines and "old format" not in what and "blocks" not in what:
        write_files(tmp_path, **{DROP_IN: finding.lines})
        assert not problems_in(findings_of("podman", tmp_path)), finding


def test_podman_uses_the_later_file(tmp_path: Path) -> None:
    """A file in registries.conf.d replaces an entry with the same prefix. An entry with a longer prefix and no mirror
    is a warning."""
    write_files(tmp_path, **{"etc/containers/registries.conf": texts.PODMAN_GOOD})
    assert not problems_in(findings_of("podman", tmp_path))
    later = '[[registry]]\nlocation = "docker.io"\n'
    write_files(tmp_path, **{"etc/containers/registries.conf.d/99-other.conf": later})
    assert "99-other.conf has no mirror" in problems_in(findings_of("podman", tmp_path))[0].what
    longer = '[[registry]]\nlocation = "docker.io/library"\n'
    write_files(tmp_path, **{"etc/containers/registries.conf.d/99-other.conf": longer})
    findings = findings_of("podman", tmp_path)
    assert not problems_in(findings)
    assert "the longest prefix counts" in at_level(findings, Level.WARNING)[0].why


def test_a_registry_that_does_not_respond(tmp_path: Path) -> None:
    """If nothing listens at the registry's address, the first finding says so."""
    answer = ProbeResult(PLAIN, ProbeError.REFUSED, "Connection refused")
    first = findings_of("podman", tmp_path, answer=answer)[0]
    assert "nothing listens there" in first.what
    assert "start the server" in first.next_step


def test_a_registry_that_requires_client_certificates(tmp_path: Path) -> None:
    """A registry that requires a client certificate is only a warning, because the client can have one."""
    answer = ProbeResult(SECURE, ProbeError.CLIENT_CERTIFICATE, "tlsv13 alert certificate required")
    first = findings_of("podman", tmp_path, SECURE, answer=answer)[0]
    assert (first.level, "it requires a client certificate" in first.what) == (Level.WARNING, True)
    assert "curl --cert" in first.next_step
    assert "http://" not in first.next_step


def test_installed_programs(tmp_path: Path) -> None:
    """Only programs with a file on the machine are checked."""
    assert installed_programs(tmp_path) == []
    write_files(tmp_path, **{CONFIG: "", "usr/bin/podman": ""})
    assert installed_programs(tmp_path) == ["containerd", "podman"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A directory in place of a file is reported as a file that cannot be read."""
    (tmp_path / DAEMON).mkdir(parents=True)
    files = ClientFiles("docker", tmp_path)
    hosts = mirrored_hosts(Upstream(name="docker.io"))
    address = RegistryAddress(PLAIN)
    target = TargetRegistry(address, hosts, "docker.io", SETUPS["docker"](address, hosts))
    (finding,) = CHECKS["docker"](files, target)
    assert "cannot be read" in finding.what


WRONG_TYPES = [
    ('version = "two"\n', "version in /etc/containerd/config.toml is no number"),
    ("plugins = 3\n", "plugins in /etc/containerd/config.toml does not have a table for each plugin"),
    ("[plugins]\na = 3\n", "plugins in /etc/containerd/config.toml does not have a table for each plugin"),
    ("imports = 3\n", "imports in /etc/containerd/config.toml is no list"),
    ('imports = ["/etc/containerd/more.toml"]\n', "plugins in /etc/containerd/more.toml does not have a table"),
    ('imports = ["", "a**b"]\n', "does not set config_path"),
    ('[plugins.cri.registry]\nmirrors = { "docker.io" = 3 }\n', "sends pulls of docker.io to no mirror"),
    ('[plugins.cri.registry.mirrors."docker.io"]\nendpoint = 3\n', "sends pulls of docker.io to no mirror"),
    ('[plugins.cri.registry.mirrors."docker.io"]\nendpoint = ["http://[::1"]\n', "to http://[::1"),
]


@pytest.mark.parametrize(("text", "what"), WRONG_TYPES)
def test_wrong_types_in_a_containerd_config(tmp_path: Path, text: str, what: str) -> None:
    """A value of a type that containerd does not accept is a finding."""
    write_files(tmp_path, **{CONFIG: text, "etc/containerd/more.toml": 'plugins = ["a"]\n'})
    assert any(what in finding.what for finding in problems_in(findings_of("containerd", tmp_path)))


def test_a_mirror_of_docker_that_is_not_a_url(tmp_path: Path) -> None:
    """A mirror that is not a URL is a finding. The proposed file does not contain the mirror."""
    write_files(tmp_path, **{DAEMON: '{"registry-mirrors": ["http://[::1"]}'})
    (finding,) = (
        each for each in problems_in(findings_of("docker", tmp_path)) if "is not a mirror's address" in each.what
    )
    assert "[::1" not in finding.lines


def test_the_search_for_programs_survives_system_errors(tmp_path: Path) -> None:
    """If system calls fail, the search for programs finds none."""
    assert installed_programs(tmp_path / ("a" * 300)) == []
