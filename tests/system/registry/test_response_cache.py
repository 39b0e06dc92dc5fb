"""Tests of the response cache of a real server with two workers: after a change, no connection gets an outdated cached
response."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from registry.auth.token import api_tokens
from storage.access import AccountName
from storage.composition import open_accounts, open_registry
from storage.content import Actor
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import push_image
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.store_accounts import BY, add_account, add_grant

APP = RepositoryName("team/app")
V2 = "/v2/team/app"
TAG = f"{V2}/manifests/latest"
CONNECTIONS_PER_WORKER = 3
"""The number of connections to each worker that stay open."""
REPEATS = 3
"""How often each connection sends the same request, so that cached responses are used."""
Answer = tuple[int, bytes, dict[str, str]]
"""Status, body, and headers with lower-case names."""


class KeptConnections:
    """Three open connections to each of the two workers."""

    def __init__(self, server: RegistryServer, stack: ExitStack) -> None:
        self._connections: list[http.client.HTTPConnection] = []
        workers = server.worker_pids()
        assert len(workers) == 2
        for stopped in workers:
            os.kill(stopped, signal.SIGSTOP)  # so that the other worker accepts the connections
            try:
                for _ in range(CONNECTIONS_PER_WORKER):
                    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                    stack.enter_context(closing(connection))
                    assert _ask(connection, "GET", "/v2/none/tags/list", {})[0] == 404
                    connection.auto_open = 0  # no request opens another connection
                    self._connections.append(connection)
            finally:
                os.kill(stopped, signal.SIGCONT)

    def ask(self, target: str, method: str = "GET", login: str | None = None, times: int = 1) -> list[Answer]:
        """Sends the request on each connection, `times` times. Returns all responses."""
        headers = {"authorization": login} if login else {}
        return [_ask(connection, method, target, headers) for _ in range(times) for connection in self._connections]


def _ask(connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str]) -> Answer:
    connection.request(method, target, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with running_server(tmp_path) as started:
        yield started


@pytest.fixture
def connections(server: RegistryServer) -> Iterator[KeptConnections]:
    with ExitStack() as stack:
        yield KeptConnections(server, stack)


def change_in_another_process(server: RegistryServer, change: Callable[[StoredRegistry], Awaitable[object]]) -> None:
    """Makes the change in the process of the test, which is not one of the server's. It opens the data directory."""

    async def run() -> None:
        async with open_registry(server.data) as registry:
            await change(registry)

    asyncio.run(run())


async def _push(registry: StoredRegistry, seed: str) -> None:
    """Pushes another image for each seed, with the tag `latest`."""
    await push_image(registry, APP, seed, "latest")


def statuses(answers: list[Answer]) -> set[int]:
    return {status for status, _, _ in answers}


def workers(server: RegistryServer) -> set[str]:
    """Returns the process ids of the workers that have logged requests for manifests."""
    return set(re.findall(r"registry\.access\[(\d+)\] GET \S+/manifests/", server.log_text()))


def test_changes_of_another_process_are_visible_on_every_connection(
    server: RegistryServer, connections: KeptConnections
) -> None:
    """Another process moves a tag several times, and then deletes a tag, a manifest and a blob. After each change, the
    next response on every connection is up to date."""
    for number in range(5):
        change_in_another_process(server, partial(_push, seed=f"image {number}"))
        responses = connections.ask(TAG, times=REPEATS)
        assert len({body for _, body, _ in responses}) == 1
        document = json.loads(responses[0][1])
        for digest in (document["config"]["digest"], document["layers"][0]["digest"]):
            assert len({body for _, body, _ in connections.ask(f"{V2}/blobs/{digest}", times=REPEATS)}) == 1
    digest, layer = responses[0][2]["docker-content-digest"], document["layers"][0]["digest"]
    assert f"image {number}".encode() in connections.ask(f"{V2}/blobs/{layer}")[0][1]
    for target, change in (
        (TAG, lambda registry: registry.delete_tag(APP, Tag("latest"), by=Actor())),
        (f"{V2}/manifests/{digest}", lambda registry: registry.delete_manifest(APP, digest, by=Actor())),
        (f"{V2}/blobs/{layer}", lambda registry: registry.delete_blob(APP, layer, by=Actor())),
    ):
        assert statuses(connections.ask(target, times=REPEATS)) == {200}
        change_in_another_process(server, change)
        assert statuses(connections.ask(target)) == {404}
    server.stop()
    assert len(workers(server)) == 2, "the test did not reach both workers"


