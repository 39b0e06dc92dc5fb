"""Tests of the caching headers of blobs whose digest is not verified yet, because the mirror still downloads them. Such
a response has `Cache-Control: no-store` and no ETag, so that HTTP caches do not store bytes that may be wrong."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

IMMUTABLE = "max-age=31536000, immutable"
"""The Cache-Control of a verified blob."""


def start_stalled_download(site: MirrorSite, **fault: int) -> None:
    """Starts the mirror, and pulls as a client does: gets the manifest of the image, then requests its last layer, the
    site's `blob`. The upstream sends the first MiB of the blob and holds back the rest."""
    site.start(settings='prefetch = "off"')  # so the mirror downloads the blob only when a client requests it
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB, **fault)
    site.get().wait_for_bytes(MIB)


def is_marked_unverified(site: MirrorSite, headers: Mapping[str, str]) -> bool:
    """Returns whether the headers mark the blob as unverified. Checks that they have the right values for an unverified
    or a verified blob, and name the digest in both cases."""
    assert headers["docker-content-digest"] == site.digest
    assert headers["accept-ranges"] == "bytes"
    if headers["cache-control"] == "no-store":
        assert "etag" not in headers
        return True
    assert (headers["cache-control"], headers["etag"]) == (IMMUTABLE, f'"{site.digest}"')
    return False


@pytest.mark.parametrize("span", ["", "0-9", "0-1,5-9", "100-", "1000-1000"])
def test_responses_during_the_download_must_not_be_cached(site: MirrorSite, span: str) -> None:
    """While the mirror downloads a blob, neither worker allows caches to store a response with the blob or a range of
    it. This holds even for a range whose bytes are all stored already. Once the digest is verified, the same response
    may be cached for ever."""
    start_stalled_download(site)
    for worker in site.server.worker_pids():
        unverified = site.get(span=span, worker=worker).wait_for_headers()
        assert is_marked_unverified(site, unverified.headers)
    site.hub.release()
    assert site.get().wait_for_end().body == site.blob
    verified = site.get(span=span).wait_for_end()
    assert not is_marked_unverified(site, verified.headers)
    assert verified.status == (206 if span else 200)


def test_head_of_a_blob_that_is_not_stored(site: MirrorSite) -> None:
    """The response to HEAD for a blob that is not stored has the size that the upstream or a manifest states, and is
    marked as unverified."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()  # as a client does before it requests a blob
    answer = site.http.head(site.path)
    assert answer.headers["content-length"] == str(SIZE)
    assert is_marked_unverified(site, answer.headers)
    assert site.get().wait_for_end().body == site.blob
    assert not is_marked_unverified(site, site.http.head(site.path).headers)


def test_conditional_requests_for_an_unverified_blob(site: MirrorSite) -> None:
    """An unverified blob has no ETag, so no condition matches it. A request with If-Range gets the whole blob, a
    request with If-None-Match gets 200, and a request with If-Match gets 412 (RFC 9110, 13.1 and 13.2)."""
    start_stalled_download(site)
    etag = f'"{site.digest}"'
    ranged = site.get(span="0-9", headers={"If-Range": etag}).wait_for_headers()
    assert (ranged.status, ranged.headers["content-length"]) == (200, str(SIZE))
    assert is_marked_unverified(site, ranged.headers)
    for condition in (etag, "*"):
        response = site.get(headers={"If-None-Match": condition}).wait_for_headers()
        assert response.status == 200
        assert is_marked_unverified(site, response.headers)
        assert site.http.head(site.path, headers={"If-None-Match": condition}).status_code == 200
    assert site.http.get(site.path, headers={"If-Match": etag}).status_code == 412
    assert site.http.head(site.path, headers={"If-Match": etag}).status_code == 412
    site.hub.release()
    assert ranged.wait_for_end().body == site.blob
    assert site.get(span="0-9", headers={"If-Range": etag}).wait_for_end().status == 206
    assert site.http.get(site.path, headers={"If-None-Match": etag}).status_code == 304
    assert site.http.get(site.path, headers={"If-Match": etag}).status_code == 200


def test_corrupt_bytes_are_not_sent_a_second_time(site: MirrorSite) -> None:
    """A client gets a range with a corrupt byte, marked as unverified. When the check of the digest has failed, a new
    request for the same range gets the right bytes."""
    start_stalled_download(site, corrupt=5)
    corrupt_range = site.get(span="0-9").wait_for_end()
    assert corrupt_range.is_complete
    assert corrupt_range.body != site.blob[:10]
    assert is_marked_unverified(site, corrupt_range.headers)
    site.hub.release()
    wait_until(lambda: not site.stored_files(), "wrong bytes are kept")
    assert site.get(span="0-9").wait_for_end().body == site.blob[:10]


def test_small_blobs_are_verified_before_they_are_served(site: MirrorSite) -> None:
    """The mirror verifies a small blob before it serves any byte of it, so every response may be cached."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()  # as a client does before it requests a blob
    small = site.image.layers[0]
    answer = site.get(f"/v2/{REPO}/blobs/{small.digest}", "0-9").wait_for_end()
    assert (answer.headers["cache-control"], answer.headers["etag"]) == (IMMUTABLE, f'"{small.digest}"')
    assert answer.body == small.read(0, 10)
