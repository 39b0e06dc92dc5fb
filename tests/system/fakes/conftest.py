"""Fixtures and helpers for the tests of the fake Docker Hub: a running fake Hub with one image, an HTTP client, and
requests over plain sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.plain_client import plain_client
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

REPO = "library/app"
SIZE = 3 * MIB + 11
"""The size of the second layer in bytes."""


@pytest.fixture(scope="module")
def hub_image() -> ImageTree:
    """The image of the fake Hub, with a layer of 1000 bytes and one of SIZE bytes."""
    return noise_image("app", 1000, SIZE)


@pytest.fixture
def content(hub_image: ImageTree) -> UpstreamContent:
    made = UpstreamContent()
    made.add(REPO, hub_image, "1", "latest")
    return made


@pytest.fixture
def upstream(tmp_path: Path, content: UpstreamContent) -> Iterator[Hub]:
    with hub(tmp_path, content) as running:
        yield running


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with plain_client(timeout=30, headers={"Accept-Encoding": "identity"}) as made:
        yield made


def blob_url(upstream: Hub, digest: str) -> str:
    return f"{upstream.url}/v2/{REPO}/blobs/{digest}"


def manifest_url(upstream: Hub, reference: str = "1", repo: str = REPO) -> str:
    return f"{upstream.url}/v2/{repo}/manifests/{reference}"


def ask(upstream: Hub, path: str, *lines: str) -> socket.socket:
    """Sends a GET with these header lines over a new connection. Returns the socket, from which the response can be
    read."""
    host, port = upstream.address.split(":")
    sock = socket.create_connection((host, int(port)), 30)
    sock.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: hub", *lines, "", ""]).encode())
    return sock


def rest(sock: socket.socket) -> tuple[bytes, bool]:
    """Reads until the connection ends. Returns the bytes, and whether the connection was reset."""
    received = b""
    try:
        while piece := sock.recv(1 << 20):
            received += piece
    except ConnectionResetError:
        return received, True
    finally:
        sock.close()
    return received, False


def body_of(answer: bytes) -> bytes:
    """Returns the body of a response."""
    return answer.partition(b"\r\n\r\n")[2]


def token_for(client: httpx2.Client, refused: httpx2.Response, auth: tuple[str, str] | None = None) -> httpx2.Response:
    """Requests a token from the token service and for the scope that the 401 response `refused` names."""
    scheme, _, text = refused.headers["WWW-Authenticate"].partition(" ")
    assert scheme == "Bearer"
    challenge = {name: value.strip('"') for name, _, value in (part.partition("=") for part in text.split(","))}
    query = {"service": challenge["service"], "scope": challenge["scope"]}
    return client.get(challenge["realm"], params=query, auth=auth)


def bearer(answer: httpx2.Response) -> dict[str, str]:
    """Returns the Authorization header with the token of a response."""
    return {"Authorization": f"Bearer {answer.raise_for_status().json()['token']}"}
