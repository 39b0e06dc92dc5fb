"""Tags while the upstream limits requests or is down: cached content is served and marked as stale."""

from __future__ import annotations

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import noise_image

NO_TTL = 'tag_ttl = "0s"\nmiss_ttl = "0s"'


def moved(site: MirrorSite) -> None:
    """Moves the tag `1` at the upstream."""
    site.content.add(REPO, noise_image("moved", 2000), "1")
    site.hub.put(site.content)


def test_too_many_requests(site: MirrorSite) -> None:
    """A cached tag is served with a Warning. Other content gets the upstream's 429 and Retry-After. Cached digests and
    blobs need neither."""
    site.content.add(REPO, noise_image("second", 3000), "2")
    site.start(settings=NO_TTL)
    pulled(site)
    site.hub.set(limit=0, retry_after=1)
    moved(site)
    refused = site.http.get(f"/v2/{REPO}/manifests/2")
    assert refused.status_code == 429
    assert refused.json()["errors"][0]["code"] == "TOOMANYREQUESTS"
    assert refused.headers["retry-after"] == "1"
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, f"/v2/{REPO}/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    assert "warning" not in site.inspect(site.image.digest).headers
    assert site.get().ended().body == site.blob


def test_requests_that_run_out(site: MirrorSite) -> None:
    """After the last request that the upstream allows, cached content is served without an upstream request."""
    site.start(settings=NO_TTL, limit=1)
    pulled(site)
    moved(site)
    for _ in range(4):
        answer = site.inspect()
        assert answer.headers["docker-content-digest"] == site.image.digest
        assert answer.headers["warning"].startswith('299 - "')
    assert site.asked("manifest") == 1


def test_a_limit_reached_while_a_blob_comes(site: MirrorSite) -> None:
    """A 429 for one client's image does not disturb readers of a blob: the fill goes on requesting its pieces."""
    site.content.add(REPO, noise_image("second", 3000), "2")
    site.start(12 * MIB, settings='connections = 1\nprefetch = "off"', rate=4 * MIB)
    site.inspect()
    reading = site.get().reached(1)
    site.hub.set(limit=0, retry_after=60)
    assert site.http.get(f"/v2/{REPO}/manifests/2").status_code == 429
    asked = site.asked("blob")
    assert reading.ended().body == site.blob
    assert site.asked("blob") > asked


def test_a_fallback_that_has_less(site: MirrorSite) -> None:
    """While the first endpoint is down, "not found" from the second one deletes no cached tag, and is not passed on for
    an unknown tag."""
    site.start(settings=NO_TTL, endpoints=2)
    pulled(site)
    for tag in ("1", "latest"):
        site.other.remove(REPO, tag)
    site.hub.refuse()
    for _ in range(5):
        answer = site.inspect()
        assert answer.headers["docker-content-digest"] == site.image.digest
        assert answer.headers["warning"].startswith('299 - "')
        assert site.http.get(f"/v2/{REPO}/manifests/latest").status_code == 502


@pytest.mark.parametrize("status", [404, 403])
def test_a_page_that_is_no_registry_s(site: MirrorSite, status: int) -> None:
    """A firewall or proxy that refuses in place of the upstream deletes no cached content; a refusal by the upstream
    itself does."""
    site.start(settings=NO_TTL, auth="off")
    pulled(site)
    site.hub.fault(on="manifest", method="", status=status, page=True, times=None)
    for method in ("GET", "HEAD", "GET"):
        answer = site.http.request(method, f"/v2/{REPO}/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    site.hub.clear()
    site.hub.remove(REPO, "1")
    assert site.http.get(f"/v2/{REPO}/manifests/1").status_code == 404


def test_the_upstream_is_off(site: MirrorSite) -> None:
    """All that was pulled can be pulled again: by tag with a Warning, by digest without one, with all blobs, and also
    after a restart. Anything else gets 502."""
    site.start(settings=NO_TTL)
    pulled(site)
    site.hub.refuse()
    for restarted in (False, True):
        if restarted:
            site.server.stop()
            site.serve()
        for worker in site.server.worker_pids():
            by_tag = site.get(f"/v2/{REPO}/manifests/1", worker=worker).ended()
            assert (by_tag.status, bytes(by_tag.body)) == (200, site.image.body)
            assert by_tag.headers["warning"].startswith('299 - "')
            by_digest = site.get(f"/v2/{REPO}/manifests/{site.image.digest}", worker=worker).ended()
            assert (by_digest.status, "warning" in by_digest.headers) == (200, False)
            for digest, blob in site.image.blobs.items():
                answer = site.get(f"/v2/{REPO}/blobs/{digest}", worker=worker).ended()
                assert (answer.status, bytes(answer.body), "warning" in answer.headers) == (200, blob.read(), False)
            assert site.get(f"/v2/{REPO}/manifests/other", worker=worker).ended().status == 502


@pytest.mark.parametrize("how", ["status", "stall"])
def test_the_upstream_is_ill(site: MirrorSite, how: str) -> None:
    """If the upstream returns errors or does not respond, cached content is served as well, and a client that can get a
    stale copy waits 3 s at most."""
    site.start(settings=NO_TTL)
    pulled(site)
    wrong = {"status": 503} if how == "status" else {"stall": True}
    site.hub.fault(on="any", method="", times=None, **wrong)
    answer = site.inspect()
    assert answer.headers["docker-content-digest"] == site.image.digest
    assert answer.headers["warning"].startswith('299 - "')
    site.hub.clear()
    site.hub.release()


def pulled(site: MirrorSite) -> None:
    assert site.inspect().content == site.image.body
    for digest, blob in site.image.blobs.items():
        assert site.get(f"/v2/{REPO}/blobs/{digest}").ended().body == blob.read()
