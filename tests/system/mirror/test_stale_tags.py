"""Tests of tags while the upstream limits requests or is down. The mirror serves its cached copy with a Warning
header."""

from __future__ import annotations

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import noise_image

# Settings of the upstream with which the mirror asks it at each request for a tag.
NO_TTL = 'tag_ttl = "0s"\nmiss_ttl = "0s"'


def move_tag(site: MirrorSite) -> None:
    """Moves the tag `1` at the upstream."""
    site.content.add(REPO, noise_image("moved", 2000), "1")
    site.hub.put(site.content)


def test_rate_limited_upstream(site: MirrorSite) -> None:
    """While the upstream answers 429, the mirror serves a cached tag with a Warning, and cached digests and blobs
    without one. Requests for content that is not cached get the 429 and Retry-After of the upstream."""
    site.content.add(REPO, noise_image("second", 3000), "2")
    site.start(settings=NO_TTL)
    pull_image(site)
    site.hub.set(limit=0, retry_after=1)
    move_tag(site)
    refused = site.http.get(f"/v2/{REPO}/manifests/2")
    assert refused.status_code == 429
    assert refused.json()["errors"][0]["code"] == "TOOMANYREQUESTS"
    assert refused.headers["retry-after"] == "1"
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, f"/v2/{REPO}/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    assert "warning" not in site.get_manifest(site.image.digest).headers
    assert site.get().wait_for_end().body == site.blob


def test_no_upstream_request_after_the_rate_limit_is_used_up(site: MirrorSite) -> None:
    """The upstream states how many requests it still allows. When none are left, the mirror serves its cached copy and
    sends no further request."""
    site.start(settings=NO_TTL, limit=1)
    pull_image(site)
    move_tag(site)
    for _ in range(4):
        answer = site.get_manifest()
        assert answer.headers["docker-content-digest"] == site.image.digest
        assert answer.headers["warning"].startswith('299 - "')
    assert site.count_requests("manifest") == 1


def test_rate_limit_does_not_stop_a_running_download(site: MirrorSite) -> None:
    """A 429 for one client's manifest does not stop the download of a blob that another client reads. The mirror
    continues to request the pieces of the blob."""
    site.content.add(REPO, noise_image("second", 3000), "2")
    site.start(12 * MIB, settings='connections = 1\nprefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    reader = site.get().wait_for_bytes(MIB)
    site.hub.set(limit=0, retry_after=60)
    assert site.http.get(f"/v2/{REPO}/manifests/2").status_code == 429
    requests_before = site.count_requests("blob")
    site.hub.release()
    assert reader.wait_for_end().body == site.blob
    assert site.count_requests("blob") > requests_before


def test_not_found_from_the_second_endpoint_keeps_cached_tags(site: MirrorSite) -> None:
    """The first endpoint is down, and the second endpoint does not have the tags. Its 404 does not delete a cached tag.
    For a tag that is not cached, the client gets 502 instead of the 404."""
    site.start(settings=NO_TTL, endpoints=2)
    pull_image(site)
    for tag in ("1", "latest"):
        site.other.remove(REPO, tag)
    site.hub.refuse()
    for _ in range(5):
        answer = site.get_manifest()
        assert answer.headers["docker-content-digest"] == site.image.digest
        assert answer.headers["warning"].startswith('299 - "')
        assert site.http.get(f"/v2/{REPO}/manifests/latest").status_code == 502


@pytest.mark.parametrize("status", [404, 403])
def test_error_page_of_a_proxy_keeps_cached_tags(site: MirrorSite, status: int) -> None:
    """An error page of a firewall or proxy in front of the upstream deletes no cached tag. A 404 of the upstream
    registry itself does."""
    site.start(settings=NO_TTL, auth="off")
    pull_image(site)
    site.hub.fault(on="manifest", method="", status=status, page=True, times=None)
    for method in ("GET", "HEAD", "GET"):
        answer = site.http.request(method, f"/v2/{REPO}/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    site.hub.clear()
    site.hub.remove(REPO, "1")
    assert site.http.get(f"/v2/{REPO}/manifests/1").status_code == 404


def test_cached_images_can_be_pulled_while_the_upstream_is_down(site: MirrorSite) -> None:
    """While the upstream is down, an image that was pulled before can be pulled again with all its blobs, also after a
    restart. A response to a request by tag has a Warning, and one by digest has none. Content that is not cached gets
    502."""
    site.start(settings=NO_TTL)
    pull_image(site)
    site.hub.refuse()
    for restarted in (False, True):
        if restarted:
            site.server.stop()
            site.serve()
        for worker in site.server.worker_pids():
            by_tag = site.get(f"/v2/{REPO}/manifests/1", worker=worker).wait_for_end()
            assert (by_tag.status, bytes(by_tag.body)) == (200, site.image.body)
            assert by_tag.headers["warning"].startswith('299 - "')
            by_digest = site.get(f"/v2/{REPO}/manifests/{site.image.digest}", worker=worker).wait_for_end()
            assert (by_digest.status, "warning" in by_digest.headers) == (200, False)
            for digest, blob in site.image.blobs.items():
                answer = site.get(f"/v2/{REPO}/blobs/{digest}", worker=worker).wait_for_end()
                assert (answer.status, bytes(answer.body), "warning" in answer.headers) == (200, blob.read(), False)
            assert site.get(f"/v2/{REPO}/manifests/other", worker=worker).wait_for_end().status == 502


@pytest.mark.parametrize("failure", ["status", "stall"])
def test_stale_copy_is_served_if_the_upstream_fails_or_stalls(site: MirrorSite, failure: str) -> None:
    """If the upstream returns errors or does not respond, the client gets the cached copy with a Warning."""
    site.start(settings=NO_TTL)
    pull_image(site)
    fault = {"status": 503} if failure == "status" else {"stall": True}
    site.hub.fault(on="any", method="", times=None, **fault)
    answer = site.get_manifest()
    assert answer.headers["docker-content-digest"] == site.image.digest
    assert answer.headers["warning"].startswith('299 - "')
    site.hub.clear()
    site.hub.release()


def pull_image(site: MirrorSite) -> None:
    """Pulls the image with all its blobs, so that it is cached."""
    assert site.get_manifest().content == site.image.body
    for digest, blob in site.image.blobs.items():
        assert site.get(f"/v2/{REPO}/blobs/{digest}").wait_for_end().body == blob.read()
