"""Tests of a server with few file descriptors: many silent connections must not stop it, and it reports when no
descriptor is left."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.fakes.hub.hub import hub
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.system.server.app_process import wait_for

LIMIT = 256
"""The number of file descriptors of each process."""
SILENT_CONNECTIONS = 900
"""More connections than the two workers together have descriptors."""
MIB = 1024 * 1024
TIMEOUT = 30.0
"""The number of seconds that a client waits for the server."""
IMAGE = "application/vnd.oci.image.manifest.v1+json"
SILENCE = {
    "nothing": (b"", 9),
    "from one address": (b"", 1),
    "from many addresses": (b"", 450),
    "half a head": (b"GET /v2/ HTTP/1.1\r\nHost: registry\r\nX-", 9),
    "a whole request": (b"GET /v2/ HTTP/1.1\r\nHost: registry\r\n\r\n", 9),
}
"""What each silent connection sends before it stops sending, and the number of client addresses."""


class KeptClient:
    """A client whose connection stays open. `headers`: of the last response."""

    def __init__(self, server: RegistryServer) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        self.headers: dict[str, str] = {}

    def connect(self) -> None:
        self._http.connect()

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, str]:
        """Sends a request. Returns the status, the body and the header Location."""
        self._http.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = self._http.getresponse()
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.read(), answer.getheader("location", "")

    def push(self, name: str, content: bytes) -> str:
        """Pushes an image of one layer. Returns the layer's digest."""
        layer, config = (self._push_blob(name, blob) for blob in (content, b"{}"))
        manifest = {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
            "layers": [{"mediaType": "application/octet-stream", "digest": layer, "size": len(content)}],
        }
        path = f"/v2/{name}/manifests/1"
        assert self.call("PUT", path, json.dumps(manifest).encode(), content_type=IMAGE)[0] == 201
        return layer

    def _push_blob(self, name: str, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        status, _, location = self.call("POST", f"/v2/{name}/blobs/uploads/")
        assert status == 202
        assert self.call("PUT", f"{location}?digest={digest}", content)[0] == 201
        return digest

    def pull(self, name: str, digest: str) -> None:
        """Pulls a blob and checks its digest."""
        status, body, _ = self.call("GET", f"/v2/{name}/blobs/{digest}")
        assert status == 200, body
        assert "sha256:" + hashlib.sha256(body).hexdigest() == digest

    def close(self) -> None:
        self._http.close()


def upstream_image() -> tuple[UpstreamContent, ImageTree]:
    """Returns the content of the upstream, and its only image."""
    content = UpstreamContent()
    return content, content.add("library/app", noise_image("app", 1000, 3 * MIB), "1")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, folder: Path, descriptors: int = LIMIT) -> tuple[RegistryServer, ImageTree]:
    """Starts a server with two workers that mirrors an upstream. Returns the server and the image at the upstream."""
    content, image = upstream_image()
    upstream = stack.enter_context(hub(folder, content))
    (folder / "entrepot.toml").write_text(
        f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\n'
    )
    server = running_server(folder, "--config", str(folder / "entrepot.toml"), descriptors=descriptors)
    return stack.enter_context(server), image


def silent_connections(
    stack: ExitStack, server: RegistryServer, sent: bytes, addresses: int, count: int = SILENT_CONNECTIONS
) -> None:
    """Opens `count` connections from `addresses` client addresses. Each sends `sent` and then nothing more."""
    for number in range(count):
        sock = stack.enter_context(socket.socket())
        sock.settimeout(TIMEOUT)
        sock.bind((f"127.0.{1 + number % addresses // 250}.{1 + number % addresses % 250}", 0))
        sock.connect(("127.0.0.1", server.port))
        if sent:
            with suppress(ConnectionError):
                sock.sendall(sent)


