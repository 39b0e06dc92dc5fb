"""Tests of `entrepot client PROGRAM`, which prints settings with which a client program (docker, containerd, podman,
BuildKit) uses this registry as a mirror."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from registry.clients.registry_address import RegistryAddress
from tests.fakes.commands import entrepot, error_line

REMOTE = "http://registry.example.com:5000"
TWO_UPSTREAMS = """
[[upstream]]
name = "docker.io"
default = true
[[upstream]]
name = "ghcr.io"
"""


def client_output(folder: Path, *args: str, hint: str = "") -> str:
    """Returns the output of the command. Checks that stderr has only comments, and that `hint` is in them."""
    result = entrepot("client", *args, folder=folder)
    assert result.returncode == 0, result.stderr
    assert hint in result.stderr
    assert all(line.startswith("# ") for line in result.stderr.splitlines())
    return result.stdout


def toml(folder: Path, *args: str) -> dict[str, Any]:
    """Returns the output of the command, parsed as TOML."""
    return tomllib.loads(client_output(folder, *args))


def test_docker_on_this_machine(tmp_path: Path) -> None:
    """docker accepts plain HTTP at loopback addresses, so the printed daemon.json has only the mirror. stdout has
    nothing but the JSON document."""
    document = json.loads(client_output(tmp_path, "docker", hint="systemctl reload docker"))
    assert document == {"registry-mirrors": ["http://127.0.0.1:5000"]}


def test_docker_on_other_machines(tmp_path: Path) -> None:
    """For a registry with plain HTTP on another machine, daemon.json has to allow plain HTTP. For HTTPS, it has only
    the mirror."""
    document = json.loads(client_output(tmp_path, "docker", "--url", "registry.example.com:5000"))
    assert document == {"registry-mirrors": [REMOTE], "insecure-registries": ["registry.example.com:5000"]}
    document = json.loads(client_output(tmp_path, "docker", "--url", "https://registry.example.com"))
    assert document == {"registry-mirrors": ["https://registry.example.com"]}


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("http://127.0.0.1:5000", True),
        ("http://127.9.9.9", True),
        ("http://localhost:5000", True),
        ("http://[::1]:5000", False),
        ("http://10.0.0.1:5000", False),
        ("http://localhost.example.com", False),
    ],
)
def test_where_docker_accepts_plain_http(url: str, trusted: bool) -> None:
    """docker accepts plain HTTP at 127.0.0.0/8 and `localhost`. Older versions do not accept it at the IPv6 loopback
    address."""
    assert RegistryAddress(url).docker_accepts_plain_http is trusted


def test_docker_has_no_mirrors_of_other_upstreams(tmp_path: Path) -> None:
    """docker has a setting for mirrors of Docker Hub only. For other upstreams, a hint says how to name their
    images."""
    hint = f"docker pull {REMOTE.partition('//')[2]}/ghcr.io/NAME"
    document = json.loads(client_output(tmp_path, "docker", "--url", REMOTE, "--upstream", "ghcr.io", hint=hint))
    assert document == {"insecure-registries": ["registry.example.com:5000"]}


def test_docker_needs_hub_to_be_the_default(tmp_path: Path) -> None:
    """If the settings have another default upstream than Docker Hub, docker would get wrong images for names without a
    host. So the command fails."""
    (tmp_path / "a.toml").write_text('[[upstream]]\nname = "docker.io"\n[[upstream]]\nname = "ghcr.io"\ndefault = true')
    error = error_line(entrepot("client", "docker", "--config", "a.toml", folder=tmp_path), 2)
    assert "set `default = true` for the upstream docker.io" in error


def test_containerd(tmp_path: Path) -> None:
    """The output has one hosts.toml for each upstream, which begins with a comment with the path of the file. With
    --upstream, the output is one valid hosts.toml. For Docker Hub, it has the real address of the registry."""
    (tmp_path / "a.toml").write_text(TWO_UPSTREAMS)
    all_hosts_text = client_output(
        tmp_path, "containerd", "--config", "a.toml", "--url", REMOTE, hint="--upstream NAME"
    )
    paths = [f"# /etc/containerd/certs.d/{name}/hosts.toml" for name in ("docker.io", "ghcr.io")]
    assert [line for line in all_hosts_text.splitlines() if line.startswith("# /")] == paths
    for name, server in (("docker.io", "https://registry-1.docker.io"), ("ghcr.io", "https://ghcr.io")):
        host_settings = toml(tmp_path, "containerd", "--config", "a.toml", "--url", REMOTE, "--upstream", name)
        assert host_settings == {"server": server, "host": {REMOTE: {"capabilities": ["pull", "resolve"]}}}


UPSTREAM_WITH_ALIASES = """
[[upstream]]
name = "corp"
endpoints = ["http://registry.corp:5000"]
aliases = ["registry.corp:5000", "old.corp"]
[[upstream]]
name = "ghcr.io"
"""


def test_upstream_with_aliases(tmp_path: Path) -> None:
    """Names of images begin with an alias of the upstream, such as `registry.corp:5000`, and not with the upstream's
    name `corp`. So the printed files are for the aliases. Only the path at the mirror has the name `corp`."""
    (tmp_path / "a.toml").write_text(UPSTREAM_WITH_ALIASES)
    options = ("--config", "a.toml", "--url", REMOTE)
    files = client_output(tmp_path, "containerd", *options)
    paths = [f"# /etc/containerd/certs.d/{name}/hosts.toml" for name in ("registry.corp:5000", "old.corp", "ghcr.io")]
    assert [line for line in files.splitlines() if line.startswith("# /")] == paths
    for name, server in (("registry.corp:5000", "http://registry.corp:5000"), ("old.corp", "https://old.corp")):
        hosts_toml = toml(tmp_path, "containerd", *options, "--upstream", name)
        assert hosts_toml == {"server": server, "host": {REMOTE: {"capabilities": ["pull", "resolve"]}}}
    assert client_output(tmp_path, "containerd", *options, "--upstream", "corp").count("[host.") == 2
    host = "registry.example.com:5000"
    document = toml(tmp_path, "podman", *options, "--upstream", "registry.corp:5000")["registry"]
    mirror = {"location": f"{host}/corp", "insecure": True}
    assert document[0] == {"prefix": "registry.corp:5000", "location": "registry.corp:5000", "mirror": [mirror]}
    document = toml(tmp_path, "buildkit", *options, "--upstream", "registry.corp:5000")["registry"]
    assert document == {"registry.corp:5000": {"mirrors": [host]}, host: {"http": True}}
    client_output(tmp_path, "docker", *options, "--upstream", "corp", hint=f"docker pull {host}/corp/NAME")


def test_podman(tmp_path: Path) -> None:
    """One file has all upstreams. The location of the mirror contains the upstream's name, and `insecure` is set if the
    mirror has plain HTTP."""
    (tmp_path / "a.toml").write_text(TWO_UPSTREAMS)
    host = "registry.example.com:5000"
    mirrored = [
        {"prefix": name, "location": name, "mirror": [{"location": f"{host}/{name}", "insecure": True}]}
        for name in ("docker.io", "ghcr.io")
    ]
    document = toml(tmp_path, "podman", "--config", "a.toml", "--url", REMOTE)
    assert document == {"registry": [*mirrored, {"location": host, "insecure": True}]}
    document = toml(tmp_path, "podman", "--url", "https://registry.example.com")
    mirror = {"location": "registry.example.com/docker.io"}
    assert document == {"registry": [{"prefix": "docker.io", "location": "docker.io", "mirror": [mirror]}]}


def test_buildkit(tmp_path: Path) -> None:
    """In the printed buildkitd.toml, each upstream has this registry as its mirror. Plain HTTP is allowed for this
    registry's host only."""
    (tmp_path / "a.toml").write_text(TWO_UPSTREAMS)
    host = "registry.example.com:5000"
    mirrors = {"mirrors": [host]}
    document = toml(tmp_path, "buildkit", "--config", "a.toml", "--url", REMOTE)
    assert document == {"registry": {"docker.io": mirrors, "ghcr.io": mirrors, host: {"http": True}}}
    document = toml(tmp_path, "buildkit", "--url", "https://registry.example.com")
    assert document == {"registry": {"docker.io": {"mirrors": ["registry.example.com"]}}}


