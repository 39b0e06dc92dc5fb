"""Connections to the upstream that break, stall or cannot be made."""

from __future__ import annotations

import time

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

QUICK = 'prefetch = "off"\nidle_timeout = "400ms"'


@pytest.mark.parametrize(("size", "reset"), [(SIZE, False), (SIZE, True), (12 * MIB, True)])
def test_dropped_connections(site: MirrorSite, size: int, reset: bool) -> None:
    """After a broken connection, the download continues at the next byte. The client notices nothing, and no byte is
    sent twice."""
    site.start(1000, size, settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, drop_after=300_000, reset=reset, times=3)
    assert site.get().ended().body == site.blob
    assert site.hub.faults == 0
    assert [seen.end for seen in site.hub.requests("blob")].count("dropped") == 3
    assert repeated(site.hub.sent(site.digest)) == []
    assert union(site.hub.sent(site.digest)) == [(0, size)]


def test_an_answer_that_stalls(site: MirrorSite) -> None:
    """A response that stalls in the middle of a blob is ended after the idle timeout, and the rest is requested
    again."""
    site.start(settings=QUICK)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    assert site.get().ended().body == site.blob
    assert repeated(site.hub.sent(site.digest)) == []
    assert union(site.hub.sent(site.digest)) == [(0, SIZE)]


def test_an_upstream_without_ranges(site: MirrorSite) -> None:
    """Blobs are fetched completely, and ranges are served from them. After a broken connection, the blob is fetched
    from its start, and the pull succeeds."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"', ranges=False)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, drop_after=5 * MIB)
    part = site.get(span="11000000-11999999").ended()
    assert (part.status, bytes(part.body)) == (206, site.blob[11000000:12000000])
    assert site.get().ended().body == site.blob
    assert site.hub.count("blob", digest=site.digest) == 2


def test_an_upstream_without_lengths(site: MirrorSite) -> None:
    """Manifests and blobs without a length, which end with the connection, can be pulled."""
    site.start(lengths=False)
    assert site.inspect().content == site.image.body
    for digest, blob in site.image.blobs.items():
        assert site.get(f"/v2/{REPO}/blobs/{digest}").ended().body == blob.read()


@pytest.mark.parametrize("status", [500, 503])
def test_an_upstream_that_fails(site: MirrorSite, status: int) -> None:
    """A request for content that is not cached gets 502 within 10 s."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="any", method="", status=status, times=None)
    begun = time.monotonic()
    asked = [site.get(f"/v2/{REPO}/manifests/none"), site.get(), site.get(span="-10")]
    for each in asked:
        assert each.ended().status == 502
        assert b'"UNAVAILABLE"' in each.body
    assert time.monotonic() - begun < 10


def test_a_failure_that_passes(site: MirrorSite) -> None:
    """One bad response to the request for a blob is retried, so the client notices nothing."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="redirect", match=site.encoded, status=503)
    assert site.get().ended().body == site.blob


def test_an_upstream_that_says_nothing(site: MirrorSite) -> None:
    """Whatever the idle timeout is, each request that the upstream has to answer first gets 504 before docker gives up,
    which is after 15 s."""
    site.start(settings='prefetch = "off"\nidle_timeout = "1h"')
    site.hub.fault(on="any", method="", stall=True, times=None)
    begun = time.monotonic()
    paths = ["manifests/1", f"manifests/{site.image.digest}", f"blobs/{site.digest}", "tags/list"]
    asked = [site.get(f"/v2/{REPO}/{path}", worker=pid) for path in paths for pid in site.server.worker_pids()]
    for each in asked:
        assert each.ended().status == 504, each.body
    assert time.monotonic() - begun < 15
    site.hub.clear()
    site.hub.release()  # or the server waits for what it has under way before it ends


def test_a_blob_that_does_not_begin(site: MirrorSite) -> None:
    """A blob that does not begin gets 504 after the idle timeout, at both workers. The next request can succeed."""
    site.start(settings=QUICK)
    site.inspect()
    site.hub.fault(on="any", method="", stall=True, times=None)
    asked = [site.get(span=span, worker=pid) for span in ("", "-10") for pid in site.server.worker_pids()]
    for each in asked:
        assert each.ended().status == 504
        assert b'"UNAVAILABLE"' in each.body
    site.hub.clear()
    site.hub.release()
    assert site.get().ended().body == site.blob


def test_an_upstream_that_is_started_anew(site: MirrorSite) -> None:
    """The only endpoint refuses connections until its circuit breaker opens. Readers in the middle of a blob, at every
    worker, wait, and get the whole blob once the endpoint is back."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    readers = [site.get(worker=pid).reached(MIB) for pid in site.server.worker_pids()]
    site.hub.refuse()
    wait_until(lambda: "it is left alone for a moment" in site.server.log_text(), "the endpoint is not given up")
    site.hub.listen()
    for reader in readers:
        assert reader.ended().body == site.blob
    assert union(site.hub.sent(site.digest)) == [(0, 12 * MIB)]


def test_one_connection_that_stalls(site: MirrorSite) -> None:
    """Whatever the idle timeout is: when all other bytes are stored, the rest of the piece of a stalled connection is
    fetched over another one, and no byte twice."""
    site.start(1000, 24 * MIB, settings='prefetch = "off"\nidle_timeout = "1h"', rate=4 * MIB)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    assert site.get().ended().body == site.blob
    assert repeated(site.hub.sent(site.digest)) == []
    assert union(site.hub.sent(site.digest)) == [(0, 24 * MIB)]


def test_ranges_that_are_refused(site: MirrorSite) -> None:
    """An upstream that answers a Range with an error is asked for the whole blob."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, status=416, times=2)
    assert site.get().ended().body == site.blob


def test_an_endpoint_that_is_gone(site: MirrorSite) -> None:
    """If an endpoint fails, the next one is used, also in the middle of a blob."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"\nconnections = 1', endpoints=2)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    reader = site.get().reached(MIB)
    site.hub.refuse()
    assert reader.ended().body == site.blob
    assert site.inspect("latest").content == site.image.body
    both = [*site.hub.sent(site.digest), *site.other.sent(site.digest)]
    assert repeated(both) == []
    assert union(both) == [(0, 12 * MIB)]
