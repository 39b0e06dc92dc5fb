"""Readers do not disturb a fill, and a fill serves all its readers."""

from __future__ import annotations

import threading

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

GIB = 1024 * MIB
ALONE = 'prefetch = "off"\nconnections = 1'


def test_a_slow_reader_slows_nobody(site: MirrorSite) -> None:
    """While one client reads nothing, the fill completes, and other clients get the whole blob. Then the slow client
    gets it as well."""
    site.start(1000, 16 * MIB, settings='prefetch = "off"')
    site.inspect()
    hold = threading.Event()
    slow = [site.get(worker=pid, hold=hold).answered() for pid in site.server.worker_pids()]
    for pid in site.server.worker_pids():
        assert site.get(worker=pid).ended().body == site.blob
    site.hub.refuse()
    assert [len(reader.body) for reader in slow] == [0, 0]
    hold.set()
    for reader in slow:
        assert reader.ended().body == site.blob
    assert repeated(site.hub.sent(site.digest)) == []


def test_a_reader_that_leaves_takes_nothing_along(site: MirrorSite) -> None:
    """If a reader disconnects, the fill continues for the others, at its own worker and at the other one."""
    site.start(settings=ALONE)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    first = site.get().reached(MIB)
    readers = [site.get(worker=pid).reached(MIB) for pid in site.server.worker_pids()]
    first.leave()
    site.hub.release()
    for reader in readers:
        assert reader.ended().body == site.blob
    assert repeated(site.hub.sent(site.digest)) == []


def test_a_blob_whose_only_reader_leaves(site: MirrorSite) -> None:
    """If the only reader disconnects, the blob is fetched to its end and stored."""
    site.start(settings=ALONE)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    site.get().reached(MIB).leave()
    site.hub.release()
    wait_until(lambda: any("/blobs/" in path for path in site.kept()), "the blob is not kept")
    site.hub.refuse()
    assert site.get().ended().body == site.blob
    assert repeated(site.hub.sent(site.digest)) == []


def test_headers_of_a_huge_blob_come_at_once(site: MirrorSite) -> None:
    """The headers and first bytes of a 1 GiB blob that is not stored arrive when the upstream has sent only a little of
    it. A HEAD fetches nothing."""
    site.start(1000, GIB, settings='prefetch = "off"', rate=MIB)
    site.inspect()
    head = site.http.head(site.path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(GIB))
    assert site.hub.sent(site.digest) == []
    worker = site.server.worker_pids()[0]
    reader = site.get(worker=worker).answered()
    assert (reader.status, reader.headers["content-length"]) == (200, str(GIB))
    assert reader.headers["docker-content-digest"] == site.digest
    assert sum(stop - start for start, stop in site.hub.sent(site.digest)) < GIB // 64
    assert reader.reached(100).body[:100] == site.image.layers[-1].read(0, 100)
    middle = site.get(span=f"{GIB // 2}-{GIB // 2 + 99}", worker=worker).ended()
    assert (middle.status, bytes(middle.body)) == (206, site.image.layers[-1].read(GIB // 2, GIB // 2 + 100))
    assert sum(stop - start for start, stop in site.hub.sent(site.digest)) < GIB // 16
    reader.leave()


SPANS = ["0-0", "1000000-1999999", f"{SIZE - 10}-", "-1000", f"0-{SIZE - 1}"]


def test_ranges_of_what_is_not_here(site: MirrorSite) -> None:
    """A range of a blob that is not stored gets 206 with the right bytes. If the whole blob is requested next, no byte
    is fetched twice."""
    site.start(*(SIZE - place for place in range(len(SPANS))), settings='prefetch = "off"')
    site.inspect()
    for layer, span in zip(site.image.layers, SPANS, strict=True):
        path = f"/v2/{REPO}/blobs/{layer.digest}"
        answer = site.get(path, span).ended()
        start, stop = bounds(span, layer.size)
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{layer.size}")
        assert answer.body == layer.read(start, stop)
        assert site.get(path).ended().body == layer.read()
        assert repeated(site.hub.sent(layer.digest)) == []


def bounds(span: str, size: int) -> tuple[int, int]:
    first, _, last = span.partition("-")
    if not first:
        return size - int(last), size
    return int(first), min(int(last) + 1, size) if last else size


def test_ranges_of_what_is_on_its_way(site: MirrorSite) -> None:
    """At both workers, stored bytes are sent while the upstream delays the rest. The rest is sent when it arrives."""
    site.start(settings=ALONE)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    whole = site.get().reached(MIB)
    workers = site.server.worker_pids()
    for pid in workers:
        here = site.get(span="1000-1999", worker=pid).ended()
        assert (here.status, bytes(here.body)) == (206, site.blob[1000:2000])
    later = [site.get(span=f"{2 * MIB}-{2 * MIB + 999}", worker=pid).answered() for pid in workers]
    last = [site.get(span="-1000", worker=pid).answered() for pid in workers]
    across = [site.get(span=f"{MIB // 2}-{2 * MIB - 1}", worker=pid).reached(MIB // 4) for pid in workers]
    assert [len(each.body) for each in (*later, *last)] == [0] * 4
    site.hub.release()
    for each in later:
        assert (each.ended().status, bytes(each.body)) == (206, site.blob[2 * MIB : 2 * MIB + 1000])
    for each in last:
        assert (each.ended().status, bytes(each.body)) == (206, site.blob[-1000:])
    for each in across:
        assert (each.ended().status, bytes(each.body)) == (206, site.blob[MIB // 2 : 2 * MIB])
    assert whole.ended().body == site.blob
    assert union(site.hub.sent(site.digest)) == [(0, SIZE)]
    assert repeated(site.hub.sent(site.digest)) == []
    beyond = site.get(span=f"{SIZE}-").ended()
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{SIZE}")
