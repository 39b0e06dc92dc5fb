"""Tests of the commands for accounts while a server runs: every worker applies a change from the next request on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot_output
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

PASSWORD = "correct horse battery"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
INDEX = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []})
BOB = ("bob", PASSWORD)
CONNECTIONS = 6
"""The number of connections per check. It is large enough that both workers get some of them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs a server with two accounts: the admin root, and bob, who has no rights."""
    folder = tmp_path_factory.mktemp("beside")
    with running_server(folder, workers=2) as started:
        for name, *flags in (("root", "--admin"), ("bob",)):
            entrepot_output("user", "add", name, *flags, "--password-file", "-", folder=folder, stdin_text=PASSWORD)
        yield started


def run(server: RegistryServer, *args: str) -> str:
    """Runs a command on the data directory of the server, and returns its output."""
    return entrepot_output(*args, folder=server.data.parent).strip()


def push_statuses(server: RegistryServer, name: str, auth: tuple[str, str] | None) -> set[int]:
    """Pushes a manifest several times, each over a new connection, and returns the statuses."""
    url = f"{server.url}/v2/{name}/manifests/1"
    headers = {"content-type": INDEX_TYPE}
    return {
        plain_request("PUT", url, content=INDEX, headers=headers, auth=auth).status_code for _ in range(CONNECTIONS)
    }


def pull_statuses(server: RegistryServer, name: str, auth: tuple[str, str] | None) -> set[int]:
    """Pulls a manifest several times, each over a new connection, and returns the statuses."""
    url = f"{server.url}/v2/{name}/manifests/1"
    return {
        plain_request("GET", url, headers={"accept": INDEX_TYPE}, auth=auth).status_code for _ in range(CONNECTIONS)
    }


def test_grants(server: RegistryServer) -> None:
    """After a grant (a right of an account) is added or removed, every worker applies the change from the next request
    on. Without the right, an account gets 403 for a push. For a pull it gets 404, so that the refusal does not reveal
    whether the repository exists."""
    assert push_statuses(server, "granted/app", BOB) == {403}
    run(server, "grant", "add", "granted/**", "pull,push", "user:bob")
    assert push_statuses(server, "granted/app", BOB) == {201}
    assert pull_statuses(server, "granted/app", BOB) == {200}
    assert pull_statuses(server, "granted/app", None) == {401}
    run(server, "grant", "add", "granted/**", "pull", "everyone")
    assert pull_statuses(server, "granted/app", None) == {200}
    assert push_statuses(server, "granted/app", None) == {401}
    run(server, "grant", "remove", "granted/**", "user:bob", "everyone")
    assert push_statuses(server, "granted/app", BOB) == {403}
    assert pull_statuses(server, "granted/app", BOB) == {404}


def test_groups(server: RegistryServer) -> None:
    """An account has the rights of a group as long as it is a member."""
    run(server, "group", "add", "pushers")
    run(server, "grant", "add", "grouped/**", "push", "group:pushers")
    assert push_statuses(server, "grouped/app", BOB) == {403}
    run(server, "group", "join", "pushers", "bob")
    assert push_statuses(server, "grouped/app", BOB) == {201}
    run(server, "group", "leave", "pushers", "bob")
    assert push_statuses(server, "grouped/app", BOB) == {403}


def test_tokens(server: RegistryServer) -> None:
    """A robot (an account for a program) can use its API tokens within their limits. Beyond the limits, it gets 401 and
    not 403, because it has the right and needs only another token. A revoked token is refused, and so are all tokens of
    a disabled robot."""
    run(server, "robot", "add", "ci")
    run(server, "grant", "add", "built/**", "pull,push", "robot:ci")
    unlimited, limited = (
        run(server, "token", "add", "ci"),
        run(server, "token", "add", "ci", "--allow", "built/**:pull"),
    )
    assert push_statuses(server, "built/app", ("ci", unlimited)) == {201}
    assert push_statuses(server, "built/app", ("ci", limited)) == {401}
    assert pull_statuses(server, "built/app", ("ci", limited)) == {200}
    # A token is `ent_ID_SECRET`. The command gets the id.
    run(server, "token", "revoke", unlimited.split("_")[1])
    assert push_statuses(server, "built/app", ("ci", unlimited)) == {401}
    assert pull_statuses(server, "built/app", ("ci", limited)) == {200}
    run(server, "robot", "disable", "ci")
    assert pull_statuses(server, "built/app", ("ci", limited)) == {401}


def test_people(server: RegistryServer) -> None:
    """After an account is disabled, removed or gets another password, the next request with the old login is refused
    with 401. A request with an accepted login gets 404, because the repository does not exist."""
    folder = server.data.parent
    entrepot_output("user", "add", "carol", "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    assert pull_statuses(server, "none/none", ("carol", PASSWORD)) == {404}
    run(server, "user", "disable", "carol")
    assert pull_statuses(server, "none/none", ("carol", PASSWORD)) == {401}
    run(server, "user", "enable", "carol")
    assert pull_statuses(server, "none/none", ("carol", PASSWORD)) == {404}
    new_password = run(server, "user", "password", "carol", "--generate")
    assert pull_statuses(server, "none/none", ("carol", PASSWORD)) == {401}
    assert pull_statuses(server, "none/none", ("carol", new_password)) == {404}
    run(server, "user", "remove", "carol")
    assert pull_statuses(server, "none/none", ("carol", new_password)) == {401}


def test_audit_log_has_requests_and_commands(server: RegistryServer, tmp_path: Path) -> None:
    """The audit log has entries for refused requests to the server and for changes by commands."""
    push_statuses(server, "denied/app", BOB)
    while not (
        lines := json.loads(
            run(server, "audit", "--actor", "bob", "--outcome", "denied", "--target", "denied/app", "--json")
        )
    ):
        pass
    assert {line["action"] for line in lines} == {"push"}
    # Each worker combines equal entries into one with a count, and writes it a second later. The sum is lower than
    # CONNECTIONS if one worker has not written its entry yet.
    assert sum(line["count"] for line in lines) <= CONNECTIONS
    added = json.loads(run(server, "audit", "--action", "account.add", "--target", "bob", "--json"))
    assert [line["actor"].partition(":")[0] for line in added] == ["cli"]
