"""Runs a server with webhooks, and pushes images whose events the webhooks receive."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from storage.content import OCI_INDEX, digest_of
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, running_server


def index_named(name: str) -> bytes:
    """Returns an index that lists no manifests, so that it can be pushed without blobs. Different names give different
    indexes."""
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "annotations": {"name": name}}
    return json.dumps(document).encode()


def digest_named(name: str) -> str:
    return digest_of(index_named(name))


def push(server: RegistryServer, repo: str, tag: str, name: str, **options: Any) -> httpx2.Response:
    """Pushes the index with the name `name` to `repo` under a tag."""
    with plain_client(server.url, timeout=60) as client:
        return push_with(client, repo, tag, name, **options)


def push_with(client: httpx2.Client, repo: str, tag: str, name: str, **options: Any) -> httpx2.Response:
    """Pushes the index with the client, and returns the response unchecked. `options`: further arguments of `put`."""
    path, headers = f"/v2/{repo}/manifests/{tag}", {"content-type": OCI_INDEX}
    return client.put(path, content=index_named(name), headers=headers, **options)


def webhook_table(url: str, name: str = "hook", **settings: Any) -> str:
    """Returns a `[[webhook]]` table for a settings file. Its endpoint may be on this machine."""
    values = {"name": name, "url": url, "private_network": True, **settings}
    return "[[webhook]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@contextlib.contextmanager
def event_site(folder: Path, settings: str, *args: str, workers: int = 2) -> Iterator[RegistryServer]:
    """Runs a server until the block ends. `settings`: the text of its settings file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "entrepot.toml"
    file.write_text(settings)
    with running_server(folder, "--config", str(file), *args, workers=workers) as server:
        yield server
