"""Tests of `docker search` and `podman search`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.fakes.client_images import ClientImage
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import SiteWithAccounts, logged_out, tools_logged_out
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
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """docker finds a repository by a part of its name."""
    wire.push(repo, "v1", small_image)
    until_found(wire, repo)
    term = repo.removeprefix("team/")
    for options in ((), ("--limit", "5"), ("--filter", "stars=0")):
        found = docker("search", "--format", "{{.Name}}", *options, f"{server.address}/{term}").out.split()
        assert found == [repo]
    assert docker("search", "--format", "{{.Name}}", f"{server.address}/nothing-like-it").out == ""


def test_docker_search_with_a_login(
    docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """docker finds the repositories from which its login may pull. This works without TLS as well, because docker
    exchanges the refresh token of its login for a bearer token. Without a login, docker finds the repositories from
    which everyone may pull. If there are none, the search gets 401."""
    my_client, term = logged_out(docker, tmp_path), repo.removeprefix("team/")
    public_repo, hidden_repo = f"{repo}/open", f"{repo}/hidden"
    for name in (repo, public_repo, hidden_repo):
        site.client().push(name, "v1", small_image)
        until_found(site.client(), name)
    search = ("search", "--format", "{{.Name}}", f"{site.address}/{term}")
    refused = my_client.call.attempt(*search)
    assert (refused.code, "status code 401" in refused.err) == (1, True), refused.err
    login = site.add_user({repo: "pull"})
    site.allow_everyone(public_repo)
    assert my_client(*search).out.split() == [public_repo]
    my_client("login", site.address, "-u", login.name, "-p", login.secret)
    assert my_client(*search).out.split() == [repo, public_repo]


def test_podman_search(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """podman finds repositories by name, and lists the tags of a repository."""
    wire.push(repo, "v1", small_image)
    until_found(wire, repo)
    name = f"{server.address}/{repo}"
    found = json.loads(tools.podman("search", INSECURE, "--format", "json", f"{server.address}/{repo}").out)
    assert [entry["Name"] for entry in found] == [name]
    tags = json.loads(tools.podman("search", INSECURE, "--list-tags", "--format", "json", name).out)
    assert [(entry["Name"], entry["Tags"]) for entry in tags] == [(name, ["v1"])]


def test_podman_search_with_a_login(
    tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """podman sends no login to the search API of registry version 1, and gets a 401. It then reads the list of
    repositories with its login."""
    my_client = tools_logged_out(tools, tmp_path)
    site.client().push(repo, "v1", small_image)
    until_found(site.client(), repo)
    login = site.add_user({f"{repo}": "pull"})
    my_client.podman("login", INSECURE, "-u", login.name, "-p", login.secret, site.address)
    log_before = site.server.log_text()
    found = json.loads(my_client.podman("search", INSECURE, "--format", "json", f"{site.address}/{repo}").out)
    assert [entry["Name"] for entry in found] == [f"{site.address}/{repo}"]

    def searches() -> list[tuple[str, str, str]]:
        """Returns the path, the status and the account of podman's requests for a search or a list of repositories."""
        log = site.server.log_text().removeprefix(log_before)
        line = r" GET (/v1/search|/v2/_catalog) status=(\d+) .* principal=(\S+) .* agent=containers/"
        return re.findall(line, log)

    def has_both() -> bool:
        return {("/v1/search", "401", "anonymous"), ("/v2/_catalog", "200", login.name)} <= {*searches()}

    wait_until(has_both, 60, lambda: f"the access log has only {searches()}")
    assert [account for path, _, account in searches() if path == "/v1/search"] == ["anonymous"]
