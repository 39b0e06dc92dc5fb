"""Errors of pushes and deletions in `/v2` name stored digests and tags only to clients that may pull from the
repository."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from storage.content import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST
from storage.names import RepositoryName, Tag
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.registry_content import BY, image_of, manifest_from, push_blob, push_image
from tests.fakes.store_accounts import add_grant

APP = RepositoryName("team/app")
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]
TAG, INDEX_TAG = "v1-only-readers-know-this-tag", "v2-only-readers-know-this-tag"
INDEX = manifest_from({"schemaVersion": 2, "manifests": []}, OCI_INDEX)
"""An index whose body does not say its media type."""


@dataclass(frozen=True)
class Refusal:
    """A request that is refused with `status` because of stored content, and what the error names for a client that may
    pull. Braces in the path stand for digests: `{image}` and `{index}` are stored under immutable tags, `{layer}` is
    the image's layer. `body`: the manifest that is pushed; None: an image that is not stored."""

    method: str
    path: str
    status: int
    names: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


REFUSALS = {
    "tag must not exist": Refusal("PUT", "manifests/latest", 412, "{image}", {"if-none-match": "*"}),
    "tag must have another digest": Refusal(
        "PUT", "manifests/latest", 412, "{image}", {"if-match": f'"sha256:{0:064}"'}
    ),
    "immutable tag": Refusal("PUT", f"manifests/{TAG}", 403, "{image}"),
    "manifest of an immutable tag": Refusal("DELETE", "manifests/{image}", 403, TAG),
    "media type of an immutable tag": Refusal(
        "PUT", "manifests/{index}", 403, INDEX_TAG, {"content-type": DOCKER_LIST}, INDEX.body
    ),
    "blob in use": Refusal("DELETE", "blobs/{layer}", 405, "{image}"),
}


class RefusingSite:
    """A registry with an image under an immutable tag and the tag `latest`. An index has another immutable tag."""

    def __init__(self, app: AppInProcess) -> None:
        self.app = app
        self.digests: dict[str, str] = {}
        self.body = b""

    async def push_content(self) -> None:
        image = await push_image(self.app.hosted, APP, "image", TAG, "latest")
        await self.app.hosted.put_manifest(APP, INDEX, [Tag(INDEX_TAG)], by=BY)
        self.digests = {"image": image.digest, "layer": image.blobs[1].digest, "index": INDEX.digest}
        config = await push_blob(self.app.hosted, APP, b"{}")
        self.body = image_of(config, []).body

    async def send(self, refusal: Refusal, login: str) -> AsgiAnswer:
        is_put = refusal.method == "PUT"
        headers = {"authorization": login, **({"content-type": OCI_MANIFEST} if is_put else {}), **refusal.headers}
        path = f"/v2/{APP}/{refusal.path.format(**self.digests)}"
        return await self.app.client(refusal.method, path, headers, (refusal.body or self.body) if is_put else b"")


@pytest.fixture(params=[[], UPSTREAM], ids=["hosted", "default upstream"])
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RefusingSite]:
    immutable = [{"repositories": ["team/**"], "tags": ["v*"]}]
    async with running_app(tmp_path / "data", immutable=immutable, upstream=request.param) as app:
        refusing_site = RefusingSite(app)
        await refusing_site.push_content()
        yield refusing_site


@pytest.mark.parametrize("name", REFUSALS)
async def test_errors_name_content_only_to_clients_that_may_pull(site: RefusingSite, name: str) -> None:
    """A refused push or deletion gets the same status and code with and without the right to pull. Only with this
    right, the error names the stored digest or tag. A bearer token without `pull` is without the right, too."""
    refusal = REFUSALS[name]
    blind, reader = await site.app.user("blind"), await site.app.user("reader")
    await add_grant(site.app.accounts, "user:blind", "team/**", "push,delete")
    await add_grant(site.app.accounts, "user:reader", "team/**", "pull,push,delete")
    bearer = await site.app.bearer(reader, f"repository:{APP}:push,delete")
    named = refusal.names.format(**site.digests)
    seen = await site.send(refusal, reader)
    assert (seen.status, named in seen.body.decode()) == (refusal.status, True), seen.body
    for login in (blind, bearer):
        answer = await site.send(refusal, login)
        assert (answer.status, answer.code) == (seen.status, seen.code)
        in_request = refusal.path.format(**site.digests)
        for secret in (*site.digests.values(), TAG, INDEX_TAG):
            assert secret in in_request or secret not in answer.body.decode(), answer.body
    assert (await site.app.hosted.resolve_manifest(APP, Tag("latest"))).digest == site.digests["image"]
