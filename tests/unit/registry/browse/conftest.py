"""Fixtures for the tests of the browse API, which shows the content of repositories."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.content import Descriptor, Manifest
from storage.interface import Registry
from storage.names import RepositoryName, Tag
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.store_accounts import add_grant

APP = RepositoryName("team/app")
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
CREATED = "2026-01-02T03:04:05Z"


class Site:
    """A running registry with three accounts: `root` is an admin, `puller` may pull from `team/**`, and `other` has no
    rights."""

    def __init__(self, app: AppInProcess) -> None:
        self.app = app
        self.registry: Registry = app.hosted
        self.logins: dict[str, str] = {}

    async def get(self, path: str, account: str | None = "puller", method: str = "GET", body: Any = None) -> AsgiAnswer:
        """Returns the response to a request for a path below `/api/v1/repositories`, as this account or (None) without
        a login."""
        headers = {} if account is None else {"authorization": self.logins[account]}
        data = b""
        if body is not None:
            headers["content-type"], data = "application/json", json.dumps(body).encode()
        return await self.app.client(method, f"/api/v1/repositories/{path}", headers, data)

    async def json(self, path: str, account: str | None = "puller", method: str = "GET", body: Any = None) -> Any:
        """Returns the JSON of a response with status 200."""
        answer = await self.get(path, account, method, body)
        assert answer.status == 200, answer.body
        return answer.json

    async def image(
        self,
        *tags: str,
        config: Mapping[str, Any] | bytes | None = None,
        layers: Iterable[bytes] = (b"layer",),
        repo: RepositoryName = APP,
        **fields: Any,
    ) -> Manifest:
        """Pushes an image. `config` is its config, as an object or as bytes."""
        config = {"os": "linux", "architecture": "amd64", "created": CREATED} if config is None else config
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        pushed = await push_blob(self.registry, repo, data)
        layers = list(layers)
        by_data = {layer: await push_blob(self.registry, repo, layer) for layer in dict.fromkeys(layers)}
        blobs = [by_data[layer] for layer in layers]
        manifest = image_of(Descriptor(CONFIG_TYPE, pushed.digest, pushed.size), blobs, **fields)
        await self.registry.put_manifest(repo, manifest, [Tag(tag) for tag in tags], by=BY)
        return manifest


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running_app(tmp_path / "data") as app:
        running_site = Site(app)
        running_site.logins = {
            "root": await app.user("root", admin=True),
            "puller": await app.user("puller"),
            "other": await app.user("other"),
        }
        await add_grant(app.accounts, "user:puller", "team/**", "pull")
        yield running_site
