"""Tests of an upstream that sends corrupt bytes. The mirror never completes a response with such bytes, and stores none
of them."""

from __future__ import annotations

import time

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

MIN_PAUSE_SECONDS = 2
"""Time for which the mirror does not ask an endpoint for a blob after it has sent corrupt bytes twice."""
CORRUPT_OFFSETS = pytest.mark.parametrize("offset", [0, SIZE // 2, SIZE - 1], ids=["first", "middle", "last"])


@CORRUPT_OFFSETS
def test_corrupt_blob_is_cut_off_at_all_clients(site: MirrorSite, offset: int) -> None:
    """One byte of a blob is corrupt. Both workers close the connections of their clients before the last byte, for
    requests of the whole blob and of ranges. The blob is not stored, and the next request gets the right bytes."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, corrupt=offset, stall_after=MIB)
    workers = site.server.worker_pids()
    # These clients connect before the download ends. Clients that connect later would start a new download.
    readers = [site.get(worker=pid).wait_for_bytes(MIB) for pid in workers]
    readers += [
        site.get(span=span, worker=pid).wait_for_headers() for pid in workers for span in ("-1", "-1000", "100-")
    ]
    site.hub.release()
    for reader in readers:
        assert not reader.wait_for_end().is_complete
    wait_until(lambda: not site.stored_files(), "wrong bytes are kept")
    assert site.get().wait_for_end().body == site.blob
    assert site.get(span="-1000").wait_for_end().body == site.blob[-1000:]


def test_corrupt_byte_in_one_piece_of_a_large_blob(site: MirrorSite) -> None:
    """The mirror fetches a large blob in pieces over several connections. If one piece has a corrupt byte, the client
    is cut off before the last byte, and the next request gets the right bytes."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, corrupt=7 * MIB)
    assert not site.get().wait_for_end().is_complete
    wait_until(lambda: not site.stored_files(), "wrong bytes are kept")
    assert site.get().wait_for_end().body == site.blob


def test_next_endpoint_is_used_after_corrupt_bytes(site: MirrorSite) -> None:
    """If the first endpoint of the upstream sends corrupt bytes, a second request to either worker gets the blob from
    the next endpoint."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, corrupt=0, times=None)
    first, second = site.server.worker_pids()
    assert not site.get(worker=first).wait_for_end().is_complete
    assert site.get(worker=second).wait_for_end().body == site.blob
    assert site.get(worker=first).wait_for_end().body == site.blob
    assert union(site.other.sent_ranges(site.digest)) == [(0, SIZE)]


def test_small_blob_is_verified_before_it_is_served(site: MirrorSite) -> None:
    """The mirror verifies a small blob before it serves it. If the first endpoint sends a corrupt blob, the first
    request of the client already gets the right bytes from the next endpoint."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.get_manifest()
    digest = site.image.layers[0].digest
    site.hub.fault(on="blob", match=digest.partition(":")[2], corrupt=500, times=None)
    assert site.get(f"/v2/{REPO}/blobs/{digest}").wait_for_end().body == site.image.layers[0].read()


def test_corrupt_manifest_is_not_served(site: MirrorSite) -> None:
    """If the upstream sends a corrupt manifest, a request by tag or by digest gets 502. The next request gets the
    manifest if the upstream then sends the right bytes."""
    site.start(settings='prefetch = "off"')
    for reference in (site.image.digest, "1"):
        site.hub.fault(on="manifest", corrupt=20)
        answer = site.http.get(f"/v2/{REPO}/manifests/{reference}")
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")
        assert site.http.get(f"/v2/{REPO}/manifests/{reference}").content == site.image.body
        site.http.delete(f"/v2/{REPO}/manifests/{site.image.digest}")


def test_corrupt_manifest_is_fetched_from_the_next_endpoint(site: MirrorSite) -> None:
    """If the first endpoint sends a corrupt manifest, the mirror fetches the manifest from the second endpoint."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.hub.fault(on="manifest", corrupt=20, times=None)
    assert site.get_manifest().content == site.image.body
    assert site.count_requests("manifest", far=site.other) == 1


def error_lines(site: MirrorSite) -> list[str]:
    """Returns the error lines of the server's log."""
    return [line for line in site.server.log_text().splitlines() if " ERROR " in line]


def test_corrupt_bytes_are_logged_once(site: MirrorSite) -> None:
    """Eight clients of both workers are cut off because of corrupt bytes. The log has one error line with the endpoint,
    the repository and the digest, and no traceback."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, corrupt=5, stall_after=MIB)
    readers = [site.get(worker=pid).wait_for_bytes(MIB) for pid in site.server.worker_pids() for _ in range(4)]
    site.hub.release()
    for reader in readers:
        assert not reader.wait_for_end().is_complete
    site.server.stop()
    assert "Traceback" not in site.server.log_text()
    (line,) = error_lines(site)
    assert all(part in line for part in (site.hub.url, f"docker.io/{REPO}", site.digest)), line


def test_client_that_retries_at_once_gets_502_with_retry_after(site: MirrorSite) -> None:
    """A client that retries immediately after corrupt bytes gets 502 with Retry-After and a message that names the
    upstream and the digest. Until the retry time the mirror sends no request to the upstream. Soon after the upstream
    is repaired, the blob can be pulled."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, corrupt=5, times=None)
    cut_off_since = 0.0  # when the last request was sent whose response was cut off
    for attempt in range(1, 6):
        requests_before, asked_at = site.count_requests("blob"), time.monotonic()
        while (answer := site.get().wait_for_end()).status != 502:
            assert not answer.is_complete
            assert site.count_requests("blob") < requests_before + 5
            cut_off_since, asked_at = asked_at, time.monotonic()
        assert 1 <= int(answer.headers["retry-after"]) <= MIN_PAUSE_SECONDS**attempt + 1
        requests_sent = site.count_requests("blob")
        statuses = [site.get(worker=worker).wait_for_end().status for worker in site.server.worker_pids()]
        requests_after = site.count_requests("blob")
        if time.monotonic() - cut_off_since < MIN_PAUSE_SECONDS:
            break  # else the machine has stalled, so the retry time may have come; the next pause is twice as long
    assert answer.headers["cache-control"] == "no-store"
    text = answer.body.decode()
    assert all(part in text for part in ("docker.io", site.hub.url, site.digest, "entrepot mirror refresh")), text
    assert requests_sent - requests_before <= 2
    assert statuses == [502, 502]
    assert requests_after == requests_sent
    site.hub.clear()
    wait_until(lambda: site.get().wait_for_end().body == site.blob, "the right bytes")
