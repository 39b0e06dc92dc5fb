"""`entrepot client PROGRAM`: what it prints, and that the output is valid for the program."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from registry.clients.registry_address import RegistryAddress
from tests.fakes.commands import entrepot, error_line

REMOTE = "http://registry.example.com:5000"
TWO = """
[[upstream]]
name = "docker.io"
default = true
[[upstream]]
name = "ghcr.io"
"""


def printed(folder: Path, *args: str, said: str = "") -> str:
    done = entrepot("client", *args, folder=folder)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert all(line.startswith("# ") for line in done.stderr.splitlines())
    return done.stdout


def toml(folder: Path, *args: str) -> dict[str, Any]:
    return tomllib.loads(printed(folder, *args))


def test_docker_on_this_machine(tmp_path: Path) -> None:
    """docker trusts plain HTTP on loopback addresses, so daemon.json sets the mirror alone. stdout is pure JSON."""
    shown = json.loads(printed(tmp_path, "docker", said="systemctl reload docker"))
    assert shown == {"registry-mirrors": ["http://127.0.0.1:5000"]}


def test_docker_on_other_machines(tmp_path: Path) -> None:
    """On other machines, daemon.json has to allow plain HTTP. HTTPS needs no entry."""
    shown = json.loads(printed(tmp_path, "docker", "--url", "registry.example.com:5000"))
    assert shown == {"registry-mirrors": [REMOTE], "insecure-registries": ["registry.example.com:5000"]}
    shown = json.loads(printed(tmp_path, "docker", "--url", "https://registry.example.com"))
    assert shown == {"registry-mirrors": ["https://registry.example.com"]}


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
def test_what_docker_trusts(url: str, trusted: bool) -> None:
    """docker trusts 127.0.0.0/8 and `localhost`. Older versions do not trust the IPv6 loopback address."""
    assert RegistryAddress(url).is_trusted_by_docker is trusted


def test_docker_mirrors_hub_only(tmp_path: Path) -> None:
    """docker has no setting for mirrors of other upstreams. A hint says how to name their images."""
    hint = f"docker pull {REMOTE.partition('//')[2]}/ghcr.io/NAME"
    shown = json.loads(printed(tmp_path, "docker", "--url", REMOTE, "--upstream", "ghcr.io", said=hint))
    assert shown == {"insecure-registries": ["registry.example.com:5000"]}


def test_docker_needs_hub_to_be_the_default(tmp_path: Path) -> None:
    """If names without a host mean another upstream, docker would get wrong images, so the command refuses."""
    (tmp_path / "a.toml").write_text('[[upstream]]\nname = "docker.io"\n[[upstream]]\nname = "ghcr.io"\ndefault = true')
    said = error_line(entrepot("client", "docker", "--config", "a.toml", folder=tmp_path), 2)
    assert "set default = true for the upstream docker.io" in said


def test_containerd(tmp_path: Path) -> None:
    """Each upstream has its own file, which begins with its path. One file alone is a valid hosts.toml with Docker
    Hub's real address."""
    (tmp_path / "a.toml").write_text(TWO)
    both = printed(tmp_path, "containerd", "--config", "a.toml", "--url", REMOTE, said="--upstream NAME")
    paths = [f"# /etc/containerd/certs.d/{name}/hosts.toml" for name in ("docker.io", "ghcr.io")]
    assert [line for line in both.splitlines() if line.startswith("# /")] == paths
    for name, server in (("docker.io", "https://registry-1.docker.io"), ("ghcr.io", "https://ghcr.io")):
        one = toml(tmp_path, "containerd", "--config", "a.toml", "--url", REMOTE, "--upstream", name)
        assert one == {"server": server, "host": {REMOTE: {"capabilities": ["pull", "resolve"]}}}


CORP = """
[[upstream]]
name = "corp"
endpoints = ["http://registry.corp:5000"]
aliases = ["registry.corp:5000", "old.corp"]
[[upstream]]
name = "ghcr.io"
"""


