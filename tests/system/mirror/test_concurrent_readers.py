"""Tests of several clients that read a blob during its fill, which is the download of the blob from the upstream into
the mirror's cache."""

from __future__ import annotations

import threading

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

GIB = 1024 * MIB
# Settings of the upstream with which the mirror downloads each blob over one connection.
ONE_CONNECTION = 'prefetch = "off"\nconnections = 1'


def test_slow_reader_does_not_delay_the_fill(site: MirrorSite) -> None:
    """While one client of each worker reads nothing from its connection, the fill completes, and other clients get the
    whole blob. When the slow clients read again, they get the whole blob too."""
    site.start(1000, 16 * MIB, settings='prefetch = "off"')
    site.get_manifest()
    may_read = threading.Event()
    slow_readers = [site.get(worker=pid, hold=may_read).wait_for_headers() for pid in site.server.worker_pids()]
    for pid in site.server.worker_pids():
        assert site.get(worker=pid).wait_for_end().body == site.blob
    site.hub.refuse()
    assert [len(reader.body) for reader in slow_readers] == [0, 0]
    may_read.set()
    for reader in slow_readers:
        assert reader.wait_for_end().body == site.blob
    assert repeated(site.hub.sent_ranges(site.digest)) == []


def test_fill_continues_for_other_readers_after_a_disconnect(site: MirrorSite) -> None:
    """If the client that started a fill disconnects, the fill continues for the remaining clients of both workers."""
    site.start(settings=ONE_CONNECTION)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    first = site.get().wait_for_bytes(MIB)
    readers = [site.get(worker=pid).wait_for_bytes(MIB) for pid in site.server.worker_pids()]
    first.leave()
    site.hub.release()
    for reader in readers:
        assert reader.wait_for_end().body == site.blob
    assert repeated(site.hub.sent_ranges(site.digest)) == []


def test_fill_completes_after_its_only_reader_disconnects(site: MirrorSite) -> None:
    """If the only client disconnects, the mirror still downloads the rest of the blob and stores it."""
    site.start(settings=ONE_CONNECTION)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    site.get().wait_for_bytes(MIB).leave()
    site.hub.release()
    wait_until(lambda: any("/blobs/" in path for path in site.stored_files()), "the blob is not kept")
    site.hub.refuse()
    assert site.get().wait_for_end().body == site.blob
    assert repeated(site.hub.sent_ranges(site.digest)) == []


def test_headers_of_a_huge_blob_are_sent_early(site: MirrorSite) -> None:
    """A client requests a 1 GiB blob that is not stored. Its headers, its first bytes and a range in its middle arrive
    after the upstream has sent only a small part of it. A HEAD request downloads nothing."""
    site.start(1000, GIB, settings='prefetch = "off"', rate=MIB // 8)
    site.get_manifest()
    head = site.http.head(site.path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(GIB))
    assert site.hub.sent_ranges(site.digest) == []
    worker = site.server.worker_pids()[0]
    reader = site.get(worker=worker).wait_for_headers()
    assert (reader.status, reader.headers["content-length"]) == (200, str(GIB))
    assert reader.headers["docker-content-digest"] == site.digest
    assert sum(stop - start for start, stop in site.hub.sent_ranges(site.digest)) < GIB // 64
    assert reader.wait_for_bytes(100).body[:100] == site.image.layers[-1].read(0, 100)
    middle = site.get(span=f"{GIB // 2}-{GIB // 2 + 99}", worker=worker).wait_for_end()
    assert (middle.status, bytes(middle.body)) == (206, site.image.layers[-1].read(GIB // 2, GIB // 2 + 100))
    assert sum(stop - start for start, stop in site.hub.sent_ranges(site.digest)) < GIB // 16
    reader.leave()


RANGES = ["0-0", "1000000-1999999", f"{SIZE - 10}-", "-1000", f"0-{SIZE - 1}"]


def test_ranges_of_blobs_that_are_not_stored(site: MirrorSite) -> None:
    """A Range request for a blob that is not stored gets 206 with the right bytes. If the client then requests the
    whole blob, the mirror fetches no byte twice."""
    site.start(*(SIZE - number for number in range(len(RANGES))), settings='prefetch = "off"')
    site.get_manifest()
    for layer, span in zip(site.image.layers, RANGES, strict=True):
        path = f"/v2/{REPO}/blobs/{layer.digest}"
        answer = site.get(path, span).wait_for_end()
        start, stop = bounds(span, layer.size)
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{layer.size}")
        assert answer.body == layer.read(start, stop)
        assert site.get(path).wait_for_end().body == layer.read()
        assert repeated(site.hub.sent_ranges(layer.digest)) == []


def bounds(span: str, size: int) -> tuple[int, int]:
    """Returns the first byte's offset, and the offset after the last byte, of a range as in `bytes=SPAN`."""
    first, _, last = span.partition("-")
    if not first:
        return size - int(last), size
    return int(first), min(int(last) + 1, size) if last else size


def test_ranges_of_a_partly_stored_blob(site: MirrorSite) -> None:
    """While the upstream holds back the rest of a blob, both workers send the stored bytes of a requested range. They
    send the remaining bytes as soon as the upstream has sent them."""
    site.start(settings=ONE_CONNECTION)
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
    whole_blob = site.get().wait_for_bytes(MIB)
    workers = site.server.worker_pids()
    for pid in workers:
        stored = site.get(span="1000-1999", worker=pid).wait_for_end()
        assert (stored.status, bytes(stored.body)) == (206, site.blob[1000:2000])
    missing = [site.get(span=f"{2 * MIB}-{2 * MIB + 999}", worker=pid).wait_for_headers() for pid in workers]
    suffixes = [site.get(span="-1000", worker=pid).wait_for_headers() for pid in workers]
    partly_stored = [site.get(span=f"{MIB // 2}-{2 * MIB - 1}", worker=pid).wait_for_bytes(MIB // 4) for pid in workers]
    assert [len(reader.body) for reader in (*missing, *suffixes)] == [0] * 4
    site.hub.release()
    for reader in missing:
        assert (reader.wait_for_end().status, bytes(reader.body)) == (206, site.blob[2 * MIB : 2 * MIB + 1000])
    for reader in suffixes:
        assert (reader.wait_for_end().status, bytes(reader.body)) == (206, site.blob[-1000:])
    for reader in partly_stored:
        assert (reader.wait_for_end().status, bytes(reader.body)) == (206, site.blob[MIB // 2 : 2 * MIB])
    assert whole_blob.wait_for_end().body == site.blob
    assert union(site.hub.sent_ranges(site.digest)) == [(0, SIZE)]
    assert repeated(site.hub.sent_ranges(site.digest)) == []
    past_the_end = site.get(span=f"{SIZE}-").wait_for_end()
    assert (past_the_end.status, past_the_end.headers["content-range"]) == (416, f"bytes */{SIZE}")
