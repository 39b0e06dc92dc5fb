"""The mirror serves a stored blob through a repository of a private upstream only after the upstream has confirmed that
this repository has the blob."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import apsw
import httpx2
import pytest

from storage.composition import open_accounts
from storage.data_dir.layout import Layout
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import SIZE, BackgroundGet, MirrorSite
from tests.fakes.store_accounts import add_grant
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, manifest_of, noise_blob
from tests.system.mirror.test_private_upstream import account

PASSWORD = "correct-horse-battery"
SECRET = "private/y"
ATTACKER = "attacker/x"
PARTNER = "partner/z"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = noise_blob("secret", SIZE)


def image(name: str) -> ImageTree:
    """Returns an image with the secret layer in its manifest, after a layer of its own."""
    return manifest_of(UpstreamBlob(json.dumps({"name": name}).encode(), CONFIG), noise_blob(name, 1000), LAYER)


def start(site: MirrorSite, prefetch: str = "off", **switches: Any) -> None:
    """Starts an upstream with a login. The secret layer is in private/y and partner/z. The manifest of attacker/x names
    it as well, but that repository does not have it."""
    (site.folder / "password").write_text(PASSWORD)
    names = (SECRET, ATTACKER, PARTNER)
    for name in names:
        site.content.add(name, image(name), "1")
    del site.content.repositories[ATTACKER].blobs[LAYER.digest]
    login = f'username = "me"\npassword_file = "{site.folder / "password"}"\n'
    site.start(
        settings=f'{login}prefetch = "{prefetch}"',
        **{"username": "me", "password": PASSWORD, "private": names, **switches},
    )


def blob(repo: str) -> str:
    return f"/v2/docker.io/{repo}/blobs/{LAYER.digest}"


def pull(site: MirrorSite, repo: str, login: dict[str, str]) -> BackgroundGet:
    """Pulls the manifest, then the layer."""
    answer = site.http.get(f"/v2/docker.io/{repo}/manifests/1", headers=login)
    assert answer.status_code == 200, answer.text
    return site.get(blob(repo), headers=login).ended()


def request_layer_in_all_ways(site: MirrorSite, repo: str, login: dict[str, str]) -> list[httpx2.Response]:
    """Requests the layer under both names of the repository: with GET, with ranges, with If-None-Match, with HEAD, and
    with the query `ns`. Returns the responses."""
    found = []
    for name in (f"docker.io/{repo}", repo):
        path = f"/v2/{name}/blobs/{LAYER.digest}"
        for headers in ({}, {"range": "bytes=0-9"}, {"range": "bytes=0-1,5-9"}, {"if-none-match": f'"{LAYER.digest}"'}):
            found.append(site.http.get(path, headers={**login, **headers}))
        found.append(site.http.head(path, headers=login))
        found.append(site.http.get(f"{path}?ns=docker.io", headers=login))
    return found


def heads(site: MirrorSite, repo: str) -> int:
    """Returns how many authorized requests asked whether the repository has the layer."""
    asked = [*site.hub.requests(method="HEAD", match=f"{repo}/blobs/{LAYER.digest}")]
    return sum(seen.status != 401 for seen in asked)


def test_a_known_digest_opens_no_blob_of_another_repository(site: MirrorSite) -> None:
    """The attacker's repository has a manifest that names a layer of another repository. The layer is stored, but all
    requests for it through the attacker's repository get 404, as from the upstream. The mirror asks the upstream only
    once."""
    start(site)
    reader = account(site, "reader", f"docker.io/{SECRET}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET, reader).body == LAYER.read()
    assert pull(site, ATTACKER, attacker).status == 404
    for answer in request_layer_in_all_ways(site, ATTACKER, attacker):
        assert answer.status_code == 404, answer.request
        assert LAYER.read(0, 10) not in answer.content
    assert heads(site, ATTACKER) == 1
    for digest in (image(SECRET).digest, image(SECRET).config.digest):
        assert site.http.get(f"/v2/docker.io/{ATTACKER}/manifests/{digest}", headers=attacker).status_code == 404
        assert site.http.get(f"/v2/docker.io/{ATTACKER}/blobs/{digest}", headers=attacker).status_code == 404


def test_a_known_digest_opens_no_blob_that_is_on_its_way_in(site: MirrorSite) -> None:
    """While the mirror downloads a layer for one repository, requests for the layer through the attacker's repository
    get 404 from every worker."""
    start(site, send_buffer=65536)
    reader = account(site, "reader", f"docker.io/{SECRET}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert site.http.get(f"/v2/docker.io/{SECRET}/manifests/1", headers=reader).status_code == 200
    site.hub.fault(on="blob", match=LAYER.digest.partition(":")[2], stall_after=MIB)
    growing = site.get(blob(SECRET), headers=reader).reached(MIB)
    assert site.http.get(f"/v2/docker.io/{ATTACKER}/manifests/1", headers=attacker).status_code == 200
    for worker in site.server.worker_pids():
        for span in ("", "0-9"):
            assert site.get(blob(ATTACKER), span, worker=worker, headers=attacker).ended().status == 404
    site.hub.release()
    assert growing.ended().body == LAYER.read()


def test_a_stored_layer_is_confirmed_once_for_each_repository(site: MirrorSite) -> None:
    """The mirror sends one HEAD to confirm that a second repository has a stored layer, and fetches no byte again. From
    then on it serves the layer through this repository even while the upstream is down. It does not serve the layer
    through a repository for which it has not asked the upstream."""
    start(site)
    reader = account(site, "reader", "docker.io/**")
    assert pull(site, SECRET, reader).body == LAYER.read()
    assert site.http.head(blob(PARTNER), headers=reader).headers["content-length"] == str(SIZE)
    assert pull(site, PARTNER, reader).body == LAYER.read()
    assert pull(site, PARTNER, reader).body == LAYER.read()
    assert heads(site, PARTNER) == 1
    assert repeated(site.hub.sent(LAYER.digest)) == []
    assert union(site.hub.sent(LAYER.digest)) == [(0, SIZE)]
    assert site.http.get(f"/v2/docker.io/{ATTACKER}/manifests/1", headers=reader).status_code == 200
    site.hub.refuse()
    assert site.get(blob(PARTNER), headers=reader).ended().body == LAYER.read()
    assert site.get(blob(SECRET), headers=reader).ended().body == LAYER.read()
    refused = site.http.get(blob(ATTACKER), headers=reader)
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")


def test_links_that_nobody_has_confirmed_are_asked_for(site: MirrorSite) -> None:
    """Earlier versions could link a blob to a repository without asking the upstream. Until the upstream confirms that
    the repository has the blob, the mirror does not serve the blob through it, no other repository can mount the blob
    from it, and a pushed manifest cannot use the blob."""
    start(site)
    reader = account(site, "reader", "docker.io/**")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET, reader).body == LAYER.read()
    assert site.http.get(f"/v2/docker.io/{ATTACKER}/manifests/1", headers=attacker).status_code == 200
    site.server.stop()
    give_without_asking(site, ATTACKER)
    give_without_asking(site, PARTNER)
    site.hub.forget()
    site.serve()
    writer = account(site, "writer", "docker.io/attacker/**", "docker.io/partner/**")
    grant_push(site, "writer", "team/**", "attacker/**")
    for name in (f"docker.io/{ATTACKER}", ATTACKER, f"docker.io/{PARTNER}", ""):
        source = f"&from={name}" if name else ""
        answer = site.http.post(f"/v2/team/app/blobs/uploads/?mount={LAYER.digest}{source}", headers=writer)
        assert answer.status_code == 202, name
    put = {**writer, "content-type": "application/vnd.oci.image.manifest.v1+json"}
    pushed = site.http.put(f"/v2/{ATTACKER}/manifests/1", headers=put, content=image(ATTACKER).body)
    assert (pushed.status_code, pushed.json()["errors"][0]["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert {answer.status_code for answer in request_layer_in_all_ways(site, ATTACKER, attacker)} == {404}
    assert pull(site, PARTNER, reader).body == LAYER.read()
    assert heads(site, PARTNER) == 1
    mounted = site.http.post(
        f"/v2/team/app/blobs/uploads/?mount={LAYER.digest}&from=docker.io/{PARTNER}", headers=writer
    )
    assert mounted.status_code == 201


def test_a_prefetched_layer_is_confirmed_as_well(site: MirrorSite) -> None:
    """Prefetching a stored layer asks the upstream as well. If the upstream says that the repository does not have the
    layer, the mirror does not serve it through this repository."""
    start(site, prefetch="layers")
    reader = account(site, "reader", f"docker.io/{SECRET}")
    attacker = account(site, "attacker", "docker.io/attacker/**")
    assert pull(site, SECRET, reader).body == LAYER.read()
    own = image(ATTACKER).layers[0].digest
    assert site.http.get(f"/v2/docker.io/{ATTACKER}/manifests/1", headers=attacker).status_code == 200
    assert site.http.get(f"/v2/docker.io/{ATTACKER}/blobs/{own}", headers=attacker).status_code == 200
    site.hub.until(lambda: heads(site, ATTACKER) == 1)
    assert site.http.get(blob(ATTACKER), headers=attacker).status_code == 404
    assert heads(site, ATTACKER) == 1


@pytest.mark.parametrize("size", [SIZE + 1, 10, 0])
def test_a_manifest_cannot_choose_a_blobs_size(site: MirrorSite, size: int) -> None:
    """The headers of a blob that is not stored state the upstream's size, whatever a manifest claims."""
    start(site)
    document = json.loads(image(PARTNER).body)
    document["layers"][1]["size"] = size
    liar = ImageTree(json.dumps(document).encode(), image(PARTNER).media_type, image(PARTNER).blobs)
    site.content.add(PARTNER, liar, "liar")
    site.hub.put(site.content)
    reader = account(site, "reader", "docker.io/partner/**")
    assert site.http.get(f"/v2/docker.io/{PARTNER}/manifests/liar", headers=reader).status_code == 200
    assert site.http.head(blob(PARTNER), headers=reader).headers["content-length"] == str(SIZE)
    assert site.get(blob(PARTNER), headers=reader).ended().body == LAYER.read()


