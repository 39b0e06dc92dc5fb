"""Commands for accounts while a server runs: for every worker, the change counts at the next request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot_output
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

PASSWORD = "correct horse battery"
KIND = "application/vnd.oci.image.index.v1+json"
INDEX = json.dumps({"schemaVersion": 2, "mediaType": KIND, "manifests": []})
BOB = ("bob", PASSWORD)
TRIES = 6
"""So many connections that both workers get some."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A server with the admin root and with bob, who has no rights."""
    folder = tmp_path_factory.mktemp("beside")
    with running_server(folder, workers=2) as started:
        for name, *flags in (("root", "--admin"), ("bob",)):
            entrepot_output("user", "add", name, *flags, "--password-file", "-", folder=folder, given=PASSWORD)
        yield started


def said(server: RegistryServer, *args: str) -> str:
    return entrepot_output(*args, folder=server.data.parent).strip()


def pushed(server: RegistryServer, name: str, auth: tuple[str, str] | None) -> set[int]:
    """Pushes a manifest several times, each over a new connection, and returns the statuses."""
    url = f"{server.url}/v2/{name}/manifests/1"
    headers = {"content-type": KIND}
    return {plain_request("PUT", url, content=INDEX, headers=headers, auth=auth).status_code for _ in range(TRIES)}


def pulled(server: RegistryServer, name: str, auth: tuple[str, str] | None) -> set[int]:
    url = f"{server.url}/v2/{name}/manifests/1"
    return {plain_request("GET", url, headers={"accept": KIND}, auth=auth).status_code for _ in range(TRIES)}


def test_grants(server: RegistryServer) -> None:
    """A grant counts from the next request after the command on. After its removal, it no longer counts at the next
    request."""
    assert pushed(server, "granted/app", BOB) == {403}
    said(server, "grant", "add", "granted/**", "pull,push", "user:bob")
    assert pushed(server, "granted/app", BOB) == {201}
    assert pulled(server, "granted/app", BOB) == {200}
    assert pulled(server, "granted/app", None) == {401}
    said(server, "grant", "add", "granted/**", "pull", "everyone")
    assert pulled(server, "granted/app", None) == {200}
    assert pushed(server, "granted/app", None) == {401}
    said(server, "grant", "remove", "granted/**", "user:bob", "everyone")
    assert pushed(server, "granted/app", BOB) == {403}
    assert pulled(server, "granted/app", BOB) == {404}


def test_groups(server: RegistryServer) -> None:
    """An account has the rights of a group as long as it is a member."""
    said(server, "group", "add", "pushers")
    said(server, "grant", "add", "grouped/**", "push", "group:pushers")
    assert pushed(server, "grouped/app", BOB) == {403}
    said(server, "group", "join", "pushers", "bob")
    assert pushed(server, "grouped/app", BOB) == {201}
    said(server, "group", "leave", "pushers", "bob")
    assert pushed(server, "grouped/app", BOB) == {403}


def test_tokens(server: RegistryServer) -> None:
    """A robot's token has its limits, and is refused once it is revoked."""
    said(server, "robot", "add", "ci")
    said(server, "grant", "add", "built/**", "pull,push", "robot:ci")
    all_of_it, limited = (
        said(server, "token", "add", "ci"),
        said(server, "token", "add", "ci", "--allow", "built/**:pull"),
    )
    assert pushed(server, "built/app", ("ci", all_of_it)) == {201}
    assert pushed(server, "built/app", ("ci", limited)) == {401}
    assert pulled(server, "built/app", ("ci", limited)) == {200}
    said(server, "token", "revoke", all_of_it.split("_")[1])
    assert pushed(server, "built/app", ("ci", all_of_it)) == {401}
    assert pulled(server, "built/app", ("ci", limited)) == {200}
    said(server, "robot", "disable", "ci")
    assert pulled(server, "built/app", ("ci", limited)) == {401}


def test_people(server: RegistryServer) -> None:
    """After an account was disabled or got another password, the next request with the old login is refused."""
    folder = server.data.parent
    entrepot_output("user", "add", "carol", "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    assert pulled(server, "none/none", ("carol", PASSWORD)) == {404}
    said(server, "user", "disable", "carol")
    assert pulled(server, "none/none", ("carol", PASSWORD)) == {401}
    said(server, "user", "enable", "carol")
    assert pulled(server, "none/none", ("carol", PASSWORD)) == {404}
    made = said(server, "user", "password", "carol", "--generate")
    assert pulled(server, "none/none", ("carol", PASSWORD)) == {401}
    assert pulled(server, "none/none", ("carol", made)) == {404}
    said(server, "user", "remove", "carol")
    assert pulled(server, "none/none", ("carol", made)) == {401}


def test_what_the_server_says_is_in_the_audit_log(server: RegistryServer, tmp_path: Path) -> None:
    """One audit log has the server's logins and refusals, and the changes by commands."""
    pushed(server, "denied/app", BOB)
    while not (
        lines := json.loads(
            said(server, "audit", "--actor", "bob", "--outcome", "denied", "--target", "denied/app", "--json")
        )
    ):
        pass
    assert {line["action"] for line in lines} == {"push"}
    assert sum(line["count"] for line in lines) <= TRIES
    added = json.loads(said(server, "audit", "--action", "account.add", "--target", "bob", "--json"))
    assert [line["actor"].partition(":")[0] for line in added] == ["cli"]
