"""Names through the whole server: two upstreams and hosted repositories."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.fakes.hub.hub import Hub
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

NAME = "org/app"


class TwoUpstreams:
    """A fake Docker Hub as the default upstream, and another one as ghcr.io; both have different images under the same
    name."""

    def __init__(self, site: MirrorSite, far: Hub, hubs: ImageTree, ghcrs: ImageTree) -> None:
        self.site = site
        self.far = far
        self.hubs = hubs
        self.ghcrs = ghcrs


@pytest.fixture
def pair(site: MirrorSite) -> TwoUpstreams:
    content = UpstreamContent()
    ghcrs = content.add(NAME, noise_image("ghcr", 1000, 100_000), "1")
    hubs = site.content.add(NAME, noise_image("hub", 1000, 100_000), "1")
    far = site.upstream(content, auth="bearer", redirects=True)
    site.start(more=f'[[upstream]]\nname = "ghcr.io"\nendpoints = ["{far.url}"]\nhosts = ["ghcr.example"]')
    return TwoUpstreams(site, far, hubs, ghcrs)


def pull(site: MirrorSite, name: str, query: str = "", headers: Mapping[str, str] | None = None) -> list[bytes]:
    """Pulls the manifest by tag and by digest, then the blobs, all requested in the same way."""
    first = site.get(f"/v2/{name}/manifests/1{query}", headers=headers).ended()
    assert first.status == 200, (name, query, first.body)
    assert first.headers.get("oci-namespace") == (query.partition("=")[2] or None)
    again = site.get(f"/v2/{name}/manifests/{first.headers['docker-content-digest']}{query}", headers=headers).ended()
    assert again.body == first.body
    found = [bytes(first.body)]
    image = next(held for held in known(site) if held.body == first.body)
    for digest in image.blobs:
        answer = site.get(f"/v2/{name}/blobs/{digest}{query}", headers=headers).ended()
        assert answer.whole
        assert answer.headers.get("oci-namespace") == (query.partition("=")[2] or None)
        found.append(bytes(answer.body))
    return found


def known(site: MirrorSite) -> list[ImageTree]:
    return [site.image, noise_image("ghcr", 1000, 100_000), noise_image("hub", 1000, 100_000)]


def all_of(image: ImageTree) -> list[bytes]:
    return [image.body, *(blob.read() for blob in image.blobs.values())]


def test_one_name_at_two_upstreams(pair: TwoUpstreams) -> None:
    """The host in the path, `ns=` and the Host header select the upstream; each image is fetched once, from its own
    upstream."""
    site = pair.site
    for _ in range(2):
        assert pull(site, NAME) == all_of(pair.hubs)
        assert pull(site, f"ghcr.io/{NAME}") == all_of(pair.ghcrs)
        assert pull(site, NAME, "?ns=ghcr.io") == all_of(pair.ghcrs)
        assert pull(site, NAME, "?ns=docker.io") == all_of(pair.hubs)
        assert pull(site, f"docker.io/{NAME}") == all_of(pair.hubs)
        assert pull(site, NAME, headers={"Host": "ghcr.example"}) == all_of(pair.ghcrs)
    assert site.asked("manifest") == 1
    assert site.asked("manifest", far=pair.far) == 1
    for far, image in ((site.hub, pair.hubs), (pair.far, pair.ghcrs)):
        for digest, blob in image.blobs.items():
            assert far.sent(digest) == [(0, blob.size)]
    catalog = site.http.get("/v2/_catalog").json()["repositories"]
    assert catalog == [f"docker.io/{NAME}", f"ghcr.io/{NAME}"]


def test_a_host_nobody_mirrors(pair: TwoUpstreams) -> None:
    """`ns` and hosts select from the configured upstreams: no other host is contacted."""
    site = pair.site
    assert site.get(f"/v2/{NAME}/manifests/1?ns=quay.io").ended().status in (400, 404)
    assert site.get(f"/v2/{NAME}/manifests/1?ns={pair.far.address}").ended().status in (400, 404)
    assert site.get(f"/v2/quay.io/{NAME}/manifests/1").ended().status == 404
    assert site.hub.requests() == []
    assert pair.far.requests() == []


def test_pushes_to_what_is_mirrored(pair: TwoUpstreams) -> None:
    """Every request with which docker may start a push gets 403 DENIED in the form that docker prints. The image does
    not change."""
    for name in (REPO, "docker.io/team/app", f"ghcr.io/{NAME}"):
        check_refusals(pair, f"/v2/{name}")
    assert pair.site.inspect().content == pair.site.image.body


def check_refusals(pair: TwoUpstreams, base: str) -> None:
    site, digest = pair.site, pair.ghcrs.config.digest
    kind = {"Content-Type": pair.ghcrs.media_type}
    steps = [
        site.http.post(f"{base}/blobs/uploads/"),
        site.http.post(f"{base}/blobs/uploads/", params={"mount": digest, "from": f"ghcr.io/{NAME}"}),
        site.http.post(f"{base}/blobs/uploads/", params={"digest": digest}, content=pair.ghcrs.config.read()),
        site.http.put(f"{base}/manifests/1", content=pair.ghcrs.body, headers=kind),
        site.http.put(f"{base}/manifests/{pair.ghcrs.digest}", content=pair.ghcrs.body, headers=kind),
    ]
    for answer in steps:
        assert answer.status_code == 403
        assert answer.headers["content-type"] == "application/json"
        assert list(answer.json()) == ["errors"]
        (error,) = answer.json()["errors"]
        assert error["code"] == "DENIED"
        assert "is mirrored from" in error["message"]


def test_what_is_hosted_beside_it(pair: TwoUpstreams) -> None:
    """A push of team/app succeeds while the upstreams are down, is complete on both workers, and is never requested
    upstream. Mirrored content can still be pulled afterwards."""
    site, ours = pair.site, noise_image("ours", 1000, 200_000)
    site.hub.refuse()
    pair.far.refuse()
    for digest, blob in ours.blobs.items():
        assert site.http.head(f"/v2/team/app/blobs/{digest}").status_code == 404
        begun = site.http.post("/v2/team/app/blobs/uploads/")
        assert begun.status_code == 202
        where = begun.headers["location"]
        done = site.http.put(where, params={"digest": digest}, content=blob.read())
        assert done.status_code == 201
    kind = {"Content-Type": ours.media_type}
    assert site.http.put("/v2/team/app/manifests/1", content=ours.body, headers=kind).status_code == 201
    site.hub.listen()
    pair.far.listen()
    for worker in site.server.worker_pids():
        assert site.get("/v2/team/app/manifests/1", worker=worker).ended().body == ours.body
        for digest, blob in ours.blobs.items():
            assert site.get(f"/v2/team/app/blobs/{digest}", worker=worker).ended().body == blob.read()
        assert site.get("/v2/team/app/manifests/none", worker=worker).ended().status == 404
    assert site.hub.requests() == []
    assert site.inspect().content == site.image.body
