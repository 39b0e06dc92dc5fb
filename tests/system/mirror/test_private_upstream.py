"""Tests of a private upstream, which requires a login. An account gets its content only with a grant, which is a
permission for repository names that match a pattern."""

from __future__ import annotations

import asyncio
import base64
import time

from registry.auth.token import api_tokens
from storage.access import AccountName
from storage.composition import open_accounts
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.store_accounts import BY, add_account, add_grant

PASSWORD = "correct-horse-battery"
MANIFEST = f"/v2/{REPO}/manifests/1"


async def _account(site: MirrorSite, name: str, *patterns: str) -> str:
    async with open_accounts(site.server.data) as accounts:
        await add_account(accounts, name)
        for pattern in patterns:
            await add_grant(accounts, f"user:{name}", pattern, "pull")
        created = api_tokens.make(AccountName(name), now=time.time())
        await accounts.add_token(created.token, created.secret_hash, by=BY)
    return "Basic " + base64.b64encode(f"{name}:{created.text}".encode()).decode()


def account(site: MirrorSite, name: str, *patterns: str) -> dict[str, str]:
    """Creates an account that may pull names matching the patterns. Returns its login as headers."""
    return {"authorization": asyncio.run(_account(site, name, *patterns))}


def test_private_upstream_requires_a_grant_that_names_it(site: MirrorSite) -> None:
    """Only a grant whose pattern starts with the name of the private upstream allows pulls from it. A grant for all
    names does not, and in a registry without accounts nobody can pull from it. Without such a grant, cached content is
    not served under any name."""
    (site.folder / "password").write_text(PASSWORD)
    site.start(
        settings=f'username = "me"\npassword_file = "{site.folder / "password"}"',
        username="me",
        password=PASSWORD,
        private=(REPO,),
    )
    refused = site.http.get(MANIFEST)
    assert refused.status_code == 401
    assert "require_grant" in refused.json()["errors"][0]["message"]
    assert site.hub.count("manifest") == 0

    reader = account(site, "reader", "docker.io/library/*")
    other_account = account(site, "other", "**", "library/**", "*")
    pulled = site.http.get(MANIFEST, headers=reader)
    assert (pulled.status_code, pulled.content) == (200, site.image.body)
    for digest, blob in site.image.blobs.items():
        answer = site.get(f"/v2/{REPO}/blobs/{digest}", headers=reader).wait_for_end()
        assert (answer.status, bytes(answer.body)) == (200, blob.read())
    for headers, status in ((other_account, 404), ({}, 401)):
        for name in (REPO, "app", f"docker.io/{REPO}", "docker.io/app"):
            for query in ("", "?ns=docker.io"):
                assert site.http.get(f"/v2/{name}/manifests/1{query}", headers=headers).status_code == status
                assert site.http.get(f"/v2/{name}/blobs/{site.digest}{query}", headers=headers).status_code == status
                assert site.http.get(f"/v2/{name}/tags/list{query}", headers=headers).status_code == status
    assert site.http.get("/v2/_catalog", headers=other_account).json() == {"repositories": []}
    assert site.http.get("/v2/_catalog", headers=reader).json() == {"repositories": [f"docker.io/{REPO}"]}


def test_private_content_cannot_be_mounted_or_pushed_by_digest(site: MirrorSite) -> None:
    """An account without a grant for the private upstream can mount none of its blobs into a repository that it may
    push to. It can also push no manifest that refers to these blobs, even under a name that would be mirrored."""
    (site.folder / "password").write_text(PASSWORD)
    site.start(
        settings=f'username = "me"\npassword_file = "{site.folder / "password"}"',
        username="me",
        password=PASSWORD,
        private=(REPO,),
    )
    reader = account(site, "reader", "docker.io/library/*")
    site.get(headers=reader).wait_for_end()
    assert site.http.get(MANIFEST, headers=reader).status_code == 200

    async def allow_push() -> None:
        async with open_accounts(site.server.data) as accounts:
            await add_grant(accounts, "user:thief", "**", "pull,push")

    thief = account(site, "thief")
    asyncio.run(allow_push())
    for source in ("&from=" + REPO, "&from=docker.io/" + REPO, ""):
        answer = site.http.post(f"/v2/team/app/blobs/uploads/?mount={site.digest}{source}", headers=thief)
        assert answer.status_code == 202
    push_headers = {**thief, "content-type": "application/vnd.oci.image.manifest.v1+json"}
    for name in ("team/app", "app"):
        answer = site.http.put(f"/v2/{name}/manifests/1", headers=push_headers, content=site.image.body)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