def wait_until_settled(server: RegistryServer) -> None:
    """Waits until the number of open files of each worker no longer changes, because the workers accept no more
    connections. Raises AssertionError if it still changes after ten seconds."""
    counts_before: list[int] = []
    for _ in range(100):
        counts_now = [open_files(pid) for pid in server.worker_pids()]
        if counts_now == counts_before:
            return
        counts_before = counts_now
        time.sleep(0.1)
    raise AssertionError(f"the number of open files still changes: {counts_before}")


def open_files(pid: int) -> int:
    """Returns the number of file descriptors that the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def lines(server: RegistryServer, text: str) -> list[str]:
    """Returns the log lines with this text."""
    return [line for line in server.log_text().splitlines() if text in line]


@pytest.mark.parametrize(("sent", "addresses"), SILENCE.values(), ids=SILENCE)
def test_silent_connections_do_not_stop_the_server(
    stack: ExitStack, tmp_path: Path, sent: bytes, addresses: int
) -> None:
    """900 connections, more than the server has descriptors, stop sending. Clients that were connected before can still
    pull, push, and pull through the mirror on their connections. New clients can connect. The log has at most one line
    about this from each worker, and no traceback."""
    server, image = start(stack, tmp_path)
    early_clients = [KeptClient(server) for _ in range(6)]
    for client in early_clients:
        stack.callback(client.close)
        assert client.call("GET", "/v2/")[0] == 200
    layer = early_clients[0].push("team/app", os.urandom(MIB))
    silent_connections(stack, server, sent, addresses)
    wait_until_settled(server)
    for number, client in enumerate(early_clients):
        client.pull("team/app", layer)
        client.push(f"team/app{number}", os.urandom(MIB))
    assert early_clients[0].call("GET", "/v2/library/app/manifests/1", accept=IMAGE)[0] == 200
    for client, blob in zip(early_clients, image.blobs, strict=False):
        client.pull("library/app", blob)
    for number in range(6):
        late_client = KeptClient(server)
        late_client.pull("team/app", layer)
        late_client.push(f"team/late{number}", os.urandom(MIB))
        late_client.close()
    assert "Traceback" not in server.log_text()
    assert not lines(server, " 500 ")
    wait_for(lambda: bool(lines(server, "silent connections to make room")))
    assert len(lines(server, "silent connections to make room")) <= 2


def test_requests_without_a_free_descriptor_get_503(stack: ExitStack, tmp_path: Path) -> None:
    """While no descriptor is free, requests that need one get 503 with Retry-After and a message. Other requests are
    served. The log has one line for each 503, and no traceback. Once descriptors are free again, all requests are
    served."""
    server = stack.enter_context(running_server(tmp_path, workers=1, descriptors=LIMIT))
    client = KeptClient(server)
    stack.callback(client.close)
    layer = client.push("team/app", os.urandom(MIB))
    _, _, location = client.call("POST", "/v2/team/app/blobs/uploads/")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (0, LIMIT))
    for method, path, body_to_send in (("GET", f"/v2/team/app/blobs/{layer}", None), ("PATCH", location, b"abc")):
        status, body, _ = client.call(method, path, body_to_send)
        assert (status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")
        assert b"files open" in body
        assert client.headers["retry-after"] == "1"
    assert client.call("GET", "/v2/team/app/manifests/1", accept=IMAGE)[0] == 200
    late_client = KeptClient(server)
    stack.callback(late_client.close)
    late_client.connect()
    wait_for(lambda: bool(lines(server, "cannot accept connections")))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    late_client.pull("team/app", layer)
    assert late_client.call("PATCH", location, b"abc")[0] == 202
    assert "Traceback" not in server.log_text()
    assert len(lines(server, " 503 ")) == 2
    assert len(lines(server, "cannot accept connections")) == 1


def test_the_soft_limit_is_raised(tmp_path: Path) -> None:
    """If the server is started with a soft limit of descriptors below the hard limit, every process raises its soft
    limit to the hard limit."""
    with running_server(tmp_path, descriptors=LIMIT, soft_descriptors=64) as server:
        for pid in server.pids():
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (LIMIT, LIMIT)
