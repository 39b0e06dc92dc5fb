"""`docker search` and `podman search` at this registry."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fakes.client_images import ClientImage
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import MemberSite, logged_out, tools_logged_out
from tests.fakes.clients.programs import wait_until
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.server_process import RegistryServer


def until_found(wire: RegistryClient, repo: str) -> None:
    """Waits until the search index has the repository."""

    def is_found() -> bool:
        results = wire.ask("GET", f"/v1/search?q={repo}").json()["results"]
        return repo in [result["name"] for result in results]

    wait_until(is_found, 60, lambda: f"{repo} is not found")


def test_docker_search(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, fresh: ClientImage
) -> None:
    wire.push(repo, "v1", fresh)
    until_found(wire, repo)
    term = repo.removeprefix("team/")
    for options in ((), ("--limit", "5"), ("--filter", "stars=0")):
        found = docker("search", "--format", "{{.Name}}", *options, f"{server.address}/{term}").out.split()
        assert found == [repo]
    assert docker("search", "--format", "{{.Name}}", f"{server.address}/nothing-like-it").out == ""


def test_docker_search_with_a_login(
    docker: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """docker finds what its login may pull, also without TLS, because it gets a token with the refresh token of its
    login. Without a login it finds what everyone may pull. If that is nothing, it is asked to log in."""
    mine, term = logged_out(docker, tmp_path), repo.removeprefix("team/")
    opened, hidden = f"{repo}/open", f"{repo}/hidden"
    for name in (repo, opened, hidden):
        club.wire().push(name, "v1", fresh)
        until_found(club.wire(), name)
    search = ("search", "--format", "{{.Name}}", f"{club.address}/{term}")
    refused = mine.call.attempt(*search)
    assert (refused.code, "status code 401" in refused.err) == (1, True), refused.err
    login = club.person({repo: "pull"})
    club.allow_everyone(opened)
    assert mine(*search).out.split() == [opened]
    mine("login", club.address, "-u", login.name, "-p", login.secret)
    assert mine(*search).out.split() == [repo, opened]


def test_podman_search(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, fresh: ClientImage
) -> None:
    """podman finds repositories by name, and lists the tags of a repository."""
    wire.push(repo, "v1", fresh)
    until_found(wire, repo)
    name = f"{server.address}/{repo}"
    found = json.loads(tools.podman("search", INSECURE, "--format", "json", f"{server.address}/{repo}").out)
    assert [entry["Name"] for entry in found] == [name]
    tags = json.loads(tools.podman("search", INSECURE, "--list-tags", "--format", "json", name).out)
    assert [(entry["Name"], entry["Tags"]) for entry in tags] == [(name, ["v1"])]


def test_podman_search_with_a_login(
    tools: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """podman sends no login to the old API and gets a 401 there. It then reads the list of repositories with its
    login."""
    mine = tools_logged_out(tools, tmp_path)
    club.wire().push(repo, "v1", fresh)
    until_found(club.wire(), repo)
    login = club.person({f"{repo}": "pull"})
    mine.podman("login", INSECURE, "-u", login.name, "-p", login.secret, club.address)
    found = json.loads(mine.podman("search", INSECURE, "--format", "json", f"{club.address}/{repo}").out)
    assert [entry["Name"] for entry in found] == [f"{club.address}/{repo}"]
