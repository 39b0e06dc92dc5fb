"""Tests of a mirror whose connections to the upstream break, stall or cannot be opened."""

from __future__ import annotations

import time

import pytest

from registry.upstream.request_limits import REQUEST_TIMEOUT_SECONDS
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import REPO, SIZE, BackgroundGet, MirrorSite, wait_until

DOCKER_TIMEOUT_SECONDS = 15
"""docker gives up a mirror that has not responded after this time."""
# Settings of the upstream with a short timeout for connections without data. A machine that stalls for this time lets a
# request fail as well, so tests that need a response repeat the request.
QUICK_TIMEOUT = 'prefetch = "off"\nidle_timeout = "400ms"'


def wait_for_manifest(site: MirrorSite) -> None:
    """Gets the manifest from the mirror, as a client does at the start of a pull."""
    wait_until(lambda: site.http.get(f"/v2/{REPO}/manifests/1").status_code == 200, "the manifest is not served")


def get_blob(site: MirrorSite) -> BackgroundGet:
    """Gets the blob from the mirror, and returns the first response other than 504."""
    responses = [site.get().wait_for_end()]
    while responses[-1].status == 504 and len(responses) < 20:
        responses.append(site.get().wait_for_end())
    return responses[-1]


@pytest.mark.parametrize(("size", "reset"), [(SIZE, False), (SIZE, True), (12 * MIB, True)])
def test_download_continues_after_dropped_connections(site: MirrorSite, size: int, reset: bool) -> None:
    """After a broken connection, the download continues at the next byte. The client notices nothing, and no byte is
    sent twice."""
    site.start(1000, size, settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, drop_after=300_000, reset=reset, times=3)
    assert site.get().wait_for_end().body == site.blob
    assert site.hub.faults == 0
    assert [request.end for request in site.hub.requests("blob")].count("dropped") == 3
    assert repeated(site.hub.sent_ranges(site.digest)) == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, size)]


def test_stalled_blob_response_is_resumed(site: MirrorSite) -> None:
    """If a response stalls in the middle of a blob, the mirror closes the connection after the idle timeout and
    requests the rest of the blob."""
    site.start(settings=QUICK_TIMEOUT)
    wait_for_manifest(site)
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    assert get_blob(site).body == site.blob
    # The mirror has received all bytes of the stalled response, and of those that were sent completely.
    responses = site.hub.requests("blob", digest=site.digest)
    assert repeated(each.interval for each in responses if each.sent == MIB or each.end == "whole") == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, SIZE)]


def test_upstream_without_range_support(site: MirrorSite) -> None:
    """If the upstream does not support Range, the mirror fetches each blob as a whole and serves ranges from it. After
    a broken connection, the mirror fetches the blob from its start again, and the pull succeeds."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"', ranges=False)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, drop_after=5 * MIB)
    part = site.get(span="11000000-11999999").wait_for_end()
    assert (part.status, bytes(part.body)) == (206, site.blob[11000000:12000000])
    assert site.get().wait_for_end().body == site.blob
    assert site.hub.count("blob", digest=site.digest) == 2


def test_upstream_without_content_length(site: MirrorSite) -> None:
    """If the upstream sends no Content-Length and marks the end of a body by closing the connection, manifests and
    blobs can still be pulled."""
    site.start(lengths=False)
    assert site.get_manifest().content == site.image.body
    for digest, blob in site.image.blobs.items():
        assert site.get(f"/v2/{REPO}/blobs/{digest}").wait_for_end().body == blob.read()


@pytest.mark.parametrize("status", [500, 503])
def test_uncached_content_gets_502_while_the_upstream_fails(site: MirrorSite, status: int) -> None:
    """While the upstream answers with 5xx, each request for content that is not cached gets 502 within 10 s."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="any", method="", status=status, times=None)
    started = time.monotonic()
    readers = [site.get(f"/v2/{REPO}/manifests/none"), site.get(), site.get(span="-10")]
    for reader in readers:
        assert reader.wait_for_end().status == 502
        assert b'"UNAVAILABLE"' in reader.body
    assert time.monotonic() - started < 10


