"""Tests of a server with two upstreams and with pushed repositories: the name in a request decides which of them the
server uses."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.fakes.hub.hub import Hub
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

NAME = "org/app"


class TwoUpstreams:
    """A server with two fake registries as upstreams: Docker Hub (`site.hub`, the default) and ghcr.io (`far`). They
    have different images under the name NAME: `hub_image` and `ghcr_image`."""

    def __init__(self, site: MirrorSite, far: Hub, hub_image: ImageTree, ghcr_image: ImageTree) -> None:
        self.site = site
        self.far = far
        self.hub_image = hub_image
        self.ghcr_image = ghcr_image


@pytest.fixture
def upstreams(site: MirrorSite) -> TwoUpstreams:
    content = UpstreamContent()
    ghcr_image = content.add(NAME, noise_image("ghcr", 1000, 100_000), "1")
    hub_image = site.content.add(NAME, noise_image("hub", 1000, 100_000), "1")
    far = site.upstream(content, auth="bearer", redirects=True)
    site.start(more=f'[[upstream]]\nname = "ghcr.io"\nendpoints = ["{far.url}"]\nhosts = ["ghcr.example"]')
    return TwoUpstreams(site, far, hub_image, ghcr_image)


def pull(site: MirrorSite, name: str, query: str = "", headers: Mapping[str, str] | None = None) -> list[bytes]:
    """Pulls the manifest by tag and by digest, then the blobs, each with the same query and headers. Returns their
    bytes."""
    by_tag = site.get(f"/v2/{name}/manifests/1{query}", headers=headers).wait_for_end()
    assert by_tag.status == 200, (name, query, by_tag.body)
    assert by_tag.headers.get("oci-namespace") == (query.partition("=")[2] or None)
    by_digest = site.get(
        f"/v2/{name}/manifests/{by_tag.headers['docker-content-digest']}{query}", headers=headers
    ).wait_for_end()
    assert by_digest.body == by_tag.body
    bodies = [bytes(by_tag.body)]
    image = next(known_image for known_image in known_images(site) if known_image.body == by_tag.body)
    for digest in image.blobs:
        answer = site.get(f"/v2/{name}/blobs/{digest}{query}", headers=headers).wait_for_end()
        assert answer.is_complete
        assert answer.headers.get("oci-namespace") == (query.partition("=")[2] or None)
        bodies.append(bytes(answer.body))
    return bodies


def known_images(site: MirrorSite) -> list[ImageTree]:
    """Returns all images at the upstreams."""
    return [site.image, noise_image("ghcr", 1000, 100_000), noise_image("hub", 1000, 100_000)]


def all_of(image: ImageTree) -> list[bytes]:
    """Returns the bytes of the manifest and of all blobs of an image."""
    return [image.body, *(blob.read() for blob in image.blobs.values())]


def test_request_selects_one_of_two_upstreams(upstreams: TwoUpstreams) -> None:
    """The host name in the path, the query `ns=` or the Host header of a request selects the upstream. Each image is
    fetched once, from its own upstream."""
    site = upstreams.site
    for _ in range(2):
        assert pull(site, NAME) == all_of(upstreams.hub_image)
        assert pull(site, f"ghcr.io/{NAME}") == all_of(upstreams.ghcr_image)
        assert pull(site, NAME, "?ns=ghcr.io") == all_of(upstreams.ghcr_image)
        assert pull(site, NAME, "?ns=docker.io") == all_of(upstreams.hub_image)
        assert pull(site, f"docker.io/{NAME}") == all_of(upstreams.hub_image)
        assert pull(site, NAME, headers={"Host": "ghcr.example"}) == all_of(upstreams.ghcr_image)
    assert site.count_requests("manifest") == 1
    assert site.count_requests("manifest", far=upstreams.far) == 1
    for far, image in ((site.hub, upstreams.hub_image), (upstreams.far, upstreams.ghcr_image)):
        for digest, blob in image.blobs.items():
            assert far.sent_ranges(digest) == [(0, blob.size)]
    catalog = site.http.get("/v2/_catalog").json()["repositories"]
    assert catalog == [f"docker.io/{NAME}", f"ghcr.io/{NAME}"]


def test_only_configured_upstreams_are_contacted(upstreams: TwoUpstreams) -> None:
    """A request that names a host without a configured upstream, in the query `ns` or in the path, gets an error, and
    no host is contacted."""
    site = upstreams.site
    assert site.get(f"/v2/{NAME}/manifests/1?ns=quay.io").wait_for_end().status in (400, 404)
    assert site.get(f"/v2/{NAME}/manifests/1?ns={upstreams.far.address}").wait_for_end().status in (400, 404)
    assert site.get(f"/v2/quay.io/{NAME}/manifests/1").wait_for_end().status == 404
    assert site.hub.requests() == []
    assert upstreams.far.requests() == []


def test_all_ways_to_push_to_a_mirrored_name_are_denied(upstreams: TwoUpstreams) -> None:
    """Every request with which docker may start a push to a mirrored name gets 403 DENIED, in the format that docker
    shows to its user. The mirrored image does not change."""
    for name in (REPO, "docker.io/team/app", f"ghcr.io/{NAME}"):
        check_refusals(upstreams, f"/v2/{name}")
    assert upstreams.site.get_manifest().content == upstreams.site.image.body


def check_refusals(upstreams: TwoUpstreams, base: str) -> None:
    """Checks that each request that starts a push below the path `base` is denied."""
    site, digest = upstreams.site, upstreams.ghcr_image.config.digest
    kind = {"Content-Type": upstreams.ghcr_image.media_type}
    responses = [
        site.http.post(f"{base}/blobs/uploads/"),
        site.http.post(f"{base}/blobs/uploads/", params={"mount": digest, "from": f"ghcr.io/{NAME}"}),
        site.http.post(f"{base}/blobs/uploads/", params={"digest": digest}, content=upstreams.ghcr_image.config.read()),
        site.http.put(f"{base}/manifests/1", content=upstreams.ghcr_image.body, headers=kind),
        site.http.put(
            f"{base}/manifests/{upstreams.ghcr_image.digest}", content=upstreams.ghcr_image.body, headers=kind
        ),
    ]
    for answer in responses:
        assert answer.status_code == 403
        assert answer.headers["content-type"] == "application/json"
        assert list(answer.json()) == ["errors"]
        (error,) = answer.json()["errors"]
        assert error["code"] == "DENIED"
        assert "is mirrored from" in error["message"]


def test_pushed_repository_is_never_requested_from_an_upstream(upstreams: TwoUpstreams) -> None:
    """While the upstreams are down, a client pushes an image to team/app. Both workers serve the whole image and never
    request it from an upstream. Afterwards, mirrored images can still be pulled."""
    site, image = upstreams.site, noise_image("ours", 1000, 200_000)
    site.hub.refuse()
    upstreams.far.refuse()
    for digest, blob in image.blobs.items():
        assert site.http.head(f"/v2/team/app/blobs/{digest}").status_code == 404
        started = site.http.post("/v2/team/app/blobs/uploads/")
        assert started.status_code == 202
        upload_url = started.headers["location"]
        committed = site.http.put(upload_url, params={"digest": digest}, content=blob.read())
        assert committed.status_code == 201
    kind = {"Content-Type": image.media_type}
    assert site.http.put("/v2/team/app/manifests/1", content=image.body, headers=kind).status_code == 201
    site.hub.listen()
    upstreams.far.listen()
    for worker in site.server.worker_pids():
        assert site.get("/v2/team/app/manifests/1", worker=worker).wait_for_end().body == image.body
        for digest, blob in image.blobs.items():
            assert site.get(f"/v2/team/app/blobs/{digest}", worker=worker).wait_for_end().body == blob.read()
        assert site.get("/v2/team/app/manifests/none", worker=worker).wait_for_end().status == 404
    assert site.hub.requests() == []
    assert site.get_manifest().content == site.image.body
