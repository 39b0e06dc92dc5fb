"""The files, commands and hints that the set-up page shows for each client program. The tests parse every file, for
several kinds of registry."""

from __future__ import annotations

import itertools
import json
import tomllib
from dataclasses import replace
from typing import Any

import pytest
import yaml

from registry.clients.client_setup import ClientSetup, MirroredHost
from registry.clients.more_setups import PROGRAM_SETUPS
from registry.clients.registry_address import RegistryAddress

HTTP = RegistryAddress("http://registry.example.com:5000")
HTTPS = RegistryAddress("https://registry.example.com")
HUB = MirroredHost("docker.io", "docker.io", "https://registry-1.docker.io")
GITHUB = MirroredHost("ghcr.io", "ghcr.io", "https://ghcr.io")
NON_DEFAULT_HUB = replace(HUB, has_short_names=False)
"""Docker Hub in a registry with another default upstream. The default upstream serves image names without a host, such
as `ubuntu`."""
GITLAB_KEYWORDS = {
    *("image", "services", "stages", "types", "before_script", "after_script", "variables", "cache", "include"),
    *("default", "workflow", "spec", "pages", "pages:deploy", "true", "false", "nil"),
}
"""Names that no job can have, or that mean a special job (GitLab, "CI/CD YAML syntax reference" and "Jobs")."""


def parse(path: str, content: str) -> Any:
    """Returns the parsed content of a file. The extension of its path tells the format."""
    if path.endswith(".json"):
        return json.loads(content)
    return yaml.safe_load(content) if path.endswith((".yaml", ".yml")) else tomllib.loads(content)


def parsed_files(setup: ClientSetup) -> dict[str, Any]:
    """Returns the parsed content of each file."""
    return {path: parse(path, content) for path, content in setup.files}


def hints(program: str, address: RegistryAddress, hosts: list[MirroredHost], has_accounts: bool) -> str:
    """Returns all hints for a client, one in each line."""
    return "\n".join(map(str, PROGRAM_SETUPS[program](address, hosts, has_accounts).hints))


@pytest.mark.parametrize("program", PROGRAM_SETUPS)
def test_every_file_can_be_parsed(program: str) -> None:
    """Every file can be parsed: over http and https, with and without mirrors, with and without accounts. Every
    placeholder in a hint is filled in. A login is mentioned only if the registry has accounts."""
    host_lists: tuple[list[MirroredHost], ...] = ([], [HUB], [NON_DEFAULT_HUB, GITHUB])
    for address, hosts, has_accounts in itertools.product((HTTP, HTTPS), host_lists, (True, False)):
        setup = PROGRAM_SETUPS[program](address, hosts, has_accounts)
        parsed_files(setup)
        text = " ".join([*(content for _, content in setup.files), *setup.commands, *map(str, setup.hints)])
        assert "{" not in " ".join(map(str, setup.hints))
        mentions_login = any(word in text for word in ("login", "TOKEN", "token", "auth:"))
        assert mentions_login == has_accounts, (address.url, hosts, text)


def test_the_file_of_k3s() -> None:
    """The mirrors lead to this registry. The registry's own images need an entry only over plain HTTP. A login is
    needed only if there are accounts."""
    registries = parsed_files(PROGRAM_SETUPS["k3s"](HTTP, [HUB, GITHUB], True))["/etc/rancher/k3s/registries.yaml"]
    this_registry = {"endpoint": [HTTP.url]}
    assert registries == {
        "mirrors": {"docker.io": this_registry, "ghcr.io": this_registry, HTTP.host: this_registry},
        "configs": {HTTP.host: {"auth": {"username": "NAME", "password": "TOKEN"}}},
    }
    assert parsed_files(PROGRAM_SETUPS["k3s"](HTTPS, [HUB], False)) == {
        "/etc/rancher/k3s/registries.yaml": {"mirrors": {"docker.io": {"endpoint": [HTTPS.url]}}}
    }
    assert PROGRAM_SETUPS["k3s"](HTTPS, [], False) == ClientSetup((), ())


def test_the_files_of_kind() -> None:
    """The configuration of kind (Kubernetes in Docker) mounts the directory with containerd's files into the node."""
    contents = parsed_files(PROGRAM_SETUPS["kind"](HTTP, [HUB], False))
    (node,) = contents["kind.yaml"]["nodes"]
    assert node["extraMounts"] == [{"hostPath": "./certs.d", "containerPath": "/etc/containerd/certs.d"}]
    assert set(contents) == {"kind.yaml", "certs.d/docker.io/hosts.toml", f"certs.d/{HTTP.host}/hosts.toml"}
    assert "loopback" in hints("kind", RegistryAddress("http://localhost:5000"), [HUB], False)
    assert PROGRAM_SETUPS["kind"](HTTPS, [], False) == ClientSetup((), (), ("kind create cluster",))