def test_one_failed_blob_request_is_retried(site: MirrorSite) -> None:
    """If the upstream answers one request for a blob with 503, the mirror retries it, and the client gets the blob."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="redirect", match=site.digest_hex, status=503)
    assert site.get().wait_for_end().body == site.blob


def test_silent_upstream_gives_504_before_docker_times_out(site: MirrorSite) -> None:
    """If the upstream accepts requests but never responds, each request that depends on it gets 504 after
    `REQUEST_TIMEOUT_SECONDS`, before docker times out. The idle timeout of the mirror does not matter: here it is one
    hour."""
    assert REQUEST_TIMEOUT_SECONDS < DOCKER_TIMEOUT_SECONDS
    site.start(settings='prefetch = "off"\nidle_timeout = "1h"')
    site.hub.fault(on="any", method="", stall=True, times=None)
    paths = ["manifests/1", f"manifests/{site.image.digest}", f"blobs/{site.digest}", "tags/list"]
    readers = [site.get(f"/v2/{REPO}/{path}", worker=pid) for path in paths for pid in site.server.worker_pids()]
    for reader in readers:
        assert reader.wait_for_end().status == 504, reader.body
    site.hub.clear()
    site.hub.release()  # otherwise the server would wait at its shutdown for the open upstream requests


def test_blob_response_without_headers_gets_504(site: MirrorSite) -> None:
    """If the upstream does not start to send a blob within the idle timeout, clients of both workers get 504. Once the
    upstream responds again, the next request gets the blob."""
    site.start(settings=QUICK_TIMEOUT)
    wait_for_manifest(site)
    site.hub.fault(on="any", method="", stall=True, times=None)
    readers = [site.get(span=span, worker=pid) for span in ("", "-10") for pid in site.server.worker_pids()]
    for reader in readers:
        assert reader.wait_for_end().status == 504
        assert b'"UNAVAILABLE"' in reader.body
    site.hub.clear()
    site.hub.release()
    assert get_blob(site).body == site.blob


def test_readers_wait_until_the_upstream_is_back(site: MirrorSite) -> None:
    """The only endpoint of the upstream refuses connections until the mirror's circuit breaker opens. Clients that have
    received a part of a blob keep waiting at every worker, and get the whole blob once the endpoint accepts connections
    again."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    readers = [site.get(worker=pid).wait_for_bytes(MIB) for pid in site.server.worker_pids()]
    site.hub.refuse()
    wait_until(lambda: "the mirror sends it no requests" in site.server.log_text(), "the endpoint is not given up")
    site.hub.listen()
    for reader in readers:
        assert reader.wait_for_end().body == site.blob
    assert union(site.hub.sent_ranges(site.digest)) == [(0, 12 * MIB)]


def test_piece_of_a_stalled_connection_is_fetched_over_another_one(site: MirrorSite) -> None:
    """The mirror fetches the pieces of a blob over several connections, and one of them stalls. When all other pieces
    are stored, the mirror fetches the rest of the stalled piece over another connection, without waiting for the idle
    timeout. No byte is sent twice."""
    site.start(1000, 24 * MIB, settings='prefetch = "off"\nidle_timeout = "1h"', rate=4 * MIB)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    assert site.get().wait_for_end().body == site.blob
    assert repeated(site.hub.sent_ranges(site.digest)) == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, 24 * MIB)]


def test_whole_blob_is_requested_if_ranges_are_refused(site: MirrorSite) -> None:
    """If the upstream answers a Range request with an error, the mirror requests the whole blob."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, status=416, times=2)
    assert site.get().wait_for_end().body == site.blob


def test_second_endpoint_is_used_if_the_first_fails(site: MirrorSite) -> None:
    """If one endpoint of the upstream fails, the mirror uses the next endpoint, even in the middle of a blob."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"\nconnections = 1', endpoints=2)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    reader = site.get().wait_for_bytes(MIB)
    site.hub.refuse()
    assert reader.wait_for_end().body == site.blob
    assert site.get_manifest("latest").content == site.image.body
    sent_intervals = [*site.hub.sent_ranges(site.digest), *site.other.sent_ranges(site.digest)]
    assert repeated(sent_intervals) == []
    assert union(sent_intervals) == [(0, 12 * MIB)]
