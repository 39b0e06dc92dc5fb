"""Tests of a private upstream, which requires a login. The mirror serves a stored blob through one of its repositories
only after the upstream has confirmed that this repository has the blob."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from storage.composition import open_accounts
from storage.data_dir.layout import Layout
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import SIZE, BackgroundGet, MirrorSite
from tests.fakes.second_connection import second_connection
from tests.fakes.store_accounts import add_grant
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, manifest_of, noise_blob
from tests.system.mirror.test_private_upstream import account

PASSWORD = "correct-horse-battery"
SECRET_REPO = "private/y"
ATTACKER_REPO = "attacker/x"
PARTNER_REPO = "partner/z"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = noise_blob("secret", SIZE)


def image(name: str) -> ImageTree:
    """Returns an image with the secret layer in its manifest, after a layer of its own."""
    return manifest_of(UpstreamBlob(json.dumps({"name": name}).encode(), CONFIG), noise_blob(name, 1000), LAYER)


def start(site: MirrorSite, prefetch: str = "off", **switches: Any) -> None:
    """Starts an upstream with a login. The secret layer is in private/y and partner/z. The manifest of attacker/x names
    it as well, but that repository does not have it."""
    (site.folder / "password").write_text(PASSWORD)
    names = (SECRET_REPO, ATTACKER_REPO, PARTNER_REPO)
    for name in names:
        site.content.add(name, image(name), "1")
    del site.content.repositories[ATTACKER_REPO].blobs[LAYER.digest]
    login = f'username = "me"\npassword_file = "{site.folder / "password"}"\n'
    site.start(
        settings=f'{login}prefetch = "{prefetch}"',
        **{"username": "me", "password": PASSWORD, "private": names, **switches},
    )


def blob(repo: str) -> str:
    """Returns the path of the secret layer in a repository."""
    return f"/v2/docker.io/{repo}/blobs/{LAYER.digest}"


def pull(site: MirrorSite, repo: str, login: dict[str, str]) -> BackgroundGet:
    """Pulls the manifest of a repository, then the secret layer. Returns the response with the layer."""
    answer = site.http.get(f"/v2/docker.io/{repo}/manifests/1", headers=login)
    assert answer.status_code == 200, answer.text
    return site.get(blob(repo), headers=login).wait_for_end()


def request_layer_in_all_ways(site: MirrorSite, repo: str, login: dict[str, str]) -> list[httpx2.Response]:
    """Requests the layer under both names of the repository: with GET, with ranges, with If-None-Match, with HEAD, and
    with the query `ns`. Returns the responses."""
    responses = []
    for name in (f"docker.io/{repo}", repo):
        path = f"/v2/{name}/blobs/{LAYER.digest}"
        for headers in ({}, {"range": "bytes=0-9"}, {"range": "bytes=0-1,5-9"}, {"if-none-match": f'"{LAYER.digest}"'}):
            responses.append(site.http.get(path, headers={**login, **headers}))
        responses.append(site.http.head(path, headers=login))
        responses.append(site.http.get(f"{path}?ns=docker.io", headers=login))
    return responses


def heads(site: MirrorSite, repo: str) -> int:
    """Returns how many authorized requests asked whether the repository has the layer."""
    head_requests = [*site.hub.requests(method="HEAD", match=f"{repo}/blobs/{LAYER.digest}")]
    return sum(request.status != 401 for request in head_requests)


def test_stored_blob_is_not_served_through_another_repository(site: MirrorSite) -> None:
    """The attacker's repository has a manifest that names a layer of another repository. The mirror has stored the
    layer, but all requests for the layer through the attacker's repository get 404, as they would from the upstream.
    The mirror asks the upstream only once."""
    start(site)
    reader = account(site, "reader", f"docker.io/{SECRET_REPO}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    assert pull(site, ATTACKER_REPO, attacker).status == 404
    for answer in request_layer_in_all_ways(site, ATTACKER_REPO, attacker):
        assert answer.status_code == 404, answer.request
        assert LAYER.read(0, 10) not in answer.content
    assert heads(site, ATTACKER_REPO) == 1
    for digest in (image(SECRET_REPO).digest, image(SECRET_REPO).config.digest):
        assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/manifests/{digest}", headers=attacker).status_code == 404
        assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/blobs/{digest}", headers=attacker).status_code == 404


def test_blob_in_download_is_not_served_through_another_repository(site: MirrorSite) -> None:
    """While the mirror downloads a layer for one repository, requests for the layer through the attacker's repository
    get 404 from every worker."""
    start(site, send_buffer=65536)
    reader = account(site, "reader", f"docker.io/{SECRET_REPO}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert site.http.get(f"/v2/docker.io/{SECRET_REPO}/manifests/1", headers=reader).status_code == 200
    site.hub.fault(on="blob", match=LAYER.digest.partition(":")[2], stall_after=MIB)
    growing = site.get(blob(SECRET_REPO), headers=reader).wait_for_bytes(MIB)
    assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/manifests/1", headers=attacker).status_code == 200
    for worker in site.server.worker_pids():
        for span in ("", "0-9"):
            assert site.get(blob(ATTACKER_REPO), span, worker=worker, headers=attacker).wait_for_end().status == 404
    site.hub.release()
    assert growing.wait_for_end().body == LAYER.read()


def test_a_stored_layer_is_confirmed_once_for_each_repository(site: MirrorSite) -> None:
    """The mirror sends one HEAD to confirm that a second repository has a stored layer, and fetches no byte again. From
    then on it serves the layer through this repository even while the upstream is down. It does not serve the layer
    through a repository for which it has not asked the upstream."""
    start(site)
    reader = account(site, "reader", "docker.io/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    assert site.http.head(blob(PARTNER_REPO), headers=reader).headers["content-length"] == str(SIZE)
    assert pull(site, PARTNER_REPO, reader).body == LAYER.read()
    assert pull(site, PARTNER_REPO, reader).body == LAYER.read()
    assert heads(site, PARTNER_REPO) == 1
    assert repeated(site.hub.sent_ranges(LAYER.digest)) == []
    assert union(site.hub.sent_ranges(LAYER.digest)) == [(0, SIZE)]
    assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/manifests/1", headers=reader).status_code == 200
    site.hub.refuse()
    assert site.get(blob(PARTNER_REPO), headers=reader).wait_for_end().body == LAYER.read()
    assert site.get(blob(SECRET_REPO), headers=reader).wait_for_end().body == LAYER.read()
    refused = site.http.get(blob(ATTACKER_REPO), headers=reader)
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")


def test_unconfirmed_blob_links_are_confirmed_before_use(site: MirrorSite) -> None:
    """Earlier versions could link a blob to a repository without asking the upstream whether the repository has the
    blob. Until the upstream confirms the link, the mirror does not serve the blob through this repository, other
    repositories cannot mount the blob from it, and a pushed manifest cannot refer to the blob."""
    start(site)
    reader = account(site, "reader", "docker.io/**")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/manifests/1", headers=attacker).status_code == 200
    site.server.stop()
    link_without_asking(site, ATTACKER_REPO)
    link_without_asking(site, PARTNER_REPO)
    site.hub.forget()
    site.serve()
    writer = account(site, "writer", "docker.io/attacker/**", "docker.io/partner/**")
    grant_push(site, "writer", "team/**", "attacker/**")
    for name in (f"docker.io/{ATTACKER_REPO}", ATTACKER_REPO, f"docker.io/{PARTNER_REPO}", ""):
        source = f"&from={name}" if name else ""
        answer = site.http.post(f"/v2/team/app/blobs/uploads/?mount={LAYER.digest}{source}", headers=writer)
        assert answer.status_code == 202, name
    push_headers = {**writer, "content-type": "application/vnd.oci.image.manifest.v1+json"}
    pushed = site.http.put(f"/v2/{ATTACKER_REPO}/manifests/1", headers=push_headers, content=image(ATTACKER_REPO).body)
    assert (pushed.status_code, pushed.json()["errors"][0]["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert {answer.status_code for answer in request_layer_in_all_ways(site, ATTACKER_REPO, attacker)} == {404}
    assert pull(site, PARTNER_REPO, reader).body == LAYER.read()
    assert heads(site, PARTNER_REPO) == 1
    mounted = site.http.post(
        f"/v2/team/app/blobs/uploads/?mount={LAYER.digest}&from=docker.io/{PARTNER_REPO}", headers=writer
    )
    assert mounted.status_code == 201


def test_prefetch_confirms_a_stored_layer(site: MirrorSite) -> None:
    """The mirror prefetches the layers of a pulled manifest. For a layer that is already stored, the prefetch asks the
    upstream whether the repository has it. If the upstream denies this, the mirror does not serve the layer through
    this repository."""
    start(site, prefetch="layers")
    reader = account(site, "reader", f"docker.io/{SECRET_REPO}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    own_layer = image(ATTACKER_REPO).layers[0].digest
    assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/manifests/1", headers=attacker).status_code == 200
    assert site.http.get(f"/v2/docker.io/{ATTACKER_REPO}/blobs/{own_layer}", headers=attacker).status_code == 200
    site.hub.until(lambda: heads(site, ATTACKER_REPO) == 1)
    assert site.http.get(blob(ATTACKER_REPO), headers=attacker).status_code == 404
    assert heads(site, ATTACKER_REPO) == 1


@pytest.mark.parametrize("size", [SIZE + 1, 10, 0])
def test_blob_size_comes_from_the_upstream_not_from_a_manifest(site: MirrorSite, size: int) -> None:
    """The Content-Length of a blob that is not stored is the size that the upstream states, even if a manifest states
    another size."""
    start(site)
    document = json.loads(image(PARTNER_REPO).body)
    document["layers"][1]["size"] = size
    false_image = ImageTree(json.dumps(document).encode(), image(PARTNER_REPO).media_type, image(PARTNER_REPO).blobs)
    site.content.add(PARTNER_REPO, false_image, "liar")
    site.hub.put(site.content)
    reader = account(site, "reader", "docker.io/partner/**")
    assert site.http.get(f"/v2/docker.io/{PARTNER_REPO}/manifests/liar", headers=reader).status_code == 200
    assert site.http.head(blob(PARTNER_REPO), headers=reader).headers["content-length"] == str(SIZE)
    assert site.get(blob(PARTNER_REPO), headers=reader).wait_for_end().body == LAYER.read()


def test_repositories_of_a_public_upstream_share_blobs(site: MirrorSite) -> None:
    """A public upstream needs no login, and accounts need no grant (permission) for it. The mirror serves a stored
    layer through each of its repositories that has a manifest with this layer. It sends no HEAD request to confirm
    this, and fetches no byte twice."""
    for name in (SECRET_REPO, PARTNER_REPO):
        site.content.add(name, image(name), "1")
    site.start(settings='prefetch = "off"')
    for name in (SECRET_REPO, PARTNER_REPO):
        assert pull(site, name, {}).body == LAYER.read()
    assert heads(site, PARTNER_REPO) == 0
    assert union(site.hub.sent_ranges(LAYER.digest)) == [(0, SIZE)]
    assert repeated(site.hub.sent_ranges(LAYER.digest)) == []


def link_without_asking(site: MirrorSite, repo: str) -> None:
    """Links a blob as earlier versions did, without asking the upstream."""
    db = second_connection(Layout(site.server.data).metadata)
    name = f"docker.io/{repo}"
    db.execute("INSERT OR IGNORE INTO repository (name, created) VALUES (?, 1.0)", (name,))
    db.execute(
        "INSERT INTO blob_link (repository, blob, needed) "
        "SELECT r.id, b.id, 2e9 FROM repository r, blob b WHERE r.name = ? AND b.digest = ?",
        (name, LAYER.digest),
    )
    db.close()


def grant_push(site: MirrorSite, name: str, *patterns: str) -> None:
    """Allows the account to pull and push repositories that match the patterns."""

    async def allow() -> None:
        async with open_accounts(site.server.data) as accounts:
            for pattern in patterns:
                await add_grant(accounts, f"user:{name}", pattern, "pull,push")

    asyncio.run(allow())