def test_address_from_the_settings(tmp_path: Path) -> None:
    """The address in the output is that of `public_url`, or else that of `listen`. If `listen` is a wildcard address,
    the output has localhost, with a hint."""
    assert "http://127.0.0.1:7000" in client_output(tmp_path, "docker", "--listen", "127.0.0.1:7000")
    document = client_output(tmp_path, "docker", "--listen", "0.0.0.0:7000", hint="clients on the same machine")
    assert json.loads(document)["registry-mirrors"] == ["http://localhost:7000"]
    (tmp_path / "a.toml").write_text('public_url = "https://registry.example.com"')
    document = client_output(tmp_path, "docker", "--config", "a.toml")
    assert json.loads(document)["registry-mirrors"] == ["https://registry.example.com"]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["docker", "--listen", "127.0.0.1:0"], "give the server's address with --url"),
        (["docker", "--url", "ftp://x"], "--url: 'ftp://x' is not an address like"),
        (["docker", "--url", "https://x/registry"], "--url: 'https://x/registry' must end after the host and port"),
        (["docker", "--url", "http://"], "--url: 'http://' is not an address like"),
        (["podman", "--upstream", "Docker Hub"], "--upstream: 'Docker Hub' is not a name like docker.io"),
        (["podman", "--upstream", "registry-1.docker.io"], "is a host of Docker Hub; write 'docker.io'"),
        (["podman", "--config", "two.toml", "--upstream", "quay.io"], "valid values are: docker.io, ghcr.io"),
    ],
)
def test_wrong_arguments_get_an_error_of_one_line(tmp_path: Path, args: list[str], error: str) -> None:
    """With wrong arguments, the command fails with one line, and prints nothing to stdout."""
    (tmp_path / "two.toml").write_text(TWO_UPSTREAMS)
    assert error in error_line(entrepot("client", *args, folder=tmp_path), 2)


def test_options_of_serve_are_accepted(tmp_path: Path) -> None:
    """The command accepts the options of `entrepot serve`, and its output is then for a server with these options."""
    serve_options = ["--data", str(tmp_path / "data"), "--mirror", "quay.io", "--listen", "127.0.0.1:5001"]
    document = tomllib.loads(client_output(tmp_path, "podman", *serve_options))
    (mirrored,) = (registry for registry in document["registry"] if registry.get("prefix") == "quay.io")
    assert mirrored["mirror"][0]["location"] == "127.0.0.1:5001/quay.io"
    assert not (tmp_path / "data").exists()