def test_an_upstream_with_a_port(tmp_path: Path) -> None:
    """Clients know the upstream by its alias, a host with a port. The files are for the alias, with the endpoint at
    this host as the server. Only the path of the mirror has the upstream's name."""
    (tmp_path / "a.toml").write_text(CORP)
    here = ("--config", "a.toml", "--url", REMOTE)
    files = printed(tmp_path, "containerd", *here)
    paths = [f"# /etc/containerd/certs.d/{name}/hosts.toml" for name in ("registry.corp:5000", "old.corp", "ghcr.io")]
    assert [line for line in files.splitlines() if line.startswith("# /")] == paths
    for name, server in (("registry.corp:5000", "http://registry.corp:5000"), ("old.corp", "https://old.corp")):
        one = toml(tmp_path, "containerd", *here, "--upstream", name)
        assert one == {"server": server, "host": {REMOTE: {"capabilities": ["pull", "resolve"]}}}
    assert printed(tmp_path, "containerd", *here, "--upstream", "corp").count("[host.") == 2
    host = "registry.example.com:5000"
    shown = toml(tmp_path, "podman", *here, "--upstream", "registry.corp:5000")["registry"]
    mirror = {"location": f"{host}/corp", "insecure": True}
    assert shown[0] == {"prefix": "registry.corp:5000", "location": "registry.corp:5000", "mirror": [mirror]}
    shown = toml(tmp_path, "buildkit", *here, "--upstream", "registry.corp:5000")["registry"]
    assert shown == {"registry.corp:5000": {"mirrors": [host]}, host: {"http": True}}
    printed(tmp_path, "docker", *here, "--upstream", "corp", said=f"docker pull {host}/corp/NAME")


def test_podman(tmp_path: Path) -> None:
    """One file holds all upstreams. The mirror's location has the upstream's name, and `insecure` is set for plain
    HTTP."""
    (tmp_path / "a.toml").write_text(TWO)
    host = "registry.example.com:5000"
    mirrored = [
        {"prefix": name, "location": name, "mirror": [{"location": f"{host}/{name}", "insecure": True}]}
        for name in ("docker.io", "ghcr.io")
    ]
    shown = toml(tmp_path, "podman", "--config", "a.toml", "--url", REMOTE)
    assert shown == {"registry": [*mirrored, {"location": host, "insecure": True}]}
    shown = toml(tmp_path, "podman", "--url", "https://registry.example.com")
    mirror = {"location": "registry.example.com/docker.io"}
    assert shown == {"registry": [{"prefix": "docker.io", "location": "docker.io", "mirror": [mirror]}]}


def test_buildkit(tmp_path: Path) -> None:
    """Each upstream has this registry as its mirror. Plain HTTP is allowed for this registry's host only."""
    (tmp_path / "a.toml").write_text(TWO)
    host = "registry.example.com:5000"
    mirrors = {"mirrors": [host]}
    shown = toml(tmp_path, "buildkit", "--config", "a.toml", "--url", REMOTE)
    assert shown == {"registry": {"docker.io": mirrors, "ghcr.io": mirrors, host: {"http": True}}}
    shown = toml(tmp_path, "buildkit", "--url", "https://registry.example.com")
    assert shown == {"registry": {"docker.io": {"mirrors": ["registry.example.com"]}}}


def test_address_from_the_settings(tmp_path: Path) -> None:
    """`public_url` has precedence over `listen`. A wildcard address becomes localhost, with a hint."""
    assert "http://127.0.0.1:7000" in printed(tmp_path, "docker", "--listen", "127.0.0.1:7000")
    shown = printed(tmp_path, "docker", "--listen", "0.0.0.0:7000", said="clients on the same machine")
    assert json.loads(shown)["registry-mirrors"] == ["http://localhost:7000"]
    (tmp_path / "a.toml").write_text('public_url = "https://registry.example.com"')
    shown = printed(tmp_path, "docker", "--config", "a.toml")
    assert json.loads(shown)["registry-mirrors"] == ["https://registry.example.com"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["docker", "--listen", "127.0.0.1:0"], "give the server's address with --url"),
        (["docker", "--url", "ftp://x"], "--url: 'ftp://x' is not an address like"),
        (["docker", "--url", "https://x/registry"], "--url: 'https://x/registry' must end after the host and port"),
        (["docker", "--url", "http://"], "--url: 'http://' is not an address like"),
        (["podman", "--upstream", "Docker Hub"], "--upstream: 'Docker Hub' is not a name like docker.io"),
        (["podman", "--upstream", "registry-1.docker.io"], "is called 'docker.io' in names"),
        (["podman", "--config", "two.toml", "--upstream", "quay.io"], "these are: docker.io, ghcr.io"),
    ],
)
def test_wrong_use_in_one_line(tmp_path: Path, args: list[str], said: str) -> None:
    """Wrong arguments end the command with one line and nothing on stdout, so that `> file` leaves an empty file."""
    (tmp_path / "two.toml").write_text(TWO)
    assert said in error_line(entrepot("client", *args, folder=tmp_path), 2)


def test_the_options_of_serve(tmp_path: Path) -> None:
    """The command accepts the options that start the server, and then describes that server."""
    line = ["--data", str(tmp_path / "data"), "--mirror", "quay.io", "--listen", "127.0.0.1:5001"]
    shown = tomllib.loads(printed(tmp_path, "podman", *line))
    (mirrored,) = (registry for registry in shown["registry"] if registry.get("prefix") == "quay.io")
    assert mirrored["mirror"][0]["location"] == "127.0.0.1:5001/quay.io"
    assert not (tmp_path / "data").exists()