def test_changes_by_one_worker_are_visible_on_every_connection(
    server: RegistryServer, connections: KeptConnections
) -> None:
    """A client deletes a tag and pushes it again, many times. After each change, the next response on every connection
    is up to date."""
    change_in_another_process(server, partial(_push, seed="x"))
    body = connections.ask(TAG, times=REPEATS)[0][1]
    put = {"content-type": json.loads(body)["mediaType"]}
    for _ in range(20):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as other_connection:
            assert _ask(other_connection, "DELETE", TAG, {})[0] == 202
            assert statuses(connections.ask(TAG)) == {404}
            other_connection.request("PUT", TAG, body, put)
            answer = other_connection.getresponse()
            assert (answer.status, answer.read()) == (201, b"")
            assert {received for _, received, _ in connections.ask(TAG, times=REPEATS)} == {body}
    server.stop()
    assert len(workers(server)) == 2, "the test did not reach both workers"


def test_changed_permissions_apply_on_every_connection(server: RegistryServer, connections: KeptConnections) -> None:
    """The first account is created, grants (permissions) are given and withdrawn, and a token is revoked. After each
    change, the next response on every connection follows the new permissions, although the headers of the requests stay
    the same."""

    async def change(step: str) -> str:
        alice = AccountName("alice")
        async with open_accounts(server.data) as accounts:
            if step == "account":
                await add_account(accounts, "alice")
                created = api_tokens.make(alice, now=time.time())
                await accounts.add_token(created.token, created.secret_hash, by=BY)
                return "Basic " + base64.b64encode(f"alice:{created.text}".encode()).decode()
            if step == "grant":
                await add_grant(accounts, "user:alice", "team/**", "pull")
            elif step == "withdraw":
                (grant,) = accounts.grants()
                await accounts.remove_grant(grant.subject, grant.pattern, by=BY)
            elif step == "revoke":
                await accounts.revoke_token(accounts.tokens(alice, None, 1).items[0].id, by=BY)
        return ""

    change_in_another_process(server, partial(_push, seed="x"))
    assert statuses(connections.ask(TAG, times=REPEATS)) == {200}
    login = asyncio.run(change("account"))
    assert statuses(connections.ask(TAG)) == {401}
    for step, status in (("grant", 200), ("withdraw", 404), ("grant", 200), ("revoke", 401)):
        asyncio.run(change(step))
        assert statuses(connections.ask(TAG, login=login, times=REPEATS)) == {status}
        assert statuses(connections.ask(TAG)) == {401}


def test_each_response_has_a_log_line(server: RegistryServer, connections: KeptConnections) -> None:
    """Each response, cached or not, has one log line with the same request id as its headers. The line has the account,
    the address, the repository and the reference."""
    change_in_another_process(server, partial(_push, seed="x"))
    ids = [headers["x-request-id"] for _, _, headers in connections.ask(TAG, times=5)]
    assert len(set(ids)) == len(ids)
    server.stop()
    lines = re.findall(r"(GET \S+) (status=200) .* (principal=.*) cache=(?:answer|-) request=(\w+)", server.log_text())
    assert sorted(line[3] for line in lines) == sorted(ids)
    details = "principal=anonymous address=127.0.0.1 repository=team/app reference=latest"
    assert {line[:3] for line in lines} == {(f"GET {TAG}", "status=200", details)}


def test_rate_limit_applies_to_cached_responses(tmp_path: Path) -> None:
    """The rate limit counts all requests over both workers, although the responses are cached. Each request beyond the
    limit gets a 429."""
    (tmp_path / "entrepot.toml").write_text("[limits]\nrequests_per_second = 0.001\nburst = 40\n")
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server, ExitStack() as stack:
        connections = KeptConnections(server, stack)
        statuses_received = [status for status, _, _ in connections.ask("/v2/", times=10)]
        earlier_requests = 2 * CONNECTIONS_PER_WORKER
        assert statuses_received == [200] * (40 - earlier_requests) + [429] * (
            len(statuses_received) - 40 + earlier_requests
        )
