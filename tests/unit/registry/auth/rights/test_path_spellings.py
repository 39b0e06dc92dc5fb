"""Unusual spellings of a repository's path. No spelling evades the rights, and the response is always for the
repository that the path names."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from storage.names import RepositoryName, Tag
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.registry_content import push_image
from tests.fakes.store_accounts import add_account, add_grant

pytestmark = pytest.mark.asyncio(loop_scope="module")
LATEST = Tag("latest")
SPELLINGS = [
    "/v2/secret/app/manifests/latest",
    "/v2/secret%2fapp/manifests/latest",
    "/v2/secret%2Fapp/manifests/latest",
    "/v2/%73ecret/app/manifests/latest",
    "/v2/secret/%61pp/manifests/latest",
    "/v2/secret/app/%6danifests/latest",
    "/v2/secret/app/manifests/%6Catest",
    "/v2/secret//app/manifests/latest",
    "/v2//secret/app/manifests/latest",
    "/v2/secret/app//manifests/latest",
    "/v2/secret/app/manifests//latest",
    "/v2/secret/app/manifests/latest/",
    "/v2/./secret/app/manifests/latest",
    "/v2/public/../secret/app/manifests/latest",
    "/v2/public/%2e%2e/secret/app/manifests/latest",
    "/v2/public/..%2fsecret/app/manifests/latest",
    "/v2/public/%2e%2e%2fsecret/app/manifests/latest",
    "/v2/public/app/manifests/../../../secret/app/manifests/latest",
    "/v2/public/app/manifests/..%2f..%2f..%2fsecret%2fapp%2fmanifests%2flatest",
    "/v2/public/app/blobs/../../secret/app/manifests/latest",
    "/v2/public/app/manifests/latest/../../../../secret/app/manifests/latest",
    "/v2/SECRET/app/manifests/latest",
    "/v2/Secret/App/manifests/latest",
    "/v2/secret/app/MANIFESTS/latest",
    "/v2/secret/app;public/manifests/latest",
    "/v2/secret/app%00/manifests/latest",
    "/v2/secret/app%20/manifests/latest",
    "/v2/ secret/app/manifests/latest".replace(" ", "%20"),
    "/v2/secret/app./manifests/latest",
    "/v2/secret\\app/manifests/latest",
    "/v2/public\\..\\secret/app/manifests/latest",
    "/v2/public/app%3f/../secret/app/manifests/latest",
    "/v2/public/app%23/secret/app/manifests/latest",
    "/v2/%252e%252e/secret/app/manifests/latest",
    "/v2/public/app/%c0%ae%c0%ae/secret/app/manifests/latest",
    "/v2/public/app/%ef%bc%8f/secret/app/manifests/latest",
    "/v2/secret/app/manifests/latest?ns=public",
    "/v2/public/app/manifests/latest?ns=secret/app",
    "/v2/app/manifests/latest?ns=secret",
    "/v2/app/manifests/latest?ns=secret&ns=public",
    "/v2/public/app/manifests/latest?name=secret/app",
    "/v2/public/app/manifests/latest#/v2/secret/app/manifests/latest",
]
"""Paths that some proxies or servers would take for the path of `secret/app`."""
REWRITES = [
    ("x-original-url", "/v2/public/app/manifests/latest"),
    ("x-rewrite-url", "/v2/public/app/manifests/latest"),
    ("x-http-method-override", "OPTIONS"),
    ("x-forwarded-prefix", "/v2/public"),
    ("x-forwarded-user", "root"),
]
"""Headers with which some servers let a client change the path, the method or the user."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AppInProcess]:
    """Yields a service where only root may pull from `secret/app`. Everyone may pull from all other repositories, some
    of which have similar names. All tests share the service, because they only read."""
    async with running_app(tmp_path_factory.mktemp("service") / "data") as opened:
        await add_account(opened.accounts, "root", admin=True)
        await add_account(opened.accounts, "alice")
        for area in ("secret", "public"):
            await push_image(opened.hosted, RepositoryName(f"{area}/app"), f"of {area}", "latest")
        for pattern in ("public/**", "secret", "secret/app/**", "secretapp", "app", "s/**", "v2/**"):
            await add_grant(opened.accounts, "everyone", pattern, "pull")
        yield opened


@pytest.mark.parametrize("login", [None, "alice"])
@pytest.mark.parametrize("target", SPELLINGS)
@pytest.mark.slow
async def test_no_spelling_evades_the_rights(service: AppInProcess, login: str | None, target: str) -> None:
    """No response contains the secret manifest or its digest, or shows that the manifest exists."""
    image = await service.hosted.get_manifest(RepositoryName("secret/app"), LATEST)
    headers = {"authorization": await service.token(login)} if login else {}
    answer = await service.client("GET", target, headers)
    assert image.body not in answer.body
    assert image.digest not in str(answer.fields)
    if answer.status == 200:
        public = await service.hosted.get_manifest(RepositoryName("public/app"), LATEST)
        assert answer.body == public.body
    else:
        assert answer.status in (400, 401, 404)


@pytest.mark.parametrize("header", REWRITES)
async def test_no_header_changes_the_request(service: AppInProcess, header: tuple[str, str]) -> None:
    """No header changes the requested repository, the method or the principal."""
    answer = await service.client("GET", "/v2/secret/app/manifests/latest", [header])
    assert answer.status == 401


async def test_a_known_digest_gives_no_access(service: AppInProcess) -> None:
    """A blob can be read only through a repository that has the blob and from which the client may pull."""
    image = await service.hosted.get_manifest(RepositoryName("secret/app"), LATEST)
    headers = {"authorization": await service.token("alice")}
    for digest in [image.digest, *(blob.digest for blob in image.blobs)]:
        for repo in ("secret/app", "public/app", "secret/app/x", "app"):
            for kind in ("blobs", "manifests"):
                answer = await service.client("GET", f"/v2/{repo}/{kind}/{digest}", headers)
                assert (answer.status, answer.code.partition("_")[2]) == (404, "UNKNOWN")