def test_the_files_of_containerd_and_docker() -> None:
    """containerd needs a file for this registry's own images only over plain HTTP. docker needs no file if the registry
    uses https and mirrors nothing."""
    own = f"/etc/containerd/certs.d/{HTTP.host}/hosts.toml"
    contents = parsed_files(PROGRAM_SETUPS["containerd"](HTTP, [HUB], False))
    assert contents[own] == {"server": HTTP.url, "host": {HTTP.url: {"capabilities": ["pull", "resolve", "push"]}}}
    assert set(parsed_files(PROGRAM_SETUPS["containerd"](HTTPS, [HUB], False))) == {
        "/etc/containerd/certs.d/docker.io/hosts.toml"
    }
    assert PROGRAM_SETUPS["docker"](HTTPS, [], False).files == ()
    text = hints("containerd", HTTPS, [HUB], False)
    for section in ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"):
        assert f'[plugins."{section}".registry]' in text


@pytest.mark.parametrize("program", ["docker", "nas", "ci"])
def test_hints_for_upstreams_that_docker_cannot_mirror(program: str) -> None:
    """docker can use a mirror only for Docker Hub, and only if Docker Hub is the default upstream. For other upstreams,
    a hint says to write the upstream's name in front of the image."""
    for address in (HTTP, HTTPS):
        assert f"docker pull {address.host}/ghcr.io/NAME" in hints(program, address, [GITHUB], False)
        setup = PROGRAM_SETUPS[program](address, [NON_DEFAULT_HUB], True)
        assert not any("registry-mirror" in content for _, content in setup.files)
        text = hints(program, address, [NON_DEFAULT_HUB], True)
        assert f"docker pull {address.host}/docker.io/library/ubuntu" in text
        assert "sends no login" not in text
        assert "docker.io/library" not in hints(program, address, [HUB], False)
    assert "daemon.json" not in hints("docker", HTTPS, [GITHUB], False)


@pytest.mark.parametrize("program", ["docker", "nas", "ci", "containerd", "kind"])
def test_mirrors_that_need_open_pulls(program: str) -> None:
    """docker and containerd send no login to a mirror. If the registry has accounts, a hint has the command that lets
    everyone pull from the upstream."""
    both = [HUB, GITHUB]
    for host in both if program in ("containerd", "kind") else [HUB]:
        assert f"entrepot grant add '{host.upstream}/**' pull everyone" in hints(program, HTTPS, both, True)
    assert "sends no login" not in hints(program, HTTPS, both, False)


@pytest.mark.parametrize("program", ["k3s", "kind", "containerd"])
def test_a_hint_says_how_to_create_a_robot(program: str) -> None:
    """If the registry has accounts, a hint has the commands that create a robot account NAME, its TOKEN, and its
    rights."""
    text = hints(program, HTTP, [], True)
    for command in ("robot add NAME", "token add NAME", "grant add 'team/**' pull,push robot:NAME"):
        assert f"entrepot {command}" in text


def test_ci_jobs() -> None:
    """GitLab's docker service uses the mirror and shares its certificates with the job. In the GitHub workflow,
    BuildKit's settings name the mirror, even if Docker Hub is not the default upstream."""
    setup = PROGRAM_SETUPS["ci"](HTTP, [HUB], True)
    gitlab, github = (parse(path, content) for path, content in setup.files)
    ((name, job),) = gitlab.items()
    assert name not in GITLAB_KEYWORDS
    assert job["variables"] == {"DOCKER_TLS_CERTDIR": "/certs"}
    (service,) = job["services"]
    assert service["command"] == ["--registry-mirror", HTTP.url, "--insecure-registry", HTTP.host]
    steps = github["jobs"]["image"]["steps"]
    assert tomllib.loads(steps[1]["with"]["buildkitd-config-inline"])["registry"]["docker.io"]["mirrors"] == [HTTP.host]
    assert [step["uses"].partition("@")[0] for step in steps] == [
        "actions/checkout",
        "docker/setup-buildx-action",
        "docker/login-action",
        "docker/build-push-action",
    ]
    assert '"insecure-registries"' in hints("ci", HTTP, [HUB], True)
    assert '"insecure-registries"' not in hints("ci", HTTPS, [HUB], True) + hints("ci", HTTP, [HUB], False)
    assert '"/certs/client"' in hints("ci", HTTPS, [], False)
    _, (_, content) = PROGRAM_SETUPS["ci"](HTTPS, [NON_DEFAULT_HUB], False).files
    assert "docker.io" in content