def test_a_public_upstream_shares(site: MirrorSite) -> None:
    """A public upstream needs neither a login nor a grant. A repository of it may serve a stored layer as soon as one
    of its manifests names the layer. The mirror does not ask the upstream with HEAD, and fetches no byte twice."""
    for name in (SECRET, PARTNER):
        site.content.add(name, image(name), "1")
    site.start(settings='prefetch = "off"')
    for name in (SECRET, PARTNER):
        assert pull(site, name, {}).body == LAYER.read()
    assert heads(site, PARTNER) == 0
    assert union(site.hub.sent(LAYER.digest)) == [(0, SIZE)]
    assert repeated(site.hub.sent(LAYER.digest)) == []


def give_without_asking(site: MirrorSite, repo: str) -> None:
    """Links a blob as earlier versions did, without asking the upstream."""
    db = apsw.Connection(str(Layout(site.server.data).metadata))
    name = f"docker.io/{repo}"
    db.execute("INSERT OR IGNORE INTO repository (name, created) VALUES (?, 1.0)", (name,))
    db.execute(
        "INSERT INTO blob_link (repository, blob, needed) "
        "SELECT r.id, b.id, 2e9 FROM repository r, blob b WHERE r.name = ? AND b.digest = ?",
        (name, LAYER.digest),
    )
    db.close()


def grant_push(site: MirrorSite, name: str, *patterns: str) -> None:
    async def allow() -> None:
        async with open_accounts(site.server.data) as accounts:
            for pattern in patterns:
                await add_grant(accounts, f"user:{name}", pattern, "pull,push")

    asyncio.run(allow())
