"""Tests of a mirror whose login at the upstream fails for one repository. The cached tags of this repository are kept,
and other repositories are not affected."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import noise_image

# Settings of the upstream with which the mirror asks it at each request for a tag.
NO_TTL = 'tag_ttl = "0s"\nmiss_ttl = "0s"'
FAILING_REPO = "library/bad"
TAGS = [f"t{number}" for number in range(10)]

# By name: the realm (URL of the token service) with which the login for FAILING_REPO fails.
FAILURES: dict[str, Callable[[MirrorSite], str]] = {
    "realm that is not trusted": lambda site: f"{site.hub.auth_url}/token",
    "token service that is dead": lambda site: "http://127.0.0.1:1/token",
    "anonymous refused": lambda site: f"{site.hub.url}/v2/{REPO}/manifests/absent",
    "no token": lambda site: f"{site.hub.url}/v2/",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_login_failure_of_one_repository_keeps_its_cached_tags(site: MirrorSite, failure: str) -> None:
    """While the login for one repository fails, both workers serve its cached tags with a Warning header, again and
    again, and do not delete them. All other repositories are served without a Warning, even repositories that were
    never requested before."""
    site.content.add(FAILING_REPO, noise_image("bad", 2000), *TAGS)
    for number in range(8):
        site.content.add(f"library/new{number}", noise_image(f"new{number}", 500), "1")
    site.start(settings=NO_TTL)
    for tag in TAGS:
        assert site.http.get(f"/v2/{FAILING_REPO}/manifests/{tag}").status_code == 200
    site.get_manifest()
    site.hub.set(realms={FAILING_REPO: FAILURES[failure](site)}, private=(FAILING_REPO,))
    site.hub.revoke()
    for number in range(8):
        for worker in site.server.worker_pids():
            tag = TAGS[number]
            answer = site.get(f"/v2/{FAILING_REPO}/manifests/{tag}", worker=worker).wait_for_end()
            assert (answer.status, answer.headers["warning"][:7]) == (200, '299 - "')
            for path in (f"/v2/library/new{number}/manifests/1", f"/v2/{REPO}/manifests/1"):
                other = site.get(path, worker=worker).wait_for_end()
                assert (other.status, "warning" in other.headers) == (200, False), other.body
        assert site.http.get(f"/v2/{FAILING_REPO}/manifests/absent").status_code in (404, 502)
    listed = site.http.get(f"/v2/{FAILING_REPO}/tags/list")
    assert (listed.status_code, listed.json()["tags"]) == (200, TAGS)
    site.hub.set(realms={}, private=())
    for tag in TAGS:
        answer = site.get(f"/v2/{FAILING_REPO}/manifests/{tag}").wait_for_end()
        assert (answer.status, "warning" in answer.headers) == (200, False)


def test_tag_of_a_deleted_repository_is_deleted(site: MirrorSite) -> None:
    """Docker Hub issues a token without any permission for a deleted repository. The mirror then answers 404 and
    deletes its cached tag."""
    site.content.add(FAILING_REPO, noise_image("bad", 2000), "1")
    site.start(settings=NO_TTL, hide_unknown=True)
    assert site.http.get(f"/v2/{FAILING_REPO}/manifests/1").status_code == 200
    site.hub.set(private=(FAILING_REPO,))
    site.hub.revoke()
    assert site.http.get(f"/v2/{FAILING_REPO}/manifests/1").status_code == 404
    site.hub.refuse()
    assert site.http.get(f"/v2/{FAILING_REPO}/manifests/1").status_code == 502


def test_redirect_to_a_private_network_is_refused(site: MirrorSite) -> None:
    """An upstream on this machine redirects the request for a blob to a private or link-local address, or to an
    unspecified address such as 0.0.0.0. The mirror does not follow the redirect, and the client gets 502. Afterwards,
    blobs with good redirects can be pulled."""
    site.start()
    site.get_manifest()
    config_digest = next(digest for digest in site.image.blobs if digest != site.digest)
    port = site.hub.cdn_url.rpartition(":")[2]
    for cdn in ("http://10.255.255.1", "http://169.254.169.254", f"http://0.0.0.0:{port}", f"http://[::]:{port}"):
        site.hub.set(cdn=cdn)
        answer = site.http.get(f"/v2/{REPO}/blobs/{site.digest}")
        assert (answer.status_code, "not public" in answer.text) == (502, True), answer.text
    site.hub.set(cdn="")
    assert site.get().wait_for_end().body == site.blob
    assert site.http.get(f"/v2/{REPO}/blobs/{config_digest}").status_code == 200
