"""Until a blob's digest is checked, caches must not store any of it: no validator, and no-store."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

IMMUTABLE = "max-age=31536000, immutable"


def held(site: MirrorSite, **fault: int) -> None:
    """Fetches the first MiB of the blob, for a client that reads it, and stops there."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB, **fault)
    site.get().reached(MIB)


def unverified(site: MirrorSite, headers: Mapping[str, str]) -> bool:
    """Returns whether the headers mark the blob as unverified. Its digest is in the headers in either case."""
    assert headers["docker-content-digest"] == site.digest
    assert headers["accept-ranges"] == "bytes"
    if headers["cache-control"] == "no-store":
        assert "etag" not in headers
        return True
    assert (headers["cache-control"], headers["etag"]) == (IMMUTABLE, f'"{site.digest}"')
    return False


@pytest.mark.parametrize("span", ["", "0-9", "0-1,5-9", "100-", "1000-1000"])
def test_a_cold_answer_is_kept_by_no_cache(site: MirrorSite, span: str) -> None:
    """No response from a blob that is being filled may be cached: neither the whole nor ranges, at any worker. That
    includes a range which is complete long before the digest is checked. After the check, the same response may be
    cached for ever."""
    held(site)
    for worker in site.server.worker_pids():
        cold = site.get(span=span, worker=worker).answered()
        assert unverified(site, cold.headers)
    site.hub.release()
    assert site.get().ended().body == site.blob
    warm = site.get(span=span).ended()
    assert not unverified(site, warm.headers)
    assert warm.status == (206 if span else 200)


def test_a_head_of_what_is_not_here(site: MirrorSite) -> None:
    """The response to HEAD states what the upstream or a manifest says, and is marked as unverified."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    answer = site.http.head(site.path)
    assert answer.headers["content-length"] == str(SIZE)
    assert unverified(site, answer.headers)
    assert site.get().ended().body == site.blob
    assert not unverified(site, site.http.head(site.path).headers)


def test_conditions_do_not_hold_for_what_is_not_checked(site: MirrorSite) -> None:
    """An unverified blob has no validator to compare with: If-Range returns the whole, If-None-Match a 200, and
    If-Match fails (RFC 9110, 13.1 and 13.2)."""
    held(site)
    tag = f'"{site.digest}"'
    ranged = site.get(span="0-9", headers={"If-Range": tag}).answered()
    assert (ranged.status, ranged.headers["content-length"]) == (200, str(SIZE))
    assert unverified(site, ranged.headers)
    for condition in (tag, "*"):
        got = site.get(headers={"If-None-Match": condition}).answered()
        assert got.status == 200
        assert unverified(site, got.headers)
        assert site.http.head(site.path, headers={"If-None-Match": condition}).status_code == 200
    assert site.http.get(site.path, headers={"If-Match": tag}).status_code == 412
    assert site.http.head(site.path, headers={"If-Match": tag}).status_code == 412
    site.hub.release()
    assert ranged.ended().body == site.blob
    assert site.get(span="0-9", headers={"If-Range": tag}).ended().status == 206
    assert site.http.get(site.path, headers={"If-None-Match": tag}).status_code == 304
    assert site.http.get(site.path, headers={"If-Match": tag}).status_code == 200


def test_bytes_of_a_bad_blob_are_not_sent_again(site: MirrorSite) -> None:
    """After a range of corrupt bytes was sent, the same range later returns the right ones."""
    held(site, corrupt=5)
    early = site.get(span="0-9").ended()
    assert early.whole
    assert early.body != site.blob[:10]
    assert unverified(site, early.headers)
    site.hub.release()
    wait_until(lambda: not site.kept(), "wrong bytes are kept")
    assert site.get(span="0-9").ended().body == site.blob[:10]


def test_small_blobs_are_checked_first(site: MirrorSite) -> None:
    """Small blobs are verified before they are served, so each response may be cached."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    small = site.image.layers[0]
    answer = site.get(f"/v2/{REPO}/blobs/{small.digest}", "0-9").ended()
    assert (answer.headers["cache-control"], answer.headers["etag"]) == (IMMUTABLE, f'"{small.digest}"')
    assert answer.body == small.read(0, 10)
