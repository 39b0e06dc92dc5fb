"""If the login fails for one repository, its tags are kept, and other repositories are not affected."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import noise_image

NO_TTL = 'tag_ttl = "0s"\nmiss_ttl = "0s"'
BAD = "library/bad"
TAGS = [f"t{number}" for number in range(10)]

FAILURES: dict[str, Callable[[MirrorSite], str]] = {
    "realm that is not trusted": lambda site: f"{site.hub.auth_url}/token",
    "token service that is dead": lambda site: "http://127.0.0.1:1/token",
    "anonymous refused": lambda site: f"{site.hub.url}/v2/{REPO}/manifests/absent",
    "no token": lambda site: f"{site.hub.url}/v2/",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_repository_that_cannot_be_logged_in_for(site: MirrorSite, failure: str) -> None:
    """Repeatedly and through both workers: cached content of this repository is served with a Warning and not deleted.
    All other repositories, also new ones, are served without a Warning."""
    site.content.add(BAD, noise_image("bad", 2000), *TAGS)
    for number in range(8):
        site.content.add(f"library/new{number}", noise_image(f"new{number}", 500), "1")
    site.start(settings=NO_TTL)
    for tag in TAGS:
        assert site.http.get(f"/v2/{BAD}/manifests/{tag}").status_code == 200
    site.inspect()
    site.hub.set(realms={BAD: FAILURES[failure](site)}, private=(BAD,))
    site.hub.revoke()
    for number in range(8):
        for worker in site.server.worker_pids():
            tag = TAGS[number]
            answer = site.get(f"/v2/{BAD}/manifests/{tag}", worker=worker).ended()
            assert (answer.status, answer.headers["warning"][:7]) == (200, '299 - "')
            for path in (f"/v2/library/new{number}/manifests/1", f"/v2/{REPO}/manifests/1"):
                other = site.get(path, worker=worker).ended()
                assert (other.status, "warning" in other.headers) == (200, False), other.body
        assert site.http.get(f"/v2/{BAD}/manifests/absent").status_code in (404, 502)
    listed = site.http.get(f"/v2/{BAD}/tags/list")
    assert (listed.status_code, listed.json()["tags"]) == (200, TAGS)
    site.hub.set(realms={}, private=())
    for tag in TAGS:
        answer = site.get(f"/v2/{BAD}/manifests/{tag}").ended()
        assert (answer.status, "warning" in answer.headers) == (200, False)


def test_a_repository_that_is_gone(site: MirrorSite) -> None:
    """If the upstream issues a token that grants nothing, as Docker Hub does for a deleted repository, the tag is
    deleted."""
    site.content.add(BAD, noise_image("bad", 2000), "1")
    site.start(settings=NO_TTL, hide_unknown=True)
    assert site.http.get(f"/v2/{BAD}/manifests/1").status_code == 200
    site.hub.set(private=(BAD,))
    site.hub.revoke()
    assert site.http.get(f"/v2/{BAD}/manifests/1").status_code == 404
    site.hub.refuse()
    assert site.http.get(f"/v2/{BAD}/manifests/1").status_code == 502


def test_a_redirect_to_another_network(site: MirrorSite) -> None:
    """If an upstream on this machine redirects to a private or link-local address, or to 0.0.0.0, the client gets an
    error at once. Other blobs still arrive."""
    site.start()
    site.inspect()
    config = next(digest for digest in site.image.blobs if digest != site.digest)
    port = site.hub.cdn_url.rpartition(":")[2]
    for cdn in ("http://10.255.255.1", "http://169.254.169.254", f"http://0.0.0.0:{port}", f"http://[::]:{port}"):
        site.hub.set(cdn=cdn)
        answer = site.http.get(f"/v2/{REPO}/blobs/{site.digest}")
        assert (answer.status_code, "not public" in answer.text) == (502, True), answer.text
    site.hub.set(cdn="")
    assert site.get().ended().body == site.blob
    assert site.http.get(f"/v2/{REPO}/blobs/{config}").status_code == 200
